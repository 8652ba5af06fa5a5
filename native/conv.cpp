// Convolutions of the image tokenizer on channels-last fp32 activations, fused with the operations around them.
//
// 3x3 convolutions of stride 1 take Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308): F(4x4, 3x3) needs a
// quarter of the products of the definition. A block of tiles goes through these steps in the cache: a patch of the input
// is read (nearest-neighbour upsampling, GroupNorm and SiLU applied on the way), transformed, multiplied position by
// position with the transformed weights, transformed back, and bias and residual are added; where weights are more than
// pictures, the inputs of all blocks are transformed first. Everything else (1x1, stride 2) gathers its patches into the
// rows of one matrix product.
//
// Every output is one sum over the input channels in ascending order, whatever block, thread or batch it belongs to.
// CPUs with AMX have another way where 16 bits of a number are enough: conv_amx.h.
#include <cmath>
#include <vector>

#include "pixels.h"
#include "team.h"
#ifdef TILES
#include "conv_amx.h"
#endif

#ifdef SIXTEEN_LANES
static const int ROWS = 12, PANELS = 2;  // computed at once by a product: 24 vectors of sums, which fit into the registers
#else
static const int ROWS = 6, PANELS = 1;   // 12 vectors of sums
#endif
static const int VECTORS = COLUMNS / LANES;  // of a panel's row
static const long PIXELS = 48;  // outputs of a block of a direct convolution
static const long MOST_PANELS = 64;  // of such a block
static const long CHUNK = 64;  // pixels whose moments are summed at once
static const long FEW = 8;     // pixels summed in fp32 before the sum is added in fp64
static const long FEW_FLOATS = 4096;  // a thread reads them sooner than it shares them

