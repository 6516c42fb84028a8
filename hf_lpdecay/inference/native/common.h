// What the kernels of all instruction sets share: the types, the arguments of a call, and its threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
enum Type : int64_t { F32, BF16, F16 };

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
static inline float widen(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent's bias is 112 less; the multiplication also puts subnormal numbers right.
    return as_float(sign | as_bits(as_float(rest << 13) * 5.192296858534828e33f));
}

static inline void narrow(float x, float* y) { *y = x; }
static inline void narrow(float x, bf16* y) {
    uint32_t bits = as_bits(x);
    y->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : (bits >> 16 | 0x40);
}
static inline void narrow(float x, f16* y) {
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t out;
    if (size > 0x7f800000) out = 0x7e00;
    else if (size >= 0x477ff000) out = 0x7c00;  // 65520 and more
    else if (size < 0x38800000) out = as_bits(as_float(size) + 0.5f) - 0x3f000000;  // the addition rounds
    else out = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    y->bits = sign | out;
}

// A linear layer: kernels.py's _LAYER.
struct Layer {
    // Bits: one per weight, rows padded to bytes, lowest bit first. Columns: uint16 for each value.
    // Readable for 64 bytes past the end, as the values are.
    const uint8_t* positions;
    const VALUE* values;
    const int64_t* starts;  // rows + 1: where a row's values begin
    const void* bias;       // of the activations' type, or null
    int64_t rows, cols;
    int64_t columns;  // 1: positions are columns, 0: bits
};

struct Call {
    const Layer* layer;
    const void* x;  // as `Prepared` says
    int64_t stride; // elements from one row of x to the next
    void* y;        // (n, rows)
    int64_t n;
    int64_t type;   // of y and bias
    void (*work)(Call&, int64_t, int64_t);
    int64_t count, chunk;  // what the threads share, and what one takes at a time: rows of the weight, or panels.h's tasks
    int64_t across, threads;  // panels.h: rows of x of a task
    std::atomic<int64_t> next;
};

// Outputs of one row of the weight for `count` rows of x from `first` on.
template <class Out> static inline void put_as(const Call& call, int64_t first, int64_t row, const float* values, int64_t count) {
    const Layer& layer = *call.layer;
    const float bias = layer.bias ? widen(((const Out*)layer.bias)[row]) : 0;
    Out* out = (Out*)call.y + first * layer.rows + row;
    for (int64_t i = 0; i < count; ++i, out += layer.rows) narrow(layer.bias ? values[i] + bias : values[i], out);
}

static inline void put(const Call& call, int64_t first, int64_t row, const float* values, int64_t count) {
    switch (call.type) {
    case F32: return put_as<float>(call, first, row, values, count);
    case BF16: return put_as<bf16>(call, first, row, values, count);
    default: return put_as<f16>(call, first, row, values, count);
    }
}

// Bytes [8 * word, 8 * word + 8) of a row's mask, without the bits behind its last column.
static inline uint64_t mask_word(const uint8_t* row, int64_t word, int64_t cols) {
    uint64_t bits;
    memcpy(&bits, row + 8 * word, 8);
    int64_t left = cols - 64 * word;
    return left >= 64 ? bits : bits & ((uint64_t(1) << left) - 1);
}

static inline int64_t mask_stride(const Layer& layer) { return (layer.cols + 7) / 8; }
static inline int64_t padded(int64_t cols) { return (cols + 63) / 64 * 64; }

// The processor's own prefetchers stop at the end of a page, which is soon reached.
static inline void ahead(const void* from) { __builtin_prefetch((const char*)from + 4096); }

struct ForX {};

// Where something lies while a thread's call is at work.
template <class T, class Use = ForX> static T* scratch(int64_t count) {
    static thread_local std::vector<char> buffer;
    if (int64_t(buffer.size()) < count * int64_t(sizeof(T)) + 64) buffer.resize(count * sizeof(T) + 64);
    return (T*)((uintptr_t(buffer.data()) + 63) / 64 * 64);
}

// Calls `f` with x as what it is.
template <class F> static const void* of_type(const void* x, int64_t type, F f) {
    switch (type) {
    case F32: return f((const float*)x);
    case BF16: return f((const bf16*)x);
    default: return f((const f16*)x);
    }
}

// The threads are those of torch's own OpenMP runtime (a second pool would wait for the same cores): kernels.py passes its GOMP_parallel.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

static void take_chunks(void* data) {
    Call& call = *(Call*)data;
    for (;;) {
        int64_t begin = call.next.fetch_add(call.chunk);
        if (begin >= call.count) return;
        call.work(call, begin, begin + call.chunk < call.count ? begin + call.chunk : call.count);
    }
}

static void start(Call& call, int64_t threads, Parallel parallel) {
    if (threads > call.count) threads = call.count;
    call.threads = threads;
    call.next = 0;
    if (threads <= 1 || !parallel) take_chunks(&call);
    else parallel(take_chunks, &call, unsigned(threads), 0);
}

static void run(Call& call, int64_t threads, Parallel parallel) {
    int64_t rows = call.layer->rows, parts = rows * call.layer->cols >> 16;
    if (threads > parts) threads = parts;
    if (threads < 1) threads = 1;
    // Chunks of whole tiles of 32 rows; several for each thread, since rows differ in length and threads in speed.
    call.chunk = (rows / (threads * (threads > 1 ? 8 : 1)) + 31) / 32 * 32;
    if (call.chunk < 32) call.chunk = 32;
    call.count = rows;
    start(call, threads, parallel);
}
