// Random numbers that depend on nothing but their place.
#pragma once
#include "simd.h"

// The upper and the lower half of eight products.
static inline void multiply(u8 x, uint32_t by, u8& high, u8& low) {
#ifdef __AVX2__
    const __m256i factor = _mm256_set1_epi32(by), even = _mm256_mul_epu32((__m256i)x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
    low = (u8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = (u8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    typedef uint64_t w8 __attribute__((vector_size(64)));
    const w8 product = __builtin_convertvector(x, w8) * by;
    low = __builtin_convertvector(product, u8), high = __builtin_convertvector(product >> 32, u8);
#endif
}

// Philox 4x32 with ten rounds ("Parallel random numbers: as easy as 1, 2, 3", SC 2011), eight counters at a time.
static inline void philox(uint64_t key, uint32_t position, uint32_t block, u8 (&out)[4]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    u8 c0 = u8{0, 1, 2, 3, 4, 5, 6, 7} + block, c1 = u8{} + position, c2 = {}, c3 = {};
    for (int round = 0; round < 10; round++) {
        u8 high0, low0, high2, low2;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high2, low2);
        c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}
