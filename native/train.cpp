// What training computes between matrix products, number by number, in one pass over the memory where PyTorch's
// operations take four to nine. Numbers are float or, in half precision, bfloat16; all arithmetic is fp32.
//
// Pieces of work have a fixed size, and sums of pieces are added in their order: results depend on no number of threads.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "philox.h"
#include "simd.h"
#ifdef TILES
#include "attention_amx.h"
#endif

typedef Bits<Lanes>::Unsigned Words;
typedef Bits<Lanes>::Signed Signed;
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
static const long ROWS = 64;          // of a piece
static const long NUMBERS = 1 << 14;  // of a piece of what has no rows; a multiple of 64

// PyTorch's own threads, those of OpenMP: after each operation they spin for a while, which threads of ours would have to
// compete with. Found at run time, as PyTorch brings its own copy of the library; without it the caller works alone, and
// PyTorch's operations may be faster.
typedef void (*Parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);

static Parallel parallel() {
    static const Parallel found = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found;
}

template <class Body> static void loop(long count, int threads, const Body& body) {
    struct Shared {
        std::atomic<long> next;
        long count;
        const Body& body;
    } shared{{0}, count, body};
    const auto work = [](void* data) {
        Shared& shared = *(Shared*)data;
        for (long i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.body(i);
    };
    if (threads > 1 && count > 1 && parallel())
        parallel()(work, &shared, threads, 0);
    else
        work(&shared);
}

// The first n numbers at p (all if there are as many), and back.
static inline Lanes get(const float* p, long n) { return load_part<Lanes>(p, n); }
static inline Lanes get(const uint16_t* p, long n) {
    uint16_t full[LANES] = {0};
    if (n < LANES) std::memcpy(full, p, n * sizeof *p);
    return (Lanes)(__builtin_convertvector(read<Halves>(n < LANES ? full : p), Words) << 16);
}
static inline void put(float* p, Lanes v, long n) {
    if (n >= LANES) return (void)std::memcpy(p, &v, sizeof v);
    for (long i = 0; i < n; i++) p[i] = v[i];
}
static inline void put(uint16_t* p, Lanes v, long n) {  // to nearest, ties to even
    const Words bits = (Words)v, nan = Words{} + 0x7fc0, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector((Words)select((Signed)(v != v), (Lanes)nan, (Lanes)rounded), Halves);
    if (n >= LANES) return (void)std::memcpy(p, &half, sizeof half);
    for (long i = 0; i < n; i++) p[i] = half[i];
}

template <class Number>
static void norm(const float* x, const float* rms, const float* weight, Number* out, long rows, long dim, int threads) {
    loop((rows + ROWS - 1) / ROWS, threads, [&](long piece) {
        for (long row = piece * ROWS; row < std::min(rows, (piece + 1) * ROWS); row++)
            for (long i = 0; i < dim; i += LANES) {
                const long n = dim - i;
                put(out + row * dim + i, get(x + row * dim + i, n) * rms[row] * get(weight + i, n), n);
            }
    });
}

// With unit = x * rms and product = grad * unit: grad_x = (grad * weight - unit * mean(product * weight)) * rms;
// grad_weight += the sum of products over rows.
template <class Number>
static void norm_backward(const Number* grad, const float* x, const float* rms, const float* weight, float* grad_x,
                          float* grad_weight, long rows, long dim, int threads) {
    const long pieces = (rows + ROWS - 1) / ROWS, width = (dim + LANES - 1) / LANES * LANES;
    std::vector<float> sums(pieces * width);
    loop(pieces, threads, [&](long piece) {
        float* sum = sums.data() + piece * width;
        for (long row = piece * ROWS; row < std::min(rows, (piece + 1) * ROWS); row++) {
            Lanes total = {};
            for (long i = 0; i < dim; i += LANES) {
                const long n = dim - i;
                const Lanes product = get(grad + row * dim + i, n) * (get(x + row * dim + i, n) * rms[row]);
                put(sum + i, read<Lanes>(sum + i) + product, LANES);
                total += product * get(weight + i, n);
            }
            float mean = 0;
            for (int i = 0; i < LANES; i++) mean += total[i];
            mean /= dim;
            for (long i = 0; i < dim; i += LANES) {
                const long n = dim - i;
                const Lanes unit = get(x + row * dim + i, n) * rms[row];
                const Lanes scaled = get(grad + row * dim + i, n) * get(weight + i, n);
                put(grad_x + row * dim + i, (scaled - unit * mean) * rms[row], n);
            }
        }
    });
    for (long piece = 0; piece < pieces; piece++)
        for (long i = 0; i < dim; i++) grad_weight[i] += sums[piece * width + i];
}

// Of y = silu(a) * b: y itself, and from its gradient g those of a and of b, which takes the place of g.
template <class Number>
static void swiglu_backward(const Number* a, const Number* b, Number* g, Number* grad_a, Number* y, long count,
                            int threads) {
    loop((count + NUMBERS - 1) / NUMBERS, threads, [&](long piece) {
        for (long i = piece * NUMBERS; i < std::min(count, (piece + 1) * NUMBERS); i += LANES) {
            const long n = count - i;
            const Lanes x = get(a + i, n), up = get(b + i, n), grad = get(g + i, n);
            const Lanes sigmoid = everywhere(1.0f) / (everywhere(1.0f) + exponential(-x)), gate = x * sigmoid;
            put(y + i, gate * up, n);
            put(g + i, gate * grad, n);
            put(grad_a + i, grad * up * (sigmoid + gate * (everywhere(1.0f) - sigmoid)), n);
        }
    });
}

// x with dropped / 65536 of its numbers zero and the others scaled up. Number i draws 16 bits that depend on key and i.
template <class Number>
static void drop(const Number* x, Number* out, long count, uint64_t key, int dropped, int threads) {
    const float scale = 65536.0f / (65536 - dropped);
    loop((count + NUMBERS - 1) / NUMBERS, threads, [&](long piece) {
        for (long first = piece * NUMBERS; first < std::min(count, (piece + 1) * NUMBERS); first += 64) {
            u8 random[4];
            philox(key, 0, first / 8, random);
            for (long i = 0; i < 64 && first + i < count; i += LANES) {
                const long n = count - first - i;
                const Signed draws = __builtin_convertvector(read<Halves>((const char*)random + 2 * i), Signed);
                put(out + first + i, select(draws >= dropped, get(x + first + i, n) * scale, Lanes{}), n);
            }
        }
    });
}

static inline Lanes swapped(Lanes x) {  // neighbours with one another
#ifdef SIXTEEN_LANES
    return (Lanes)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX2__)
    return (Lanes)_mm256_permute_ps((__m256)x, 0xb1);
#else
    Lanes y;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ 1];
    return y;
