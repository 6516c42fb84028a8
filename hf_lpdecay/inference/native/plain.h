// The plain loop: what every other kernel is tested against.
#pragma once
#include "common.h"

// x: float, natural order, rows of `cols`.
static void plain_rows(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row)
        for (int64_t i = 0; i < call.n; ++i) {
            float sum = 0;
            const VALUE* value = layer.values + layer.starts[row];
            if (layer.columns) {
                const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
                for (int64_t k = 0; k < layer.starts[row + 1] - layer.starts[row]; ++k)
                    sum += widen(value[k]) * x[i * layer.cols + column[k]];
            } else {
                const uint8_t* mask = layer.positions + row * mask_stride(layer);
                for (int64_t col = 0; col < layer.cols; ++col)
                    if (mask[col / 8] >> (col % 8) & 1) sum += widen(*value++) * x[i * layer.cols + col];
            }
            put(call, i, row, &sum, 1);
        }
}

template <class In, class Out> static inline void convert(In value, Out* out) { narrow(widen(value), out); }
template <class T> static inline void convert(T value, T* out) { *out = value; }

// Up to 64 dense entries; what follows the values that were taken.
template <class Out> static inline const VALUE* plain_word(uint64_t bits, const VALUE* value, Out* out, int64_t cols) {
    memset((void*)out, 0, (cols < 64 ? cols : 64) * sizeof(Out));
    for (; bits; bits &= bits - 1) convert(*value++, out + __builtin_ctzll(bits));
    return value;
}

// y: the dense rows [0, rows) of the layer.
template <class Out> static void plain_decode(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        Out* out = (Out*)call.y + row * layer.cols;
        if (layer.columns) {
            memset((void*)out, 0, layer.cols * sizeof(Out));
            const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
            for (int64_t k = 0; k < layer.starts[row + 1] - layer.starts[row]; ++k) convert(value[k], out + column[k]);
        } else {
            const uint8_t* mask = layer.positions + row * mask_stride(layer);
            for (int64_t word = 0; 64 * word < layer.cols; ++word)
                value = plain_word(mask_word(mask, word, layer.cols), value, out + 64 * word, layer.cols - 64 * word);
        }
    }
}
