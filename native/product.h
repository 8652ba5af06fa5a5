// Products of rows with a matrix, x (M, K) times w (N, K) transposed. With few rows reading w is the work, with many
// the arithmetic.
//
// The matrix is read in place, as the checkpoint holds it: float, bfloat16, or int8 / int4 with scales. All sums are
// fp32, each in one order fixed by K alone, so that a row's result depends neither on the other rows, nor on threads,
// nor on how wide the registers are: `grain_tile` has four sums, of every fourth input (bfloat16: pair of inputs),
// `tile` eight, of every eighth; they are added up at the end.
//
// CPUs with instructions for bfloat16 (AVX512-BF16, AMX) multiply bfloat16 weights with inputs that are rounded to
// bfloat16 too, as PyTorch does: an instruction does twice the arithmetic, or sixteen times. AMX has an order of its own
// (see amx.h), as fixed as the above.
#pragma once
#include <algorithm>
#include <type_traits>

#include "simd.h"

enum WeightType { FLOAT = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
constexpr int GROUP = 64;  // int4: so many neighbours along K share a scale

struct Linear {
    const void* weight;  // (N, K), laid out as Weight says
    const float* scale;  // int8: (N,), int4: (N, K / GROUP)
};

static inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// How one 32-byte load of a row of w becomes PARTS vectors of eight floats. `place(i)` is where input i must be stored
// so that these vectors are multiplied with the right inputs. V is f8, or f16 for two rows of w side by side.
template <int Type> struct Weight;

#ifdef TILES
#include "amx.h"
#endif
#if defined(__AVX512BF16__) && UNITS >= 3
#define DOTS
#endif

#if defined(DOTS) || defined(TILES)
template <int Type> using Input = std::conditional_t<Type == BFLOAT16, uint16_t, float>;  // what rows of x consist of
#else
template <int Type> using Input = float;
#endif

#ifdef TILES
template <int Type> constexpr bool IN_TILES = Type == BFLOAT16;
#else
template <int Type> constexpr bool IN_TILES = false;
#endif
// Weights that need no unpacking: `grain_tile` multiplies them as they are.
template <int Type> constexpr bool IN_GRAINS = !IN_TILES<Type> && (Type == FLOAT || std::is_same_v<Input<Type>, uint16_t>);
constexpr int64_t GRAIN = 16;  // bytes: so much of a row of x lies together in a register, between those of other rows
template <int Type> constexpr int ROUND = IN_TILES<Type> ? 16 : IN_GRAINS<Type> ? LANES / 4 : 1;  // rows that lie together

template <> struct Weight<FLOAT> {
    static constexpr int BITS = 32;
};

template <> struct Weight<BFLOAT16> {  // elements 0 2 4 … 14, then 1 3 5 … 15
    static constexpr int PARTS = 2, BITS = 16;
    template <class V> using Raw = typename Bits<V>::Unsigned;
    template <class V> static V part(Raw<V> raw, int j) { return (V)(j ? raw & 0xffff0000u : raw << 16); }
    static int64_t place(int64_t i) { return (i & ~int64_t(15)) | (i & 15) >> 1 | (i & 1) << 3; }
};

template <> struct Weight<INT8> {  // byte j of word i is element 8 j + i of 32
    static constexpr int PARTS = 4, BITS = 8;
    template <class V> using Raw = typename Bits<V>::Signed;
    template <class V> static V part(Raw<V> raw, int j) {
        return __builtin_convertvector((raw << (24 - 8 * j)) >> 24, V);
    }
    static int64_t place(int64_t i) { return i; }
};

template <> struct Weight<INT4> {  // the j-th four bits of word i are element 8 j + i of 64
    static constexpr int PARTS = 8, BITS = 4;
    template <class V> using Raw = typename Bits<V>::Signed;
    template <class V> static V part(Raw<V> raw, int j) {
        return __builtin_convertvector((raw << (28 - 4 * j)) >> 28, V);
    }
    static int64_t place(int64_t i) { return i; }
};

// Stores the inputs [begin, begin + count) of row i of x, whose rows are ldx apart: input k is value(k). For
// `grain_tile`, ROUND rows share their room: the first grains of all of them, the second ones, …
template <int Type, class Value>
static inline void put_inputs(Input<Type>* x, int64_t ldx, int64_t i, int64_t begin, int64_t count, const Value& value) {
    const auto convert = [&](int64_t k) {
        if constexpr (std::is_same_v<Input<Type>, float>) return value(k);
        else return to_bfloat16(value(k));
    };
    if constexpr (IN_GRAINS<Type>) {
        constexpr int64_t EACH = GRAIN / sizeof(Input<Type>), R = ROUND<Type>;
        Input<Type>* row = x + i / R * R * ldx + i % R * EACH;
        int64_t k = begin;
        for (; k < begin + count && k % EACH; k++) row[k / EACH * EACH * R + k % EACH] = convert(k);
        for (; k + EACH <= begin + count; k += EACH)
            for (int64_t j = 0; j < EACH; j++) row[k * R + j] = convert(k + j);
        for (; k < begin + count; k++) row[k / EACH * EACH * R + k % EACH] = convert(k);
    } else if constexpr (std::is_same_v<Input<Type>, float>) {
        for (int64_t k = begin; k < begin + count; k++) x[i * ldx + Weight<Type>::place(k)] = convert(k);
    } else {
        for (int64_t k = begin; k < begin + count; k++) x[i * ldx + k] = convert(k);
    }
}

// A grain of a row of w, once for each of the rows of x in a register.
static inline Lanes repeated(const char* grain) {
#ifdef SIXTEEN_LANES
    return (Lanes)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)grain));
