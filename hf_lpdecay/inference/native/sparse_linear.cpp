// y = x W^T + bias for a W with many zeros, kept as a bit mask (or column numbers) and the values that are not zero.
//
// Compiled by kernels.py, for one type of the values at a time:
//   VALUE      float, bf16 or f16
//   VALUE_IS   the same as a Type
//   ISA_PLAIN  if nothing but the plain loop is wanted; else the best is taken that the compiler's target has
#if !defined(ISA_PLAIN)
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ISA_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ISA_AVX2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define ISA_NEON
#endif
#endif

#include "common.h"
#include "columns.h"
#include "plain.h"

#if defined(ISA_AVX512)
#include "avx512.h"
#if defined(__AMX_BF16__) && VALUE_IS == 1
#include "amx.h"
#define HAS_AMX 1
#endif
#elif defined(ISA_AVX2) || defined(ISA_NEON)
#include "lanes.h"
#endif

// x for `plain_rows` and one row of columns (`lanes` 0), or with up to `lanes` rows beside each other.
static const float* floats(const void* x, int64_t type, int64_t n, int64_t cols, int64_t lanes) {
    if (type == F32 && !lanes) return (const float*)x;
    float* out = scratch<float>(cols * (lanes ? lanes : n));
    if (lanes) memset(out, 0, cols * lanes * sizeof(float));
    of_type(x, type, [=](auto* from) -> const void* {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < cols; ++k) convert(from[i * cols + k], out + (lanes ? k * lanes + i : i * cols + k));
        return out;
    });
    return out;
}

#if defined(ISA_AVX512) || defined(ISA_AVX2) || defined(ISA_NEON)
// x for `panels`.
template <class Ops> static const void* rows_of(const void* x, int64_t type, Call& call) {
    typedef typename Ops::X X;
    const int64_t cols = call.layer->cols;
    call.stride = part_of(cols, Ops::UNIT) * Ops::UNIT;
    if (std::is_same<X, float>::value) return floats(x, type, call.n, cols, 0);
    if (call.stride == cols) return x;
    X* out = scratch<X>(call.n * call.stride);
    for (int64_t i = 0; i < call.n; ++i) {
        memcpy((void*)(out + i * call.stride), (const X*)x + i * cols, cols * sizeof(X));
        memset((void*)(out + i * call.stride + cols), 0, (call.stride - cols) * sizeof(X));
    }
    return out;
}

template <class Ops> static void multiply_columns(Call& call, const void* x, int64_t type, int64_t threads, Parallel parallel) {
    const Layer& layer = *call.layer;
    const int64_t n = call.n, size = type == F32 ? 4 : 2;
    char* y = (char*)call.y;
    for (int64_t first = 0; first < n; first += Ops::LANES) {
        call.n = n - first < Ops::LANES ? n - first : Ops::LANES;
        call.y = y + first * layer.rows * size;
        call.x = floats((const char*)x + first * layer.cols * size, type, call.n, layer.cols, call.n == 1 ? 0 : Ops::LANES);
        call.work = call.n == 1 ? columns_1 : columns_many<Ops>;
        run(call, threads, parallel);
    }
}

template <class Ops> static void multiply_bits(Call& call, const void* x, int64_t type, int64_t threads, Parallel parallel) {
    call.x = of_type(x, type, [&](auto* from) { return packed<Ops>(from, call.n, call.layer->cols); });
    call.work = bits<Ops>;
    run(call, threads, parallel);
}

template <class Ops> static void multiply_with(Call& call, const void* x, int64_t type, int64_t threads, Parallel parallel) {
    const Layer& layer = *call.layer;
    const bool few_values = (layer.starts[layer.rows] - layer.starts[0]) * FEW_VALUES < layer.rows * layer.cols;
    if (layer.columns ? call.n > MANY_FOR_COLUMNS && !few_values : call.n >= MANY) {
        call.x = rows_of<Ops>(x, type, call);
        return run_panels<Ops>(call, threads, parallel);
    }
    if (layer.columns) return multiply_columns<Ops>(call, x, type, threads, parallel);
    multiply_bits<Ops>(call, x, type, threads, parallel);
}
#endif

