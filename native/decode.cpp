// One step of a Llama decoder over cached tokens: embeddings in, logits out, all layers in one call.
//
// A step is flat: n tokens of any rows (sequences), each with its place in its row's cache and the number of places
// that it sees; and asks, whose logits are wanted: fed tokens, or queries of their own that attend keys and values which all
// their layers share. Keys are stored sixteen positions side by side, so that scores of neighbouring positions are
// computed together; values position by position. Compiled once for each type of weights (-DWEIGHTS=…); the cache is
// bfloat16 unless the weights are fp32. Arithmetic is fp32, but for the inputs of products (see product.h).
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "product.h"
#include "team.h"

constexpr int SIDE = 16;  // positions side by side in the cache of keys
// Columns that a thread computes at a time: whole tiles of products, and whole cache lines of results.
constexpr int COLUMNS = IN_TILES<WEIGHTS> ? 64 : 48;
constexpr int64_t NEAR = 1 << 19;  // bytes of inputs that stay in the second-level cache of a core
typedef Input<WEIGHTS> In;
typedef std::conditional_t<WEIGHTS == FLOAT, float, uint16_t> Cached;

struct Attention {           // without q: only stores keys and values; without k and v: attends those of another
    const float* norm;       // (D,)
    Linear q, k, v, out;     // (H K, D), (G K, D), (G K, D), (D, H K)
    void* keys;              // (rows, G, capacity / SIDE, K, SIDE)
    void* values;            // (rows, G, capacity, P), P: K rounded up to a multiple of SIDE
};

struct FeedForward {
    const float* norm;       // (D,)
    Linear gate, up, down;   // (F, D), (F, D), (D, F)
};

struct Layer {
    Attention attention;
    FeedForward feed_forward;
};

struct Model {
    int64_t dim, heads, kv_heads, head_dim, hidden, vocab, capacity;
    float eps;
    int64_t layers;          // self-attention, of the tokens that are fed
    const Layer* layer;
    int64_t queries;         // layers in which separate queries attend what `shared` stored; 0: tokens answer
    const Layer* query;
    Attention shared;
    const float* norm;       // (D,)
    Linear output;           // (V, D)
};

struct Tokens {              // of any rows; those of one row side by side
    int64_t count;
    const int64_t *rope, *row, *slot, *sees;  // (count,) each: rotary row, cache row, place in it, slots that it sees
};

struct Step {
    float* x;                // (n, D) embeddings of what is fed; overwritten
    Tokens fed;
    const int64_t* token;    // (asks,) which fed token answers, where there are no separate queries
    float* y;                // (asks, D) the queries, where there are; overwritten
    const float* query;      // (H K,) what `first_query` gives where all queries start alike, else null
    Tokens asked;            // slot is not used
    const float* table;      // (places, K / 2, 2) cosine and sine
    float* logits;           // (asks, stride)
    int64_t stride;
    float* scratch;          // scratch_size floats
    int64_t threads;
    const float* const* added;  // of each layer what is added to x before it, (n, D) or null; null: nothing at all
};

