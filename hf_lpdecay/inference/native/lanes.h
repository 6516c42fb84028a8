// Eight weights at a time: AVX2 and NEON behind the same few functions. A table of 256 byte shuffles puts up to eight
// packed values in their places (an index with the highest bit set gives zero).
#pragma once
#include "panels.h"

#if defined(ISA_AVX2)
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#endif

#if defined(ISA_AVX2)
typedef __m256 lanes;
static inline lanes zero() { return _mm256_setzero_ps(); }
static inline lanes load(const float* x) { return _mm256_loadu_ps(x); }
static inline lanes broadcast(float x) { return _mm256_set1_ps(x); }
static inline lanes fma(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lanes add(lanes a, lanes b) { return _mm256_add_ps(a, b); }
static inline void store(float* x, lanes a) { _mm256_storeu_ps(x, a); }
#elif defined(ISA_NEON)
struct lanes { float32x4_t low, high; };
static inline lanes zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
static inline lanes load(const float* x) { return {vld1q_f32(x), vld1q_f32(x + 4)}; }
static inline lanes broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline lanes fma(lanes a, lanes b, lanes c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
static inline lanes add(lanes a, lanes b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
static inline void store(float* x, lanes a) { vst1q_f32(x, a.low); vst1q_f32(x + 4, a.high); }
#endif

// The sum of each of up to four.
static inline void sums(const lanes* total, int count, float* out) {
#if defined(ISA_AVX2)
    if (count > 1) {
        const lanes none = zero(), third = count > 2 ? total[2] : none, fourth = count > 3 ? total[3] : none;
        const lanes four = _mm256_hadd_ps(_mm256_hadd_ps(total[0], total[1]), _mm256_hadd_ps(third, fourth));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
        return;
    }
#endif
    for (int i = 0; i < count; ++i) {
        float x[8];
        store(x, total[i]);
        out[i] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
    }
}

// For each mask of eight bits 32 bytes: where the bytes of eight float32 come from.
struct Table {
    alignas(64) uint8_t at[256][32], count[256];
    Table() {
        for (int mask = 0; mask < 256; ++mask) {
            count[mask] = __builtin_popcount(mask);
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                bool set = mask >> lane & 1;
                for (int byte = 0; byte < 4; ++byte) at[mask][4 * lane + byte] = entry(set, rank, byte);
                rank += set;
            }
        }
    }
    static uint8_t entry(bool set, int rank, int byte) {
        if (!set) return 0x80;
        if (sizeof(VALUE) == 4) return ENTRY_FLOAT(rank, byte);
        // bfloat16 is the upper half of a float32; float16 is widened afterwards, from the lower half.
        bool bf = std::is_same<VALUE, bf16>::value;
        if (bf ? byte < 2 : byte >= 2) return 0x80;
        return 2 * rank + byte % 2;
    }
    static uint8_t ENTRY_FLOAT(int rank, int byte) {
#if defined(ISA_AVX2)
        return byte == 3 ? 0 : rank;  // a lane's number, and the highest bit clear
#else
        return 4 * rank + byte;
#endif
    }
};
static const Table table;

#if defined(ISA_AVX2)
static inline lanes place(const bf16* values, const uint8_t* at) {
    __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)at)));
}
static inline lanes place(const f16* values, const uint8_t* at) {
    __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    __m256i spread = _mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)at));
    __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(spread), _mm256_extracti128_si256(spread, 1));
    return _mm256_cvtph_ps(narrow);
}
static inline lanes place(const float* values, const uint8_t* at) {
    __m256i lane = _mm256_load_si256((const __m256i*)at);
    __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), spread);
}
#elif defined(ISA_NEON)
static inline lanes place(const bf16* values, const uint8_t* at) {
    uint8x16_t packed = vld1q_u8((const uint8_t*)values);
    return {vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(at))),
            vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(at + 16)))};
}
static inline lanes place(const f16* values, const uint8_t* at) {
    uint8x16_t packed = vld1q_u8((const uint8_t*)values);
    uint16x4_t low = vmovn_u32(vreinterpretq_u32_u8(vqtbl1q_u8(packed, vld1q_u8(at))));
    uint16x4_t high = vmovn_u32(vreinterpretq_u32_u8(vqtbl1q_u8(packed, vld1q_u8(at + 16))));
    return {vcvt_f32_f16(vreinterpret_f16_u16(low)), vcvt_f32_f16(vreinterpret_f16_u16(high))};
}
static inline lanes place(const float* values, const uint8_t* at) {
    uint8x16x2_t packed = {{vld1q_u8((const uint8_t*)values), vld1q_u8((const uint8_t*)values + 16)}};
    return {vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(at))),
            vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(at + 16)))};
}
#endif

#if defined(ISA_AVX2)
static inline void store_as(float* out, lanes a) { store(out, a); }
static inline void store_as(bf16* out, lanes a) {
    __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    _mm_storeu_si128((__m128i*)out, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
static inline void store_as(f16* out, lanes a) { _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(a, 0)); }
#else
static inline void store_as(float* out, lanes a) { store(out, a); }
static inline void store_as(bf16* out, lanes a) {
    vst1q_u16((uint16_t*)out, vcombine_u16(vshrn_n_u32(vreinterpretq_u32_f32(a.low), 16),
                                           vshrn_n_u32(vreinterpretq_u32_f32(a.high), 16)));
}
static inline void store_as(f16* out, lanes a) {
    vst1q_u16((uint16_t*)out, vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.low)),
                                           vreinterpret_u16_f16(vcvt_f16_f32(a.high))));
}
#endif

