// Eight weights at a time: AVX2 and NEON behind the same few functions. A table of 256 byte shuffles puts up to eight
// packed values in their places (an index with the highest bit set gives zero).
#pragma once
#include <type_traits>

#include "plain.h"

#if defined(ISA_AVX2)
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#endif

#if defined(ISA_AVX2)
typedef __m256 lanes;
static inline lanes zero() { return _mm256_setzero_ps(); }
static inline lanes load(const float* x) { return _mm256_loadu_ps(x); }
static inline lanes broadcast(float x) { return _mm256_set1_ps(x); }
static inline lanes fma(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lanes add(lanes a, lanes b) { return _mm256_add_ps(a, b); }
static inline void store(float* x, lanes a) { _mm256_storeu_ps(x, a); }
#elif defined(ISA_NEON)
struct lanes { float32x4_t low, high; };
static inline lanes zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
static inline lanes load(const float* x) { return {vld1q_f32(x), vld1q_f32(x + 4)}; }
static inline lanes broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline lanes fma(lanes a, lanes b, lanes c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
static inline lanes add(lanes a, lanes b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
static inline void store(float* x, lanes a) { vst1q_f32(x, a.low); vst1q_f32(x + 4, a.high); }
#endif

static inline float sum(lanes a) {
    float x[8];
    store(x, a);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// For each mask of eight bits 32 bytes: where the bytes of eight float32 come from.
struct Table {
    alignas(64) uint8_t at[256][32];
    Table() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                bool set = mask >> lane & 1;
                for (int byte = 0; byte < 4; ++byte) at[mask][4 * lane + byte] = entry(set, rank, byte);
                rank += set;
            }
    }
    static uint8_t entry(bool set, int rank, int byte) {
        if (!set) return 0x80;
        if (sizeof(VALUE) == 4) return ENTRY_FLOAT(rank, byte);
        // bfloat16 is the upper half of a float32; float16 is widened afterwards, from the lower half.
        bool bf = std::is_same<VALUE, bf16>::value;
        if (bf ? byte < 2 : byte >= 2) return 0x80;
        return 2 * rank + byte % 2;
    }
    static uint8_t ENTRY_FLOAT(int rank, int byte) {
#if defined(ISA_AVX2)
        return byte == 3 ? 0 : rank;  // a lane's number, and the highest bit clear
#else
        return 4 * rank + byte;
#endif
    }
};
static const Table table;

#if defined(ISA_AVX2)
static inline lanes place(const bf16* values, const uint8_t* at) {
    __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)at)));
}
static inline lanes place(const f16* values, const uint8_t* at) {
    __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    __m256i spread = _mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)at));
    __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(spread), _mm256_extracti128_si256(spread, 1));
    return _mm256_cvtph_ps(narrow);
}
static inline lanes place(const float* values, const uint8_t* at) {
    __m256i lane = _mm256_load_si256((const __m256i*)at);
    __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), spread);
}
#elif defined(ISA_NEON)
static inline lanes place(const bf16* values, const uint8_t* at) {
    uint8x16_t packed = vld1q_u8((const uint8_t*)values);
    return {vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(at))),
            vreinterpretq_f32_u8(vqtbl1q_u8(packed, vld1q_u8(at + 16)))};
}
static inline lanes place(const f16* values, const uint8_t* at) {
    uint8x16_t packed = vld1q_u8((const uint8_t*)values);
    uint16x4_t low = vmovn_u32(vreinterpretq_u32_u8(vqtbl1q_u8(packed, vld1q_u8(at))));
    uint16x4_t high = vmovn_u32(vreinterpretq_u32_u8(vqtbl1q_u8(packed, vld1q_u8(at + 16))));
    return {vcvt_f32_f16(vreinterpret_f16_u16(low)), vcvt_f32_f16(vreinterpret_f16_u16(high))};
}
static inline lanes place(const float* values, const uint8_t* at) {
    uint8x16x2_t packed = {{vld1q_u8((const uint8_t*)values), vld1q_u8((const uint8_t*)values + 16)}};
    return {vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(at))),
            vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(at + 16)))};
}
#endif

