// Convolutions of the image tokenizer on channels-last fp32 activations, fused with the operations around them.
//
// 3x3 convolutions of stride 1 take Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308): F(4x4, 3x3) needs a
// quarter of the products of the definition. A block of tiles goes through all steps in the cache: a patch of the input
// is read (nearest-neighbour upsampling, GroupNorm and SiLU applied on the way), transformed, multiplied position by
// position with the transformed weights, transformed back, and bias and residual are added. Everything else (1x1,
// stride 2) gathers its patches into the rows of one matrix product.
//
// Every output is one sum over the input channels in ascending order, whatever block, thread or batch it belongs to.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>
#include "simd.h"
#include "team.h"

typedef double d8 __attribute__((vector_size(64)));
typedef float m8 __attribute__((vector_size(32), aligned(4), may_alias));  // eight floats in memory, at any address

static const int COLUMNS = 16;  // of a panel of weights
#ifdef SIXTEEN_LANES
typedef f16 Lanes;
static const int ROWS = 12, PANELS = 2;  // computed at once by a product: 24 vectors of sums, which fit into the registers
static inline f16 everywhere(float x) { return (f16)_mm512_set1_ps(x); }
#else
typedef f8 Lanes;
static const int ROWS = 6, PANELS = 1;   // 12 vectors of sums
static inline f8 everywhere(float x) { return all(x); }
#endif
static const int LANES = sizeof(Lanes) / sizeof(float), VECTORS = COLUMNS / LANES;
static const long PIXELS = 48;  // outputs of a block of a direct convolution
static const long MOST_PANELS = 64;  // of such a block
static const long CHUNK = 64;  // pixels whose moments are summed at once
static const long FEW = 8;     // pixels summed in fp32 before the sum is added in fp64
static const long FEW_FLOATS = 4096;  // a thread reads them sooner than it shares them

struct Input {
    const float* values;  // (batch, height, width, channels)
    const float *scale, *shift;  // (batch, channels) each, or null: taken as it is
    long batch, height, width, channels;
    int silu, upsample;
    long padded() const { return (channels + 7) / 8 * 8; }
};

struct Output {
    float* values;  // (batch, height, width, channels)
    const float *bias, *residual;  // (channels), and like values; each may be null
    long height, width, channels;
    long panels() const { return (channels + COLUMNS - 1) / COLUMNS; }
};

