// What convolutions read and write: channels-last pictures, with the operations before and after a convolution.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "simd.h"

static const int COLUMNS = 16;  // of a panel of weights: that many output channels are computed side by side

static const long AHEAD = 64;   // inputs: weights are fetched so far before they are needed

struct Input {
    const float* values;  // (batch, height, width, channels)
    const float *scale, *shift;  // (batch, channels) each, or null: taken as it is
    long batch, height, width, channels;
    int silu, upsample;
};

struct Output {
    float* values;  // (batch, height, width, channels)
    const float *bias, *residual;  // (channels), and like values; each may be null
    long height, width, channels;
    long panels() const { return (channels + COLUMNS - 1) / COLUMNS; }
};

struct Window {
    long side, stride, before;  // `before`: zeros above and left of the picture; below and right as many as it takes
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class Number> using Room = std::unique_ptr<Number, Free>;

static inline long up_to(long multiple, long n) { return (n + multiple - 1) / multiple * multiple; }

// Has the system back fresh memory with huge pages where they fit: a five hundredth of the page faults, which else take as
// long as the work itself.
static inline void in_huge_pages(void* p, long bytes) {
#ifdef MADV_HUGEPAGE
    const long page = 1 << 21, first = up_to(page, (long)p), end = ((long)p + bytes) / page * page;
    if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

template <class Number> static void make(Room<Number>& room, long count) {  // for so many, unless it was made before
    if (room) return;
    const long bytes = up_to(64, count * sizeof(Number));
    room.reset((Number*)std::aligned_alloc(64, bytes));
    in_huge_pages(room.get(), bytes);
}

static inline Lanes load_strided(const float* p, long stride, long n) {
    if (stride == 1) return load_part<Lanes>(p, n);
    float full[LANES] = {0};
    for (long i = 0; i < std::min<long>(n, LANES); i++) full[i] = p[i * stride];
    return read<Lanes>(full);
}

// LANES inputs of each of as many outputs, transposed. weights (out, in, side, side) with strides; zeros past the last.
// To be called for ascending inputs: it has the CPU fetch those that come next.
static inline void read_weights(const float* weights, const long* stride, long side, long position, long co, long out,
                                long ci, long in, Lanes (&rows)[LANES]) {
    const float* from = weights + ci * stride[1] + position / side * stride[2] + position % side * stride[3];
    for (long i = 0; i < LANES; i++) {
        rows[i] = co + i < out && ci < in ? load_strided(from + (co + i) * stride[0], stride[1], in - ci) : Lanes{};
        __builtin_prefetch(from + (co + i) * stride[0] + AHEAD * stride[1]);
    }
    transpose(rows);
}

static inline Lanes silu(Lanes x) { return x / (everywhere(1.0f) + exponential(-x)); }

// put(c, LANES channels from c) for one pixel of an input, up to `depth`: zeros past the last channel and outside of
// the picture. activate: SiLU, where the input wants it.
template <class Activate, class Put>
static inline void read_pixel(const Input& in, long image, long y, long x, long depth, const Activate& activate,
                              const Put& put) {
    if (y < 0 || x < 0 || y >= in.height << in.upsample || x >= in.width << in.upsample) {
        for (long c = 0; c < depth; c += LANES) put(c, Lanes{});
        return;
    }
    const float* from = in.values + ((image * in.height + (y >> in.upsample)) * in.width + (x >> in.upsample)) *
                        in.channels;
    const float *scale = in.scale + image * in.channels, *shift = in.shift + image * in.channels;
    for (long c = 0; c < depth; c += LANES) {
        const long n = in.channels - c;
        Lanes v = load_part<Lanes>(from + c, n);
        if (in.scale) v = v * load_part<Lanes>(scale + c, n) + load_part<Lanes>(shift + c, n);
        if (in.silu) v = activate(v);
        put(c, v);
    }
}

// What read_pixel and write_part will touch; pixels may lie outside of the picture.
static inline void prefetch(const Input& in, long image, long y, long x) {
    const float* from = in.values + ((image * in.height + (y >> in.upsample)) * in.width + (x >> in.upsample)) *
                        in.channels;
    for (long c = 0; c < in.channels; c += 16) __builtin_prefetch(from + c);
}

static inline void prefetch(const Output& out, long pixel, long c) {
    if (out.residual) __builtin_prefetch(out.residual + pixel * out.channels + c);
    __builtin_prefetch(out.values + pixel * out.channels + c, 1);
}

static inline void write_part(const Output& out, long pixel, long c, Lanes v) {
    const long n = out.channels - c, at = pixel * out.channels + c;
    if (out.bias) v += load_part<Lanes>(out.bias + c, n);
    if (out.residual) v += load_part<Lanes>(out.residual + at, n);
    if (n >= LANES)
        std::memcpy(out.values + at, &v, sizeof v);
    else
        for (long i = 0; i < n; i++) out.values[at + i] = v[i];
}
