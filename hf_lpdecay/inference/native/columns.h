// Columns and values times rows of x.
#pragma once
#include "plain.h"

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
        put(call, 0, row, (total[0] + total[1]) + (total[2] + total[3]));
    }
}

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
        for (int64_t i = 0; i < call.n; ++i) put(call, i, row, sums[i]);
    }
}
