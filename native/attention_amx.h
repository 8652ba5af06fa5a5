// The gradients of causal attention in bfloat16, on CPUs with AMX.
//
// As in FlashAttention-2 (arXiv 2307.08691) scores are computed again, block by block, and never kept. A block of 32 keys
// by 32 queries is four tiles of sums. Scores are computed transposed, a row per key: so they are what the gradients of
// values and keys multiply, and sixteen queries lie side by side for the softmax.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "amx.h"
#include "simd.h"

struct Head {  // of one image; numbers from one token to the next
    const uint16_t *q, *k, *v;
    long q_stride, k_stride, v_stride;
    const uint16_t *out, *grad;
    uint16_t *grad_q, *grad_k, *grad_v;
    long stride;  // of the latter five
};

class AttentionGradients {
   public:
    AttentionGradients(long tokens, long width)
        : T(tokens), K(width), P((tokens + BLOCK - 1) / BLOCK * BLOCK), W(P + 32),
          room(6 * P * K + (K + 3 * BLOCK) * W), floats(P * BLOCK + 2 * BLOCK * BLOCK + 2 * P + W * K) {
        uint16_t* at = aligned(room);
        for (uint16_t** part : {&keys, &values, &queries_turned, &grads_turned, &queries_paired, &grads_paired})
            *part = at, at += P * K;
        for (uint16_t** part : {&weights, &slopes, &slopes_paired}) *part = at, at += BLOCK * W;
        keys_across = at;
        float* next = aligned(floats);
        scores = next, next += P * BLOCK;
        block = next, next += BLOCK * BLOCK;
        slope = next, next += BLOCK * BLOCK;
        log_sum = next, next += P;
        delta = next, next += P;
        grad_q = next;
    }

    bool fits(long tokens, long width) const { return tokens == T && width == K; }

    void run(const Head& head) {
        const float scale = 1 / std::sqrt((float)K);
        arrange(head);
        amx::in_memory(keys);
        amx::configure(16, 16, 32);
        for (long i = 0; i < P; i += BLOCK) normalise(i, scale);
        std::fill(grad_q, grad_q + W * K, 0.0f);
        for (long j = 0; j < P; j += BLOCK) {
            for (long i = j; i < P; i += BLOCK) weigh(i, j, scale);
            for (long first = 0; first < K; first += BLOCK) {
                collect(weights, grads_paired, j, first, head.grad_v, head.stride, 1);
                collect(slopes, queries_paired, j, first, head.grad_k, head.stride, scale);
                add_to_queries(j, first);
            }
        }
        _tile_release();
        for (long t = 0; t < T; t++)
            for (long i = 0; i < K; i++) to_bfloat(grad_q[i * W + t] * scale, head.grad_q + t * head.stride + i);
    }

   private:
    static constexpr long BLOCK = 32, TILE = 512;  // tokens; numbers of a tile
    const long T, K, P;  // tokens, numbers of each, tokens filled up with zeros to whole blocks
    const long W;        // from one row of tokens to the next: a power of two would share cache sets
    std::vector<uint16_t> room;
    std::vector<float> floats;
    uint16_t *keys, *values;                  // (P, K)
    uint16_t* keys_across;                    // (K, W)
    uint16_t *queries_turned, *grads_turned;  // (K / 32, P / 16, pair of numbers, token, number): see amx.h
    uint16_t *queries_paired, *grads_paired;  // (P / 32, K / 16, pair of tokens, number, token)
    uint16_t *weights, *slopes;               // (BLOCK keys, W): the softmax, and the gradient of the scores
    uint16_t* slopes_paired;                  // (BLOCK / 2 pairs of keys, W, key)
    float *scores, *block, *slope;            // (P or BLOCK keys, BLOCK queries)
    float *log_sum, *delta;                   // (P,) of each query: of the softmax; output times its gradient
    float* grad_q;                            // (K, W)

    template <class Number> static Number* aligned(std::vector<Number>& room) {
        room.resize(room.size() + 64 / sizeof(Number));
        return (Number*)(((uintptr_t)room.data() + 63) / 64 * 64);
    }