// c (R, 16 P) = a (R, depth) b (P, depth, 16)
template <int R, int P>
static void product(const float* a, long a_stride, const float* b, long depth, float* c, long c_stride) {
    Lanes sums[R][P * VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) sums[r][v] = Lanes{};
    for (long k = 0; k < depth; k++) {
        Lanes row[P * VECTORS];
        for (int v = 0; v < P * VECTORS; v++)
            row[v] = read<Lanes>(b + v / VECTORS * depth * COLUMNS + k * COLUMNS + v % VECTORS * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Lanes x = everywhere(a[r * a_stride + k]);
            for (int v = 0; v < P * VECTORS; v++) sums[r][v] = multiply_add(x, row[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) std::memcpy(c + r * c_stride + v * LANES, &sums[r][v], sizeof(Lanes));
}

template <int R, int P>
static void product_of(long rows, const float* a, long a_stride, const float* b, long depth, float* c, long c_stride) {
    if constexpr (R > 1)
        if (rows < R) return product_of<R - 1, P>(rows, a, a_stride, b, depth, c, c_stride);
    product<R, P>(a, a_stride, b, depth, c, c_stride);
}

// c (rows, 16 panels) = a (rows, depth) b (panels, depth, 16), in evenly filled kernels
static void matrix_product(const float* a, long a_stride, const float* b, long depth, long panels, long rows, float* c,
                           long c_stride) {
    const long kernels = (rows + ROWS - 1) / ROWS;
    for (long p = 0, now; p < panels; p += now, b += now * depth * COLUMNS, c += now * COLUMNS) {
        now = panels - p < PANELS ? 1 : PANELS;
        for (long i = 0; i < kernels; i++) {
            const long first = rows * i / kernels, count = rows * (i + 1) / kernels - first;
            (now == 1 ? product_of<ROWS, 1> : product_of<ROWS, PANELS>)(
                count, a + first * a_stride, a_stride, b, depth, c + first * c_stride, c_stride);
        }
    }
}

// ---- Winograd: a tile of M x M outputs from N x N inputs

static const int M = 4, N = M + 2;
static const long HIGH = 4, WIDE = 6;  // tiles of a block

// F(4, 3) in one dimension with the points 0, +-A, +-B and infinity. These round less than the customary 1 and 2, five
// times in the worst output and twice on average: about as PyTorch's direct convolution does.
struct Filter {
    static constexpr double A = 11 / 16.0, B = 11 / 8.0;
    static constexpr float AA = A * A, BB = B * B, SUM = A * A + B * B, PRODUCT = A * A * B * B;
    static inline void input(const Row* d, long s, Row* v, long t) {
        const Lanes even_a = d[4 * s] - BB * d[2 * s], odd_a = float(A) * (d[3 * s] - BB * d[s]);
        const Lanes even_b = d[4 * s] - AA * d[2 * s], odd_b = float(B) * (d[3 * s] - AA * d[s]);
        v[0] = PRODUCT * d[0] - SUM * d[2 * s] + d[4 * s];
        v[t] = even_a + odd_a;
        v[2 * t] = even_a - odd_a;
        v[3 * t] = even_b + odd_b;
        v[4 * t] = even_b - odd_b;
        v[5 * t] = PRODUCT * d[s] - SUM * d[3 * s] + d[5 * s];
    }
    static inline void weights(const Row* g, long s, Row* u, long t) {
        const float a = 1 / (2 * A * A * (A * A - B * B)), b = 1 / (2 * B * B * (B * B - A * A));
        const Lanes even_a = a * (g[0] + AA * g[2 * s]), odd_a = float(A) * a * g[s];
        const Lanes even_b = b * (g[0] + BB * g[2 * s]), odd_b = float(B) * b * g[s];
        u[0] = (1 / PRODUCT) * g[0];
        u[t] = even_a + odd_a;
        u[2 * t] = even_a - odd_a;
        u[3 * t] = even_b + odd_b;
        u[4 * t] = even_b - odd_b;
        u[5 * t] = g[2 * s];
    }
    static inline void output(const Row* m, long s, Row* y, long t) {
        const Lanes even_a = m[s] + m[2 * s], odd_a = float(A) * (m[s] - m[2 * s]);
        const Lanes even_b = m[3 * s] + m[4 * s], odd_b = float(B) * (m[3 * s] - m[4 * s]);
        y[0] = m[0] + even_a + even_b;
        y[t] = odd_a + odd_b;
        y[2 * t] = AA * even_a + BB * even_b;
        y[3 * t] = AA * odd_a + BB * odd_b + m[5 * s];
    }
};

// A convolution by tiles: blocks of HIGH x WIDE tiles, whose numbers lie position by position of a tile.
struct Tiles {
    const Input& in;
    const Output& out;
    const float* weights;  // (out, in, 3, 3)
    const long* stride;
    const long depth = up_to(LANES, in.channels), panels = out.panels();
    const long tiles_high = (out.height + M - 1) / M, tiles_wide = (out.width + M - 1) / M;
    const long high = (tiles_high + HIGH - 1) / HIGH, wide = (tiles_wide + WIDE - 1) / WIDE, blocks = in.batch * high * wide;
    static constexpr long MOST = HIGH * WIDE, PATCH_HIGH = HIGH * M + 2, PATCH_WIDE = WIDE * M + 2;

    struct Block {
        long image, top, left, rows, across;  // in tiles
    };
    Block block(long i) const {
        const long top = i / wide % high * HIGH, left = i % wide * WIDE;
        return {i / (high * wide), top, left, std::min(HIGH, tiles_high - top), std::min(WIDE, tiles_wide - left)};
    }

    // Numbers from one position to the next. Not a power of two: those would share cache sets.
    static long step(long numbers) { return numbers + 16; }
    long bytes_of_weights() const { return N * N * step(panels * depth * COLUMNS) * sizeof(float); }

    // The two ways below give the same bits because they run the same instructions: these three are not inlined, else
    // compilers might fuse products and sums here and not there.

    // Weights of the panel, from input channel ci -> (position, in, 16), the positions `apart`
    __attribute__((noinline)) void transform_weights(long panel, long ci, float* to, long apart) const {
        Row g[LANES][VECTORS][9];  // (input channel, part of the panel, weight of the window)
        for (int part = 0; part < VECTORS; part++)
            for (int k = 0; k < 9; k++) {
                Lanes rows[LANES];
                read_weights(weights, stride, 3, k, panel * COLUMNS + part * LANES, out.channels, ci, in.channels, rows);
                for (int i = 0; i < LANES; i++) g[i][part][k] = rows[i];
            }
        for (int i = 0; i < LANES; i++)
            for (int part = 0; part < VECTORS; part++) {
                Row rows[N * 3], u[N * N];
                for (int x = 0; x < 3; x++) Filter::weights(g[i][part] + x, 3, rows + x, 3);
                for (int y = 0; y < N; y++) Filter::weights(rows + 3 * y, 1, u + N * y, 1);
                for (int k = 0; k < N * N; k++)
                    std::memcpy(to + k * apart + (ci + i) * COLUMNS + part * LANES, &u[k], sizeof u[k]);
            }
    }

    // The block's part of the picture -> (position, tile, in), the positions `apart`; `patch` is room for it.
    __attribute__((noinline)) void transform_inputs(const Block& b, float* patch, float* to, long apart) const {
        for (long y = 0; y < b.rows * M + 2; y++)
            for (long x = 0; x < b.across * M + 2; x++) {
                float* pixel = patch + (y * PATCH_WIDE + x) * depth;
                prefetch(in, b.image, b.top * M + y, b.left * M + x - 1);  // the next row
                read_pixel(in, b.image, b.top * M + y - 1, b.left * M + x - 1, depth, silu,
                           [&](long c, Lanes v) { std::memcpy(pixel + c, &v, sizeof v); });
            }
        for (long t = 0; t < b.rows * b.across; t++) {
            const float* from = patch + (t / b.across * M * PATCH_WIDE + t % b.across * M) * depth;
            for (long c = 0; c < depth; c += LANES) {
                Row half[N * N];
                const Row* d = (const Row*)(from + c);
                Row* v = (Row*)(to + t * depth + c);
                for (int x = 0; x < N; x++)
                    Filter::input(d + x * depth / LANES, PATCH_WIDE * depth / LANES, half + x, N);
                for (int y = 0; y < N; y++) Filter::input(half + N * y, 1, v + N * y * apart / LANES, apart / LANES);
            }
        }
    }

    // `count` panels of the block's outputs: products of all positions into `sums`, then back from tiles to pixels.
    __attribute__((noinline)) void multiply(const Block& b, const float* inputs, long inputs_apart,
                                            const float* transformed, long weights_apart, long first_panel, long count,
                                            float* sums) const {
        const long columns = count * COLUMNS, apart = step(MOST * columns), tiles = b.rows * b.across;
        for (int i = 0; i < N * N; i++)
            matrix_product(inputs + i * inputs_apart, depth, transformed + i * weights_apart, depth, count, tiles,
                           sums + i * apart, columns);
        for (long t = 0; t < tiles; t++) {
            const long y0 = (b.top + t / b.across) * M, x0 = (b.left + t % b.across) * M;
            const long end = std::min(columns, out.channels - first_panel * COLUMNS);
            const long first = (b.image * out.height + y0) * out.width + x0;  // pixel
            for (long c = 0; c < end; c += LANES) {  // meanwhile the next tile's outputs are fetched
                for (long i = 0; i < M; i++)
                    for (long j = 0; j < M; j++) prefetch(out, first + i * out.width + M + j, first_panel * COLUMNS + c);
                Row half[M * N], y[M * M];
                const Row* m = (const Row*)(sums + t * columns + c);
                for (int x = 0; x < N; x++) Filter::output(m + x * apart / LANES, N * apart / LANES, half + x, N);
                for (int i = 0; i < M; i++) Filter::output(half + N * i, 1, y + M * i, 1);
                for (long i = 0; i < M && y0 + i < out.height; i++)
                    for (long j = 0; j < M && x0 + j < out.width; j++)
                        write_part(out, first + i * out.width + j, first_panel * COLUMNS + c, y[M * i + j]);
            }
        }
    }

    struct alignas(64) Own {  // of a thread
        Room<float> patch, inputs, weights, sums;
    };

    // Many tiles: all weights are transformed first, into `packed`; then each block is on its own.
    void block_by_block(float* packed, Team::Call& team) const {
        const long threads = team.threads(), apart = step(panels * depth * COLUMNS);
        team.loop(panels * depth / LANES, [&](long item, long) {
            const long panel = item / (depth / LANES);
            transform_weights(panel, item % (depth / LANES) * LANES, packed + panel * depth * COLUMNS, apart);
        });
        // The panels are split where the weights overflow the shared cache, or where there are too few blocks for all.
        const long heavy = (bytes_of_weights() >> 24) + 1, idle = blocks >= 2 * threads ? 1 : 2 * threads / blocks;
        const long groups = std::min(std::max(heavy, idle), panels), most = (panels + groups - 1) / groups;
        const long inputs_apart = step(MOST * depth);
        std::vector<Own> own(threads);
        team.loop(groups * blocks, [&](long item, long thread) {
            Own& mine = own[thread];
            make(mine.patch, PATCH_HIGH * PATCH_WIDE * depth);
            make(mine.inputs, N * N * inputs_apart);
            make(mine.sums, N * N * step(MOST * most * COLUMNS));
            const long group = item / blocks, first = panels * group / groups;
            const Block b = block(item % blocks);
            transform_inputs(b, mine.patch.get(), mine.inputs.get(), inputs_apart);
            multiply(b, mine.inputs.get(), inputs_apart, packed + first * depth * COLUMNS, apart, first,
                     panels * (group + 1) / groups - first, mine.sums.get());
        });
    }

    // Few tiles, such as those of wide layers at low resolution: all inputs are transformed first, into `packed`, for they
    // are less than the transformed weights, which are four times as much as the weights. A panel's transformed weights
    // are used up before the next panel's are made.
    bool few(long threads) const {
        return N * N * step(blocks * MOST * depth) * (long)sizeof(float) <= bytes_of_weights() && panels >= 2 * threads;
    }
    void panel_by_panel(float* packed, Team::Call& team) const {
        const long threads = team.threads(), inputs_apart = step(blocks * MOST * depth);
        const long most = panels < 2 * threads * PANELS ? 1 : PANELS, apart = step(most * depth * COLUMNS);
        std::vector<Own> own(threads);
        team.loop(blocks, [&](long i, long thread) {
            make(own[thread].patch, PATCH_HIGH * PATCH_WIDE * depth);
            transform_inputs(block(i), own[thread].patch.get(), packed + i * MOST * depth, inputs_apart);
        });
        team.loop((panels + most - 1) / most, [&](long item, long thread) {
            Own& mine = own[thread];
            make(mine.weights, N * N * apart);
            make(mine.sums, N * N * step(MOST * most * COLUMNS));
            const long first = item * most, count = std::min(most, panels - first);
            for (long p = 0; p < count; p++)
                for (long ci = 0; ci < depth; ci += LANES)
                    transform_weights(first + p, ci, mine.weights.get() + p * depth * COLUMNS, apart);
            for (long i = 0; i < blocks; i++)
                multiply(block(i), packed + i * MOST * depth, inputs_apart, mine.weights.get(), apart, first, count,
                         mine.sums.get());
        });
    }
};

// ---- any other window: patches are gathered into the rows of one matrix product

// weights (out, in, side, side) with strides -> (panel, side * side * in, 16)
static void pack_weights(const float* weights, const long* stride, long side, long in, long out, float* to,
                         Team::Call& team) {
    const long depth = up_to(LANES, in), panels = (out + COLUMNS - 1) / COLUMNS, positions = side * side;
    team.loop(panels * positions, [&](long item, long) {
        const long p = item / positions, k = item % positions;
        for (long ci = 0; ci < depth; ci += LANES)
            for (int part = 0; part < VECTORS; part++) {
                Lanes rows[LANES];
                read_weights(weights, stride, side, k, p * COLUMNS + part * LANES, out, ci, in, rows);
                for (long i = 0; i < LANES; i++)
                    std::memcpy(to + (item * depth + ci + i) * COLUMNS + part * LANES, &rows[i], sizeof rows[i]);
            }
    });
}

static void convolve_windows(const Input& in, const Window& window, const float* weights, const Output& out,
                             Team::Call& team) {
    const long threads = team.threads();
    const long depth = up_to(LANES, in.channels), area = window.side * window.side, all = area * depth;
    const long panels = out.panels();
    const long pixels = in.batch * out.height * out.width, blocks = (pixels + PIXELS - 1) / PIXELS;
    const long idle = blocks >= 2 * threads ? 1 : 2 * threads / blocks;
    const long groups = std::min(std::max((panels + MOST_PANELS - 1) / MOST_PANELS, idle), panels);
    const long columns = (panels + groups - 1) / groups * COLUMNS;
    struct alignas(64) Own {
        Room<float> inputs, outputs;
    };
    std::vector<Own> own(threads);
    team.loop(groups * blocks, [&](long item, long thread) {
        Own& mine = own[thread];
        make(mine.inputs, PIXELS * all);
        make(mine.outputs, PIXELS * columns);
        float *inputs = mine.inputs.get(), *outputs = mine.outputs.get();
        const long group = item / blocks, first = item % blocks * PIXELS, rows = std::min(PIXELS, pixels - first);
        const long first_panel = panels * group / groups, count = panels * (group + 1) / groups - first_panel;
        for (long r = 0; r < rows; r++) {
            const long image = (first + r) / (out.height * out.width), at = (first + r) % (out.height * out.width);
            const long y = at / out.width * window.stride - window.before;
            const long x = at % out.width * window.stride - window.before;
            for (long k = 0; k < area; k++) {
                float* to = inputs + r * all + k * depth;
                read_pixel(in, image, y + k / window.side, x + k % window.side, depth, silu,
                           [&](long c, Lanes v) { std::memcpy(to + c, &v, sizeof v); });
            }
        }
        matrix_product(inputs, all, weights + first_panel * all * COLUMNS, all, count, rows, outputs, columns);
        const long end = std::min(count * COLUMNS, out.channels - first_panel * COLUMNS);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < end; c += LANES)
                write_part(out, first + r, first_panel * COLUMNS + c, read<Lanes>(outputs + r * columns + c));
    });
}

// ---- GroupNorm

// Sums and sums of squares of each channel of one chunk of pixels.
static void chunk_moments(const float* x, long pixels, long channels, double* sums, double* squares) {
    std::fill(sums, sums + channels, 0.0);
    std::fill(squares, squares + channels, 0.0);
    const auto add = [](double* to, const float* few, long count) {
        for (long i = 0; i < count; i++) to[i] += few[i];
    };
    for (long first = 0; first < pixels; first += FEW)
        for (long c = 0; c < channels; c += LANES) {
            const long count = std::min<long>(LANES, channels - c);
            Lanes few = {}, few_squares = {};
            for (long i = first; i < std::min(first + FEW, pixels); i++) {
                __builtin_prefetch(x + (i + 2 * FEW) * channels + c);  // norms take half the time by it
                const Lanes v = load_part<Lanes>(x + i * channels + c, count);
                few += v;
                few_squares = multiply_add(v, v, few_squares);
            }
            add(sums + c, (const float*)&few, count);
            add(squares + c, (const float*)&few_squares, count);
        }
}

// GroupNorm as a factor and a summand for each channel of each image: scale and shift (batch, channels).
struct Norm {
    const float *weight, *bias;  // (channels,) each
    long groups;
    double eps;
};

static void group_norm(const float* x, long batch, long pixels, long channels, const Norm& norm, float* scale,
                       float* shift, Team::Call& team) {
    const long chunks = (pixels + CHUNK - 1) / CHUNK, each = channels / norm.groups;
    std::vector<double> moments(batch * chunks * 2 * channels);
    team.loop(batch * chunks, [&](long item, long) {
        const long first = item % chunks * CHUNK;
        double* sums = moments.data() + item * 2 * channels;
        chunk_moments(x + (item / chunks * pixels + first) * channels, std::min(CHUNK, pixels - first), channels, sums,
                      sums + channels);
    }, FEW_FLOATS / (CHUNK * channels) + 1);
    team.loop(batch * norm.groups, [&](long item, long) {
        const long image = item / norm.groups, group = item % norm.groups;
        double sum = 0, square = 0;
        for (long chunk = 0; chunk < chunks; chunk++) {
            const double* sums = moments.data() + (image * chunks + chunk) * 2 * channels;
            for (long c = group * each; c < (group + 1) * each; c++) sum += sums[c], square += sums[channels + c];
        }
        const double mean = sum / (each * pixels);
        const double variance = std::max(square / (each * pixels) - mean * mean, 0.0);
        const double inverse = 1 / std::sqrt(variance + norm.eps);
        for (long c = group * each; c < (group + 1) * each; c++) {
            scale[image * channels + c] = norm.weight[c] * inverse;
            shift[image * channels + c] = norm.bias[c] - mean * norm.weight[c] * inverse;
        }
    }, FEW_FLOATS / (chunks * each) + 1);
}

// ---- what Python calls; activations are channels-last, weights have any strides

extern "C" {

// Whether `split` does something: see conv_amx.h.
int splits() {
#ifdef TILES
    return 1;
#else
    return 0;
#endif
}

// Bytes that the packed weights take.
long packed_size(int winograd, long side, long in, long out, int split) {
#ifdef TILES
    if (split) return Split::packed_size(side, in, out);
#endif
    const long depth = up_to(LANES, in), panels = (out + COLUMNS - 1) / COLUMNS;
    return (winograd ? N * N * Tiles::step(panels * depth * COLUMNS) : panels * side * side * depth * COLUMNS) *
           sizeof(float);
}

// y = residual + convolution(silu(norm(x))) + bias; what is null or 0 is left out. `packed`: room for the weights.
// winograd: for windows of 3, stride 1 and zeros all around only. split: products keep 16 bits, and are faster.
void convolution(int winograd, const float* x, long batch, long height, long width, long in, const float* norm_weight,
                 const float* norm_bias, long groups, double eps, int silu, int upsample, const float* weights,
                 const long* weight_stride, long side, long stride, long before, void* packed, const float* bias,
                 const float* residual, float* y, long out_height, long out_width, long out, int split, int threads) {
    in_huge_pages(y, batch * out_height * out_width * out * sizeof(float));
    in_huge_pages(packed, packed_size(winograd, side, in, out, split));
    Team::Call team(threads);
    std::vector<float> scaling(groups ? 2 * batch * in : 0);
    float *scale = nullptr, *shift = nullptr;
    if (groups) {
        scale = scaling.data(), shift = scale + batch * in;
        group_norm(x, batch, height * width, in, Norm{norm_weight, norm_bias, groups, eps}, scale, shift, team);
    }
    const Input input{x, scale, shift, batch, height, width, in, silu, upsample};
    const Output output{y, bias, residual, out_height, out_width, out};
    const Window window{side, stride, before};
#ifdef TILES
    if (split) {
        Split::pack(weights, weight_stride, window, in, out, (uint16_t*)packed, team);
        return Split::convolve(input, window, (const uint16_t*)packed, output, team);
    }
#endif
    if (winograd) {
        const Tiles tiles{input, output, weights, weight_stride};
        if (tiles.few(team.threads())) tiles.panel_by_panel((float*)packed, team);
        else tiles.block_by_block((float*)packed, team);
    } else {
        pack_weights(weights, weight_stride, side, in, out, (float*)packed, team);
        convolve_windows(input, window, (const float*)packed, output, team);
    }
}

}