#else
    const f4 once = read<f4>(grain);
    return Lanes{once[0], once[1], once[2], once[3], once[0], once[1], once[2], once[3]};
#endif
}

template <int Type> static inline Lanes add_product(Lanes inputs, Lanes weights, Lanes total) {
#ifdef DOTS
    if constexpr (Type == BFLOAT16)
        return (Lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)(__m512)inputs, (__m512bh)(__m512)weights);
    else
#endif
        return multiply_add(inputs, weights, total);
}

// out[m][n] for M times ROUND rows of x, ldx apart, as put_inputs lays them down, and N rows of w. For each 64 bytes of
// a row of w, LINES cache lines are prefetched, the first at `ahead`, `apart` bytes from one another.
template <int Type, int M, int N, int LINES>
static __attribute__((noinline)) void grain_tile(const Input<Type>* x, int64_t ldx, const Linear& w, int64_t first,
                                                 int64_t K, const char* ahead, int64_t apart,
                                                 float (&out)[M * ROUND<Type>][N]) {
    constexpr int LEVEL = LINES < 2 ? 3 : 2;
    constexpr int64_t WIDTH = sizeof(Lanes);
    const int64_t size = K * sizeof(Input<Type>), group = ldx * ROUND<Type> * sizeof(Input<Type>);
    const char *inputs = (const char*)x, *weights = (const char*)w.weight + first * size;
    Lanes total[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = Lanes{};
    const auto add = [&](int64_t at) __attribute__((always_inline)) {
        Lanes rows[M];
        for (int m = 0; m < M; m++) rows[m] = read<Lanes>(inputs + m * group + at / GRAIN * WIDTH);
        for (int n = 0; n < N; n++) {
            const Lanes grain = held(repeated(weights + n * size + at));
            for (int m = 0; m < M; m++) total[m][n] = add_product<Type>(rows[m], grain, total[m][n]);
        }
    };
    int64_t at = 0;
    for (; at + 64 <= size; at += 64) {
        for (int line = 0; line < LINES; line++, ahead += apart) __builtin_prefetch(ahead, 0, LEVEL);
        for (int64_t grain = 0; grain < 64; grain += GRAIN) add(at + grain);
    }
    for (; at < size; at += GRAIN) add(at);
    for (int m = 0; m < M; m++) add_up_rows<N>(total[m], &out[m * ROUND<Type>][0]);
}

// out[m][n] = x_m . w_n for M rows of x, ldx apart, and N rows of w, as many side by side as V holds. With each load of
// a row, LINES cache lines are prefetched, the first at `ahead`, `apart` bytes from one another.
template <class V, int Type, int M, int N, int LINES>
static __attribute__((noinline)) void tile(const float* x, int64_t ldx, const Linear& w, int64_t first, int64_t K,
                                           const char* ahead, int64_t apart, float (&out)[M][N]) {
    typedef Weight<Type> W;
    typedef typename W::template Raw<V> Raw;
    constexpr int STEP = 8 * W::PARTS, BESIDE = HALVES<V>, S = N / BESIDE;
    // Hold a weight in a register for all rows; compilers by themselves load it again for each. Not where the memory is
    // the limit (LINES >= 2), nor where there are too few registers.
    constexpr bool HOLD = LINES < 2 && (BESIDE > 1 || M * N + N < 16);
    // Several lines at a time fill the first-level cache, whose lines are still in use, sooner than they are wanted
    // there: into the second level, products of 1 to 8 rows become 1.3 to 2 times as fast.
    constexpr int LEVEL = LINES < 2 ? 3 : 2;
    const int64_t stride = K * W::BITS / 8;
    const char* base = (const char*)w.weight + first * stride;
    V total[M][S];
    for (int m = 0; m < M; m++)  // not = {}: for that GCC calls memset, which took 7 % of a step
        for (int s = 0; s < S; s++) total[m][s] = V{};
    for (int64_t k = 0; k < K; k += STEP, base += 32) {
        Raw raw[S];
        V part[M][S] = {};
        for (int line = 0; line < LINES; line++, ahead += apart) __builtin_prefetch(ahead, 0, LEVEL);
        for (int s = 0; s < S; s++) raw[s] = read_halves<Raw>(base + s * BESIDE * stride, base + (s * BESIDE + 1) * stride);
        for (int j = 0; j < W::PARTS; j++) {
            V values[S];
            for (int s = 0; s < S; s++) {
                values[s] = W::template part<V>(raw[s], j);
                if (HOLD) values[s] = held(values[s]);
            }
            for (int m = 0; m < M; m++) {
                const V inputs = held(load_twice<V>(x + m * ldx + k + 8 * j));
                V(&row)[S] = (Type == INT4 ? part : total)[m];
                for (int s = 0; s < S; s++) row[s] = multiply_add(inputs, values[s], row[s]);
            }
        }
        if (Type == INT4)
            for (int s = 0; s < S; s++) {
                const float* scale = w.scale + (first + s * BESIDE) * (K / GROUP) + k / GROUP;
                const V scales = all<V>(scale[0], scale[(BESIDE - 1) * (K / GROUP)]);
                for (int m = 0; m < M; m++) total[m][s] = multiply_add(part[m][s], scales, total[m][s]);
            }
    }
    add_up<M * S>(&total[0][0], &out[0][0]);
    if (Type == INT8)
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++) out[m][n] *= w.scale[first + n];
}