    static inline void to_bfloat(float x, uint16_t* to) {
        const __m128i word = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
        *to = (uint16_t)_mm_extract_epi16(word, 0);
    }
    static inline __m512i words(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    }
    static inline float dot(const uint16_t* a, const uint16_t* b, long n) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < n; i += 16)
            sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words(a + i), 16)),
                                  _mm512_castsi512_ps(_mm512_slli_epi32(words(b + i), 16)), sum);
        return _mm512_reduce_add_ps(sum);
    }

    // Copies of a head's tokens as tiles want them. Tokens past the last are zeros.
    void arrange(const Head& head) {
        for (long t = 0; t < T; t++) {
            std::memcpy(keys + t * K, head.k + t * head.k_stride, K * 2);
            std::memcpy(values + t * K, head.v + t * head.v_stride, K * 2);
            delta[t] = dot(head.out + t * head.stride, head.grad + t * head.stride, K);
        }
        std::fill(delta + T, delta + P, 0.0f);
        const std::vector<uint16_t> zeros(K);
        const auto token = [&](const uint16_t* x, long stride, long t) { return t < T ? x + t * stride : zeros.data(); };
        const auto turn = [&](const uint16_t* x, long stride, uint16_t* to) {
            for (long s = 0; s < K / 32; s++)
                for (long g = 0; g < P / 16; g++, to += TILE) {
                    for (long i = 0; i < 16; i++) std::memcpy(to + i * 32, token(x, stride, g * 16 + i) + s * 32, 64);
                    amx::transpose(to, 64);
                }
        };
        const auto pair = [&](const uint16_t* x, long stride, uint16_t* to) {
            for (long t = 0; t < P; t += 32)
                for (long i = 0; i < K; i += 16)
                    for (long r = 0; r < 32; r += 2, to += 32)
                        _mm512_storeu_si512(to, _mm512_or_si512(words(token(x, stride, t + r) + i), _mm512_slli_epi32(
                            words(token(x, stride, t + r + 1) + i), 16)));
        };
        turn(head.q, head.q_stride, queries_turned);
        turn(head.grad, head.stride, grads_turned);
        pair(head.q, head.q_stride, queries_paired);
        pair(head.grad, head.stride, grads_paired);
        alignas(64) uint16_t tile[TILE];
        for (long g = 0; g < P; g += 16)
            for (long s = 0; s < K; s += 32) {
                for (long i = 0; i < 16; i++) std::memcpy(tile + i * 32, keys + (g + i) * K + s, 64);
                amx::transpose(tile, 64);
                for (long i = 0; i < 16; i++) {  // numbers 2 i and 2 i + 1 of sixteen tokens
                    const __m512i both = _mm512_loadu_si512(tile + i * 32);
                    _mm256_storeu_si256((__m256i*)(keys_across + (s + 2 * i) * W + g), _mm512_cvtepi32_epi16(both));
                    _mm256_storeu_si256((__m256i*)(keys_across + (s + 2 * i + 1) * W + g),
                                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
                }
            }
    }

    // to (BLOCK, BLOCK) = 32 rows of `rows` (P, K) from j by 32 tokens of `turned` from i
    void multiply(const uint16_t* rows, long j, const uint16_t* turned, long i, float* to) const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long s = 0; s < K / 32; s++) {
            const uint16_t *a = rows + j * K + s * 32, *b = turned + (s * (P / 16) + i / 16) * TILE;
            _tile_loadd(4, a, K * 2);
            _tile_loadd(5, a + 16 * K, K * 2);
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + TILE, 64);
            add_products();
        }
        store(to);
    }
    static inline void add_products() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    static inline void store(float* to) {
        _tile_stored(0, to, BLOCK * 4);
        _tile_stored(1, to + 16, BLOCK * 4);
        _tile_stored(2, to + 16 * BLOCK, BLOCK * 4);
        _tile_stored(3, to + 16 * BLOCK + 16, BLOCK * 4);
        amx::in_memory(to);
    }

    // log_sum of 32 queries from i: what the exponents of their softmax are lowered by.
    void normalise(long i, float scale) {
        for (long j = 0; j <= i; j += BLOCK) multiply(keys, j, queries_turned, i, scores + j * BLOCK);
        const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (long half = 0; half < BLOCK; half += 16) {
            const __m512i query = _mm512_add_epi32(place, _mm512_set1_epi32(i + half));
            const auto sees = [&](long key) { return _mm512_cmple_epi32_mask(_mm512_set1_epi32(key), query); };
            __m512 top = _mm512_set1_ps(-INFINITY);
            for (long key = 0; key < i + BLOCK; key++)
                top = _mm512_mask_max_ps(top, sees(key), top, _mm512_loadu_ps(scores + key * BLOCK + half));
            f16 sum = {};
            for (long key = 0; key < i + BLOCK; key++) {
                const f16 x = ((f16)_mm512_loadu_ps(scores + key * BLOCK + half) - (f16)top) * scale;
                sum += (f16)_mm512_maskz_mov_ps(sees(key), (__m512)exponential(x));
            }
            for (int lane = 0; lane < 16; lane++)
                log_sum[i + half + lane] = ((f16)top)[lane] * scale + std::log(sum[lane]);
        }
    }

    // Of 32 queries from i and 32 keys from j: weights, slopes and slopes_paired.
    void weigh(long i, long j, float scale) {
        multiply(keys, j, queries_turned, i, block);
        multiply(values, j, grads_turned, i, slope);  // first the gradient of the weights
        const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (long half = 0; half < BLOCK; half += 16) {
            const f16 lowered = (f16)_mm512_loadu_ps(log_sum + i + half), less = (f16)_mm512_loadu_ps(delta + i + half);
            const __m512i query = _mm512_add_epi32(place, _mm512_set1_epi32(i + half));
            __m512i even = {};
            for (long key = 0; key < BLOCK; key++) {
                const __mmask16 sees = _mm512_cmple_epi32_mask(_mm512_set1_epi32(j + key), query);
                const f16 x = (f16)_mm512_loadu_ps(block + key * BLOCK + half) * scale - lowered;
                const f16 weight = (f16)_mm512_maskz_mov_ps(sees, (__m512)exponential(x));
                const f16 grad = weight * ((f16)_mm512_loadu_ps(slope + key * BLOCK + half) - less);
                const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)grad);
                _mm256_storeu_si256((__m256i*)(weights + key * W + i + half),
                                    (__m256i)_mm512_cvtneps_pbh((__m512)weight));
                _mm256_storeu_si256((__m256i*)(slopes + key * W + i + half), rounded);
                const __m512i now = _mm512_cvtepu16_epi32(rounded);
                if (key % 2)
                    _mm512_storeu_si512(slopes_paired + (key / 2 * W + i + half) * 2,
                                        _mm512_or_si512(even, _mm512_slli_epi32(now, 16)));
                even = now;
            }
        }
    }

    // Of 32 keys from j, 32 numbers from `first`: factor * rows (BLOCK, W) times `paired`, over the queries from j on.
    void collect(const uint16_t* rows, const uint16_t* paired, long j, long first, uint16_t* to, long stride,
                 float factor) {
        amx::in_memory(rows);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long i = j; i < P; i += BLOCK) {
            const uint16_t* b = paired + (i / 32 * (K / 16) + first / 16) * TILE;
            _tile_loadd(4, rows + i, W * 2);
            _tile_loadd(5, rows + 16 * W + i, W * 2);
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + TILE, 64);
            add_products();
        }
        store(block);
        for (long key = 0; key < BLOCK && j + key < T; key++)
            for (long half = 0; half < BLOCK; half += 16)
                _mm256_storeu_si256(
                    (__m256i*)(to + (j + key) * stride + first + half),
                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(block + key * BLOCK + half),
                                                              _mm512_set1_ps(factor))));
    }

    // grad_q += 32 numbers from `first` of 32 keys from j, times the slopes of all queries that see them.
    void add_to_queries(long j, long first) {
        amx::in_memory(slopes_paired);
        _tile_loadd(4, keys_across + first * W + j, W * 2);
        _tile_loadd(5, keys_across + (first + 16) * W + j, W * 2);
        for (long i = j; i < P; i += 16) {
            float* sums = grad_q + first * W + i;
            _tile_loadd(0, sums, W * 4);
            _tile_loadd(1, sums + 16 * W, W * 4);
            _tile_loadd(6, slopes_paired + i * 2, W * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_stored(0, sums, W * 4);
            _tile_stored(1, sums + 16 * W, W * 4);
        }
        amx::in_memory(grad_q);
    }
};
