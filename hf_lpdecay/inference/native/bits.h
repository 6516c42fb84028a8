// A bit mask and packed values times rows of x: one loop for all instruction sets.
//
// What an instruction set gives (`Ops`): WIDTH weights at a time, `place` (a step's values, taken, in their places),
// `fma` (times as many entries of one row of x), `sum`, `store` (dense), `column` (the order of x), MOST rows of x and
// `rows(n)` rows of the weight whose sums fit the registers together.
#pragma once
#include "plain.h"

// Of the weight: their values stay in the cache for all rows of x.
static const int64_t TILE_ROWS = 24;

// Outputs of R rows of the weight, of which those from `begin` to `end` are kept, for N of the `group` rows of x which
// lie together: for each `Ops::WIDTH` columns all of them.
template <class Ops, int R, int N>
static inline void bits_block(const Call& call, int64_t row, int64_t begin, int64_t end, int64_t first, const int64_t group) {
    const Layer& layer = *call.layer;
    const typename Ops::X* x = (const typename Ops::X*)call.x + first / Ops::MOST * Ops::MOST * padded(layer.cols) + first % Ops::MOST * Ops::WIDTH;
    const int64_t stride = mask_stride(layer);
    const uint8_t* mask = layer.positions + row * stride;
    // The processor's own prefetchers stop at the end of a page, which is soon reached.
    const int64_t later = layer.starts[row + 2 * R <= layer.rows ? row + R : row] - layer.starts[row];
    const VALUE* value[R];
    typename Ops::Sum sums[R][N];
    for (int r = 0; r < R; ++r) {
        value[r] = layer.values + layer.starts[row + r];
        for (int i = 0; i < N; ++i) sums[r][i] = Ops::zero();
    }
    for (int64_t word = 0; 64 * word < layer.cols; ++word) {
        uint64_t bits[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            bits[r] = mask_word(mask + r * stride, word, layer.cols);
            // With few rows of x the second cache is fast enough, and the first one's misses are the limit.
            __builtin_prefetch(value[r] + later, 0, N > 2 ? 3 : 2);
            __builtin_prefetch((const char*)(value[r] + later) + 64, 0, N > 2 ? 3 : 2);
            __builtin_prefetch(mask + (R + r) * stride + 8 * word, 0, N > 2 ? 3 : 2);
        }
#pragma GCC unroll 8
        for (int step = 0; step < 64 / Ops::WIDTH; ++step, x += group * Ops::WIDTH) {
            typename Ops::W w[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) w[r] = Ops::place(bits[r], step, value[r]);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sums[r][i] = Ops::fma(w[r], x + i * Ops::WIDTH, sums[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i)
            if (row + r >= begin && row + r < end) put(call, first + i, row + r, Ops::sum(sums[r][i]));
}

// For n rows of x, which N comes down to.
template <class Ops, int N> static void bits_rows(const Call& call, int64_t begin, int64_t end, int64_t first, int64_t n) {
    if constexpr (N > 1)
        if (n < N) return bits_rows<Ops, N - 1>(call, begin, end, first, n);
    const int R = Ops::rows(N);
    if (call.layer->rows < R) {
        for (; begin < end; ++begin)
            for (int i = 0; i < N; ++i) bits_block<Ops, 1, 1>(call, begin, begin, end, first + i, N);
        return;
    }
    for (; begin < end; begin += R) {
        const int64_t row = begin + R <= call.layer->rows ? begin : call.layer->rows - R;  // in the end, some a second time
        bits_block<Ops, R, N>(call, row, begin, end, first, N);
    }
}

// Rows of x from `first` on that lie together.
template <class Ops> static inline int64_t group_of(int64_t n, int64_t first) { return n - first < Ops::MOST ? n - first : Ops::MOST; }

template <class Ops> static void bits(Call& call, int64_t begin, int64_t end) {
    for (; begin < end; begin += TILE_ROWS) {
        const int64_t last = begin + TILE_ROWS < end ? begin + TILE_ROWS : end;
        for (int64_t first = 0; first < call.n; first += Ops::MOST)
            bits_rows<Ops, Ops::MOST>(call, begin, last, first, group_of<Ops>(call.n, first));
    }
}

// x in the order in which `bits` reads it.
template <class Ops, class In> static const void* packed(const In* x, int64_t n, int64_t cols) {
    typedef typename Ops::X X;
    const int64_t wide = padded(cols), width = Ops::WIDTH;
    if (std::is_same<X, In>::value && n == 1 && cols == wide && Ops::column(1) == 1) return x;
    X* out = scratch<X>(n * wide);
    for (int64_t i = 0; i < n; ++i, x += cols) {
        const int64_t first = i / Ops::MOST * Ops::MOST, step = group_of<Ops>(n, first) * width;
        X* to = out + first * wide + (i - first) * width;
        int64_t k = 0;
        for (; k + width <= cols; k += width, to += step)
            for (int lane = 0; lane < width; ++lane) convert(x[k + Ops::column(lane)], to + lane);
        for (; k < wide; k += width, to += step)
            for (int lane = 0; lane < width; ++lane) {
                int64_t col = k + Ops::column(lane);
                if (col < cols) convert(x[col], to + lane);
                else to[lane] = X();
            }
    }
    return out;
}

// y: the dense rows [0, rows) of the layer.
template <class Ops, class Out> static void bits_decode(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    if (layer.columns) return plain_decode<Out>(call, begin, end);
    for (; begin < end; ++begin) {
        const VALUE* value = layer.values + layer.starts[begin];
        const uint8_t* mask = layer.positions + begin * mask_stride(layer);
        Out* out = (Out*)call.y + begin * layer.cols;
        for (int64_t word = 0; 64 * word < layer.cols; ++word, out += 64) {
            const uint64_t bits = mask_word(mask, word, layer.cols);
            if (64 * (word + 1) > layer.cols) value = plain_word(bits, value, out, layer.cols - 64 * word);
            else
#pragma GCC unroll 8
                for (int step = 0; step < 64 / Ops::WIDTH; ++step) Ops::store(Ops::place(bits, step, value), out + Ops::WIDTH * step);
        }
    }
}