#endif
}

// Turns pairs of the first `width` numbers of each token in place: (a, b) -> (a cos - b sin, a sin + b cos), or with the
// transposed matrix. table (batch or 1, tokens, head_dim / 2, 2): cosine and sine.
template <class Number>
static void rotate(Number* x, long batch_stride, long token_stride, const float* table, long table_stride, long batch,
                   long tokens, long width, long head_dim, int transposed, int threads) {
    loop(batch * tokens, threads, [&](long item) {
        const float* pairs = table + item / tokens * table_stride + item % tokens * head_dim;
        Number* at = x + item / tokens * batch_stride + item % tokens * token_stride;
        float *cosine = (float*)__builtin_alloca(2 * head_dim * sizeof(float)), *sine = cosine + head_dim;
        for (long i = 0; i < head_dim; i++) {
            cosine[i] = pairs[i & ~1];
            sine[i] = (i & 1) == !transposed ? pairs[i | 1] : -pairs[i | 1];
        }
        for (long head = 0; head < width; head += head_dim)
            for (long i = 0; i < head_dim; i += LANES) {
                const long n = head_dim - i;
                const Lanes v = get(at + head + i, n);
                const Lanes straight = held(v * get(cosine + i, n)), across = held(swapped(v) * get(sine + i, n));
                put(at + head + i, straight + across, n);  // on x86 each product is rounded, as in PyTorch
            }
    });
}

// ---- what Python calls; `half`: numbers are bfloat16

extern "C" {

int has_threads() { return parallel() != nullptr; }

// Whether attention_backward does something.
int has_attention() {
#ifdef TILES
    return 1;
#else
    return 0;
#endif
}

// Of causal attention of q over k and v (batch, tokens, heads, width), bfloat16: tokens and images are `strides` apart, in
// q, k and v by turns; the others are contiguous. width is a multiple of 32.
void attention_backward(const uint16_t* q, const uint16_t* k, const uint16_t* v, const long* strides,
                        const uint16_t* out, const uint16_t* grad, uint16_t* grad_q, uint16_t* grad_k, uint16_t* grad_v,
                        long batch, long tokens, long heads, long width, int threads) {
#ifdef TILES
    loop(batch * heads, threads, [&](long item) {
        const long image = item / heads, first = item % heads * width, at = image * tokens * heads * width + first;
        static thread_local std::unique_ptr<AttentionGradients> kept;
        if (!kept || !kept->fits(tokens, width)) kept.reset(new AttentionGradients(tokens, width));
        kept->run(Head{q + image * strides[1] + first, k + image * strides[3] + first, v + image * strides[5] + first,
                       strides[0], strides[2], strides[4], out + at, grad + at, grad_q + at, grad_k + at, grad_v + at,
                       heads * width});
    });
#endif
}

void norm(const float* x, const float* rms, const float* weight, void* out, int half, long rows, long dim, int threads) {
    if (half) norm(x, rms, weight, (uint16_t*)out, rows, dim, threads);
    else norm(x, rms, weight, (float*)out, rows, dim, threads);
}

void norm_backward(const void* grad, int half, const float* x, const float* rms, const float* weight, float* grad_x,
                   float* grad_weight, long rows, long dim, int threads) {
    if (half) norm_backward((const uint16_t*)grad, x, rms, weight, grad_x, grad_weight, rows, dim, threads);
    else norm_backward((const float*)grad, x, rms, weight, grad_x, grad_weight, rows, dim, threads);
}

void swiglu_backward(const void* a, const void* b, void* g, void* grad_a, void* y, int half, long count, int threads) {
    if (half)
        swiglu_backward((const uint16_t*)a, (const uint16_t*)b, (uint16_t*)g, (uint16_t*)grad_a, (uint16_t*)y, count,
                        threads);
    else swiglu_backward((const float*)a, (const float*)b, (float*)g, (float*)grad_a, (float*)y, count, threads);
}

void drop(const void* x, void* out, int half, long count, uint64_t key, int dropped, int threads) {
    if (half) drop((const uint16_t*)x, (uint16_t*)out, count, key, dropped, threads);
    else drop((const float*)x, (float*)out, count, key, dropped, threads);
}

void rotate(void* x, int half, long batch_stride, long token_stride, const float* table, long table_stride, long batch,
            long tokens, long width, long head_dim, int transposed, int threads) {
    if (half)
        rotate((uint16_t*)x, batch_stride, token_stride, table, table_stride, batch, tokens, width, head_dim, transposed,
               threads);
    else
        rotate((float*)x, batch_stride, token_stride, table, table_stride, batch, tokens, width, head_dim, transposed,
               threads);
}

}