static inline int64_t blocks(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
static inline int64_t few(int64_t width) { return 4096 / width + 1; }  // rows that a thread does sooner than it shares them
static inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Sixteen cached numbers as two vectors. In bfloat16, number i lies beside number i + 8.
static inline void load16(const float* p, f8& low, f8& high) { low = load(p), high = load(p + 8); }
static inline void load16(const uint16_t* p, f8& low, f8& high) {
    const u8 pairs = read<u8>(p);
    low = (f8)(pairs << 16), high = (f8)(pairs & 0xffff0000u);
}
static inline void put(float* p, int64_t i, float x) { p[i] = x; }
static inline void put(uint16_t* p, int64_t i, float x) { p[(i & ~15) | (i & 7) << 1 | (i >> 3 & 1)] = to_bfloat16(x); }

// Into a row of `out`, whose rows lie ldx apart.
static void rms_norm(const float* x, const float* weight, int64_t D, float eps, In* out, int64_t ldx, int64_t row) {
    f8 squares = all(0.0f);
    for (int64_t i = 0; i < D; i += 8) squares += load(x + i) * load(x + i);
    const float scale = 1.0f / std::sqrt(sum(squares) / D + eps);
    put_inputs<WEIGHTS>(out, ldx, row, 0, D, [&](int64_t k) { return x[k] * scale * weight[k]; });
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

// sums[q] += x_q times B groups of 16 cached numbers, `apart` from one another; the x_q lie ldx apart.
template <int Q, int B>
static inline void add_scaled(const float* x, int64_t ldx, const Cached* at, int64_t apart, f8 (&sums)[Q][2 * B]) {
    for (int b = 0; b < B; b++) {
        f8 low, high;
        load16(at + b * apart, low, high);
        for (int q = 0; q < Q; q++) {
            sums[q][2 * b] = multiply_add(all(x[q * ldx]), low, sums[q][2 * b]);
            sums[q][2 * b + 1] = multiply_add(all(x[q * ldx]), high, sums[q][2 * b + 1]);
        }
    }
}

// Reads of the cache jump from one head's keys to its values, and to the next head's keys: the CPU does not foresee that,
// so what is `ahead` is prefetched all along. Attention of single queries becomes 1.3 to 1.9 times as fast.
constexpr int64_t AHEAD = 128 / sizeof(Cached);  // positions
static inline void prefetch(const Cached* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(Cached)) __builtin_prefetch(p + i);
}

// scores[q][s] = scale * x_q . k_s for Q queries, P apart, and B blocks of SIDE positions.
template <int Q, int B>
static inline void score(const float* x, int64_t P, const Cached* keys, int64_t K, float scale, float* scores,
                         int64_t capacity, const Cached* ahead) {
    f8 sums[Q][2 * B] = {};
    for (int64_t k = 0; k < K; k++, ahead += B * SIDE) {
        prefetch(ahead, B * SIDE);
        add_scaled<Q, B>(x + k, P, keys + k * SIDE, K * SIDE, sums);
    }
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < 2 * B; b++) store(scores + q * capacity + 8 * b, sums[q][b] * all(scale));
}

// out[q] = sum over s < n of p_qs v_s, for 16 B neighbours of a head; the p_q lie `capacity` apart, the v_s and outs P.
// `next`: what is read after all this.
template <int Q, int B>
static inline void mix(const float* p, int64_t capacity, const Cached* values, int64_t n, int64_t P, float* out,
                       const Cached* next) {
    f8 sums[Q][2 * B] = {};
    for (int64_t s = 0; s < n; s++) {
        prefetch(s + AHEAD < n ? values + (s + AHEAD) * P : next + (s + AHEAD - n) * P, 16 * B);
        add_scaled<Q, B>(p + s, capacity, values + s * P, 16, sums);
    }
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < 2 * B; b++) store(out + q * P + 8 * b, sums[q][b]);
}

// Scores to probabilities but for a factor, which is returned; those of no position, up to a whole block, become 0.
static float softmax(float* scores, int64_t n) {
    const int64_t padded = rounded(n, SIDE);
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
    return 1.0f / sum(total);
}

constexpr int QUERIES = 4;  // of one head that attend the same positions together: they share what is read

// Attention of Q queries over n cached positions; queries and out (Q, P), P: K rounded up to a multiple of SIDE; `scores`
// holds Q times capacity floats. `next`: what will be read after it.
template <int Q>
static void attend(const float* queries, const Cached* keys, const Cached* values, int64_t n, int64_t K,
                   int64_t capacity, float* scores, float* out, const Cached* next) {
    constexpr int B = Q == 1 ? 4 : 2;  // blocks at a time
    const int64_t blocks = (n + SIDE - 1) / SIDE, P = rounded(K, SIDE);
    const float scale = 1.0f / std::sqrt((float)K);
    int64_t b = 0;
    for (; b + B <= blocks; b += B)
        score<Q, B>(queries, P, keys + b * K * SIDE, K, scale, scores + b * SIDE, capacity,
                    b + 2 * B <= blocks ? keys + (b + B) * K * SIDE : values);
    for (; b < blocks; b++)
        score<Q, 1>(queries, P, keys + b * K * SIDE, K, scale, scores + b * SIDE, capacity, values + b % B * K * SIDE);
    float share[Q];
    for (int q = 0; q < Q; q++) share[q] = softmax(scores + q * capacity, n);
    int64_t k = 0;
    for (; k + 16 * B <= P; k += 16 * B) mix<Q, B>(scores, capacity, values + k, n, P, out + k, next + k);
    for (; k < P; k += 16) mix<Q, 1>(scores, capacity, values + k, n, P, out + k, next + k);
    for (int q = 0; q < Q; q++)
        for (int64_t i = 0; i < P; i += 8) store(out + q * P + i, load(out + q * P + i) * all(share[q]));
}

static int64_t scratch_of_thread(const Model& m) { return QUERIES * (m.capacity + 2 * rounded(m.head_dim, SIDE)); }
static int64_t spaced(int64_t width) { return width + 32; }  // no power of two: rows would share cache sets

