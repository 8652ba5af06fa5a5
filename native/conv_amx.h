// Convolutions on CPUs with AMX, which multiplies bfloat16 nine to thirteen times as fast as the other units fp32.
//
// Numbers are split into sums of two bfloat16, which keeps 16 bits of them. Of the product of two such sums that of the
// small parts is left out, which is as small as what they don't keep; three remain. (Three parts would keep all 24 bits;
// their six products take as long as Winograd's in fp32.)
//
// A block of outputs reads its part of the picture once, and splits it. Inputs of neighbouring outputs are neighbours in
// memory, so that each position of the window is just another address of the same tiles.
#pragma once
#include <vector>

#include "amx.h"
#include "pixels.h"
#include "team.h"

struct Split {
    static constexpr long PARTS = 2;
    static constexpr long INPUTS = 32, TILE = 16 * INPUTS;  // channels that an instruction multiplies; numbers of a tile
    static constexpr long WIDE = 32, MOST = 32;             // outputs of a block: in a row, and rows
    static constexpr long ROOM = 1 << 20;           // bytes of the second-level cache that a block's inputs may take
    static constexpr long PIXELS = 32, PANELS = 2;  // computed at once: four tiles of sums

    static inline Lanes silu(Lanes x) {  // by a reciprocal, which takes a third of a division's time and keeps 23 bits
        const __m512 one = _mm512_set1_ps(1.0f), y = _mm512_add_ps(one, (__m512)exponential(-x));
        __m512 inverse = _mm512_rcp14_ps(y);
        inverse = _mm512_fmadd_ps(inverse, _mm512_fnmadd_ps(y, inverse, one), inverse);
        return (Lanes)_mm512_mul_ps((__m512)x, inverse);
    }

    static long packed_size(long side, long in, long out) {  // bytes
        return up_to(COLUMNS, out) * up_to(INPUTS, in) * side * side * PARTS * sizeof(uint16_t);
    }