#ifdef HAS_AMX
static void multiply_amx(Call& call, const bf16* x, int64_t threads, Parallel parallel) {
    const int64_t blocks = (call.n + 15) / 16, steps = call.stride / 32, cols = call.layer->cols;
    bf16* out = scratch<bf16>(blocks * steps * 512);
    memset((void*)out, 0, blocks * steps * 1024);
    for (int64_t i = 0; i < call.n; ++i, x += cols) {
        bf16* to = out + i / 16 * steps * 512 + i % 16 * 2;
        for (int64_t k = 0; k + 1 < cols; k += 2) memcpy((void*)(to + k * 16), x + k, 4);
        if (cols % 2) to[(cols - 1) * 16] = x[cols - 1];
    }
    call.x = out, call.work = amx_bits;
    run(call, threads, parallel);
}
#endif

// Up to how many rows of x `multiply` is the faster way; 0: always. More rows are better decoded for torch's product.
extern "C" int64_t most_rows(int64_t type, int64_t amx) {
#if defined(ISA_AVX512)
#ifdef HAS_AMX
    if (amx && type == BF16) return AMX_ROWS;
#endif
    return 0;
#elif defined(ISA_AVX2) || defined(ISA_NEON)
    return 0;
#else
    return 128;
#endif
}

// x: (n, cols), y: (n, rows), both of `type` and contiguous; n from 1 on.
extern "C" void multiply(const Layer* layer, const void* x, void* y, int64_t n, int64_t type, int64_t amx, int64_t threads, Parallel parallel) {
    Call call;
    call.layer = layer, call.y = y, call.n = n, call.type = type, call.stride = padded(layer->cols);
#if defined(ISA_AVX512)
#ifdef HAS_AMX
    if (amx && type == BF16 && !layer->columns && n > 2 && n <= AMX_ROWS) return multiply_amx(call, (const bf16*)x, threads, parallel);
#endif
#if VALUE_IS == 1 && defined(__AVX512BF16__)
    if (type == BF16) return multiply_with<Dots>(call, x, type, threads, parallel);
#endif
    multiply_with<Floats>(call, x, type, threads, parallel);
#elif defined(ISA_AVX2) || defined(ISA_NEON)
#if defined(ISA_AVX2) && VALUE_IS != 0
    if (n == 1 && !layer->columns) return multiply_bits<Halves>(call, x, type, threads, parallel);
#endif
    multiply_with<Lanes>(call, x, type, threads, parallel);
#else
    call.x = floats(x, type, n, layer->cols, 0), call.work = plain_rows;
    run(call, threads, parallel);
#endif
}

// y: (rows, cols), dense, float or of the values' type.
extern "C" void decode(const Layer* layer, void* y, int64_t as_float, int64_t threads, Parallel parallel) {
    Call call;
    call.layer = layer, call.y = y;
#if defined(ISA_AVX512)
    call.work = as_float ? bits_decode<Floats, float> : bits_decode<std::conditional<VALUE_IS == F32, Floats, Halves>::type, VALUE>;
#elif defined(ISA_AVX2) || defined(ISA_NEON)
    call.work = as_float ? bits_decode<Lanes, float> : bits_decode<Lanes, VALUE>;
#else
    call.work = as_float ? plain_decode<float> : plain_decode<VALUE>;
#endif
    run(call, threads, parallel);
}

extern "C" const char* instruction_set() {
#if defined(ISA_AVX512)
    return "avx512";
#elif defined(ISA_AVX2)
    return "avx2";
#elif defined(ISA_NEON)
    return "neon";
#else
    return "plain";
#endif
}

// Whether this process may use AMX.
extern "C" int64_t allow_amx() {
#ifdef HAS_AMX
    return amx_allowed();
#else
    return 0;
#endif
}