struct Free {
    void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float, Free> Floats;

static void make(Floats& room, long count) {  // room for so many, unless it was made before
    if (!room) room.reset((float*)std::aligned_alloc(64, (count * 4 + 63) / 64 * 64));
}

static inline f8 load_part(const float* p, long n) {
    if (n >= 8) return load(p);
    float full[8] = {0};
    for (long i = 0; i < n; i++) full[i] = p[i];
    return load(full);
}

static inline f8 load_strided(const float* p, long stride, long n) {
    if (stride == 1) return load_part(p, n);
    float full[8] = {0};
    for (long i = 0; i < std::min(n, 8L); i++) full[i] = p[i * stride];
    return load(full);
}

static inline void store_part(float* p, f8 x, long n) {
    if (n >= 8) return store(p, x);
    for (long i = 0; i < n; i++) p[i] = x[i];
}

// One pixel, its channels padded with zeros to a multiple of eight; zeros outside of the picture.
static inline void read_pixel(float* to, const Input& in, long image, long y, long x) {
    const long padded = in.padded();
    if (y < 0 || x < 0 || y >= in.height << in.upsample || x >= in.width << in.upsample) {
        std::memset(to, 0, padded * sizeof(float));
        return;
    }
    const float* from = in.values + ((image * in.height + (y >> in.upsample)) * in.width + (x >> in.upsample)) *
                        in.channels;
    const float *scale = in.scale + image * in.channels, *shift = in.shift + image * in.channels;
    for (long c = 0; c < padded; c += 8) {
        const long n = in.channels - c;
        f8 v = load_part(from + c, n);
        if (in.scale) v = v * load_part(scale + c, n) + load_part(shift + c, n);
        if (in.silu) v = v / (all(1.0f) + exponential(-v));
        store(to + c, v);
    }
}

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

static inline void write_part(const Output& out, long pixel, long c, f8 v) {
    const long n = out.channels - c, at = pixel * out.channels + c;
    if (out.bias) v += load_part(out.bias + c, n);
    if (out.residual) v += load_part(out.residual + at, n);
    store_part(out.values + at, v, n);
}

// ---- Winograd: a tile of M x M outputs from N x N inputs

static const int M = 4, N = M + 2;
static const long HIGH = 4, WIDE = 6;  // tiles of a block

// F(4, 3) in one dimension with the points 0, +-A, +-B and infinity. These round less than the customary 1 and 2, five
// times in the worst output and twice on average: about as PyTorch's direct convolution does.
struct Filter {
    static constexpr double A = 11 / 16.0, B = 11 / 8.0;
    static constexpr float AA = A * A, BB = B * B, SUM = A * A + B * B, PRODUCT = A * A * B * B;
    static inline void input(const m8* d, long s, m8* v, long t) {
        const f8 even_a = d[4 * s] - BB * d[2 * s], odd_a = float(A) * (d[3 * s] - BB * d[s]);
        const f8 even_b = d[4 * s] - AA * d[2 * s], odd_b = float(B) * (d[3 * s] - AA * d[s]);
        v[0] = PRODUCT * d[0] - SUM * d[2 * s] + d[4 * s];
        v[t] = even_a + odd_a;
        v[2 * t] = even_a - odd_a;
        v[3 * t] = even_b + odd_b;
        v[4 * t] = even_b - odd_b;
        v[5 * t] = PRODUCT * d[s] - SUM * d[3 * s] + d[5 * s];
    }
    static inline void weights(const m8* g, long s, m8* u, long t) {
        const float a = 1 / (2 * A * A * (A * A - B * B)), b = 1 / (2 * B * B * (B * B - A * A));
        const f8 even_a = a * (g[0] + AA * g[2 * s]), odd_a = float(A) * a * g[s];
        const f8 even_b = b * (g[0] + BB * g[2 * s]), odd_b = float(B) * b * g[s];
        u[0] = (1 / PRODUCT) * g[0];
        u[t] = even_a + odd_a;
        u[2 * t] = even_a - odd_a;
        u[3 * t] = even_b + odd_b;
        u[4 * t] = even_b - odd_b;
        u[5 * t] = g[2 * s];
    }
    static inline void output(const m8* m, long s, m8* y, long t) {
        const f8 even_a = m[s] + m[2 * s], odd_a = float(A) * (m[s] - m[2 * s]);
        const f8 even_b = m[3 * s] + m[4 * s], odd_b = float(B) * (m[3 * s] - m[4 * s]);
        y[0] = m[0] + even_a + even_b;
        y[t] = odd_a + odd_b;
        y[2 * t] = AA * even_a + BB * even_b;
        y[3 * t] = AA * odd_a + BB * odd_b + m[5 * s];
    }
};

// Floats from one position's transformed weights to the next. Not a power of two: those would share cache sets.
static long position_stride(long depth, long panels) { return panels * depth * COLUMNS + 16; }

// weights (out, in, 3, 3) with strides -> (position, panel, in, 16)
static void transform_weights(const float* weights, const long* stride, long in, long out, float* to,
                              Team::Call& team) {
    const long depth = (in + 7) / 8 * 8, panels = (out + COLUMNS - 1) / COLUMNS, step = position_stride(depth, panels);
    team.loop(panels * depth / 8, [&](long item, long) {
        const long p = item / (depth / 8), ci = item % (depth / 8) * 8;
        m8 g[8][2][9];  // (input channel, half of the panel, weight of the window)
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 9; k++) {
                for (long i = 0; i < 8; i++) {
                    const long co = p * COLUMNS + half * 8 + i;
                    const float* from = weights + co * stride[0] + ci * stride[1] + k / 3 * stride[2] +
                                        k % 3 * stride[3];
                    const f8 row = co < out ? load_strided(from, stride[1], in - ci) : all(0.0f);
                    for (int j = 0; j < 8; j++) g[j][half][k][i] = row[j];
                }
            }
        for (int i = 0; i < 8; i++)
            for (int half = 0; half < 2; half++) {
                m8 rows[N * 3], u[N * N];
                for (int x = 0; x < 3; x++) Filter::weights(g[i][half] + x, 3, rows + x, 3);
                for (int y = 0; y < N; y++) Filter::weights(rows + 3 * y, 1, u + N * y, 1);
                for (int k = 0; k < N * N; k++)
                    store(to + k * step + (p * depth + ci + i) * COLUMNS + half * 8, u[k]);
            }
    });
}

