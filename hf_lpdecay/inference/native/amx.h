// bfloat16 times bfloat16 for up to 32 rows of x on AMX: the weights of 32 rows are put in their places in the cache, a
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

// x: bf16, for each block of 16 rows, each 32 columns a tile: pairs of columns in rows of 16 x 2.
template <int BLOCKS> static void amx_bits(Call& call, int64_t begin, int64_t end) {
    const Layer& layer = *call.layer;
    const bf16* x = (const bf16*)call.x;
    const int64_t steps = padded(layer.cols) / 32;
    alignas(64) static thread_local bf16 dense[32][AMX_COLS + 32];
    alignas(64) float sums[16][16];
    amx_configure();
    for (int64_t row = begin; row < end; row += 32) {
        const int64_t rows = end - row < 32 ? end - row : 32;
        const VALUE* value[32];
        for (int64_t r = 0; r < rows; ++r) value[r] = layer.values + layer.starts[row + r];
        if (rows < 32) memset(dense, 0, sizeof dense);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step += AMX_COLS / 32) {
            const int64_t last = steps - step < AMX_COLS / 32 ? steps : step + AMX_COLS / 32;
            for (int64_t r = 0; r < rows; ++r) {
                const VALUE* from = value[r];
                const uint8_t* mask = layer.positions + (row + r) * mask_stride(layer);
                for (int64_t k = step; k < last; k += 2) {
                    uint64_t bits = mask_word(mask, k / 2, layer.cols);
                    ahead(from, mask + k * 4);
                    _mm512_store_si512(dense[r] + 32 * (k - step), expand(uint32_t(bits), from));
                    from += __builtin_popcount(uint32_t(bits));
                    _mm512_store_si512(dense[r] + 32 * (k - step) + 32, expand(uint32_t(bits >> 32), from));
                    from += __builtin_popcount(uint32_t(bits >> 32));
                }
                value[r] = from;
            }
            for (int64_t k = step; k < last; ++k) {
                _tile_loadd(4, x + k * 512, 64);
                if (BLOCKS == 2) { _tile_loadd(5, x + (steps + k) * 512, 64); }
                _tile_loadd(6, dense[0] + 32 * (k - step), sizeof dense[0]);
                _tile_dpbf16ps(0, 6, 4);
                if (BLOCKS == 2) { _tile_dpbf16ps(2, 6, 5); }
                _tile_loadd(7, dense[16] + 32 * (k - step), sizeof dense[0]);
                _tile_dpbf16ps(1, 7, 4);
                if (BLOCKS == 2) { _tile_dpbf16ps(3, 7, 5); }
            }
        }
        for (int part = 0; part < 2 * BLOCKS; ++part) {
            switch (part) {  // a tile's number must be a constant
            case 0: _tile_stored(0, sums, 64); break;
            case 1: _tile_stored(1, sums, 64); break;
            case 2: _tile_stored(2, sums, 64); break;
            default: _tile_stored(3, sums, 64);
            }
            const int64_t first = 16 * (part % 2), from = 16 * (part / 2);
            for (int64_t r = first; r < rows && r < first + 16; ++r)
                for (int64_t i = from; i < call.n && i < from + 16; ++i) put(call, i, row + r, sums[r - first][i - from]);
        }
    }
    _tile_release();
}