// What the functions below work with.
struct Work {
    Team::Call& team;
    const Model& m;
    const float* table;
    In* normed;             // rows of D, `spaced`
    float* qkv;             // rows of (H + 2 G) K
    In *attended, *hidden;  // rows of H K and F, `spaced`
    float* own;             // of each thread: scratch_of_thread floats, then COLUMNS for each row
    int64_t rows;           // all of the above have room for so many, a multiple of ROUND

    int64_t width() const { return (m.heads + 2 * m.kv_heads) * m.head_dim; }
    float* scratch(int64_t thread) const { return own + thread * (scratch_of_thread(m) + rows * COLUMNS); }
};

// normed row i = norm of row of(i) of x.
template <class Of> static void norm_rows(const Work& w, const float* x, const float* weight, int64_t n, const Of& of) {
    const int64_t D = w.m.dim;
    w.team.loop(n, [&](int64_t i, int64_t) { rms_norm(x + of(i) * D, weight, D, w.m.eps, w.normed, spaced(D), i); },
                few(D));
}

static void norm_rows(const Work& w, const float* x, const float* weight, int64_t n) {
    norm_rows(w, x, weight, n, [](int64_t i) { return i; });
}

// Arranges n rows of x and calls part(x, first, rows, begin, end, thread) for all pieces of their product with a matrix
// of N columns: `x` begins with row `first`. Many rows are done some at a time, which then stay in the cache.
template <class Part>
static void in_parts(const Work& w, In* x, int64_t ldx, int64_t n, int64_t N, int64_t K, const Part& part) {
    constexpr int64_t TOGETHER = ROUND<WEIGHTS>, LEAST = 96;  // rows: with fewer in a part reading w takes long
    if (IN_TILES<WEIGHTS>)
        w.team.loop((n + TOGETHER - 1) / TOGETHER,
                    [&](int64_t i, int64_t) { arrange<WEIGHTS>(x + i * TOGETHER * ldx, ldx, K); },
                    few(TOGETHER * K / 8));
    const int64_t most = std::max(LEAST, NEAR / (K * (int64_t)sizeof(In))), parts = (n + most - 1) / most;
    const int64_t each = parts ? rounded((n + parts - 1) / parts, TOGETHER) : 0;  // rows of a part
    w.team.loop(parts * blocks(N), [&](int64_t piece, int64_t thread) {
        const int64_t first = piece / blocks(N) * each, begin = piece % blocks(N) * COLUMNS;
        if (first < n)
            part(x + first * ldx, first, std::min(n - first, each), begin, std::min(N, begin + COLUMNS), thread);
    });
}

// put(i, j, y) for every y = x_i . w_j.
template <class Put>
static void project(const Work& w, In* x, int64_t ldx, int64_t n, const Linear& linear, int64_t N, int64_t K,
                    const Put& put) {
    in_parts(w, x, ldx, n, N, K, [&](const In* from, int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t) {
        product<WEIGHTS>(from, ldx, rows, linear, begin, end, K,
                         [&](int64_t i, int64_t j, float y) { put(first + i, j, y); });
    });
}

// The rows' queries, keys and values into qkv, in one loop, as there is little to do for few rows.
static void project_qkv(const Work& w, const Attention& a, int64_t n) {
    const int64_t D = w.m.dim, width = w.width(), H = w.m.heads * w.m.head_dim, G = w.m.kv_heads * w.m.head_dim;
    const Linear* linears[] = {&a.q, &a.k, &a.v};
    const int64_t sizes[] = {a.q.weight ? H : 0, a.k.weight ? G : 0, a.k.weight ? G : 0}, offsets[] = {0, H, H + G};
    int64_t starts[4] = {};  // where their columns begin if each begins a block
    for (int p = 0; p < 3; p++) starts[p + 1] = starts[p] + blocks(sizes[p]) * COLUMNS;
    in_parts(w, w.normed, spaced(D), n, starts[3], D,
             [&](const In* from, int64_t first, int64_t rows, int64_t column, int64_t, int64_t) {
        const int p = (column >= starts[1]) + (column >= starts[2]);
        const int64_t begin = column - starts[p];
        float* into = w.qkv + first * width + offsets[p];
        product<WEIGHTS>(from, spaced(D), rows, *linears[p], begin, std::min(sizes[p], begin + COLUMNS), D,
                         [&](int64_t i, int64_t j, float y) { into[i * width + j] = y; });
    });
}

