// Products of bfloat16 on CPUs with AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// One instruction multiplies sixteen rows of w with sixteen of x over 32 inputs. Rows of w are read in place. Of x it
// wants pairs of inputs one below the other, the sixteen rows side by side: `turn` brings them there once for all
// columns. A number of the result is one sum: of each 32 inputs the instruction adds up the products of the even ones, and of
// the odd ones, and adds both to it. That does not depend on what else is in the tile.
#pragma once
#include <algorithm>

#include "simd.h"

namespace amx {

typedef float Tile[16 * 16];

// What was written through `p` is in memory now: the instructions for tiles don't tell compilers what they read.
static inline void in_memory(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// Tiles 0 to 3 hold sums (columns, rows), 4 and 5 `inputs` of rows of w, 6 and 7 those of x, turned.
static inline void configure(int columns, int rows, int inputs) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int t = 0; t < 8; t++) {
        shape.rows[t] = t < 6 ? columns : inputs / 2;
        shape.bytes[t] = t == 4 || t == 5 ? inputs * 2 : rows * 4;
    }
    in_memory(&shape);
    _tile_loadconfig(&shape);
}

// Sixteen rows of 64 bytes, `apart` bytes from one another, become sixteen columns of words.
static inline void transpose(void* rows, int64_t apart) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((char*)rows + i * apart);
    ::transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512((char*)rows + i * apart, r[i]);
}

// Sixteen rows of x, ldx apart, in place. Reads and writes up to a whole multiple of 32 inputs.
static inline void turn(uint16_t* x, int64_t ldx, int64_t K) {
    for (int64_t k = 0; k < K; k += 32) transpose(x + k, ldx * 2);
}

// sums[g] += sixteen columns times the g-th sixteen rows, over the inputs [k, end); from zero where k is 0.
template <int GROUPS, int INPUTS>
static inline void column_tile(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t K, int64_t k, int64_t end,
                               Tile* sums) {
    if (k == 0) {
        _tile_zero(0);
        if constexpr (GROUPS > 1) _tile_zero(1);
        if constexpr (GROUPS > 2) _tile_zero(2);
        if constexpr (GROUPS > 3) _tile_zero(3);
    } else {
        in_memory(sums);
        _tile_loadd(0, sums[0], 64);
        if constexpr (GROUPS > 1) _tile_loadd(1, sums[1], 64);
        if constexpr (GROUPS > 2) _tile_loadd(2, sums[2], 64);
        if constexpr (GROUPS > 3) _tile_loadd(3, sums[3], 64);
    }
    for (; k < end; k += INPUTS) {  // the CPU prefetches w by itself: instructions for it make this slower
        _tile_loadd(4, w + k, K * 2);
        _tile_loadd(6, x + k, ldx * 2);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (GROUPS > 1) {
            _tile_loadd(7, x + 16 * ldx + k, ldx * 2);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (GROUPS > 2) {
            _tile_loadd(6, x + 32 * ldx + k, ldx * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (GROUPS > 3) {
            _tile_loadd(7, x + 48 * ldx + k, ldx * 2);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (GROUPS > 1) _tile_stored(1, sums[1], 64);
    if constexpr (GROUPS > 2) _tile_stored(2, sums[2], 64);
    if constexpr (GROUPS > 3) _tile_stored(3, sums[3], 64);
}

// The same of twice sixteen columns and one or two groups of rows, which needs the fewest loads: sums[g], sums[2 + g].
template <int GROUPS>
static inline void pair_of_tiles(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t K, Tile* sums) {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (GROUPS > 1) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += 32) {
        _tile_loadd(4, w + k, K * 2);
        _tile_loadd(6, x + k, ldx * 2);
        if constexpr (GROUPS > 1) _tile_loadd(7, x + 16 * ldx + k, ldx * 2);
        _tile_loadd(5, w + 16 * K + k, K * 2);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (GROUPS > 1) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (GROUPS > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(2, sums[2], 64);
    if constexpr (GROUPS > 1) {
        _tile_stored(1, sums[1], 64);
        _tile_stored(3, sums[3], 64);
    }
}

template <int INPUTS>
static inline void column_tiles(int64_t groups, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t K, int64_t k,
                                int64_t end, Tile* sums) {
    switch (groups) {
        case 1: column_tile<1, INPUTS>(x, ldx, w, K, k, end, sums); break;
        case 2: column_tile<2, INPUTS>(x, ldx, w, K, k, end, sums); break;
        case 3: column_tile<3, INPUTS>(x, ldx, w, K, k, end, sums); break;
        default: column_tile<4, INPUTS>(x, ldx, w, K, k, end, sums);
    }
}

template <class Put>
static inline void put_tile(Tile& sums, int64_t m, int64_t rows, int64_t n, int64_t columns, const Put& put) {
    if (rows > 4) transpose(sums, 64);
    const int64_t row = rows > 4 ? 16 : 1, column = rows > 4 ? 1 : 16;
    if (row == 16 && columns == 16)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < 16; j++) put(m + i, n + j, sums[i * 16 + j]);
    else
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++) put(m + i, n + j, sums[i * row + j * column]);
}

// As `product` (product.h), of rows of x that were turned sixteen by sixteen; K is a multiple of 16.
template <class Put>
static void product(const uint16_t* x, int64_t ldx, int64_t M, const uint16_t* w, int64_t begin, int64_t end, int64_t K,
                    const Put& put) {
    constexpr int64_t FEW = 64;  // rows whose sums fit into four tiles
    const int64_t lanes = std::min<int64_t>(M, 16), whole = K / 32 * 32;
    alignas(64) Tile sums[4];
    int64_t n = begin;
    in_memory(x);
    configure(16, lanes, 32);
    if (whole == K && (M <= 16 || M > FEW))
        for (; n + 32 <= end; n += 32)
            for (int64_t m = 0; m < M; m += 32) {
                const int64_t groups = M - m > 16 ? 2 : 1;
                (groups == 2 ? pair_of_tiles<2> : pair_of_tiles<1>)(x + m * ldx, ldx, w + n * K, K, sums);
                for (int64_t i = 0; i < 2 * groups; i++) {
                    const int64_t g = i % groups, side = i / groups, first = m + g * 16;
                    put_tile(sums[2 * side + g], first, std::min<int64_t>(M - first, 16), n + side * 16, 16, put);
                }
            }
    for (; n < end; n += 16) {
        const int64_t columns = std::min<int64_t>(end - n, 16);
        if (columns < 16) configure(columns, lanes, 32);
        for (int64_t m = 0; m < M; m += FEW) {
            const int64_t groups = std::min<int64_t>((M - m + 15) / 16, 4);
            column_tiles<32>(groups, x + m * ldx, ldx, w + n * K, K, 0, whole, sums);
            if (whole < K) {
                configure(columns, lanes, 16);
                column_tiles<16>(groups, x + m * ldx, ldx, w + n * K, K, whole, K, sums);
                configure(columns, lanes, 32);
            }
            for (int64_t g = 0; g < groups; g++) {
                const int64_t first = m + g * 16;
                put_tile(sums[g], first, std::min<int64_t>(M - first, 16), n, columns, put);
            }
        }
    }
    _tile_release();  // so that the system need not save tiles when it lets another program run
}

}  // namespace amx
