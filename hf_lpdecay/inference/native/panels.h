// Many rows of x: a dense product. The weights of a few rows, a panel, are put in their places and transposed, and are
// then used for all rows of x from the cache.
//
// What an instruction set gives beside what bits.h names: vectors of LANES numbers of 32 bits (floats, or pairs of
// bfloat16: UNIT columns), `transposed`, `load`, `dot` (times one number of x), `store_sum`, and how many vectors of sums
// fit the registers: PANEL of the weight times ACROSS rows of x.
#pragma once
#include "bits.h"

// Rows of x that one thread takes at a time, with a panel: fewer where there would be too little to share.
static const int64_t MOST_ACROSS = 512, LEAST_ACROSS = 64;

// Of columns panels take long to be put in their places: passes of a few rows of x are faster up to so many rows, and
// always where fewer than one in FEW_VALUES weights is not zero.
static const int64_t MANY_FOR_COLUMNS = 64, FEW_VALUES = 8;

// Bytes to prefetch of a row while the others of its panel are in work.
static const int64_t NEAR = 256;
// Columns of the weight that are put in their places at a time: what the caches nearest to a core hold.
static const int64_t PANEL_COLS = 512;

struct ForPanel {};
struct ForDense {};
struct ForSums {};

static inline int64_t part_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Rows of the weight that are put in their places together, some columns at a time.
template <class Ops> struct Panel {
    static const int64_t LANES = Ops::LANES, MOST = Ops::PANEL * LANES;
    const Layer& layer;
    const int64_t row, count, groups, mask_ahead;
    // Cache lines of values for 64 columns.
    const int64_t lines;
    const VALUE* value[MOST];
    const uint16_t* column[MOST];
    // Where the next values are prefetched from: the rows that this thread is likely to take next.
    int64_t ahead[MOST];

    Panel(const Layer& layer, int64_t row, int64_t later) : layer(layer), row(row), count(layer.rows - row < MOST ? layer.rows - row : MOST),
            groups(part_of(count, LANES)), mask_ahead(later < layer.rows ? (later - row) * mask_stride(layer) : 0),
            lines((layer.starts[layer.rows] - layer.starts[0]) * int64_t(sizeof(VALUE)) / (layer.rows * padded(layer.cols)) + 1) {
        for (int64_t r = 0; r < MOST; ++r) {
            const int64_t own = r < count ? layer.starts[row + r] : 0;
            value[r] = layer.values + own;
            column[r] = (const uint16_t*)layer.positions + own;
            ahead[r] = r < count && later + r < layer.rows ? layer.starts[later + r] - own : 0;
        }
    }

    // For each unit of the columns [begin, end) `groups` vectors of LANES rows. Rows that there are not are zeros.
    void place(int64_t begin, int64_t end, float* panel) {
        for (int64_t group = 0; group < groups; ++group, panel += LANES)
            if (layer.columns) place_columns(group * LANES, begin, end, panel);
            else place_bits(group * LANES, begin, end, panel);
    }

  private:
    void place_bits(int64_t first, int64_t begin, int64_t end, float* panel) {
        const int64_t stride = mask_stride(layer);
        const uint8_t* mask = layer.positions + (row + first) * stride;
        for (; begin < end; begin += 64, panel += 64 / Ops::UNIT * groups * LANES) {
            typename Ops::W w[64 / Ops::WIDTH][LANES];
            for (int64_t r = 0; r < LANES; ++r) {
                const VALUE*& from = value[first + r];
                uint64_t bits = 0;
                if (first + r < count) {
                    bits = mask_word(mask + r * stride, begin / 64, layer.cols);
                    // What comes next, from the second cache or the third, and what the next panel needs, into these.
                    __builtin_prefetch((const char*)from + NEAR);
                    if (begin % 512 == 0) {
                        __builtin_prefetch(mask + r * stride + begin / 8 + 64);
                        __builtin_prefetch(mask + r * stride + begin / 8 + mask_ahead, 0, 2);
                    }
                    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch((const char*)(from + ahead[first + r]) + 64 * line, 0, 2);
                }
#pragma GCC unroll 8
                for (int step = 0; step < 64 / Ops::WIDTH; ++step) w[step][r] = Ops::place(bits, step, from);
            }
            transposed(w, panel);
        }
    }

    void place_columns(int64_t first, int64_t begin, int64_t end, float* panel) {
        VALUE* dense = scratch<VALUE, ForDense>(LANES * PANEL_COLS + 64);
        memset((void*)dense, 0, LANES * PANEL_COLS * sizeof(VALUE));
        for (int64_t r = 0; r < LANES && first + r < count; ++r) {
            const VALUE* last = layer.values + layer.starts[row + first + r + 1];
            const VALUE*& from = value[first + r];
            const uint16_t*& at = column[first + r];
            for (; from < last && *at < end; ++from, ++at) dense[r * PANEL_COLS + *at - begin] = *from;
        }
        for (int64_t k = 0; begin + k < end; k += 64, panel += 64 / Ops::UNIT * groups * LANES) {
            typename Ops::W w[64 / Ops::WIDTH][LANES];
            for (int64_t r = 0; r < LANES; ++r) {
                const VALUE* from = dense + r * PANEL_COLS + k;
                for (int step = 0; step < 64 / Ops::WIDTH; ++step) w[step][r] = Ops::place(~uint64_t(0), step, from);
            }
            transposed(w, panel);
        }
    }

    void transposed(const typename Ops::W (*w)[LANES], float* panel) const {
#pragma GCC unroll 8
        for (int step = 0; step < 64 / Ops::WIDTH; ++step)
            Ops::transposed(w[step], panel + Ops::WIDTH * step / Ops::UNIT * groups * LANES, groups * LANES);
    }
};

