// Columns and values times rows of x.
#pragma once
#include "plain.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) && !defined(ISA_PLAIN)
static inline __m256 wide(const float* value) { return _mm256_loadu_ps(value); }
static inline __m256 wide(const bf16* value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)value)), 16));
}
static inline __m256 wide(const f16* value) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)value)); }

// Four entries of x, put together by single loads: a gather takes half as long again on AMD, and far longer on Intel's
// processors with the remedy against Downfall.
static inline __m128 four(const float* x, const uint16_t* column) {
    uint64_t at;
    memcpy(&at, column, 8);
    return _mm_setr_ps(x[at & 0xffff], x[at >> 16 & 0xffff], x[at >> 32 & 0xffff], x[at >> 48]);
}

// One row of x: float, natural order. Eight values at a time.
static void columns_1(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        int64_t k = 0, count = layer.starts[row + 1] - layer.starts[row];
        __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (; k + 16 <= count; k += 16) {
            ahead(value + k);
            ahead(column + k);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const uint16_t* at = column + k + 8 * half;
                const __m256 given = _mm256_insertf128_ps(_mm256_castps128_ps256(four(x, at)), four(x, at + 4), 1);
                total[half] = _mm256_fmadd_ps(wide(value + k + 8 * half), given, total[half]);
            }
        }
        float sum = 0, sums[8];
        for (; k < count; ++k) sum += widen(value[k]) * x[column[k]];
        _mm256_storeu_ps(sums, _mm256_add_ps(total[0], total[1]));
        for (int c = 0; c < 8; ++c) sum += sums[c];
        put(call, 0, row, &sum, 1);
    }
}
#else
static const int64_t COLUMNS_PART = 1024;

// One row of x: float, natural order. Values are widened first, many at a time; then each takes three loads.
static void columns_1(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    float wide[COLUMNS_PART];
    for (int64_t row = begin; row < end; ++row) {
        float total[8] = {};
        for (int64_t first = layer.starts[row]; first < layer.starts[row + 1]; first += COLUMNS_PART) {
            const int64_t left = layer.starts[row + 1] - first, count = left < COLUMNS_PART ? left : COLUMNS_PART;
            const VALUE* value = layer.values + first;
            const uint16_t* column = (const uint16_t*)layer.positions + first;
            for (int64_t k = 0; k < count; ++k) wide[k] = widen(value[k]);
            int64_t k = 0;
            for (; k + 8 <= count; k += 8) {
                uint64_t four[2];
                memcpy(four, column + k, 16);
                ahead(value + k);
                ahead(column + k);
#pragma GCC unroll 8
                for (int c = 0; c < 8; ++c) total[c] += wide[k + c] * x[four[c / 4] >> 16 * (c % 4) & 0xffff];
            }
            for (; k < count; ++k) total[0] += wide[k] * x[column[k]];
        }
        for (int c = 0; c < 4; ++c) total[c] += total[c + 4];
        const float sum = (total[0] + total[1]) + (total[2] + total[3]);
        put(call, 0, row, &sum, 1);
    }
}
#endif

// Up to `Ops::LANES` rows of x beside each other. x: float, transposed, (cols, LANES).
template <class Ops> static void columns_many(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        int64_t k = 0, count = layer.starts[row + 1] - layer.starts[row];
        typename Ops::Sum total[4];
        for (int c = 0; c < 4; ++c) total[c] = Ops::zero();
        for (; k + 4 <= count; k += 4) {
            ahead(value + k);
            ahead(column + k);
            for (int c = 0; c < 4; ++c) total[c] = Ops::scaled(widen(value[k + c]), x + Ops::LANES * column[k + c], total[c]);
        }
        for (; k < count; ++k) total[0] = Ops::scaled(widen(value[k]), x + Ops::LANES * column[k], total[0]);
        float sums[Ops::LANES];
        Ops::all(sums, total);
        put(call, 0, row, sums, call.n);
    }
}
