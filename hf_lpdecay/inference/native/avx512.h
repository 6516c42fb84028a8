// 32 weights at a time: VBMI2 puts as many packed values as a mask has bits in their places.
#pragma once
#include <immintrin.h>

#include "plain.h"

static inline __m512i expand(uint32_t mask, const void* values) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

// bfloat16: `a` has the even columns, `b` the odd ones (x lies in the same order). Else the first and the last 16.
static inline void place(uint32_t mask, const bf16* values, __m512& a, __m512& b) {
    __m512i w = expand(mask, values);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))));
}
static inline void place(uint32_t mask, const f16* values, __m512& a, __m512& b) {
    __m512i w = expand(mask, values);
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(w));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1));
}
static inline void place(uint32_t mask, const float* values, __m512& a, __m512& b) {
    a = _mm512_maskz_expand_ps(mask & 0xffff, _mm512_loadu_ps(values));
    b = _mm512_maskz_expand_ps(mask >> 16, _mm512_loadu_ps(values + __builtin_popcount(mask & 0xffff)));
}

// x: float, in the order of `place`, rows of a multiple of 64, zero behind the last column.
template <int N> static void avx512_bits(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint8_t* mask = layer.positions + row * mask_stride(layer);
        __m512 total[N][4];
        for (int i = 0; i < N; ++i)
            for (int c = 0; c < 4; ++c) total[i][c] = _mm512_setzero_ps();
        const int chains = N <= 4 ? 2 : 0;
        for (int64_t word = 0; 64 * word < layer.cols; ++word) {
            uint64_t bits = mask_word(mask, word, layer.cols);
            ahead(value, mask + 8 * word);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                uint32_t part = uint32_t(bits >> 32 * half);
                __m512 a, b;
                place(part, value, a, b);
                value += __builtin_popcount(part);
                const float* at = x + 64 * word + 32 * half;
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    __m512* sums = total[i] + half * chains;
                    sums[0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(at + i * call.stride), sums[0]);
                    sums[1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(at + i * call.stride + 16), sums[1]);
                }
            }
        }
        for (int i = 0; i < N; ++i) {
            __m512 all = _mm512_add_ps(_mm512_add_ps(total[i][0], total[i][1]), _mm512_add_ps(total[i][2], total[i][3]));
            put(call, i, row, _mm512_reduce_add_ps(all));
        }
    }
}

#ifdef __AVX512BF16__
// bfloat16 times bfloat16, two products and their sum in one instruction. x: bf16, natural order, padded to 64.
template <int N> static void avx512_dot(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const bf16* x = (const bf16*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint8_t* mask = layer.positions + row * mask_stride(layer);
        __m512 total[N][2];
        for (int i = 0; i < N; ++i) total[i][0] = total[i][1] = _mm512_setzero_ps();
        for (int64_t word = 0; 64 * word < layer.cols; ++word) {
            uint64_t bits = mask_word(mask, word, layer.cols);
            ahead(value, mask + 8 * word);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                uint32_t part = uint32_t(bits >> 32 * half);
                __m512bh w = (__m512bh)expand(part, value);
                value += __builtin_popcount(part);
                const bf16* at = x + 64 * word + 32 * half;
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i)
                    total[i][half] = _mm512_dpbf16_ps(total[i][half], w, (__m512bh)_mm512_loadu_si512(at + i * call.stride));
            }
        }
        for (int i = 0; i < N; ++i) put(call, i, row, _mm512_reduce_add_ps(_mm512_add_ps(total[i][0], total[i][1])));
    }
}
#endif

static inline __m512 widen16(__mmask16 mask, const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
static inline __m512 widen16(__mmask16 mask, const f16* x) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x)); }
static inline __m512 widen16(__mmask16 mask, const float* x) { return _mm512_maskz_loadu_ps(mask, x); }

// Columns, one row of x: float, natural order.
static void avx512_columns_1(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        __m512 total = _mm512_setzero_ps();
        for (int64_t left = layer.starts[row + 1] - layer.starts[row]; left > 0; left -= 16, value += 16, column += 16) {
            _mm_prefetch((const char*)value + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char*)column + AHEAD, _MM_HINT_T0);
            __mmask16 mask = left >= 16 ? 0xffff : (1 << left) - 1;
            __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, column));
            total = _mm512_fmadd_ps(widen16(mask, value), _mm512_i32gather_ps(at, x, 4), total);
        }
        put(call, 0, row, _mm512_reduce_add_ps(total));
    }
}

// Columns, up to 16 rows of x in the lanes. x: float, transposed, (cols, 16).
static void avx512_columns_16(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        int64_t k = 0, count = layer.starts[row + 1] - layer.starts[row];
        __m512 total[4];
        for (int c = 0; c < 4; ++c) total[c] = _mm512_setzero_ps();
        for (; k + 4 <= count; k += 4)
            {
            _mm_prefetch((const char*)(value + k) + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char*)(column + k) + AHEAD, _MM_HINT_T0);
            for (int c = 0; c < 4; ++c)
                total[c] = _mm512_fmadd_ps(_mm512_set1_ps(widen(value[k + c])), _mm512_loadu_ps(x + 16 * column[k + c]), total[c]);
        }
        for (; k < count; ++k)
            total[0] = _mm512_fmadd_ps(_mm512_set1_ps(widen(value[k])), _mm512_loadu_ps(x + 16 * column[k]), total[0]);
        float sums[16];
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
        for (int64_t i = 0; i < call.n; ++i) put(call, i, row, sums[i]);
    }
}

static inline void store_dense(uint32_t mask, const bf16* values, bf16* out, uint32_t keep) {
    _mm512_mask_storeu_epi16(out, keep, expand(mask, values));
}
static inline void store_dense(uint32_t mask, const f16* values, f16* out, uint32_t keep) {
    _mm512_mask_storeu_epi16(out, keep, expand(mask, values));
}
static inline void store_dense(uint32_t mask, const float* values, float* out, uint32_t keep) {
    __m512 a, b;
    place(mask, values, a, b);
    _mm512_mask_storeu_ps(out, keep & 0xffff, a);
    _mm512_mask_storeu_ps(out + 16, keep >> 16, b);
}
template <class Half> static inline void store_dense(uint32_t mask, const Half* values, float* out, uint32_t keep) {
    // In natural order: twice 16 at a time.
    for (int half = 0; half < 2; ++half) {
        uint32_t part = mask >> 16 * half & 0xffff;
        __m256i w = _mm256_maskz_expand_epi16(part, _mm256_loadu_si256((const __m256i*)values));
        alignas(32) Half spread[16];
        _mm256_store_si256((__m256i*)spread, w);
        _mm512_mask_storeu_ps(out + 16 * half, keep >> 16 * half, widen16(0xffff, spread));
        values += __builtin_popcount(part);
    }
}

template <class Out> static void avx512_decode(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    if (layer.columns) return plain_decode<Out>(call, begin, end);
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint8_t* mask = layer.positions + row * mask_stride(layer);
        Out* out = (Out*)call.y + row * layer.cols;
        for (int64_t word = 0; 64 * word < layer.cols; ++word) {
            uint64_t bits = mask_word(mask, word, layer.cols);
            uint64_t keep = layer.cols - 64 * word >= 64 ? ~uint64_t(0) : (uint64_t(1) << (layer.cols - 64 * word)) - 1;
            for (int half = 0; half < 2; ++half) {
                uint32_t part = uint32_t(bits >> 32 * half);
                store_dense(part, value, out + 64 * word + 32 * half, uint32_t(keep >> 32 * half));
                value += __builtin_popcount(part);
            }
        }
    }
}
