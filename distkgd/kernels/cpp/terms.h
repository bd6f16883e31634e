// What is summed over coordinates, and its gradients, a vector of float or double at a time.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

template <class T> struct Vec;
template <> struct Vec<float> {
    typedef float type __attribute__((vector_size(64)));
    typedef int32_t bits __attribute__((vector_size(64)));
    static constexpr int lanes = 16;
    static constexpr int32_t sign = INT32_MIN;
};
template <> struct Vec<double> {
    typedef double type __attribute__((vector_size(64)));
    typedef int64_t bits __attribute__((vector_size(64)));
    static constexpr int lanes = 8;
    static constexpr int64_t sign = INT64_MIN;
};
template <class T> using V = typename Vec<T>::type;
template <class T> using B = typename Vec<T>::bits;

template <class T> INLINE V<T> load(const T* p) { V<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> INLINE void store(T* p, V<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> INLINE V<T> magnitude(V<T> v) { return (V<T>)((B<T>)v & ~Vec<T>::sign); }
// g with the sign of v; 0 where v is 0.
template <class T> INLINE V<T> signed_by(V<T> g, V<T> v) {
    V<T> s = (V<T>)((B<T>)g ^ ((B<T>)v & Vec<T>::sign));
    return v != 0 ? s : V<T>{};
}
template <class T> INLINE T total(V<T> v) {
    T sum = 0;
    for (int l = 0; l < Vec<T>::lanes; ++l) sum += v[l];
    return sum;
}
// 1 / sqrt(x), x at least the smallest normal number; NaN stays NaN.
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

// What is summed. add: one vector of coordinates into `sum`. pull: gradients of the query's vector(s) and the
// candidate's for upstream gradient g. The *_one functions do the same for the `unit` coordinates that start at k, and
// where unit is 2 the *_apart functions for vectors of first and of second coordinates.

template <class T> struct Dot {  // q c
    static constexpr int parts = 1, unit = 1;
    static constexpr T scale = 1;
    INLINE void add(V<T>& sum, V<T> q, V<T>, V<T> c) { sum += q * c; }
    INLINE void pull(V<T> g, V<T> q, V<T>, V<T> c, V<T>& dq, V<T>&, V<T>& dc) { dq += g * c; dc += g * q; }
    INLINE T one(const T* q, const T* c, int64_t k, int64_t) { return q[k] * c[k]; }
    INLINE void pull_one(T g, const T* q, const T* c, int64_t k, int64_t, T* dq, T* dc) {
        dq[k] += g * c[k];
        dc[k] += g * q[k];
    }
};

template <class T> struct Square {  // (q - c)^2
    static constexpr int parts = 1, unit = 1;
    static constexpr T scale = 1;
    INLINE void add(V<T>& sum, V<T> q, V<T>, V<T> c) { V<T> v = q - c; sum += v * v; }
    INLINE void pull(V<T> g, V<T> q, V<T>, V<T> c, V<T>& dq, V<T>&, V<T>& dc) {
        V<T> t = (q - c) * (g + g);
        dq += t;
        dc -= t;
    }
    INLINE T one(const T* q, const T* c, int64_t k, int64_t) { return (q[k] - c[k]) * (q[k] - c[k]); }
    INLINE void pull_one(T g, const T* q, const T* c, int64_t k, int64_t, T* dq, T* dc) {
        T t = 2 * g * (q[k] - c[k]);
        dq[k] += t;
        dc[k] -= t;
    }
};

template <class T> T sign_times(T g, T v) { return v > 0 ? g : v < 0 ? -g : T(0); }

template <class T> struct Manhattan {  // |q - c|
    static constexpr int parts = 1, unit = 1;
    static constexpr T scale = 1;
    INLINE void add(V<T>& sum, V<T> q, V<T>, V<T> c) { sum += magnitude<T>(q - c); }
    INLINE void pull(V<T> g, V<T> q, V<T>, V<T> c, V<T>& dq, V<T>&, V<T>& dc) {
        V<T> t = signed_by<T>(g, q - c);
        dq += t;
        dc -= t;
    }
    INLINE T one(const T* q, const T* c, int64_t k, int64_t) { return std::abs(q[k] - c[k]); }
    INLINE void pull_one(T g, const T* q, const T* c, int64_t k, int64_t, T* dq, T* dc) {
        T t = sign_times(g, q[k] - c[k]);
        dq[k] += t;
        dc[k] -= t;
    }
};

template <class T> struct ScaledManhattan {  // |a - b c|, the query is (a, b)
    static constexpr int parts = 2, unit = 1;
    static constexpr T scale = 1;
    INLINE void add(V<T>& sum, V<T> a, V<T> b, V<T> c) { sum += magnitude<T>(a - b * c); }
    INLINE void pull(V<T> g, V<T> a, V<T> b, V<T> c, V<T>& da, V<T>& db, V<T>& dc) {
        V<T> t = signed_by<T>(g, a - b * c);
        da += t;
        db -= t * c;
        dc -= t * b;
    }
    INLINE T one(const T* q, const T* c, int64_t k, int64_t d) { return std::abs(q[k] - q[d + k] * c[k]); }
    INLINE void pull_one(T g, const T* q, const T* c, int64_t k, int64_t d, T* dq, T* dc) {
        T t = sign_times(g, q[k] - q[d + k] * c[k]);
        dq[k] += t;
        dq[d + k] -= t * c[k];
        dc[k] -= t * q[d + k];
    }
};

template <class T> struct Modulus {  // |q - c| of complex numbers, stored (re, im, re, im, ...)
    static constexpr int parts = 1, unit = 2;
    static constexpr T scale = T(0.5);  // a vector has each modulus twice
    INLINE void add(V<T>& sum, V<T> q, V<T>, V<T> c) {
        V<T> v = q - c, s = v * v;
        s += swap_pairs(s);
        sum += s * inverse_root(s);
    }
    INLINE void pull(V<T> g, V<T> q, V<T>, V<T> c, V<T>& dq, V<T>&, V<T>& dc) {
        V<T> v = q - c, s = v * v;
        s += swap_pairs(s);
        V<T> t = v * (inverse_root(s) * g);
        dq += t;
        dc -= t;
    }
    INLINE void add_apart(V<T>& sum, const V<T>* q, const V<T>* c) {
        V<T> re = q[0] - c[0], im = q[1] - c[1], s = re * re + im * im;
        sum += s * inverse_root(s);
    }
    INLINE void pull_apart(V<T> g, const V<T>* q, const V<T>* c, V<T>* dq, V<T>* dc) {
        V<T> re = q[0] - c[0], im = q[1] - c[1], w = inverse_root(re * re + im * im) * g;
        dq[0] += re * w;
        dc[0] -= re * w;
        dq[1] += im * w;
        dc[1] -= im * w;
    }
    INLINE T one(const T* q, const T* c, int64_t k, int64_t) {
        T re = q[k] - c[k], im = q[k + 1] - c[k + 1];
        return std::sqrt(re * re + im * im);
    }
    INLINE void pull_one(T g, const T* q, const T* c, int64_t k, int64_t, T* dq, T* dc) {
        T re = q[k] - c[k], im = q[k + 1] - c[k + 1], s = re * re + im * im;
        T w = g / std::sqrt(std::max(s, std::numeric_limits<T>::min()));
        dq[k] += re * w;
        dc[k] -= re * w;
        dq[k + 1] += im * w;
        dc[k + 1] -= im * w;
    }
};

}  // namespace
