// One AdamW step with the p-norm decay in one pass over the memory: what functional.py does, for a CPU.
//
// Compiled by kernels.py for one case at a time:
//   NORM       p, if there is a short cut for it (0, 0.5, 1, 1.5 or 2), times two; -1 for any p
//   FACTORS    whether the importance has row and column factors
//   POST_STEP  whether the size is that of the weight after AdamW's step
//   ALONE      whether there is only the decay: `grad` then holds the weights from before the step
//   AHEAD      whether only the decay's factors are worked out, before another optimizer steps: `exp_avg` takes them
//   WEIGHT     float or bf16, the type of weights and gradients; MOMENT likewise
// Exact to about float32, as long as no |weight * gradient| comes near 1e30.
// No headers but the C library's, so that compiling takes a fraction of a second.

#if defined(__GNUC__) && !defined(__clang__)
// Threaded jumps would give exempt weights a path of their own, and with it every weight a second division.
#pragma GCC optimize("no-thread-jumps")
#endif

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t bf16;

template <class To, class From>
inline To bits_of(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const bf16* p, int64_t i) { return bits_of<float>((uint32_t)p[i] << 16); }

// A uniform number in 32 bits from a counter ("lowbias32"): random bits without a state, the same for any split into
// threads. functional.random_bits is its twin.
inline uint32_t hash(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ x >> 16;
}

// bfloat16 is the upper half of a float. Adding 16 random bits rounds stochastically, adding half of the last place
// (a little less, if that place is even) to nearest.
inline uint32_t half_place(float x) { return 0x7fff + (bits_of<uint32_t>(x) >> 16 & 1); }

inline void store(float* p, int64_t i, float x, uint32_t) { p[i] = x; }
inline void store(bf16* p, int64_t i, float x, uint32_t up) {
    uint32_t rounded = bits_of<uint32_t>(x) + up;
    p[i] = x == x ? rounded >> 16 : 0x7fc0;
}

// strength * r ** power to about 1e-5, by polynomials for log2 on [sqrt(1/2), sqrt(2)] and 2 ** x on [-1/2, 1/2].
// `strength` is given as its log2. At most 2 ** 127; r = 0 counts as about 2 ** -127.
inline float power_of(float r, float power, float log2_strength) {
    uint32_t bits = bits_of<uint32_t>(r);
    int32_t exponent = (int32_t)(bits - 0x3f3504f3U) >> 23;
    float f = bits_of<float>(bits - ((uint32_t)exponent << 23)) - 1.0f;
    float log2_r = -0.202289263727672f * f + 0.316898187155453f;
    log2_r = log2_r * f - 0.366925770957597f;
    log2_r = log2_r * f + 0.479925573470884f;
    log2_r = log2_r * f - 0.721195752393868f;
    log2_r = log2_r * f + 1.442700440013494f;
    log2_r = log2_r * f + (float)exponent;
    float t = power * log2_r + log2_strength;
    // Adding 1.5 * 2 ** 23 rounds to a whole number, which (with the bias 127) then stands in the lowest bits.
    float shifted = t + 12583039.0f;
    float x = t - (shifted - 12583039.0f);
    float y = 0.009666368515338f * x + 0.055921975842253f;
    y = y * x + 0.240223490380213f;
    y = y * x + 0.693121045203427f;
    y = y * x + 1.0f;
    int32_t scale = (int32_t)bits_of<uint32_t>(shifted);
    scale = scale < 0x4b400001 ? 0x4b400001 : scale;
    scale = scale > 0x4b4000fd ? 0x4b4000fd : scale;
    return y * bits_of<float>((uint32_t)scale << 23);
}

// r ** (2 - p) if there is a short cut for it, at most 2 ** 26: adding a strength below 1 then changes nothing.
inline float short_cut(float r) {
    float x = NORM == 0 ? r * r : NORM == 1 ? r * sqrtf(r) : NORM == 2 ? r : sqrtf(r);
    return x < 67108864.0f ? x : 67108864.0f;
}

}  // namespace

struct Task {
    WEIGHT *param, *grad;
    MOMENT *exp_avg, *exp_avg_sq;
    const float *row, *col;
    int64_t numel, cols;
    uint32_t seed, stochastic;
    float keep, rest1, rest2, step_size, bias, eps, strength, power, threshold, absorbed, frozen;
};

