// Sixteen floats at a time, and what kernels make of them.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
constexpr int L = 16;

INLINE V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

// exp to 2 units in the last place; 0 below the smallest normal number, NaN stays NaN. For x <= 88.
INLINE V exponential(V x) {
    const V lowest = V{} - 87.3f;
    const V y = x < lowest ? lowest : x;
    // The sum with 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
    const V shifted = y * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const V r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const V power = (V)(((I)shifted + (127 - 0x4b400000)) << 23);
    return x < lowest ? V{} : p * power;
}

// While it lives, its thread takes numbers below the smallest normal one for 0: each would cost a hundred cycles.
struct NoDenormals {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};
