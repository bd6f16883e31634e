// Sixteen floats or eight doubles at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

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
template <class T> using Lanes = typename Vec<T>::type;

template <class T> INLINE Lanes<T> load(const T* p) { Lanes<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> INLINE void store(T* p, Lanes<T> v) { std::memcpy(p, &v, sizeof v); }

// The first n numbers, or as many as there are in a vector; `fill` in place of others.
template <class T> INLINE Lanes<T> load_some(const T* p, int64_t n, T fill = 0) {
    if (n >= Vec<T>::lanes) return load(p);
    Lanes<T> v = Lanes<T>{} + fill;
    std::memcpy(&v, p, n * sizeof(T));
    return v;
}
template <class T> INLINE void store_some(T* p, int64_t n, Lanes<T> v) {
    if (n >= Vec<T>::lanes) store(p, v);
    else std::memcpy(p, &v, n * sizeof(T));
}

// How a vector is read and written: whole, or what is left of the last one.
template <class T> struct Whole {
    INLINE Lanes<T> get(const T* p, T = 0) { return load(p); }
    INLINE void put(T* p, Lanes<T> v) { store(p, v); }
};
template <class T> struct Part {
    int64_t left;
    __attribute__((always_inline)) Lanes<T> get(const T* p, T fill = 0) const { return load_some(p, left, fill); }
    __attribute__((always_inline)) void put(T* p, Lanes<T> v) const { store_some(p, left, v); }
};

// visit(how, i) for the vectors of n numbers, each from its i-th number on.
template <class T, class F> INLINE void by_vectors(int64_t n, const F& visit) {
    int64_t i = 0;
    for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) visit(Whole<T>{}, i);
    if (i < n) visit(Part<T>{n - i}, i);
}