// For each byte of a word, the bits set in the bytes before it.
static inline uint64_t ranks(uint64_t word) {
    word -= word >> 1 & 0x5555555555555555;
    word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
    return ((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010100;
}

// x: float, natural order, rows of a multiple of 64, zero behind the last column.
template <int N> static void lanes_bits(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint8_t* mask = layer.positions + row * mask_stride(layer);
        const int chains = N == 1 ? 4 : N == 2 ? 2 : 1;  // additions that do not wait for each other
        lanes total[N][chains];
        for (int i = 0; i < N; ++i)
            for (int c = 0; c < chains; ++c) total[i][c] = zero();
        for (int64_t word = 0; 64 * word < layer.cols; ++word) {
            uint64_t bits = mask_word(mask, word, layer.cols), rank = ranks(bits);
            ahead(value, mask + 8 * word);
#pragma GCC unroll 8
            for (int byte = 0; byte < 8; ++byte) {
                lanes w = place(value + (rank >> 8 * byte & 0xff), table.at[bits >> 8 * byte & 0xff]);
                const float* at = x + 64 * word + 8 * byte;
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i)
                    total[i][byte % chains] = fma(w, load(at + i * call.stride), total[i][byte % chains]);
            }
            value += __builtin_popcountll(bits);
        }
        for (int i = 0; i < N; ++i) {
            for (int c = 1; c < chains; ++c) total[i][0] = add(total[i][0], total[i][c]);
            put(call, i, row, sum(total[i][0]));
        }
    }
}

// Columns, one row of x: float, natural order.
static void lanes_columns_1(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        int64_t k = 0, count = layer.starts[row + 1] - layer.starts[row];
        float total[4] = {0, 0, 0, 0};
        for (; k + 4 <= count; k += 4) {
            ahead(value + k, (const uint8_t*)(column + k) + AHEAD * 3 / 4);
            for (int c = 0; c < 4; ++c) total[c] += widen(value[k + c]) * x[column[k + c]];
        }
        for (; k < count; ++k) total[0] += widen(value[k]) * x[column[k]];
        put(call, 0, row, (total[0] + total[1]) + (total[2] + total[3]));
    }
}

// Columns, up to eight rows of x in the lanes. x: float, transposed, (cols, 8).
static void lanes_columns(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const float* x = (const float*)call.x;
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint16_t* column = (const uint16_t*)layer.positions + layer.starts[row];
        int64_t k = 0, count = layer.starts[row + 1] - layer.starts[row];
        lanes total[4] = {zero(), zero(), zero(), zero()};
        for (; k + 4 <= count; k += 4) {
            ahead(value + k, (const uint8_t*)(column + k) + AHEAD * 3 / 4);
            for (int c = 0; c < 4; ++c)
                total[c] = fma(broadcast(widen(value[k + c])), load(x + 8 * column[k + c]), total[c]);
        }
        for (; k < count; ++k) total[0] = fma(broadcast(widen(value[k])), load(x + 8 * column[k]), total[0]);
        float sums[8];
        store(sums, add(add(total[0], total[1]), add(total[2], total[3])));
        for (int64_t i = 0; i < call.n; ++i) put(call, i, row, sums[i]);
    }
}

#if defined(ISA_AVX2)
static inline void store_as(float* out, lanes a) { store(out, a); }
static inline void store_as(bf16* out, lanes a) {
    __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    _mm_storeu_si128((__m128i*)out, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
static inline void store_as(f16* out, lanes a) { _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(a, 0)); }
#else
static inline void store_as(float* out, lanes a) { store(out, a); }
static inline void store_as(bf16* out, lanes a) {
    vst1q_u16((uint16_t*)out, vcombine_u16(vshrn_n_u32(vreinterpretq_u32_f32(a.low), 16),
                                           vshrn_n_u32(vreinterpretq_u32_f32(a.high), 16)));
}
static inline void store_as(f16* out, lanes a) {
    vst1q_u16((uint16_t*)out, vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.low)),
                                           vreinterpret_u16_f16(vcvt_f16_f32(a.high))));
}
#endif

template <class Out> static void lanes_decode(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    if (layer.columns) return plain_decode<Out>(call, begin, end);
    for (int64_t row = begin; row < end; ++row) {
        const VALUE* value = layer.values + layer.starts[row];
        const uint8_t* mask = layer.positions + row * mask_stride(layer);
        Out* out = (Out*)call.y + row * layer.cols;
        int64_t word = 0;
        for (; 64 * (word + 1) <= layer.cols; ++word) {
            uint64_t bits = mask_word(mask, word, layer.cols), rank = ranks(bits);
            for (int byte = 0; byte < 8; ++byte)
                store_as(out + 64 * word + 8 * byte,
                         place(value + (rank >> 8 * byte & 0xff), table.at[bits >> 8 * byte & 0xff]));
            value += __builtin_popcountll(bits);
        }
        for (int64_t col = 64 * word; col < layer.cols; ++col) {
            if (mask[col / 8] >> (col % 8) & 1) convert(*value++, out + col);
            else memset((void*)(out + col), 0, sizeof(Out));
        }
    }
}
