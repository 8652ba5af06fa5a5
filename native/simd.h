// Eight floats at a time, in the compilers' own vector types: AVX2, two NEON registers, or whatever there is.
#pragma once
enum Units { AVX2 = 1, AVX512 = 2, BF16DOT = 3, AMX = 4 };  // sets of instructions: UNITS of build.py
#ifndef UNITS
#define UNITS 4  // the last that may be used
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && UNITS >= 4
#define TILES
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32), aligned(4)));

template <class V> struct Bits;  // vectors of integers as large as V
template <> struct Bits<f8> { typedef i8 Signed; typedef u8 Unsigned; };

template <class X> static inline X read(const void* p) {  // one unaligned load, of whatever type the memory is
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// a * b + c, rounded once where the CPU can: said explicitly, as compilers fuse in one loop and not in the next.
static inline f8 multiply_add(f8 a, f8 b, f8 c) {
#if defined(__FMA__) && defined(__AVX2__)
    return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

static inline f8 load(const float* p) { return read<f8>(p); }
static inline void store(float* p, f8 x) { std::memcpy(p, &x, sizeof x); }
static inline f8 all(float x) { return f8{x, x, x, x, x, x, x, x}; }
template <class V> static inline V select(typename Bits<V>::Signed mask, V yes, V no) { return mask ? yes : no; }

static inline float sum(f8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

typedef float f4 __attribute__((vector_size(16), aligned(4)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else  // slower
template <class X> static inline f4 PICK(X x, X y, int a, int b, int c, int d) {
    constexpr int n = sizeof(X) / 4;
    return f4{a < n ? x[a] : y[a - n], b < n ? x[b] : y[b - n], c < n ? x[c] : y[c - n], d < n ? x[d] : y[d - n]};
}
#endif

static inline f4 halves(f8 x) { return PICK(x, x, 0, 1, 2, 3) + PICK(x, x, 4, 5, 6, 7); }

static inline void transpose(f8 (&r)[8]) {
    f8 t[8];
    for (int i = 0; i < 8; i++) t[i] = f8{r[0][i], r[1][i], r[2][i], r[3][i], r[4][i], r[5][i], r[6][i], r[7][i]};
    std::memcpy(r, t, sizeof t);
}

// (x0 + x2) + (x1 + x3) of four vectors at once.
static inline f4 sums(f4 a, f4 b, f4 c, f4 d) {
    const f4 ab = PICK(a, b, 0, 4, 1, 5) + PICK(a, b, 2, 6, 3, 7), cd = PICK(c, d, 0, 4, 1, 5) + PICK(c, d, 2, 6, 3, 7);
    return PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
}

// `sum` of four vectors at once, with the additions in the same order.
static inline f4 sums(f8 a, f8 b, f8 c, f8 d) { return sums(halves(a), halves(b), halves(c), halves(d)); }

// Keeps a loaded vector in a register; compilers tend to load it again for each use.
static inline f8 held(f8 x) {
#ifdef __AVX2__
    asm("" : "+v"(x));
#endif
    return x;
}

// Where registers hold sixteen floats: two vectors of eight side by side, each computed with as if it were alone.
template <class V> constexpr int HALVES = sizeof(V) / sizeof(f8);
#if defined(__AVX512F__) && UNITS >= 2
#define SIXTEEN_LANES
typedef float f16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
template <> struct Bits<f16> { typedef i16 Signed; typedef u16 Unsigned; };

static inline f16 multiply_add(f16 a, f16 b, f16 c) { return (f16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static inline f16 held(f16 x) {
    asm("" : "+v"(x));
    return x;
}

static inline void transpose(__m512i (&r)[16]) {  // of 16 x 16 words
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88), t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

static inline void transpose(f16 (&r)[16]) {
    __m512i words[16];
    for (int i = 0; i < 16; i++) words[i] = (__m512i)r[i];
    transpose(words);
    for (int i = 0; i < 16; i++) r[i] = (f16)words[i];
}

// `sum` of each half of four vectors at once, with the additions in the same order.
static inline f8 sums(f16 a, f16 b, f16 c, f16 d) {
    const __m512 A = (__m512)a, B = (__m512)b, C = (__m512)c, D = (__m512)d;
    const __m512 ab = _mm512_shuffle_f32x4(A, B, 0x88) + _mm512_shuffle_f32x4(A, B, 0xdd);  // fours: a a b b
    const __m512 cd = _mm512_shuffle_f32x4(C, D, 0x88) + _mm512_shuffle_f32x4(C, D, 0xdd);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);  // twos: a c a c b d b d
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i odd = _mm512_setr_epi32(1, 5, 9, 13, 3, 7, 11, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    return (f8)_mm256_add_ps(_mm512_castps512_ps256(_mm512_permutexvar_ps(even, abcd)),
                             _mm512_castps512_ps256(_mm512_permutexvar_ps(odd, abcd)));
}
#endif

// As many as a register holds, for what is computed number by number.
#ifdef SIXTEEN_LANES
typedef f16 Lanes;
static inline f16 everywhere(float x) { return (f16)_mm512_set1_ps(x); }
#else
typedef f8 Lanes;
static inline f8 everywhere(float x) { return all(x); }
#endif
typedef float Row __attribute__((vector_size(sizeof(Lanes)), aligned(4), may_alias));  // in memory, at any address
static const int LANES = sizeof(Lanes) / sizeof(float);

template <class V> static inline V load_part(const float* p, long n) {
    constexpr long lanes = sizeof(V) / sizeof(float);
    if (n >= lanes) return read<V>(p);
    float full[lanes] = {0};
    for (long i = 0; i < n; i++) full[i] = p[i];
    return read<V>(full);
}

// 32 bytes at `p`, and for two halves 32 at `other` too.
template <class X> static inline X read_halves(const char* p, const char* other) {
#ifdef SIXTEEN_LANES
    if constexpr (sizeof(X) == 64)
        return (X)_mm512_inserti64x4((__m512i)_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)),
                                     _mm256_loadu_si256((const __m256i*)other), 1);
    else
#endif
        return read<X>(p);
}

template <class V> static inline V load_twice(const float* p) {  // the same in each half
#ifdef SIXTEEN_LANES
    if constexpr (sizeof(V) == 64) return (V)_mm512_broadcast_f64x4(_mm256_loadu_pd((const double*)p));
    else
#endif
        return load(p);
}

template <class V> static inline V all(float x, float other) {  // each half's own number
    V v;
    for (int i = 0; i < 8 * HALVES<V>; i++) v[i] = i < 8 ? x : other;
    return v;
}

// The sums of COUNT vectors, or of their halves.
template <int COUNT, class V> static inline void add_up(const V* x, float* out) {
    constexpr int FOURS = COUNT / 4 * 4;
    for (int i = 0; i < FOURS; i += 4) {
        const auto four = sums(x[i], x[i + 1], x[i + 2], x[i + 3]);
        std::memcpy(out + i * HALVES<V>, &four, sizeof four);
    }
    for (int i = FOURS * HALVES<V>; i < COUNT * HALVES<V>; i++) out[i] = sum(load((const float*)x + 8 * i));
}

// out[r][n]: the r-th four lanes of the n-th vector, added up as `sums` adds them.
template <int COUNT> static inline void add_up_rows(const Lanes* x, float* out) {
    for (int n = 0; n < COUNT; n += 4) {
        const int last = COUNT - 1, b = std::min(n + 1, last), c = std::min(n + 2, last), d = std::min(n + 3, last);
        f4 row[LANES / 4];
#ifdef SIXTEEN_LANES
        const __m512 A = (__m512)x[n], B = (__m512)x[b], C = (__m512)x[c], D = (__m512)x[d];
        const __m512 ab = _mm512_unpacklo_ps(A, B) + _mm512_unpackhi_ps(A, B);
        const __m512 cd = _mm512_unpacklo_ps(C, D) + _mm512_unpackhi_ps(C, D);
        const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
        std::memcpy(row, &abcd, sizeof row);
#else
        f4 part[4][LANES / 4];
        for (int i = 0; i < 4; i++) std::memcpy(part[i], &x[std::min(n + i, last)], sizeof *part);
        for (int r = 0; r < LANES / 4; r++) row[r] = sums(part[0][r], part[1][r], part[2][r], part[3][r]);
#endif
        for (int r = 0; r < LANES / 4; r++)
            std::memcpy(out + r * COUNT + n, &row[r], sizeof(float) * std::min(4, COUNT - n));
    }
}

static inline float largest(f8 x) {
    float best = x[0];
    for (int i = 1; i < 8; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// e^x to two units in the last place; 0 below -87, e^88 above 88.
template <class V> static inline V exponential(V x) {
    typedef typename Bits<V>::Signed Signed;
    const V none = {}, least = none - 87.0f, most = none + 88.0f;
    const Signed tiny = x < least;
    x = select(x > most, most, select(tiny, least, x));
    const V shifter = none + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (x * 1.44269504088896341f + shifter) - shifter;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln(2) / 2
    V y = none + 1.9875691500e-4f;  // minimax coefficients of Cephes' expf
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Signed scale = (__builtin_convertvector(n, Signed) + 127) << 23;
    return select(tiny, none, y * (V)scale);
}

// ln x for normal x > 0, to two units in the last place.
static inline f8 logarithm(f8 x) {
    i8 bits = (i8)x;
    i8 exponent = ((bits >> 23) & 255) - 126;
    f8 m = (f8)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const i8 low = m < all(0.707106781186547524f);
    exponent = exponent + low;  // a true lane is -1
    m = select(low, m + m, m) - all(1.0f);
    const f8 e = __builtin_convertvector(exponent, f8), z = m * m;
    f8 y = all(7.0376836292e-2f);  // minimax coefficients of Cephes' logf
    y = y * m - all(1.1514610310e-1f);
    y = y * m + all(1.1676998740e-1f);
    y = y * m - all(1.2420140846e-1f);
    y = y * m + all(1.4249322787e-1f);
    y = y * m - all(1.6668057665e-1f);
    y = y * m + all(2.0000714765e-1f);
    y = y * m - all(2.4999993993e-1f);
    y = y * m + all(3.3333331174e-1f);
    y = y * m * z - e * all(2.12194440e-4f) - all(0.5f) * z;
    return (m + y) + e * all(0.693359375f);
}