// Results of M rows of x (times ROUND, for grains) and N rows of w, by the kind of tile that V says.
struct Grains {};
template <class V, int Type, int M, int N, int LINES, class Put>
static inline void put_tile(const Input<Type>* x, int64_t ldx, int64_t m, int64_t rows, const Linear& w, int64_t n,
                            int64_t K, const char* ahead, int64_t apart, const Put& put) {
    constexpr int EACH = std::is_same_v<V, Grains> ? ROUND<Type> : 1;
    float out[M * EACH][N];
    if constexpr (EACH > 1) grain_tile<Type, M, N, LINES>(x + m * EACH * ldx, ldx, w, n, K, ahead, apart, out);
    else tile<V, Type, M, N, LINES>(x + m * ldx, ldx, w, n, K, ahead, apart, out);
    const int64_t count = std::min<int64_t>(M * EACH, rows - m * EACH);
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < N; j++) put(m * EACH + i, n + j, out[i][j]);
}

// Rows m to m + count (at most M) times N columns of the result; pass number `turn` of `passes` over these columns. Each
// pass prefetches its share of the weights of the next N columns. m and count are numbers of ROUNDs, for grains.
template <class V, int Type, int M, int N, class Put>
static inline void pass(const Input<Type>* x, int64_t ldx, int64_t m, int64_t count, int64_t rows, const Linear& w,
                        int64_t n, int64_t K, int64_t turn, int64_t passes, const Put& put) {
    if constexpr (M > 1)
        if (count < M) return pass<V, Type, M - 1, N>(x, ldx, m, count, rows, w, n, K, turn, passes, put);
    const int64_t stride = K * Weight<Type>::BITS / 8;
    constexpr int LOAD = std::is_same_v<V, Grains> ? 64 : 32;  // bytes of a row of w at a time
    const char* ahead = (const char*)w.weight + (n + N) * stride;
    if (passes == 1) return put_tile<V, Type, M, N, (N * LOAD + 32) / 64>(x, ldx, m, rows, w, n, K, ahead, 64, put);
    ahead += N * stride * turn / passes;
    const int64_t apart = (N * LOAD + passes - 1) / passes;
    if (apart > 128) return put_tile<V, Type, M, N, 3>(x, ldx, m, rows, w, n, K, ahead, 64, put);
    if (apart > 64) return put_tile<V, Type, M, N, 2>(x, ldx, m, rows, w, n, K, ahead, 64, put);
    put_tile<V, Type, M, N, 1>(x, ldx, m, rows, w, n, K, ahead, apart, put);
}

