// A bit mask and packed values times rows of x: one loop for all instruction sets.
//
// What an instruction set gives (`Ops`): WIDTH weights at a time, `place` (a step's values, taken, in their places),
// `fma` (times as many entries of one row of x), `sums` (of up to MOST vectors), `store` (dense), `column` (the order of x), MOST rows of x and
// `rows(n)` rows of the weight whose sums fit the registers together.
#pragma once
#include "plain.h"

// Of the weight, whose values stay in the cache for all rows of x.
static const int64_t TILE_ROWS = 24;
// From so many rows of x on panels.h is the faster way.
static const int64_t MANY = 16;
// Bytes to prefetch: the processor's own prefetchers stop at the end of a page, which is soon reached.
static const int64_t AHEAD = 1024;

// Outputs of R rows of the weight, `apart` rows from each other, for N of the `group` rows of x which lie together: for
// each `Ops::WIDTH` columns all of them.
template <class Ops, int R, int N>
static inline void bits_block(const Call& call, int64_t row, int64_t apart, int64_t first, const int64_t group) {
    const Layer& layer = *call.layer;
    const typename Ops::X* x = (const typename Ops::X*)call.x + first / Ops::MOST * Ops::MOST * padded(layer.cols) + first % Ops::MOST * Ops::WIDTH;
    const int64_t stride = mask_stride(layer);
    const uint8_t* mask = layer.positions + row * stride;
    // What is prefetched: of neighbours the next R rows, into the second cache; of rows that are far apart what follows.
    const bool far = Ops::far(N);
    const int64_t next = row + 2 * R <= layer.rows ? layer.starts[row + R] - layer.starts[row] : 0;
    const int64_t ahead = far ? AHEAD : next * int64_t(sizeof(VALUE)), mask_ahead = far ? AHEAD : R * stride;
    const int lines = far && sizeof(VALUE) == 2 ? 1 : 2;
    const VALUE* value[R];
    typename Ops::Sum sums[R][N];
    for (int r = 0; r < R; ++r) {
        value[r] = layer.values + layer.starts[row + r * apart];
        for (int i = 0; i < N; ++i) sums[r][i] = Ops::zero();
    }
    for (int64_t word = 0; 64 * word < layer.cols; ++word) {
        uint64_t bits[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint8_t* from = mask + r * apart * stride;
            bits[r] = mask_word(from, word, layer.cols);
            if (word % 8 == 0) __builtin_prefetch(from + 8 * word + mask_ahead, 0, far ? 3 : 2);
#pragma GCC unroll 2
            for (int line = 0; line < lines; ++line) __builtin_prefetch((const char*)value[r] + ahead + 64 * line, 0, far ? 3 : 2);
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
    for (int r = 0; r < R; ++r) {
        float y[8];
        Ops::sums(sums[r], N, y);
        put(call, first, row + r * apart, y, N);
    }
}

// For n rows of x, which N comes down to. The R rows of the weight are neighbours, or so far apart that each is followed
// by the one that is taken next: R long streams.
template <class Ops, int N> static void bits_rows(const Call& call, int64_t begin, int64_t end, int64_t first, int64_t n) {
    if constexpr (N > 1)
        if (n < N) return bits_rows<Ops, N - 1>(call, begin, end, first, n);
    const int R = Ops::rows(N);
    const int64_t count = end - begin;
    if (count < R) {
        for (int64_t row = 0; row < count; ++row)
            for (int i = 0; i < N; ++i) bits_block<Ops, 1, 1>(call, begin + row, 0, first + i, N);
        return;
    }
    const bool far = Ops::far(N);
    const int64_t apart = far ? count / R : 1, step = far ? 1 : R, last = count - 1 - (R - 1) * apart;
    for (int64_t next = 0; next < last + step; next += step) {  // in the end, some rows a second time
        const int64_t row = next < last ? next : last;
        bits_block<Ops, R, N>(call, begin + row, apart, first, N);
    }
}

// Rows of x from `first` on that lie together.
template <class Ops> static inline int64_t group_of(int64_t n, int64_t first) { return n - first < Ops::MOST ? n - first : Ops::MOST; }

template <class Ops> static void bits(Call& call, int64_t begin, int64_t end) {
    // A few rows of the weight at a time, whose values stay in the cache for all rows of x.
    const int64_t tile = call.n > Ops::MOST ? TILE_ROWS : end - begin;
    for (; begin < end; begin += tile)
        for (int64_t first = 0; first < call.n; first += Ops::MOST)
            bits_rows<Ops, Ops::MOST>(call, begin, begin + tile < end ? begin + tile : end, first, group_of<Ops>(call.n, first));
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
