// What is summed over coordinates, and its gradients, a vector of float or double at a time.

#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

template <class T> using V = Lanes<T>;
template <class T> using B = typename Vec<T>::bits;

template <class T> INLINE V<T> magnitude(V<T> v) { return (V<T>)((B<T>)v & ~Vec<T>::sign); }
// g with the sign of v; 0 where v is 0.
template <class T> INLINE V<T> signed_by(V<T> g, V<T> v) {
    V<T> s = (V<T>)((B<T>)g ^ ((B<T>)v & Vec<T>::sign));
    return v != 0 ? s : V<T>{};
}
template <class T> INLINE T magnitude(T v) { return std::abs(v); }
template <class T> INLINE T signed_by(T g, T v) { return v > 0 ? g : v < 0 ? -g : T(0); }
template <class T> INLINE T total(V<T> v) {
    T sum = 0;
    for (int l = 0; l < Vec<T>::lanes; ++l) sum += v[l];
    return sum;
}
// 1 / sqrt(x), x at least the smallest normal number; NaN stays NaN.
template <class T> INLINE T inverse_root(T x) { return 1 / std::sqrt(std::max(x, std::numeric_limits<T>::min())); }
INLINE V<float> inverse_root(V<float> x) {
    x = x < std::numeric_limits<float>::min() ? V<float>{} + std::numeric_limits<float>::min() : x;
#ifdef __AVX512F__
    V<float> y = (V<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
    return y * (1.5f - (0.5f * x * y) * y);
#else
    V<float> y;
    for (int l = 0; l < 16; ++l) y[l] = 1.0f / std::sqrt(x[l]);
    return y;
#endif
}
INLINE V<double> inverse_root(V<double> x) {
    x = x < std::numeric_limits<double>::min() ? V<double>{} + std::numeric_limits<double>::min() : x;
    V<double> y;
    for (int l = 0; l < 8; ++l) y[l] = 1.0 / std::sqrt(x[l]);
    return y;
}
INLINE V<float> swap_pairs(V<float> v) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
INLINE V<double> swap_pairs(V<double> v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6); }

// What is summed, of vectors or single coordinates. add: one coordinate of a query and a candidate into `sum`. pull:
// their gradients for upstream gradient g. Where unit is 2, the *_apart functions do so for a first and a second
// coordinate, add and pull for vectors of both by turns.

template <class T> struct Dot {  // q c
    static constexpr int parts = 1, unit = 1;
    static constexpr T scale = 1;
    template <class X> INLINE void add(X& sum, X q, X, X c) { sum += q * c; }
    template <class X> INLINE void pull(X g, X q, X, X c, X& dq, X&, X& dc) { dq += g * c; dc += g * q; }
};

// Of v = q - c. value: what is summed; slope: g times its derivative.
template <class T, class Term> struct OfDifference {
    static constexpr int parts = 1, unit = 1;
    static constexpr T scale = 1;
    template <class X> INLINE void add(X& sum, X q, X, X c) { sum += Term::value(q - c); }
    template <class X> INLINE void pull(X g, X q, X, X c, X& dq, X&, X& dc) {
        const X t = Term::slope(g, q - c);
        dq += t;
        dc -= t;
    }
};

template <class T> struct Square : OfDifference<T, Square<T>> {  // (q - c)^2
    template <class X> INLINE X value(X v) { return v * v; }
    template <class X> INLINE X slope(X g, X v) { return v * (g + g); }
};

template <class T> struct Manhattan : OfDifference<T, Manhattan<T>> {  // |q - c|
    template <class X> INLINE X value(X v) { return magnitude<T>(v); }
    template <class X> INLINE X slope(X g, X v) { return signed_by<T>(g, v); }
};

template <class T> struct ScaledManhattan {  // |a - b c|, the query is (a, b)
    static constexpr int parts = 2, unit = 1;
    static constexpr T scale = 1;
    template <class X> INLINE void add(X& sum, X a, X b, X c) { sum += magnitude<T>(a - b * c); }
    template <class X> INLINE void pull(X g, X a, X b, X c, X& da, X& db, X& dc) {
        const X t = signed_by<T>(g, a - b * c);
        da += t;
        db -= t * c;
        dc -= t * b;
    }
};

template <class T> struct Modulus : OfDifference<T, Modulus<T>> {  // |q - c| of complex numbers (re, im, re, im, ...)
    static constexpr int unit = 2;
    static constexpr T scale = T(0.5);  // a vector has each modulus twice
    INLINE V<T> square(V<T> v) {
        const V<T> s = v * v;
        return s + swap_pairs(s);
    }
    INLINE V<T> value(V<T> v) {
        const V<T> s = square(v);
        return s * inverse_root(s);
    }
    INLINE V<T> slope(V<T> g, V<T> v) { return v * (inverse_root(square(v)) * g); }
    template <class X> INLINE void add_apart(X& sum, const X* q, const X* c) {
        const X re = q[0] - c[0], im = q[1] - c[1], s = re * re + im * im;
        sum += s * inverse_root(s);
    }
    template <class X> INLINE void pull_apart(X g, const X* q, const X* c, X* dq, X* dc) {
        const X re = q[0] - c[0], im = q[1] - c[1], w = inverse_root(re * re + im * im) * g;
        dq[0] += re * w;
        dc[0] -= re * w;
        dq[1] += im * w;
        dc[1] -= im * w;
    }
};

// Calls f with the kind of this number in kernels/pairs.py.
template <class T, class F> void with_kind(int64_t kind, const F& f) {
    switch (kind) {
        case 0: return f(Dot<T>{});
        case 1: return f(Square<T>{});
        case 2: return f(Manhattan<T>{});
        case 3: return f(ScaledManhattan<T>{});
        case 4: return f(Modulus<T>{});
    }
}

}  // namespace
