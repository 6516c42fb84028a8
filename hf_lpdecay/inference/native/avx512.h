// 32 weights at a time: VBMI2 puts as many packed values as a mask has bits in their places.
#pragma once
#include <immintrin.h>

#include "panels.h"

static inline __m512i expand(uint32_t mask, const void* values) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

// The values as they are: 16 bits each.
struct Halves {
    typedef __m512i W;
    static const int64_t WIDTH = 32, MOST = 8;
    template <class T> static W place(uint64_t bits, int step, const T*& values) {
        uint32_t mask = uint32_t(bits >> 32 * step);
        W w = expand(mask, values);
        values += __builtin_popcount(mask);
        return w;
    }
    static void store(W w, void* out) { _mm512_storeu_si512(out, w); }
};

struct Sums : Halves {
    static const int64_t LANES = 16;
    static constexpr bool far(int n) { return n > 2; }  // fewer rows of x: memory is the limit, and one stream the fastest
    typedef __m512 Sum;
    static Sum zero() { return _mm512_setzero_ps(); }
    // Of eight at once: a third of the instructions, which counts where rows are short.
    static void sums(const Sum* total, int count, float* out) {
        if (count < 4) {
            for (int i = 0; i < count; ++i) out[i] = _mm512_reduce_add_ps(total[i]);
            return;
        }
        __m256 half[8];
        for (int i = 0; i < 8; ++i) {
            const __m512 each = i < count ? total[i] : zero();
            half[i] = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
        }
        const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
        const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
        _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
    }
    static Sum scaled(float w, const float* x, Sum total) { return _mm512_fmadd_ps(_mm512_set1_ps(w), _mm512_loadu_ps(x), total); }
    static const int PANEL = 3, ACROSS = 8;
    static Sum load(const float* from) { return _mm512_load_ps(from); }
    static void store_sum(Sum sum, float* out) { _mm512_storeu_ps(out, sum); }
    static void transposed(const __m512i* rows, float* to, int64_t apart) {
        __m512i a[16], b[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
            b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
        }
        // b[4 * g + c]: of the rows 4 * g to 4 * g + 3 the columns c, c + 4, c + 8 and c + 12, one in each quarter.
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m512i low = _mm512_shuffle_i32x4(b[c], b[c + 4], 0x88), high = _mm512_shuffle_i32x4(b[c], b[c + 4], 0xdd);
            const __m512i low_2 = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0x88), high_2 = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0xdd);
            _mm512_store_si512(to + c * apart, _mm512_shuffle_i32x4(low, low_2, 0x88));
            _mm512_store_si512(to + (c + 4) * apart, _mm512_shuffle_i32x4(high, high_2, 0x88));
            _mm512_store_si512(to + (c + 8) * apart, _mm512_shuffle_i32x4(low, low_2, 0xdd));
            _mm512_store_si512(to + (c + 12) * apart, _mm512_shuffle_i32x4(high, high_2, 0xdd));
        }
    }
    static void all(float* out, const Sum* total) {
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
    }
};

#ifdef __AVX512BF16__
// bfloat16 times bfloat16, two products and their sum in one instruction.
struct Dots : Sums {
    typedef bf16 X;
    static const int64_t UNIT = 2;
    static constexpr int rows(int n) { return n > 6 ? 3 : 4; }
    static int64_t column(int64_t lane) { return lane; }
    static Sum broadcast(const X* pair) { return _mm512_castsi512_ps(_mm512_set1_epi32(pair_of(pair))); }
    static Sum dot(Sum w, Sum x, Sum total) { return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)x); }
    static int pair_of(const X* pair) { int bits; memcpy(&bits, pair, 4); return bits; }
    static Sum fma(W w, const X* x, Sum total) {
        return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
    }
};
#endif

// In float32. bfloat16: `a` has the even columns, `b` the odd ones. Else the first and the last 16.
struct Floats : Sums {
    typedef float X;
    struct W { __m512 a, b; };
    static const int64_t UNIT = 1;
    static constexpr int rows(int n) { return n > 4 ? 2 : 4; }
    static Sum broadcast(const X* x) { return _mm512_set1_ps(*x); }
    static Sum dot(Sum w, Sum x, Sum total) { return _mm512_fmadd_ps(w, x, total); }
    static void transposed(const W* rows, float* to, int64_t apart) {
        __m512i half[16];
        const int64_t second = column(16), step = (column(1) - column(0)) * apart;
        for (int i = 0; i < 16; ++i) half[i] = _mm512_castps_si512(rows[i].a);
        Sums::transposed(half, to, step);
        for (int i = 0; i < 16; ++i) half[i] = _mm512_castps_si512(rows[i].b);
        Sums::transposed(half, to + second * apart, step);
    }
    static int64_t column(int64_t lane) { return VALUE_IS == BF16 ? lane % 16 * 2 + lane / 16 : lane; }
    static W split(__m512i w, bf16) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))))};
    }
    static W split(__m512i w, f16) {
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
    }
    template <class T> static W place(uint64_t bits, int step, const T*& values) {
        return split(Halves::place(bits, step, values), T());
    }
    static W place(uint64_t bits, int step, const float*& values) {
        const float* first = values;
        uint32_t low = bits >> 32 * step & 0xffff, high = bits >> (32 * step + 16) & 0xffff;
        const float* second = first + __builtin_popcount(low);
        values = second + __builtin_popcount(high);
        return {_mm512_maskz_expand_ps(low, _mm512_loadu_ps(first)), _mm512_maskz_expand_ps(high, _mm512_loadu_ps(second))};
    }
    static Sum fma(W w, const X* x, Sum total) {
        total = _mm512_fmadd_ps(w.a, _mm512_loadu_ps(x), total);
        return _mm512_fmadd_ps(w.b, _mm512_loadu_ps(x + 16), total);
    }
    static void store(W w, float* out) {
        if (VALUE_IS == BF16) {
            const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            __m512 low = _mm512_permutex2var_ps(w.a, first, w.b);
            w.b = _mm512_permutex2var_ps(w.a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), w.b);
            w.a = low;
        }
        _mm512_storeu_ps(out, w.a);
        _mm512_storeu_ps(out + 16, w.b);
    }
};