static void update(const Task& task, int64_t begin, int64_t end, float row, const float* col) {
    const Task t = task;  // a copy, which the stores below cannot change
    WEIGHT* __restrict param = t.param;
    const WEIGHT* __restrict grad = t.grad;
    MOMENT* __restrict exp_avg = t.exp_avg;
    MOMENT* __restrict exp_avg_sq = t.exp_avg_sq;
    const bool stochastic = t.stochastic;
    for (int64_t i = begin; i < end; i++) {
        float w = load(param, i), g = load(grad, i), w_hat = w, m = 0.0f, v = 0.0f, d = 1.0f;
        float size = fabsf(ALONE ? g : w);
        if (!ALONE && !AHEAD) {
            m = load(exp_avg, i), v = load(exp_avg_sq, i);
            m += t.rest1 * (g - m);
            v += t.rest2 * (g * g - v);
            d = sqrtf(v) * t.bias + t.eps;
            w_hat = t.keep * w;
            if (POST_STEP) w_hat -= t.step_size * (m / d);
        }
        float r = POST_STEP ? fabsf(w_hat) : size;
        if (FACTORS) r *= row * col[i - begin];
        // The decay multiplies with numerator / x.
        float numerator = NORM == 4 ? t.strength : NORM < 0 ? 1.0f : short_cut(r);
        float x = NORM == 4 ? 1.0f : NORM < 0 ? 1.0f + power_of(r, t.power, t.strength) : numerator + t.strength;
        bool zero = size <= t.frozen;
        if (FACTORS || POST_STEP) zero |= r <= t.absorbed;  // otherwise size is r, and frozen the larger of the two
        // Of what becomes zero anyway x can be so large that its inverse is subnormal, which takes many times as long.
        bool decays = r < t.threshold && !zero;
        float over = decays ? x : 1.0f;
        if (AHEAD) {
            float factor = (decays ? numerator : 1.0f) / over;
            store(exp_avg, i, zero ? 0.0f : factor, 0);
            continue;
        }
        if (ALONE || POST_STEP) {
            w_hat *= (decays ? numerator : 1.0f) / over;
        } else {  // one division for both quotients; nothing is rounded where there is nothing to do
            float inverse = 1.0f / (d * over);
            w_hat -= t.step_size * (m * (inverse * over));
            w_hat *= decays ? numerator * (NORM == 4 ? 1.0f : inverse * d) : 1.0f;
        }
        // A model that computes with subnormal weights takes several times as long, and the next step makes them zero.
        zero |= decays & (fabsf(w_hat) < FLT_MIN);  // no branch, so that the loop is vectorized
        w_hat = zero ? 0.0f : w_hat;
        uint32_t bits = sizeof(WEIGHT) == 2 ? hash((uint32_t)i + t.seed) : 0;
        if (!ALONE) {
            store(exp_avg, i, m, half_place(m));
            store(exp_avg_sq, i, v, stochastic ? bits >> 16 : half_place(v));
        }
        store(param, i, w_hat, stochastic ? bits & 0xffff : half_place(w_hat));
    }
}

// What follows AHEAD: the weights, which were stepped meanwhile, times the factors.
static void apply(const Task& task, int64_t begin, int64_t end) {
    WEIGHT* __restrict param = task.param;
    const MOMENT* __restrict factors = task.exp_avg;
    const uint32_t seed = task.seed;
    const bool stochastic = task.stochastic;
    for (int64_t i = begin; i < end; i++) {
        float factor = load(factors, i), w = load(param, i) * factor;
        w = (factor == 0.0f) | ((factor != 1.0f) & (fabsf(w) < FLT_MIN)) ? 0.0f : w;
        uint32_t bits = sizeof(WEIGHT) == 2 ? hash((uint32_t)i + seed) : 0;
        store(param, i, w, stochastic ? bits & 0xffff : half_place(w));
    }
}

// One of `parts` equal parts of each task, which begin at a cache line as far as the tensors do. torch's own kernels give
// each of their threads the same part of a tensor, so that it may still lie in the cache of this thread's core.
extern "C" void run(const Task* tasks, int64_t count, int64_t part, int64_t parts, int64_t applying) {
    for (int64_t k = 0; k < count; k++) {
        const Task& task = tasks[k];
        int64_t from = task.numel * part / parts / 64 * 64;
        int64_t to = part + 1 == parts ? task.numel : task.numel * (part + 1) / parts / 64 * 64;
        if (applying) {
            apply(task, from, to);
            continue;
        }
        if (!FACTORS) {
            if (from < to) update(task, from, to, 1.0f, nullptr);
            continue;
        }
        while (from < to) {
            int64_t row = from / task.cols, stop = (row + 1) * task.cols;
            stop = stop < to ? stop : to;
            update(task, from, stop, task.row[row], task.col + from % task.cols);
            from = stop;
        }
    }
}

#if defined(__linux__)
// The OpenMP that torch computes with, wherever it has loaded it from; null if it has none. Its threads go on spinning
// for a while when they are done, and threads of our own would share the cores with them.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

struct Call {
    const Task* tasks;
    int64_t count, applying;
};

static void run_part(void* data) {
    const Call* call = (const Call*)data;
    run(call->tasks, call->count, omp_get_thread_num(), omp_get_num_threads(), call->applying);
}

// Everything, by the threads that torch has; 0 if nothing was done.
extern "C" int run_together(const Task* tasks, int64_t count, int64_t threads, int64_t applying) {
    if (!GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) return 0;
    Call call = {tasks, count, applying};
    GOMP_parallel(run_part, &call, (unsigned)threads, 0);
    return 1;
}
#else
extern "C" int run_together(const Task*, int64_t, int64_t, int64_t) { return 0; }
#endif