    static inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
    static inline __m512i words(__m256i part) { return _mm512_cvtepu16_epi32(part); }
    static inline __m512 without(__m512 x, __m512i part) {
        return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(part, 16)));
    }

    // weights (out, in, side, side) with strides -> (panel, 32 inputs, position, part, pair of inputs, column, input)
    static void pack(const float* weights, const long* stride, const Window& window, long in, long out, uint16_t* to,
                     Team::Call& team) {
        const long positions = window.side * window.side, depth = up_to(INPUTS, in);
        team.loop(up_to(COLUMNS, out) / COLUMNS * positions, [&](long item, long) {
            const long panel = item / positions, position = item % positions;
            for (long ci = 0; ci < depth; ci += INPUTS) {
                uint16_t* tile = to + ((panel * depth + ci) / INPUTS * positions + position) * PARTS * TILE;
                for (long half = 0; half < INPUTS; half += LANES) {
                    Lanes rows[LANES];
                    read_weights(weights, stride, window.side, position, panel * COLUMNS, out, ci + half, in, rows);
                    for (long i = 0; i < LANES; i += 2) {
                        __m512 even = (__m512)rows[i], odd = (__m512)rows[i + 1];
                        for (int part = 0; part < PARTS; part++) {
                            const __m512i x = words(rounded(even)), y = words(rounded(odd));
                            _mm512_storeu_si512(tile + part * TILE + (half + i) * COLUMNS,
                                                _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
                            even = without(even, x), odd = without(odd, y);
                        }
                    }
                }
            }
        });
    }

    // Sixteen or twice sixteen outputs by one or two panels, over all channels and positions. a, b: where the tiles of
    // the first position begin; pixel, row: from one pixel of a patch to the next. Small products are added first.
    template <int GROUPS, int SIDES>
    static void product(const uint16_t* a, const uint16_t* b, const uint16_t* w, long w_next, long depth,
                        const Window& window, long pixel, long row, float* sums) {
        const long pitch = pixel * window.stride * 2;
        const auto load_inputs = [&](long at) __attribute__((always_inline)) {
            _tile_loadd(4, a + at, pitch);
            if constexpr (GROUPS > 1) _tile_loadd(5, b + at, pitch);
        };
        const auto load_weights = [&](long at) __attribute__((always_inline)) {
            _tile_loadd(6, w + at, 64);
            if constexpr (SIDES > 1) _tile_loadd(7, w + at + w_next, 64);
        };
        const auto multiply = [&]() __attribute__((always_inline)) {
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (SIDES > 1) _tile_dpbf16ps(1, 4, 7);
            if constexpr (GROUPS > 1) _tile_dpbf16ps(2, 5, 6);
            if constexpr (GROUPS > 1 && SIDES > 1) _tile_dpbf16ps(3, 5, 7);
        };
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long c = 0; c < depth * PARTS; c += INPUTS * PARTS)
            for (long y = 0; y < window.side; y++)
                for (long x = 0; x < window.side; x++, w += PARTS * TILE) {
                    const long at = c + y * row + x * pixel;
                    load_inputs(at);
                    load_weights(TILE);
                    multiply();
                    load_inputs(at + INPUTS);
                    load_weights(0);
                    multiply();
                    load_inputs(at);
                    multiply();
                }
        _tile_stored(0, sums, PANELS * 64);
        if constexpr (SIDES > 1) _tile_stored(1, sums + COLUMNS, PANELS * 64);
        if constexpr (GROUPS > 1) _tile_stored(2, sums + 16 * PANELS * COLUMNS, PANELS * 64);
        if constexpr (GROUPS > 1 && SIDES > 1) _tile_stored(3, sums + 16 * PANELS * COLUMNS + COLUMNS, PANELS * 64);
    }

    static void convolve(const Input& in, const Window& window, const uint16_t* weights, const Output& out,
                         Team::Call& team) {
        const long threads = team.threads(), depth = up_to(INPUTS, in.channels), panels = out.panels();
        const long across = std::min(WIDE, up_to(16, out.width));  // outputs of a block's row
        const long patch_wide = (across - 1) * window.stride + window.side;
        const long fitting = (ROOM / (patch_wide * depth * PARTS * 2) - window.side) / window.stride + 1;
        const long rows = std::min({std::max(fitting, 4L), MOST, out.height});
        const long patch_high = (rows - 1) * window.stride + window.side;
        const long high = (out.height + rows - 1) / rows, wide = (out.width + across - 1) / across;
        const long blocks = in.batch * high * wide, idle = blocks >= 2 * threads ? 1 : 2 * threads / blocks;
        const long pairs = (panels + PANELS - 1) / PANELS, groups = std::min(idle, pairs);
        const long each = depth / INPUTS * window.side * window.side * PARTS * TILE;  // numbers of a panel
        const long pixel = depth * PARTS + INPUTS;  // (32 channels, part, channel); a power of two would share cache sets
        struct alignas(64) Own {
            Room<uint16_t> patch;
        };
        std::vector<Own> own(threads);
        team.loop(groups * blocks, [&](long item, long thread) {
            make(own[thread].patch, patch_high * patch_wide * pixel);
            uint16_t* patch = own[thread].patch.get();
            const long group = item / blocks, block = item % blocks, image = block / (high * wide);
            const long top = out.height * (block / wide % high) / high, left = block % wide * across;
            const long count = out.height * (block / wide % high + 1) / high - top;
            for (long row = 0; row < (count - 1) * window.stride + window.side; row++)
                for (long column = 0; column < patch_wide; column++) {
                    const long y = top * window.stride - window.before + row;
                    const long x = left * window.stride - window.before + column;
                    uint16_t* to = patch + (row * patch_wide + column) * pixel;
                    read_pixel(in, image, y, x, depth, silu, [&](long c, Lanes v) {
                        __m512 rest = (__m512)v;
                        for (int part = 0; part < PARTS; part++) {
                            const __m256i now = rounded(rest);
                            const long at = (c / INPUTS * PARTS + part) * INPUTS + c % INPUTS;
                            _mm256_storeu_si256((__m256i*)(to + at), now);
                            rest = without(rest, words(now));
                        }
                    });
                }
            alignas(64) float sums[PIXELS * PANELS * COLUMNS];
            amx::in_memory(patch);
            amx::configure(16, 16, INPUTS);
            const long per_row = across / 16, tiles = count * per_row;  // of sixteen outputs
            const auto corner = [&](long tile) {
                return patch + (tile / per_row * patch_wide + tile % per_row * 16) * window.stride * pixel;
            };
            for (long pair = pairs * group / groups; pair < pairs * (group + 1) / groups; pair++)
                for (long tile = 0; tile < tiles; tile += 2) {
                    const uint16_t* w = weights + pair * PANELS * each;
                    const bool two = tiles - tile > 1, both = panels - pair * PANELS > 1;
                    const auto pixel_of = [&](long i) {  // of the output, or -1 outside of it
                        const long at = tile + i / 16, y = top + at / per_row, x = left + at % per_row * 16 + i % 16;
                        return x < out.width ? (image * out.height + y) * out.width + x : -1;
                    };
                    for (long i = 0; i < (two ? PIXELS : 16); i++)  // while the product runs
                        if (const long at = pixel_of(i); at >= 0)
                            for (long c = 0; c < PANELS * COLUMNS; c += 16)
                                prefetch(out, at, pair * PANELS * COLUMNS + c);
                    (two ? both ? product<2, 2> : product<2, 1> : both ? product<1, 2> : product<1, 1>)(
                        corner(tile), two ? corner(tile + 1) : nullptr, w, each, depth, window, pixel,
                        patch_wide * pixel, sums);
                    amx::in_memory(sums);
                    for (long i = 0; i < (two ? PIXELS : 16); i++)
                        if (const long at = pixel_of(i); at >= 0)
                            for (long c = 0; c < PANELS * COLUMNS; c += LANES)
                                if (pair * PANELS * COLUMNS + c < out.channels)
                                    write_part(out, at, pair * PANELS * COLUMNS + c,
                                               read<Lanes>(sums + i * PANELS * COLUMNS + c));
                }
            _tile_release();  // so that the system need not save tiles when it lets another program run
        });
    }
};
