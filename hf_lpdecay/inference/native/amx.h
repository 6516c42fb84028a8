// bfloat16 times bfloat16 for up to 128 rows of x on AMX: the weights of 32 rows are put in their places in the cache, a
// few hundred columns at a time, and multiplied from there in tiles of 16 x 32.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

static const int64_t AMX_COLS = 512;  // decoded at a time: 32 KB

static bool amx_allowed() {
    const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: the kernel gives a process the tiles when asked
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

static inline void amx_configure() {
    alignas(64) uint8_t config[64] = {1};  // palette 1: tiles of up to 16 rows of 64 bytes
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
}

static const int64_t AMX_ROWS = 128;
#ifndef AMX_LATER
#define AMX_LATER 8
#endif

template <int BLOCKS> static inline void amx_products(const bf16* x, const bf16* next, const bf16* dense, int64_t stride, int64_t steps, float (*sums)[16][16]) {
    _tile_loadd(0, sums[0], 64);
    _tile_loadd(1, sums[1], 64);
    if (BLOCKS == 2) {
        _tile_loadd(2, sums[2], 64);
        _tile_loadd(3, sums[3], 64);
    }
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, x + k * 512, 64);
        if (BLOCKS == 2) { _tile_loadd(5, next + k * 512, 64); }
        _tile_loadd(6, dense + k * 32, stride * 2);
        _tile_dpbf16ps(0, 6, 4);
        if (BLOCKS == 2) { _tile_dpbf16ps(2, 6, 5); }
        _tile_loadd(7, dense + 16 * stride + k * 32, stride * 2);
        _tile_dpbf16ps(1, 7, 4);
        if (BLOCKS == 2) { _tile_dpbf16ps(3, 7, 5); }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (BLOCKS == 2) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

// x: bf16, for each block of 16 rows, each 32 columns a tile: pairs of columns in rows of 16 x 2.
static void amx_bits(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const bf16* x = (const bf16*)call.x;
    const int64_t steps = padded(layer.cols) / 32, blocks = (call.n + 15) / 16, stride = AMX_COLS + 32;
    alignas(64) static thread_local bf16 dense_[32][stride];
    alignas(64) static thread_local float sums_[AMX_ROWS / 32][4][16][16];
    bf16 (*dense)[stride] = dense_;
    float (*sums)[4][16][16] = sums_;
    // Of values, for 64 columns.
    const int64_t lines = (layer.starts[layer.rows] - layer.starts[0]) / (layer.rows * (call.stride / 64) * 34) + 1;
    amx_configure();
    for (int64_t row = begin; row < end; row += 32) {
        const int64_t rows = end - row < 32 ? end - row : 32;
        const VALUE* value[32];
        for (int64_t r = 0; r < rows; ++r) value[r] = layer.values + layer.starts[row + r];
        if (rows < 32) memset((void*)dense, 0, sizeof dense_);
        memset(sums, 0, (blocks + 1) / 2 * sizeof sums_[0]);
        for (int64_t step = 0; step < steps; step += AMX_COLS / 32) {
            const int64_t last = steps - step < AMX_COLS / 32 ? steps : step + AMX_COLS / 32;
            for (int64_t r = 0; r < rows; ++r) {
                const VALUE* from = value[r];
                const uint8_t* mask = layer.positions + (row + r) * mask_stride(layer);
                // What is needed a few rows later, or in the next columns, or in the next 32 rows: no prefetcher sees it.
                const int64_t later = r + AMX_LATER, wraps = later >= rows;
                const char* next = (const char*)value[wraps ? later % rows : later];
                const uint8_t* next_mask = mask + AMX_LATER * mask_stride(layer) + step * 4;
                if (wraps && last == steps && row + later < end) next = (const char*)(layer.values + layer.starts[row + later]);
                else if (wraps) next_mask += AMX_COLS / 8 - rows * mask_stride(layer);
                __builtin_prefetch(next_mask);
                for (int64_t k = step; k < last; k += 2) {
                    uint64_t bits = mask_word(mask, k / 2, layer.cols);
                    for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next);
                    _mm512_store_si512(dense[r] + 32 * (k - step), expand(uint32_t(bits), from));
                    from += __builtin_popcount(uint32_t(bits));
                    _mm512_store_si512(dense[r] + 32 * (k - step) + 32, expand(uint32_t(bits >> 32), from));
                    from += __builtin_popcount(uint32_t(bits >> 32));
                }
                value[r] = from;
            }
            for (int64_t block = 0; block < blocks; block += 2) {
                const bf16 *first = x + (block * steps + step) * 512, *second = first + steps * 512;
                if (block + 1 < blocks) amx_products<2>(first, second, dense[0], stride, last - step, sums[block / 2]);
                else amx_products<1>(first, second, dense[0], stride, last - step, sums[block / 2]);
            }
        }
        for (int64_t i = 0; i < call.n; ++i)
            for (int64_t r = 0; r < rows; ++r) put(call, i, row + r, &sums[i / 32][i % 32 / 16 * 2 + r / 16][r % 16][i % 16], 1);
    }
    _tile_release();
}
