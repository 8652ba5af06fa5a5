// One step of a Llama decoder over cached tokens: embeddings in, logits out, all layers in one parallel region.
//
// A row is one sequence with its own number of cached tokens; a step feeds T tokens to each of R rows. Attention reads
// the used part of the cache only. Keys are stored sixteen positions side by side, so that scores of neighbouring
// positions are computed together; values position by position. Compiled once for each type of weights (-DWEIGHTS=…);
// the cache is bfloat16 unless the weights are fp32. Arithmetic is fp32 throughout.
#include <cmath>
#include <limits>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "product.h"

constexpr int SIDE = 16;  // positions side by side in the cache of keys
typedef Weight<WEIGHTS> W;
typedef std::conditional_t<WEIGHTS == FLOAT, float, uint16_t> Cached;

struct Layer {
    const float* attention_norm;  // (D,)
    Linear qkv, out;              // ((H + 2 G) K, D), (D, H K)
    const float* ffn_norm;        // (D,)
    Linear gate, up, down;        // (F, D), (F, D), (D, F)
    void* keys;                   // (rows, G, capacity / SIDE, K, SIDE)
    void* values;                 // (rows, G, capacity, P), P: K rounded up to a multiple of SIDE
};

struct Model {
    int64_t layers, dim, heads, kv_heads, head_dim, hidden, vocab, capacity;
    float eps;
    const Layer* layer;
    const float* norm;  // (D,)
    Linear output;      // (V, D)
};

struct Step {
    float* x;                // (R T, D) embeddings; overwritten
    const float* rope;       // (R T, K / 2, 2) cosine and sine
    const int32_t* rows;     // (R,) where each row's cache lies
    const int32_t* lengths;  // (R,) cached tokens before this step
    int64_t R, T;
    int64_t causal;          // a token sees those of its own step up to itself, or all of them
    const int32_t* wanted;   // (wishes,) which of the R T tokens' logits
    int64_t wishes;
    float* logits;           // (wishes, stride)
    int64_t stride;
    float* scratch;          // scratch_size floats
    int64_t threads;
};

static inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Sixteen cached numbers as two vectors. In bfloat16, number i lies beside number i + 8.
static inline void load16(const float* p, f8& low, f8& high) { low = load(p), high = load(p + 8); }
static inline void load16(const uint16_t* p, f8& low, f8& high) {
    const u8 pairs = read<u8>(p);
    low = (f8)(pairs << 16), high = (f8)(pairs & 0xffff0000u);
}
static inline void put(float* p, int64_t i, float x) { p[i] = x; }
static inline void put(uint16_t* p, int64_t i, float x) { p[(i & ~15) | (i & 7) << 1 | (i >> 3 & 1)] = to_bfloat16(x); }

static void rms_norm(const float* x, const float* weight, int64_t D, float eps, float* out) {
    f8 squares = all(0.0f);
    for (int64_t i = 0; i < D; i += 8) squares += load(x + i) * load(x + i);
    const float scale = 1.0f / std::sqrt(sum(squares) / D + eps);
    for (int64_t i = 0; i < D; i++) out[W::place(i)] = x[i] * scale * weight[i];
}

static inline void silu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) store(x + i, load(x + i) / (all(1.0f) + exponential(all(0.0f) - load(x + i))));
}

static inline void rotate(const float* x, const float* rope, int64_t K, float* out) {
    for (int64_t c = 0; c < K; c += 2) {
        const float cosine = rope[c], sine = rope[c + 1];
        out[c] = x[c] * cosine - x[c + 1] * sine;
        out[c + 1] = x[c + 1] * cosine + x[c] * sine;
    }
}

// sums += x times B groups of 16 cached numbers, `apart` from one another.
template <int B>
static inline void add_scaled(f8 x, const Cached* at, int64_t apart, f8 (&sums)[2 * B]) {
    for (int b = 0; b < B; b++) {
        f8 low, high;
        load16(at + b * apart, low, high);
        sums[2 * b] = multiply_add(x, low, sums[2 * b]);
        sums[2 * b + 1] = multiply_add(x, high, sums[2 * b + 1]);
    }
}

