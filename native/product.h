// Products of a few rows with a matrix, x (M, K) times w (N, K) transposed, where reading w is the work.
//
// The matrix is read once, in place, as the checkpoint holds it: float, bfloat16, or int8 / int4 with scales. All sums
// are fp32, each in one order fixed by K alone, so that a row's result does not depend on the other rows or on threads.
#pragma once
#include <algorithm>

#include "simd.h"

enum WeightType { FLOAT = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
constexpr int GROUP = 64;  // int4: so many neighbours along K share a scale

struct Linear {
    const void* weight;  // (N, K), laid out as Weight says
    const float* scale;  // int8: (N,), int4: (N, K / GROUP)
};

// How one 32-byte load of a row of w becomes PARTS vectors of eight floats. `place(i)` is where input i must be stored
// so that these vectors are multiplied with the right inputs.
template <int Type> struct Weight;

template <> struct Weight<FLOAT> {
    typedef f8 Raw;
    static constexpr int PARTS = 1, BITS = 32;
    static f8 part(Raw raw, int) { return raw; }
    static int64_t place(int64_t i) { return i; }
};

template <> struct Weight<BFLOAT16> {  // elements 0 2 4 … 14, then 1 3 5 … 15
    typedef u8 Raw;
    static constexpr int PARTS = 2, BITS = 16;
    static f8 part(Raw raw, int j) { return (f8)(j ? raw & 0xffff0000u : raw << 16); }
    static int64_t place(int64_t i) { return (i & ~int64_t(15)) | (i & 15) >> 1 | (i & 1) << 3; }
};

template <> struct Weight<INT8> {  // byte j of word i is element 8 j + i of 32
    typedef i8 Raw;
    static constexpr int PARTS = 4, BITS = 8;
    static f8 part(Raw raw, int j) { return __builtin_convertvector((raw << (24 - 8 * j)) >> 24, f8); }
    static int64_t place(int64_t i) { return i; }
};

template <> struct Weight<INT4> {  // the j-th four bits of word i are element 8 j + i of 64
    typedef i8 Raw;
    static constexpr int PARTS = 8, BITS = 4;
    static f8 part(Raw raw, int j) { return __builtin_convertvector((raw << (28 - 4 * j)) >> 28, f8); }
    static int64_t place(int64_t i) { return i; }
};

// out[m][n] = x_m . w_n for M rows of x, ldx apart, and N rows of w. With each load of a row, LINES cache lines are
// prefetched, the first at `ahead`, `apart` bytes from one another.
template <int Type, int M, int N, int LINES>
static __attribute__((noinline)) void tile(const float* x, int64_t ldx, const Linear& w, int64_t first, int64_t K,
                                           const char* ahead, int64_t apart, float (&out)[M][N]) {
    typedef Weight<Type> W;
    constexpr int STEP = 8 * W::PARTS;
    // Hold a weight in a register for all rows; compilers by themselves load it again for each. Not where the memory is
    // the limit (LINES >= 2), nor where there are too few registers.
    constexpr bool HOLD = LINES < 2 && M * N + N < 16;
    const int64_t stride = K * W::BITS / 8;
    const char* base = (const char*)w.weight + first * stride;
    f8 total[M][N] = {};
    for (int64_t k = 0; k < K; k += STEP, base += 32) {
        typename W::Raw raw[N];
        f8 part[M][N] = {};
        for (int line = 0; line < LINES; line++, ahead += apart) __builtin_prefetch(ahead);
        for (int n = 0; n < N; n++) raw[n] = read<typename W::Raw>(base + n * stride);
        for (int j = 0; j < W::PARTS; j++) {
            f8 values[N];
            for (int n = 0; n < N; n++) values[n] = HOLD ? held(W::part(raw[n], j)) : W::part(raw[n], j);
            for (int m = 0; m < M; m++) {
                const f8 inputs = held(load(x + m * ldx + k + 8 * j));
                f8(&row)[N] = (Type == INT4 ? part : total)[m];
                for (int n = 0; n < N; n++) row[n] = multiply_add(inputs, values[n], row[n]);
            }
        }
        if (Type == INT4)
            for (int n = 0; n < N; n++) {
                const f8 scale = all(w.scale[(first + n) * (K / GROUP) + k / GROUP]);
                for (int m = 0; m < M; m++) total[m][n] = multiply_add(part[m][n], scale, total[m][n]);
            }
    }
    const f8* flat = &total[0][0];
    int i = 0;
    for (; i + 4 <= M * N; i += 4) {
        const f4 four = sums(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]);
        std::memcpy(&out[0][0] + i, &four, sizeof four);
    }
    for (; i < M * N; i++) (&out[0][0])[i] = sum(flat[i]);
    if (Type == INT8)
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++) out[m][n] *= w.scale[first + n];
}