#if defined(ISA_AVX2)
// For each mask of eight bits 16 bytes: where the bytes of eight values of 16 bits come from.
struct HalfTable {
    alignas(64) uint8_t at[256][16];
    HalfTable() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                bool set = mask >> lane & 1;
                at[mask][2 * lane] = set ? 2 * rank : 0x80;
                at[mask][2 * lane + 1] = set ? 2 * rank + 1 : 0x80;
                rank += set;
            }
    }
};
static const HalfTable half_table;

// A byte of the mask, from bit SHIFT on, times 16. The compiler takes three instructions, and their number is the limit.
template <int SHIFT> static inline uint64_t entry(uint64_t bits) {
    uint64_t offset;
    asm("rorx %2, %1, %0\n\tand $0xff0, %k0" : "=&r"(offset) : "r"(bits), "i"((SHIFT - 4) & 63) : "cc");
    return offset;
}

// For one row of x: values of 16 bits, 16 at a time, each of which is widened for one product only. bfloat16: `a` has the
// even columns, `b` the odd ones. Else the first and the last eight.
struct Halves {
    typedef float X;
    struct W { __m256 a, b; };
    typedef __m256 Sum;
    static const int64_t WIDTH = 16, MOST = 1;
    static constexpr int rows(int) { return 4; }
    static constexpr bool far(int) { return true; }
    static int64_t column(int64_t lane) { return VALUE_IS == BF16 ? lane % 8 * 2 + lane / 8 : lane; }
    static W split(__m256i w, bf16) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000))))};
    }
    static W split(__m256i w, f16) {
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(w)), _mm256_cvtph_ps(_mm256_extracti128_si256(w, 1))};
    }
    static __m256i join(const void* low, const void* high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)), _mm_loadu_si128((const __m128i*)high), 1);
    }
    // 16 weights: the mask's bits from SHIFT on.
    template <int SHIFT, class T> static __m256i both(uint64_t bits, const T*& values) {
        const uint64_t low = entry<SHIFT>(bits), high = entry<SHIFT + 8>(bits);
        const T* second = values + __builtin_popcountll(low);
        const __m256i packed = join(values, second), at = join(half_table.at[0] + low, half_table.at[0] + high);
        values = second + __builtin_popcountll(high);
        return _mm256_shuffle_epi8(packed, at);
    }
    template <class T> static W place(uint64_t bits, int step, const T*& values) {
        switch (step) {
        case 0: return split(both<0>(bits, values), T());
        case 1: return split(both<16>(bits, values), T());
        case 2: return split(both<32>(bits, values), T());
        default: return split(both<48>(bits, values), T());
        }
    }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum fma(W w, const X* x, Sum total) {
        total = _mm256_fmadd_ps(w.a, _mm256_loadu_ps(x), total);
        return _mm256_fmadd_ps(w.b, _mm256_loadu_ps(x + 8), total);
    }
    static void sums(const Sum* total, int count, float* out) { ::sums(total, count, out); }
};
#endif

struct Lanes {
    typedef float X;
    typedef lanes W;
    typedef lanes Sum;
    static const int64_t WIDTH = 8, MOST = 4, LANES = 8;
    static constexpr int rows(int) { return 3; }
    static constexpr bool far(int) { return true; }
    static int64_t column(int64_t lane) { return lane; }
    static W place(uint64_t bits, int step, const VALUE*& values) {
        // The number of the entry times its size.
        const uint32_t offset = (step ? bits >> (8 * step - 5) : bits << 5) & 255 << 5;
        W w = ::place(values, table.at[0] + offset);
#if defined(ISA_AVX2)
        values += __builtin_popcount(offset);
#else
        values += table.count[offset >> 5];
#endif
        return w;
    }
    static Sum zero() { return ::zero(); }
    static Sum fma(W w, const X* x, Sum total) { return ::fma(w, ::load(x), total); }
    static void sums(const Sum* total, int count, float* out) { ::sums(total, count, out); }
    static Sum scaled(float w, const float* x, Sum total) { return ::fma(::broadcast(w), ::load(x), total); }
    static const int64_t UNIT = 1;
    static const int PANEL = 2, ACROSS = 6;
    static Sum load(const float* from) { return ::load(from); }
    static Sum broadcast(const X* x) { return ::broadcast(*x); }
    static Sum dot(Sum w, Sum x, Sum total) { return ::fma(w, x, total); }
    static void store_sum(Sum sum, float* out) { ::store(out, sum); }
    static void transposed(const W* rows, float* to, int64_t apart) {
        float from[LANES][LANES];
        for (int i = 0; i < LANES; ++i) ::store(from[i], rows[i]);
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < LANES; ++i) to[lane * apart + i] = from[i][lane];
    }
    static void all(float* out, const Sum* total) { ::store(out, add(add(total[0], total[1]), add(total[2], total[3]))); }
    template <class Out> static void store(W w, Out* out) { store_as(out, w); }
};