// The tokens [first, end) of one row, and one KV head: store keys and values, let all queries of the group attend.
static void attend_head(const Work& w, const Attention& a, const Tokens& t, int64_t first, int64_t end, int64_t g,
                        float* scratch) {
    const Model& m = w.m;
    const int64_t K = m.head_dim, P = rounded(K, SIDE), group = m.heads / m.kv_heads, width = w.width();
    const int64_t cache_row = t.row[first] * m.kv_heads + g;
    Cached* keys = (Cached*)a.keys + cache_row * m.capacity * K;
    Cached* values = (Cached*)a.values + cache_row * m.capacity * P;
    float* turned = scratch;                 // (QUERIES, P)
    float* attended = turned + QUERIES * P;  // (QUERIES, P)
    float* scores = attended + QUERIES * P;  // (QUERIES, capacity)
    for (int64_t i = first; a.k.weight && i < end; i++) {
        const int64_t at = t.slot[i];
        rotate(w.qkv + i * width + (m.heads + g) * K, w.table + t.rope[i] * K, K, turned);
        for (int64_t k = 0; k < K; k++) put(keys + (at / SIDE * K + k) * SIDE, at % SIDE, turned[k]);
        const float* value = w.qkv + i * width + (m.heads + m.kv_heads + g) * K;
        for (int64_t k = 0; k < P; k++) put(values + at * P, k, k < K ? value[k] : 0.0f);
    }
    const int64_t asks = a.q.weight ? (end - first) * group : 0;  // the heads of the first token, of the second, …
    for (int64_t ask = 0, together; ask < asks; ask += together) {
        const int64_t sees = t.sees[first + ask / group];
        const auto like = [&](int64_t other) { return other < asks && t.sees[first + other / group] == sees; };
        together = like(ask + 1) && like(ask + 2) && like(ask + 3) ? QUERIES : 1;
        for (int64_t q = 0; q < together; q++) {
            const int64_t i = first + (ask + q) / group, h = g * group + (ask + q) % group;
            rotate(w.qkv + i * width + h * K, w.table + t.rope[i] * K, K, turned + q * P);
        }
        (together > 1 ? attend<QUERIES> : attend<1>)(turned, keys, values, sees, K, m.capacity, scores, attended,
                                                     ask + together < asks ? keys : keys + m.capacity * K);
        for (int64_t q = 0; q < together; q++) {
            const int64_t i = first + (ask + q) / group, h = g * group + (ask + q) % group;
            put_inputs<WEIGHTS>(w.attended, spaced(m.heads * K), i, h * K, K,
                                [&](int64_t k) { return attended[q * P + k - h * K]; });
        }
    }
}

// x += attention(norm(x)). `starts` holds the first token of each row, and their number at the end; `query` what the
// projection gives for every row, if that is known.
static void attention(const Work& w, const Attention& a, const Tokens& t, const std::vector<int64_t>& starts,
                      float* x, const float* query = nullptr) {
    const Model& m = w.m;
    const int64_t n = t.count, D = m.dim, H = m.heads * m.head_dim;
    if (query) {
        w.team.loop(n, [&](int64_t i, int64_t) { std::copy(query, query + H, w.qkv + i * w.width()); }, few(H));
    } else {
        norm_rows(w, x, a.norm, n);
        project_qkv(w, a, n);
    }
    w.team.loop(((int64_t)starts.size() - 1) * m.kv_heads, [&](int64_t i, int64_t thread) {
        attend_head(w, a, t, starts[i / m.kv_heads], starts[i / m.kv_heads + 1], i % m.kv_heads, w.scratch(thread));
    });
    if (a.q.weight)
        project(w, w.attended, spaced(H), n, a.out, D, H, [&](int64_t i, int64_t j, float y) { x[i * D + j] += y; });
}

// x += down(silu(gate n) * up n) with n = norm(x).
static void feed_forward(const Work& w, const FeedForward& f, int64_t n, float* x) {
    const int64_t D = w.m.dim, F = w.m.hidden, apart = spaced(F);
    norm_rows(w, x, f.norm, n);
    in_parts(w, w.normed, spaced(D), n, F, D,
             [&](const In* from, int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t thread) {
        float* gate = w.scratch(thread) + scratch_of_thread(w.m);  // (rows, COLUMNS)
        In* into = w.hidden + first * apart;
        product<WEIGHTS>(from, spaced(D), rows, f.gate, begin, end, D, [&](int64_t i, int64_t j, float y) {
            gate[i * COLUMNS + j - begin] = y; });
        for (int64_t i = 0; i < rows; i++) silu(gate + i * COLUMNS, end - begin);
        product<WEIGHTS>(from, spaced(D), rows, f.up, begin, end, D, [&](int64_t i, int64_t j, float y) {
            gate[i * COLUMNS + j - begin] *= y; });
        for (int64_t i = 0; i < rows; i++)
            put_inputs<WEIGHTS>(into, apart, i, begin, end - begin,
                                [&](int64_t k) { return gate[i * COLUMNS + k - begin]; });
    });
    project(w, w.hidden, apart, n, f.down, D, F, [&](int64_t i, int64_t j, float y) { x[i * D + j] += y; });
}

