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

typedef void (*Work)(Call&, int64_t, int64_t);
#define EACH(work) {work<1>, work<2>, work<3>, work<4>, work<5>, work<6>, work<7>, work<8>}

// Where x lies while a thread's call is at work.
template <class T> static T* scratch(int64_t count) {
    static thread_local std::vector<char> buffer;
    if (int64_t(buffer.size()) < count * int64_t(sizeof(T)) + 64) buffer.resize(count * sizeof(T) + 64);
    return (T*)((uintptr_t(buffer.data()) + 63) / 64 * 64);
}

static const float* floats(const void* x, int64_t type, int64_t n, int64_t cols, bool pairs) {
    if (type == F32 && cols % 64 == 0 && !pairs) return (const float*)x;
    int64_t wide = padded(cols);
    float* out = scratch<float>(n * wide);
    for (int64_t i = 0; i < n; ++i) {
        float* to = out + i * wide;
        for (int64_t k = 0; k < wide; ++k) {
            int64_t lane = k % 32, col = pairs ? k / 32 * 32 + lane % 16 * 2 + lane / 16 : k;
            to[k] = col < cols ? fetch(x, type, i * cols + col) : 0;
        }
    }
    return out;
}

static const float* transposed(const void* x, int64_t type, int64_t n, int64_t cols, int64_t lanes) {
    float* out = scratch<float>(cols * lanes);
    for (int64_t k = 0; k < cols; ++k)
        for (int64_t i = 0; i < lanes; ++i) out[k * lanes + i] = i < n ? fetch(x, type, i * cols + k) : 0;
    return out;
}

// Up to how many rows of x `multiply` takes at once.
extern "C" int64_t most_rows(int64_t columns, int64_t type, int64_t amx) {
#if defined(ISA_AVX512)
#ifdef HAS_AMX
    if (!columns && amx && type == BF16 && VALUE_IS == BF16) return AMX_ROWS;
#endif
    return columns ? 16 : 8;
#else
    return 8;
#endif
}

// x: (n, cols), y: (n, rows), both of `type` and contiguous; n from 1 to most_rows.
extern "C" void multiply(const Layer* layer, const void* x, void* y, int64_t n, int64_t type, int64_t amx, int64_t threads, Parallel parallel) {
    Call call;
    call.layer = layer, call.y = y, call.n = n, call.type = type, call.stride = padded(layer->cols);
#if defined(ISA_AVX512)
    if (layer->columns) {
        call.x = n == 1 ? floats(x, type, n, layer->cols, false) : transposed(x, type, n, layer->cols, 16);
        call.work = n == 1 ? avx512_columns_1 : avx512_columns_16;
        return run(call, threads, parallel);
    }
#if VALUE_IS == 1 && defined(__AVX512BF16__)
    if (type == BF16 && n > 1) {
#ifdef HAS_AMX
        if (amx && n > 2) {
            const int64_t blocks = (n + 15) / 16, steps = call.stride / 32;
            bf16* out = scratch<bf16>(blocks * steps * 512);
            memset((void*)out, 0, blocks * steps * 1024);
            for (int64_t i = 0; i < n; ++i) {
                const bf16* from = (const bf16*)x + i * layer->cols;
                bf16* to = out + i / 16 * steps * 512 + i % 16 * 2;
                for (int64_t k = 0; k + 1 < layer->cols; k += 2) memcpy((void*)(to + k * 16), from + k, 4);
                if (layer->cols % 2) to[(layer->cols - 1) * 16] = from[layer->cols - 1];
            }
            call.x = out, call.work = amx_bits;
            return run(call, threads, parallel);
        }
#endif
        if (layer->cols % 64) {
            bf16* out = scratch<bf16>(n * call.stride);
            for (int64_t i = 0; i < n; ++i) {
                memcpy((void*)(out + i * call.stride), (const bf16*)x + i * layer->cols, 2 * layer->cols);
                memset((void*)(out + i * call.stride + layer->cols), 0, 2 * (call.stride - layer->cols));
            }
            x = out;
        }
        static const Work dots[] = EACH(avx512_dot);
        call.x = x, call.work = dots[n - 1];
        return run(call, threads, parallel);
    }
#endif
    static const Work works[] = EACH(avx512_bits);
    call.x = floats(x, type, n, layer->cols, VALUE_IS == BF16), call.work = works[n - 1];
#elif defined(ISA_AVX2) || defined(ISA_NEON)
    static const Work works[] = EACH(lanes_bits);
    if (layer->columns && n > 1) call.x = transposed(x, type, n, layer->cols, 8), call.work = lanes_columns;
    else call.x = floats(x, type, n, layer->cols, false), call.work = layer->columns ? lanes_columns_1 : works[n - 1];
#else
    call.x = floats(x, type, n, layer->cols, false), call.work = plain_rows;
#endif
    run(call, threads, parallel);
}

// y: (rows, cols), dense, float or of the values' type.
extern "C" void decode(const Layer* layer, void* y, int64_t as_float, int64_t threads, Parallel parallel) {
    Call call;
    call.layer = layer, call.y = y;
#if defined(ISA_AVX512)
    call.work = as_float ? avx512_decode<float> : avx512_decode<VALUE>;
#elif defined(ISA_AVX2) || defined(ISA_NEON)
    call.work = as_float ? lanes_decode<float> : lanes_decode<VALUE>;
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