// scores[s] = scale * q . k_s for B blocks of SIDE positions.
template <int B>
static inline void score(const float* q, const Cached* keys, int64_t K, float scale, float* scores) {
    f8 sums[2 * B] = {};
    for (int64_t k = 0; k < K; k++) add_scaled<B>(all(q[k]), keys + k * SIDE, K * SIDE, sums);
    for (int b = 0; b < 2 * B; b++) store(scores + 8 * b, sums[b] * all(scale));
}

// out = sum over s < n of p_s v_s, for 16 B neighbours of a head.
template <int B>
static inline void mix(const float* p, const Cached* values, int64_t n, int64_t stride, float* out) {
    f8 sums[2 * B] = {};
    for (int64_t s = 0; s < n; s++) add_scaled<B>(all(p[s]), values + s * stride, 16, sums);
    for (int b = 0; b < 2 * B; b++) store(out + 8 * b, sums[b]);
}

// Attention of one query (K,) over n cached positions; `scores` holds capacity floats, out P.
static void attend(const float* q, const Cached* keys, const Cached* values, int64_t n, int64_t K, float* scores, float* out) {
    const int64_t blocks = (n + SIDE - 1) / SIDE, padded = blocks * SIDE, P = rounded(K, SIDE);
    const float scale = 1.0f / std::sqrt((float)K);
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4) score<4>(q, keys + b * K * SIDE, K, scale, scores + b * SIDE);
    for (; b < blocks; b++) score<1>(q, keys + b * K * SIDE, K, scale, scores + b * SIDE);
    for (int64_t s = n; s < padded; s++) scores[s] = -std::numeric_limits<float>::infinity();
    f8 best = load(scores);
    for (int64_t s = 8; s < padded; s += 8) best = select(load(scores + s) > best, load(scores + s), best);
    const f8 top = all(largest(best));
    f8 total = all(0.0f);
    for (int64_t s = 0; s < padded; s += 8) {
        const f8 e = exponential(load(scores + s) - top);
        store(scores + s, e);
        total += e;
    }
    int64_t k = 0;
    for (; k + 64 <= P; k += 64) mix<4>(scores, values + k, n, P, out + k);
    for (; k < P; k += 16) mix<1>(scores, values + k, n, P, out + k);
    const f8 share = all(1.0f / sum(total));
    for (int64_t i = 0; i < P; i += 8) store(out + i, load(out + i) * share);
}

// One row and one KV head: rotate, write the new keys and values, let all queries of the group attend.
static void attend_head(const Model& m, const Layer& layer, const Step& s, int64_t r, int64_t g, const float* qkv,
                        float* scratch, float* out) {
    const int64_t K = m.head_dim, P = rounded(K, SIDE), group = m.heads / m.kv_heads, T = s.T, before = s.lengths[r];
    const int64_t width = (m.heads + 2 * m.kv_heads) * K, cache_row = s.rows[r] * m.kv_heads + g;
    Cached* keys = (Cached*)layer.keys + cache_row * m.capacity * K;
    Cached* values = (Cached*)layer.values + cache_row * m.capacity * P;
    float* turned = scratch;         // (P,)
    float* attended = scratch + P;   // (P,)
    float* scores = attended + P;    // (capacity,)
    for (int64_t t = 0; t < T; t++) {
        const float* token = qkv + (r * T + t) * width;
        const int64_t at = before + t;
        rotate(token + (m.heads + g) * K, s.rope + (r * T + t) * K, K, turned);
        for (int64_t k = 0; k < K; k++) put(keys + (at / SIDE * K + k) * SIDE, at % SIDE, turned[k]);
        const float* value = token + (m.heads + m.kv_heads + g) * K;
        for (int64_t k = 0; k < P; k++) put(values + at * P, k, k < K ? value[k] : 0.0f);
    }
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = g * group; h < (g + 1) * group; h++) {
            rotate(qkv + (r * T + t) * width + h * K, s.rope + (r * T + t) * K, K, turned);
            attend(turned, keys, values, before + (s.causal ? t + 1 : T), K, scores, attended);
            for (int64_t k = 0; k < K; k++)
                out[(r * T + t) * m.heads * K + W::place(h * K + k)] = attended[k];
        }
}