// The logits of `n` rows of x: those that `chosen` names, or the first.
static void head(const Work& w, const float* x, const int64_t* chosen, int64_t n, float* logits, int64_t stride) {
    const int64_t D = w.m.dim;
    norm_rows(w, x, w.m.norm, n, [&](int64_t i) { return chosen ? chosen[i] : i; });
    project(w, w.normed, spaced(D), n, w.m.output, w.m.vocab, D,
            [&](int64_t i, int64_t j, float y) { logits[i * stride + j] = y; });
}

static void add(const Work& w, const float* terms, int64_t n, float* x) {
    w.team.loop(n, [&](int64_t i, int64_t) { x[i] += terms[i]; }, few(1));
}

static std::vector<int64_t> starts_of_rows(const Tokens& t) {
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < t.count; i++)
        if (i == 0 || t.row[i] != t.row[i - 1]) starts.push_back(i);
    starts.push_back(t.count);
    return starts;
}

static void run(const Model& m, const Step& s) {
    const int64_t n = rounded(std::max(s.fed.count, s.asked.count), ROUND<WEIGHTS>), D = m.dim;
    const std::vector<int64_t> fed = starts_of_rows(s.fed), asked = starts_of_rows(s.asked);
    float* qkv = s.scratch + n * spaced(D);
    float* attended = qkv + n * rounded((m.heads + 2 * m.kv_heads) * m.head_dim, SIDE);
    float* hidden = attended + n * spaced(m.heads * m.head_dim);
    Team::Call team(s.threads);
    const Work w{team, m, s.table, (In*)s.scratch, qkv, (In*)attended, (In*)hidden, hidden + n * spaced(m.hidden), n};
    for (int64_t l = 0; l < m.layers; l++) {
        if (s.added && s.added[l]) add(w, s.added[l], s.fed.count * D, s.x);
        attention(w, m.layer[l].attention, s.fed, fed, s.x);
        feed_forward(w, m.layer[l].feed_forward, s.fed.count, s.x);
    }
    if (m.queries) attention(w, m.shared, s.fed, fed, s.x);
    for (int64_t l = 0; l < m.queries; l++) {
        attention(w, m.query[l].attention, s.asked, asked, s.y, l ? nullptr : s.query);
        feed_forward(w, m.query[l].feed_forward, s.asked.count, s.y);
    }
    head(w, m.queries ? s.y : s.x, m.queries ? nullptr : s.token, s.asked.count, s.logits, s.stride);
}

extern "C" {
// The instructions that products are computed with where their results depend on it (see product.h), else 0.
int units() { return IN_TILES<WEIGHTS> ? AMX : std::is_same_v<In, uint16_t> ? BF16DOT : 0; }

// Floats that a step of at most `tokens` tokens, and as many asks, needs as scratch.
int64_t scratch_size(const Model* m, int64_t tokens, int64_t threads) {
    const int64_t H = m->heads * m->head_dim, G = m->kv_heads * m->head_dim;
    tokens = rounded(tokens, ROUND<WEIGHTS>);
    return tokens * (spaced(m->dim) + rounded(H + 2 * G, SIDE) + spaced(H) + spaced(m->hidden)) +
           threads * (scratch_of_thread(*m) + tokens * COLUMNS);
}

// What the first layer of queries projects y (D,) to, before its rotation: out (H K,), the same for every query that
// starts as y does. `scratch` holds what a step of one token needs.
void first_query(const Model* m, const float* y, float* out, float* scratch) {
    Team::Call team(1);
    const Work w{team, *m, nullptr, (In*)scratch, out, nullptr, nullptr, nullptr, ROUND<WEIGHTS>};
    norm_rows(w, y, m->query->attention.norm, 1);
    project_qkv(w, m->query->attention, 1);
}

void step(const Model* m, const Step* s) { run(*m, *s); }
}
