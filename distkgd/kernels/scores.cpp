// What is made of a block of scores z [rows, n], row by row, in one or two visits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace {

float largest(const float* z, int64_t n) {
    float top = -std::numeric_limits<float>::infinity();
    V lanes = V{} + top;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const V x = load(z + i);
        lanes = x > lanes ? x : lanes;
    }
    for (int l = 0; l < L; ++l) top = std::max(top, lanes[l]);
    for (; i < n; ++i) top = std::max(top, z[i]);
    return top;
}

// Sums along a row of single-precision vectors: short ones in their own precision, long ones in double.
template <class F> INLINE double summed(int64_t n, const F& term, int64_t* done) {
    double total = 0;
    int64_t i = 0;
    while (i + L <= n) {
        V sum{};
        for (const int64_t end = std::min(n, i + 64 * L); i + L <= end; i += L) sum += term(i);
        for (int l = 0; l < L; ++l) total += sum[l];
    }
    *done = i;
    return total;
}

float log_sum_exp(const float* z, int64_t n) {
    const float top = largest(z, n);
    int64_t i;
    double total = summed(n, [=](int64_t k) { return exponential(load(z + k) - top); }, &i);
    for (; i < n; ++i) total += std::exp(z[i] - top);
    return top + (float)std::log(total);
}

}  // namespace

// lse [rows]: log of the sum of exp(z). Rows must not be empty.
extern "C" void logsumexp_float32(const float* z, int64_t rows, int64_t n, float* lse) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) lse[row] = log_sum_exp(z + row * n, n);
}

// out: grad * exp(z - lse), the gradient of logsumexp for upstream gradients [rows]. It may be z itself.
extern "C" void logsumexp_pull_float32(const float* z, int64_t rows, int64_t n, const float* lse, const float* grad,
                                       float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = z + row * n;
        float* to = out + row * n;
        const float shift = lse[row], g = grad[row];
        int64_t i = 0;
        for (; i + L <= n; i += L) store(to + i, exponential(load(from + i) - shift) * g);
        for (; i < n; ++i) to[i] = std::exp(from[i] - shift) * g;
    }
}

// Of a student's scores z and a teacher's t: both log-sum-exps, and the mean of t - z under softmax(t).
extern "C" void softmax_gap_float32(const float* z, int64_t rows, int64_t n, const float* t, float* lse_t, float* gap,
                                    float* lse_z) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *student = z + row * n, *teacher = t + row * n;
        lse_z[row] = log_sum_exp(student, n);
        const float lse = lse_t[row] = log_sum_exp(teacher, n);
        int64_t i;
        double mean = summed(
            n,
            [=](int64_t k) {
                const V x = load(teacher + k);
                return exponential(x - lse) * (x - load(student + k));
            },
            &i);
        for (; i < n; ++i) mean += std::exp(teacher[i] - lse) * (teacher[i] - student[i]);
        gap[row] = (float)mean;
    }
}

// out: the gradient of these for z, given that of the mean and of z's log-sum-exp. It may be t itself.
extern "C" void softmax_gap_pull_float32(const float* z, int64_t rows, int64_t n, const float* t, const float* lse_t,
                                         const float* lse_z, const float* grad_gap, const float* grad_lse, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *student = z + row * n, *teacher = t + row * n;
        float* to = out + row * n;
        const float st = lse_t[row], sz = lse_z[row], gt = grad_gap[row], gz = grad_lse[row];
        int64_t i = 0;
        for (; i + L <= n; i += L)
            store(to + i, exponential(load(student + i) - sz) * gz - exponential(load(teacher + i) - st) * gt);
        for (; i < n; ++i) to[i] = std::exp(student[i] - sz) * gz - std::exp(teacher[i] - st) * gt;
    }
}

// better, no_worse [rows]: how many scores are above high, and how many are at least low.
extern "C" void count_float32(const float* z, int64_t rows, int64_t n, const float* high, const float* low,
                              int64_t* better, int64_t* no_worse) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = z + row * n;
        const float above = high[row], from_low = low[row];
        int64_t more = 0, least = 0, i = 0;
        while (i + L <= n) {
            I first{}, second{};
            for (const int64_t end = std::min(n, i + (int64_t(1) << 24)); i + L <= end; i += L) {
                const V x = load(from + i);
                first -= (I)(x > above);
                second -= (I)(x >= from_low);
            }
            for (int l = 0; l < L; ++l) more += first[l], least += second[l];
        }
        for (; i < n; ++i) more += from[i] > above, least += from[i] >= from_low;
        better[row] = more;
        no_worse[row] = least;
    }
}