template <class Out> static inline void put_beside_as(const Call& call, int64_t i, int64_t row, const float* values, int64_t count) {
    const Out* bias = call.layer->bias ? (const Out*)call.layer->bias + row : nullptr;
    Out* out = (Out*)call.y + i * call.layer->rows + row;
    if (bias) for (int64_t r = 0; r < count; ++r) narrow(values[r] + widen(bias[r]), out + r);
    else for (int64_t r = 0; r < count; ++r) narrow(values[r], out + r);
}

// Outputs of one row of x for rows of the weight beside each other.
static inline void put_beside(const Call& call, int64_t i, int64_t row, const float* values, int64_t count) {
    switch (call.type) {
    case F32: return put_beside_as<float>(call, i, row, values, count);
    case BF16: return put_beside_as<bf16>(call, i, row, values, count);
    default: return put_beside_as<f16>(call, i, row, values, count);
    }
}

// Adds to the sums of N rows of x what `units` units of columns give.
template <class Ops, int R, int N> static inline void panel_block(const float* panel, int64_t units, const typename Ops::X* x, int64_t stride, float* to) {
    typename Ops::Sum sums[N][R];
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < R; ++r) sums[i][r] = Ops::load(to + (i * R + r) * Ops::LANES);
    for (int64_t k = 0; k < units; ++k, panel += R * Ops::LANES, x += Ops::UNIT) {
        typename Ops::Sum w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) w[r] = Ops::load(panel + r * Ops::LANES);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            const typename Ops::Sum one = Ops::broadcast(x + i * stride);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[i][r] = Ops::dot(w[r], one, sums[i][r]);
        }
    }
    for (int i = 0; i < N; ++i)
        for (int r = 0; r < R; ++r) Ops::store_sum(sums[i][r], to + (i * R + r) * Ops::LANES);
}

template <class Ops, int R, int N> static void panel_rows(const float* panel, int64_t units, const typename Ops::X* x, int64_t stride, int64_t n, float* sums) {
    for (; n >= N; n -= N, x += N * stride, sums += N * R * Ops::LANES) panel_block<Ops, R, N>(panel, units, x, stride, sums);
    if constexpr (N > 1)
        if (n) panel_rows<Ops, R, N - 1>(panel, units, x, stride, n, sums);
}

// `groups` comes down to R.
template <class Ops, int R> static void panel_times_x(int64_t groups, const float* panel, int64_t units, const typename Ops::X* x, int64_t stride, int64_t n, float* sums) {
    if constexpr (R > 1)
        if (groups < R) return panel_times_x<Ops, R - 1>(groups, panel, units, x, stride, n, sums);
    panel_rows<Ops, R, Ops::ACROSS>(panel, units, x, stride, n, sums);
}

// x: rows of `stride` in natural order. One task is a panel and up to `across` rows of x.
template <class Ops> static void panels(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const int64_t most = Panel<Ops>::MOST, number = part_of(layer.rows, most);
    float* placed = scratch<float, ForPanel>(most * PANEL_COLS / Ops::UNIT);
    float* sums = scratch<float, ForSums>(most * call.across);
    for (; begin < end; ++begin) {
        const int64_t first = begin / number * call.across, n = call.n - first < call.across ? call.n - first : call.across;
        Panel<Ops> panel(layer, begin % number * most, (begin + call.threads) % number * most);
        const int64_t wide = panel.groups * Ops::LANES;
        memset(sums, 0, n * wide * sizeof(float));
        for (int64_t col = 0; col < layer.cols; col += PANEL_COLS) {
            const int64_t last = layer.cols - col < PANEL_COLS ? layer.cols : col + PANEL_COLS;
            panel.place(col, last, placed);
            const typename Ops::X* x = (const typename Ops::X*)call.x + first * call.stride + col;
            panel_times_x<Ops, Ops::PANEL>(panel.groups, placed, part_of(last - col, Ops::UNIT), x, call.stride, n, sums);
        }
        for (int64_t i = 0; i < n; ++i) put_beside(call, first + i, panel.row, sums + i * wide, panel.count);
    }
}

template <class Ops> static void run_panels(Call& call, int64_t threads, Parallel parallel) {
    const int64_t number = part_of(call.layer->rows, Panel<Ops>::MOST);
    call.across = MOST_ACROSS;
    while (call.across > LEAST_ACROSS && number * part_of(call.n, call.across) < 2 * threads) call.across /= 2;
    call.work = panels<Ops>, call.count = number * part_of(call.n, call.across), call.chunk = 1;
    start(call, threads, parallel);
}