static int64_t scratch_of_thread(const Model& m) { return rounded(m.capacity + 2 * rounded(m.head_dim, SIDE), SIDE); }
static int64_t hidden_stride(const Model& m) { return m.hidden + SIDE; }  // no power of two: they share cache sets

static void run(const Model& m, const Step& s) {
    constexpr int COLUMNS = 48;  // that a thread computes at a time: whole tiles, and whole cache lines of results
    const int64_t D = m.dim, M = s.R * s.T, F = m.hidden, width = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const int64_t apart = hidden_stride(m), own_size = scratch_of_thread(m);
    float* normed = s.scratch;             // (M, D)
    float* qkv = normed + M * D;           // (M, width)
    float* attended = qkv + M * width;     // (M, H K)
    float* hidden = attended + M * D;      // (M, F), `apart`
    float* own = hidden + M * apart;       // per thread: attention's scratch
#pragma omp parallel num_threads(s.threads)
    {
#ifdef _OPENMP
        float* mine = own + omp_get_thread_num() * own_size;
#else
        float* mine = own;
#endif
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M; i++)
                rms_norm(s.x + i * D, layer.attention_norm, D, m.eps, normed + i * D);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < width; n += COLUMNS)
                product<WEIGHTS>(normed, D, M, layer.qkv, n, std::min(width, n + COLUMNS), D,
                              [&](int64_t i, int64_t j, float y) { qkv[i * width + j] = y; });
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < s.R * m.kv_heads; i++)
                attend_head(m, layer, s, i / m.kv_heads, i % m.kv_heads, qkv, mine, attended);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < D; n += COLUMNS)
                product<WEIGHTS>(attended, D, M, layer.out, n, std::min(D, n + COLUMNS), D,
                              [&](int64_t i, int64_t j, float y) { s.x[i * D + j] += y; });
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M; i++)
                rms_norm(s.x + i * D, layer.ffn_norm, D, m.eps, normed + i * D);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < F; n += COLUMNS) {
                const int64_t end = std::min(F, n + COLUMNS);
                product<WEIGHTS>(normed, D, M, layer.gate, n, end, D, [&](int64_t i, int64_t j, float y) {
                    hidden[i * apart + W::place(j)] = y; });
                for (int64_t i = 0; i < M; i++) silu(hidden + i * apart + n, end - n);
                product<WEIGHTS>(normed, D, M, layer.up, n, end, D, [&](int64_t i, int64_t j, float y) {
                    hidden[i * apart + W::place(j)] *= y; });
            }
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < D; n += COLUMNS)
                product<WEIGHTS>(hidden, apart, M, layer.down, n, std::min(D, n + COLUMNS), F,
                              [&](int64_t i, int64_t j, float y) { s.x[i * D + j] += y; });
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.wishes; i++) rms_norm(s.x + s.wanted[i] * D, m.norm, D, m.eps, normed + i * D);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < m.vocab; n += COLUMNS)
            product<WEIGHTS>(normed, D, s.wishes, m.output, n, std::min(m.vocab, n + COLUMNS), D,
                          [&](int64_t i, int64_t j, float y) { s.logits[i * s.stride + j] = y; });
    }
}

extern "C" {
// Floats that a step of `tokens` = R T tokens needs as scratch.
int64_t scratch_size(const Model* m, int64_t tokens, int64_t threads) {
    return tokens * (2 * m->dim + hidden_stride(*m) + (m->heads + 2 * m->kv_heads) * m->head_dim) +
           threads * scratch_of_thread(*m);
}

void step(const Model* m, const Step* s) { run(*m, *s); }
}