static void convolve_tiles(const Input& in, const float* weights, const Output& out, Team::Call& team) {
    const long threads = team.threads();
    const long depth = in.padded(), panels = out.panels(), step = position_stride(depth, panels);
    const long tiles_high = (out.height + M - 1) / M, tiles_wide = (out.width + M - 1) / M;
    const long high = (tiles_high + HIGH - 1) / HIGH, wide = (tiles_wide + WIDE - 1) / WIDE;
    const long blocks = in.batch * high * wide;
    // The panels are split where the weights overflow the shared cache, or where there are too few blocks for all.
    const long heavy = (N * N * step * 4 >> 24) + 1, idle = blocks >= 2 * threads ? 1 : 2 * threads / blocks;
    const long groups = std::min(std::max(heavy, idle), panels);
    const long most = HIGH * WIDE, columns = ((panels + groups - 1) / groups) * COLUMNS;
    const long in_step = most * depth + 16, out_step = most * columns + 16;
    const long patch_wide = WIDE * M + 2, patch_high = HIGH * M + 2;
    struct alignas(64) Own {
        Floats patch, inputs, outputs;
    };
    std::vector<Own> own(threads);
    team.loop(groups * blocks, [&](long item, long thread) {
        Own& mine = own[thread];
        make(mine.patch, patch_high * patch_wide * depth);
        make(mine.inputs, N * N * in_step);
        make(mine.outputs, N * N * out_step);
        float *patch = mine.patch.get(), *inputs = mine.inputs.get(), *outputs = mine.outputs.get();
        const long group = item / blocks, block = item % blocks, image = block / (high * wide);
        const long first_panel = panels * group / groups, count = panels * (group + 1) / groups - first_panel;
        const long top = block / wide % high * HIGH, left = block % wide * WIDE;  // in tiles
        const long rows = std::min(HIGH, tiles_high - top), across = std::min(WIDE, tiles_wide - left);
        for (long y = 0; y < rows * M + 2; y++)
            for (long x = 0; x < across * M + 2; x++)
                read_pixel(patch + (y * patch_wide + x) * depth, in, image, top * M + y - 1, left * M + x - 1);
        for (long t = 0; t < rows * across; t++) {
            const float* from = patch + (t / across * M * patch_wide + t % across * M) * depth;
            for (long c = 0; c < depth; c += 8) {
                m8 half[N * N];
                const m8* d = (const m8*)(from + c);
                m8* v = (m8*)(inputs + t * depth + c);
                for (int x = 0; x < N; x++) Filter::input(d + x * depth / 8, patch_wide * depth / 8, half + x, N);
                for (int y = 0; y < N; y++) Filter::input(half + N * y, 1, v + N * y * in_step / 8, in_step / 8);
            }
        }
        for (int i = 0; i < N * N; i++)
            matrix_product(inputs + i * in_step, depth, weights + i * step + first_panel * depth * COLUMNS, depth,
                           count, rows * across, outputs + i * out_step, columns);
        for (long t = 0; t < rows * across; t++) {
            const long y0 = (top + t / across) * M, x0 = (left + t % across) * M;
            const long end = std::min(count * COLUMNS, out.channels - first_panel * COLUMNS);
            for (long c = 0; c < end; c += 8) {
                m8 half[M * N], y[M * M];
                const m8* m = (const m8*)(outputs + t * columns + c);
                for (int x = 0; x < N; x++) Filter::output(m + x * out_step / 8, N * out_step / 8, half + x, N);
                for (int i = 0; i < M; i++) Filter::output(half + N * i, 1, y + M * i, 1);
                for (long i = 0; i < M && y0 + i < out.height; i++)
                    for (long j = 0; j < M && x0 + j < out.width; j++)
                        write_part(out, (image * out.height + y0 + i) * out.width + x0 + j,
                                   first_panel * COLUMNS + c, y[M * i + j]);
            }
        }
    });
}

// ---- any other window: patches are gathered into the rows of one matrix product

struct Window {
    long side, stride, before;  // `before`: zeros above and left of the picture; below and right as many as it takes
};

