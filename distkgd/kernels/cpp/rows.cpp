// What a step does with whole rows of a table [*, dim]: take them, add to them, let the optimiser move them.
//
// Rows are split among threads, or coordinates where a row may be named twice, so that every sum runs in the same order
// whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

template <class T> void take(const T* table, const int64_t* rows, int64_t n, int64_t dim, T* out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        if (i + 4 < n)
            for (int64_t k = 0; k < dim; k += 64 / (int64_t)sizeof(T))
                __builtin_prefetch(table + rows[i + 4] * dim + k);
        std::memcpy(out + i * dim, table + rows[i] * dim, sizeof(T) * dim);
    }
}

template <class T> void add(T* table, const int64_t* rows, int64_t n, int64_t dim, const T* values) {
    constexpr int64_t line = 64 / sizeof(T);
#pragma omp parallel
    {
        const int64_t lines = (dim + line - 1) / line, threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t k0 = lines * me / threads * line, k1 = std::min(dim, lines * (me + 1) / threads * line);
        for (int64_t i = 0; i < n && k1 > k0; ++i) {
            if (i + 4 < n)
                for (int64_t k = k0; k < k1; k += line) __builtin_prefetch(table + rows[i + 4] * dim + k, 1);
            T* to = table + rows[i] * dim;
            const T* from = values + i * dim;
            for (int64_t k = k0; k < k1; ++k) to[k] += from[k];
        }
    }
}

// The formulas of distributed/optim/rows.py. rows: to which the gradients [n, dim] belong, each once; null: 0 … n - 1.
enum Rule { sgd = 0, adagrad = 1, rowwise_adagrad = 2, adam = 3 };

template <class T>
void update(int64_t rule, T* table, const int64_t* rows, int64_t n, int64_t dim, const T* grad, T* first, T* second,
            T lr, T clip, T eps, T beta1, T beta2, int64_t step) {
    const T rate = rule == adam ? lr / (1 - (T)std::pow((double)beta1, (double)step)) : lr;
    const T spread = rule == adam ? 1 / (1 - (T)std::pow((double)beta2, (double)step)) : 1;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = rows ? rows[i] : i;
        if (rows && i + 2 < n)
            for (int64_t k = 0; k < dim; k += 64 / (int64_t)sizeof(T)) {
                __builtin_prefetch(table + rows[i + 2] * dim + k, 1);
                if (rule == adagrad || rule == adam) __builtin_prefetch(first + rows[i + 2] * dim + k, 1);
                if (rule == adam) __builtin_prefetch(second + rows[i + 2] * dim + k, 1);
            }
        T* w = table + row * dim;
        const T* g = grad + i * dim;
        if (rule == sgd) {
            for (int64_t k = 0; k < dim; ++k) w[k] -= rate * clip * g[k];
        } else if (rule == adagrad) {
            T* s = first + row * dim;
            for (int64_t k = 0; k < dim; ++k) {
                const T x = clip * g[k];
                s[k] += x * x;
                w[k] -= rate * x / (std::sqrt(s[k]) + eps);
            }
        } else if (rule == rowwise_adagrad) {
            T squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t k = 0; k < dim; ++k) squares += clip * g[k] * clip * g[k];
            first[row] += squares / dim;
            const T scale = rate * clip / (std::sqrt(first[row]) + eps);
            for (int64_t k = 0; k < dim; ++k) w[k] -= scale * g[k];
        } else {
            T *m = first + row * dim, *v = second + row * dim;
            for (int64_t k = 0; k < dim; ++k) {
                const T x = clip * g[k];
                m[k] += (1 - beta1) * (x - m[k]);
                v[k] = beta2 * v[k] + (1 - beta2) * x * x;
                w[k] -= rate * m[k] / (std::sqrt(v[k] * spread) + eps);
            }
        }
    }
}

}  // namespace

#define ROWS(NAME, T)                                                                                                \
    extern "C" void take_##NAME(const T* table, const int64_t* rows, int64_t n, int64_t dim, T* out) {              \
        take<T>(table, rows, n, dim, out);                                                                           \
    }                                                                                                                \
    extern "C" void add_##NAME(T* table, const int64_t* rows, int64_t n, int64_t dim, const T* values) {            \
        add<T>(table, rows, n, dim, values);                                                                         \
    }                                                                                                                \
    extern "C" void update_##NAME(int64_t rule, T* table, const int64_t* rows, int64_t n, int64_t dim,               \
                                  const T* grad, T* first, T* second, double lr, double clip, double eps,            \
                                  double beta1, double beta2, int64_t step) {                                        \
        update<T>(rule, table, rows, n, dim, grad, first, second, lr, clip, eps, beta1, beta2, step);                \
    }

ROWS(float32, float)
ROWS(float64, double)