template <int Type, int M, int N, int LINES, class Put>
static inline void put_tile(const float* x, int64_t ldx, int64_t m, const Linear& w, int64_t n, int64_t K,
                            const char* ahead, int64_t apart, const Put& put) {
    float out[M][N];
    tile<Type, M, N, LINES>(x + m * ldx, ldx, w, n, K, ahead, apart, out);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) put(m + i, n + j, out[i][j]);
}

// Rows m to m + count (at most M) times N columns of the result; pass number `turn` of `passes` over these columns. Each
// pass prefetches its share of the weights of the next N columns.
template <int Type, int M, int N, class Put>
static inline void pass(const float* x, int64_t ldx, int64_t m, int64_t count, const Linear& w, int64_t n, int64_t K,
                        int64_t turn, int64_t passes, const Put& put) {
    if constexpr (M > 1)
        if (count < M) return pass<Type, M - 1, N>(x, ldx, m, count, w, n, K, turn, passes, put);
    const int64_t stride = K * Weight<Type>::BITS / 8;
    const char* ahead = (const char*)w.weight + (n + N) * stride;
    if (passes == 1) return put_tile<Type, M, N, (N + 1) / 2>(x, ldx, m, w, n, K, ahead, 64, put);
    const int64_t share = N * stride * turn / passes;
    put_tile<Type, M, N, 1>(x, ldx, m, w, n, K, ahead + share, (32 * N + passes - 1) / passes, put);
}

// The columns [n, end), N at a time, in passes of at most M rows; returns the first column that is left over.
template <int Type, int M, int N, class Put>
static inline int64_t strips(const float* x, int64_t ldx, int64_t first, int64_t rows, const Linear& w, int64_t n,
                             int64_t end, int64_t K, const Put& put) {
    const int64_t passes = (rows + M - 1) / M;
    for (; n + N <= end; n += N)
        for (int64_t i = 0; i < passes; i++) {
            const int64_t m = rows * i / passes, count = rows * (i + 1) / passes - m;
            pass<Type, M, N>(x, ldx, first + m, count, w, n, K, i, passes, put);
        }
    return n;
}

// put(m, n, x_m . w_n) for all rows m < M and the columns n in [begin, end).
template <int Type, class Put>
static void product(const float* x, int64_t ldx, int64_t M, const Linear& w, int64_t begin, int64_t end, int64_t K,
                    const Put& put) {
    constexpr int CHUNK = 48;  // rows of x that stay in the second-level cache while w is read
    constexpr int ROWS = Type == FLOAT ? 4 : 6, COLUMNS = Type == FLOAT ? 3 : 2;  // of the tiles for many rows
    for (int64_t m = 0; m < M; m += CHUNK) {
        const int64_t rows = std::min<int64_t>(M - m, CHUNK);
        int64_t n = begin;
        if (rows == 1) n = strips<Type, 1, 8>(x, ldx, m, rows, w, n, end, K, put);
        if (rows == 2) n = strips<Type, 2, 4>(x, ldx, m, rows, w, n, end, K, put);
        if (rows > 2) n = strips<Type, ROWS, COLUMNS>(x, ldx, m, rows, w, n, end, K, put);
        strips<Type, ROWS, 1>(x, ldx, m, rows, w, n, end, K, put);
    }
}