// weights (out, in, side, side) with strides -> (panel, side * side * in, 16)
static void pack_weights(const float* weights, const long* stride, long side, long in, long out, float* to,
                         Team::Call& team) {
    const long depth = (in + 7) / 8 * 8, panels = (out + COLUMNS - 1) / COLUMNS, all = side * side * depth;
    team.loop(panels, [&](long p, long) {
        for (long column = 0; column < COLUMNS; column++)
            for (long k = 0; k < side * side; k++) {
                const long co = p * COLUMNS + column;
                const float* from = weights + co * stride[0] + k / side * stride[2] + k % side * stride[3];
                for (long ci = 0; ci < depth; ci++)
                    to[(p * all + k * depth + ci) * COLUMNS + column] = co < out && ci < in ? from[ci * stride[1]] : 0;
            }
    });
}

static void convolve_windows(const Input& in, const Window& window, const float* weights, const Output& out,
                             Team::Call& team) {
    const long threads = team.threads();
    const long depth = in.padded(), area = window.side * window.side, all = area * depth, panels = out.panels();
    const long pixels = in.batch * out.height * out.width, blocks = (pixels + PIXELS - 1) / PIXELS;
    const long idle = blocks >= 2 * threads ? 1 : 2 * threads / blocks;
    const long groups = std::min(std::max((panels + MOST_PANELS - 1) / MOST_PANELS, idle), panels);
    const long columns = (panels + groups - 1) / groups * COLUMNS;
    struct alignas(64) Own {
        Floats inputs, outputs;
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
            for (long k = 0; k < area; k++)
                read_pixel(inputs + r * all + k * depth, in, image, y + k / window.side, x + k % window.side);
        }
        matrix_product(inputs, all, weights + first_panel * all * COLUMNS, all, count, rows, outputs, columns);
        const long end = std::min(count * COLUMNS, out.channels - first_panel * COLUMNS);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < end; c += 8)
                write_part(out, first + r, first_panel * COLUMNS + c, load(outputs + r * columns + c));
    });
}

// ---- GroupNorm

// Sums and sums of squares of each channel of one chunk of pixels.
static void chunk_moments(const float* x, long pixels, long channels, double* sums, double* squares) {
    for (long c = 0; c < channels; c += 8) {
        d8 sum = {0}, square = {0};
        for (long i = 0; i < pixels;) {
            f8 few = all(0.0f), few_squares = all(0.0f);
            for (const long end = std::min(i + FEW, pixels); i < end; i++) {
                const f8 v = load_part(x + i * channels + c, channels - c);
                few += v;
                few_squares += v * v;
            }
            sum += __builtin_convertvector(few, d8);
            square += __builtin_convertvector(few_squares, d8);
        }
        for (long i = 0; i < std::min(8L, channels - c); i++) sums[c + i] = sum[i], squares[c + i] = square[i];
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

// Floats that the packed weights take.
long packed_size(int winograd, long side, long in, long out) {
    const long depth = (in + 7) / 8 * 8, panels = (out + COLUMNS - 1) / COLUMNS;
    return winograd ? N * N * position_stride(depth, panels) : panels * side * side * depth * COLUMNS;
}

// y = residual + convolution(silu(norm(x))) + bias; what is null or 0 is left out. `packed`: room for the weights.
// winograd: for windows of 3, stride 1 and zeros all around only.
void convolution(int winograd, const float* x, long batch, long height, long width, long in, const float* norm_weight,
                 const float* norm_bias, long groups, double eps, int silu, int upsample, const float* weights,
                 const long* weight_stride, long side, long stride, long before, float* packed, const float* bias,
                 const float* residual, float* y, long out_height, long out_width, long out, int threads) {
    Team::Call team(threads);
    std::vector<float> scaling(groups ? 2 * batch * in : 0);
    float *scale = nullptr, *shift = nullptr;
    if (groups) {
        scale = scaling.data(), shift = scale + batch * in;
        group_norm(x, batch, height * width, in, Norm{norm_weight, norm_bias, groups, eps}, scale, shift, team);
    }
    const Input input{x, scale, shift, batch, height, width, in, silu, upsample};
    const Output output{y, bias, residual, out_height, out_width, out};
    if (winograd) {
        transform_weights(weights, weight_stride, in, out, packed, team);
        convolve_tiles(input, packed, output, team);
    } else {
        pack_weights(weights, weight_stride, side, in, out, packed, team);
        convolve_windows(input, Window{side, stride, before}, packed, output, team);
    }
}

}
