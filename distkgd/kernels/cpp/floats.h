// Sixteen floats at a time, and what kernels make of them.

#pragma once

#include <vector>

#include "vectors.h"

typedef Lanes<float> V;
typedef Vec<float>::bits I;
constexpr int L = Vec<float>::lanes;

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

// As the instruction does: b if one is not a number, for which `? :` on vectors would not be made into it.
INLINE V maximum(V a, V b) {
#ifdef __AVX512F__
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

INLINE V minimum(V a, V b) {
#ifdef __AVX512F__
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

// 2^x to 2 units in the last place; below the smallest normal number 0 or denormal, NaN stays NaN. For x <= 127.
INLINE V exponential2(V x) {
    const V y = maximum(V{} - 127.0f, x);
    // Rounded as in `exponential`.
    const V shifted = y + 12582912.0f, r = y - (shifted - 12582912.0f);
    V p = r * 1.32647273e-3f + 9.67151299e-3f;
    p = p * r + 5.55073358e-2f;
    p = p * r + 2.40222424e-1f;
    p = p * r + 6.93147004e-1f;
    p = p * r + 1.0f;
    return (V)((I)p + ((I)shifted << 23));
}

// 1 / x to 2 units in the last place. For x in [1, 2].
INLINE V reciprocal(V x) {
#ifdef __AVX512F__
    const V y = (V)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

INLINE bool any(I x) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
    int32_t all = 0;
    for (int l = 0; l < L; ++l) all |= x[l];
    return all;
#endif
}

// Zeros that begin at a cache line, so that no vector of them lies in two.
class Floats {
    struct alignas(64) Line { float x[L]; };
    std::vector<Line> lines;

public:
    explicit Floats(int64_t n) : lines((n + L - 1) / L) {}
    float* data() { return lines.data()->x; }
    float& operator[](int64_t i) { return data()[i]; }
    void clear() { std::memset(data(), 0, lines.size() * sizeof(Line)); }
};

// While it lives, its thread takes numbers below the smallest normal one for 0: each would cost a hundred cycles.
struct NoDenormals {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};