// The columns [n, end), N at a time, in passes of at most M rows; returns the first column that is left over.
template <class V, int Type, int M, int N, class Put>
static inline int64_t strips(const Input<Type>* x, int64_t ldx, int64_t rows, const Linear& w, int64_t n, int64_t end,
                             int64_t K, const Put& put) {
    constexpr int EACH = std::is_same_v<V, Grains> ? ROUND<Type> : 1;
    const int64_t count = (rows + EACH - 1) / EACH, passes = (count + M - 1) / M;
    for (; n + N <= end; n += N)
        for (int64_t i = 0; i < passes; i++) {
            const int64_t m = count * i / passes;
            pass<V, Type, M, N>(x, ldx, m, count * (i + 1) / passes - m, rows, w, n, K, i, passes, put);
        }
    return n;
}

// Brings ROUND rows of x, written by put_inputs, into the order that `product` wants, where that is another one.
template <int Type>
static void arrange([[maybe_unused]] Input<Type>* x, [[maybe_unused]] int64_t ldx, [[maybe_unused]] int64_t K) {
#ifdef TILES
    if constexpr (IN_TILES<Type>) amx::turn(x, ldx, K);
#endif
}

// put(m, n, x_m . w_n) for all rows m < M and the columns n in [begin, end). Rows of x are arranged; they should not lie a
// power of two apart, where they share cache sets.
template <int Type, class Put>
static void product(const Input<Type>* x, int64_t ldx, int64_t M, const Linear& w, int64_t begin, int64_t end, int64_t K,
                    const Put& put) {
    int64_t n = begin;
    if constexpr (IN_TILES<Type>) {
#ifdef TILES
        amx::product(x, ldx, M, (const uint16_t*)w.weight, begin, end, K, put);
#endif
    } else if constexpr (IN_GRAINS<Type>) {
        // Few rows go in one pass, as wide as the registers allow, for then w is read once; many rows in tiles that
        // need the fewest loads.
        const int64_t groups = (M + ROUND<Type> - 1) / ROUND<Type>;
        constexpr bool WIDE = LANES == 16;  // and thirty-two registers
        if (groups == 1) n = strips<Grains, Type, 1, 8>(x, ldx, M, w, n, end, K, put);
        if (groups == 2) n = strips<Grains, Type, 2, WIDE ? 8 : 6>(x, ldx, M, w, n, end, K, put);
        if (groups == 3) n = strips<Grains, Type, 3, WIDE ? 8 : 4>(x, ldx, M, w, n, end, K, put);
        if (WIDE && (groups == 5 || groups == 6)) n = strips<Grains, Type, 6, 4>(x, ldx, M, w, n, end, K, put);
        if (groups > 3) n = strips<Grains, Type, WIDE ? 4 : 3, WIDE ? 6 : 4>(x, ldx, M, w, n, end, K, put);
        strips<Grains, Type, 4, 1>(x, ldx, M, w, n, end, K, put);
    } else {
        if (M == 1) n = strips<f8, Type, 1, 8>(x, ldx, M, w, n, end, K, put);
        if (M == 2) n = strips<f8, Type, 2, 4>(x, ldx, M, w, n, end, K, put);
#ifdef SIXTEEN_LANES
        constexpr int WIDE_ROWS = Type == INT4 ? 4 : 8;  // times 3 vectors of columns: 24 sums in 32 registers
        if (M > 2) n = strips<f16, Type, WIDE_ROWS, 6>(x, ldx, M, w, n, end, K, put);
#endif
        if (M > 2) n = strips<f8, Type, 6, 2>(x, ldx, M, w, n, end, K, put);
        strips<f8, Type, 6, 1>(x, ldx, M, w, n, end, K, put);
    }
}
