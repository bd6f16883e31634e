// What the kernels of nested models share: model i scores margin + b_0 + … + b_i of contributions b, and a pair that does
// not count scores far below zero.

#pragma once

#include <algorithm>

#include "vectors.h"

constexpr float NEVER = -1e30f;

INLINE V maximum(V a, V b) { return a > b ? a : b; }
INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }

inline float total(V v) {
    float sum = 0;
    for (int l = 0; l < L; ++l) sum += v[l];
    return sum;
}

inline float largest(V v) {
    float top = v[0];
    for (int l = 1; l < L; ++l) top = std::max(top, v[l]);
    return top;
}

INLINE V huber(V gap, float delta) {
    const V size = absolute(gap);
    return size <= delta ? gap * gap * 0.5f : delta * (size - 0.5f * delta);
}

INLINE V huber_slope(V gap, float delta) {
    const V most = V{} + delta, least = V{} - delta;
    return gap > most ? most : gap < least ? least : gap;
}

// log(1 + t) for t in [0, 1] and s = t / (2 + t), as 2 artanh(s).
INLINE V log1p(V s) {
    const V q = s * s;
    V p = q * 0.15384615f + 0.18181818f;
    p = p * q + 0.22222222f;
    p = p * q + 0.28571429f;
    p = p * q + 0.4f;
    p = p * q + 0.66666667f;
    p = p * q + 2.0f;
    return p * s;
}

INLINE V softplus(V z, V t) { return maximum(z, V{}) + log1p(t / (t + 2.0f)); }  // t = exp(-|z|)

// softplus(z) and its slope by one division, of which they would have two.
INLINE V softplus(V z, V t, V& slope) {
    const V one = t + 1.0f, two = t + 2.0f, inverse = 1.0f / (one * two), over = inverse * two;
    slope = z >= 0 ? over : t * over;
    return maximum(z, V{}) + log1p(t * inverse * one);
}
