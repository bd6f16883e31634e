// What the kernels of nested models share: model i scores margin + b_0 + … + b_i of contributions b, and a pair that
// does not count scores far below zero.

#pragma once

#include "floats.h"

constexpr float NEVER = -1e30f;

INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }

INLINE float total(V v) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof half);
    const Quarter x = quarters[0] + quarters[1];
    return (x[0] + x[2]) + (x[1] + x[3]);
}

inline float largest(V v) {
    float top = v[0];
    for (int l = 1; l < L; ++l) top = std::max(top, v[l]);
    return top;
}

// most: Huber's delta, or 0 where a gap does not count.
INLINE V huber(V gap, V most) {
    const V size = absolute(gap), slope = minimum(most, size);
    return slope * (size - slope * 0.5f);
}

INLINE V huber_slope(V gap, V most) {
    return maximum(V{} - most, minimum(most, gap));
}

constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// exp(-|z|)
INLINE V tail(V z) { return exponential2(absolute(z) * -LOG2E); }

// log(1 + exp(z)), t = tail(z)
INLINE V softplus(V z, V t) {
    V p = t * 7.54915737e-3f - 4.25669588e-2f;
    p = p * t + 1.12856016e-1f;
    p = p * t - 1.97118804e-1f;
    p = p * t + 2.75641322e-1f;
    p = p * t - 3.58408451e-1f;
    p = p * t + 4.80692953e-1f;
    p = p * t - 7.21340179e-1f;
    p = p * t + 1.44269502f;
    return maximum(z, V{}) + p * (t * LN2);
}

// Its slope.
INLINE V sigmoid(V z, V t) {
    const V over = reciprocal(t + 1.0f);
    return z >= 0 ? over : t * over;
}
