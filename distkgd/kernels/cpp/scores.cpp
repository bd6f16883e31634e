// What is made of a block of scores z [rows, n], row by row, in one or two visits.
//
// `_columns`: the same of scores that lie candidate by candidate, [n, rows], as the faster matrix product leaves them:
// sixteen rows at a time, a few candidates at a time while these are in the cache. Pieces of n have a fixed size and are
// merged in order, so that nothing depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

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

typedef double D __attribute__((vector_size(128)));  // sixteen

constexpr int64_t PIECE = 1024, CACHED = 32;  // candidates

// Sixteen floats, or the first m of them and zeros.
INLINE V load_some(const float* p, int64_t m) {
    if (m >= L) return load(p);
    V v{};
    std::memcpy(&v, p, m * sizeof *p);
    return v;
}

INLINE void store_some(float* p, int64_t m, V v) { std::memcpy(p, &v, std::min<int64_t>(m, L) * sizeof *p); }

INLINE D wide(V v) { return __builtin_convertvector(v, D); }

// Sixteen sums of exp(z - top) and of weight * exp(z - top).
struct Sums {
    V top;
    D total, weighted;

    static Sums none() { return {V{} - std::numeric_limits<float>::max(), D{}, D{}}; }

    // Make room for larger scores.
    void raise(V best) {
        const D scale = wide(exponential(top - best));
        total *= scale, weighted *= scale, top = best;
    }

    void merge(const Sums& other) {
        const V best = other.top > top ? other.top : top;
        raise(best);
        const D scale = wide(exponential(other.top - best));
        total += other.total * scale, weighted += other.weighted * scale;
    }

    float log_sum_exp(int l) const { return top[l] + (float)std::log(total[l]); }
};

// Add a few candidates, `rows` apart, none of them above best; minus: the weight is z - minus.
template <bool WEIGHTED>
INLINE void take(Sums& sums, V best, const float* z, const float* minus, int64_t rows, int64_t candidates, int64_t m) {
    sums.raise(best);
    V total{}, weighted{};
    for (int64_t k = 0; k < candidates; ++k) {
        const V x = load_some(z + k * rows, m), power = exponential(x - best);
        total += power;
        if (WEIGHTED) weighted += power * (x - load_some(minus + k * rows, m));
    }
    sums.total += wide(total);
    if (WEIGHTED) sums.weighted += wide(weighted);
}

// The sums of each sixteen rows over some candidates, best as room for as many vectors.
template <bool WEIGHTED>
void over_piece(const float* z, const float* minus, int64_t rows, int64_t candidates, Sums* sums, V* best) {
    const int64_t groups = (rows + L - 1) / L;
    for (int64_t at = 0; at < candidates; at += CACHED) {
        const int64_t few = std::min(CACHED, candidates - at);
        for (int64_t g = 0; g < groups; ++g) best[g] = sums[g].top;
        // In the order of memory, which the processor then fetches ahead.
        for (int64_t k = at; k < at + few; ++k)
            for (int64_t g = 0; g < groups; ++g) {
                const V x = load_some(z + k * rows + g * L, rows - g * L);
                best[g] = x > best[g] ? x : best[g];
            }
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t from = at * rows + g * L;
            take<WEIGHTED>(sums[g], best[g], z + from, WEIGHTED ? minus + from : nullptr, rows, few, rows - g * L);
        }
    }
}

// found(row, Sums of z's rows from there, those of other's) for each sixteen rows, over all candidates; with other,
// the weights of z's are z - other, those of other's nothing.
template <bool WEIGHTED, class F>
void over_columns(const float* z, const float* other, int64_t rows, int64_t n, const F& found) {
    const int64_t groups = (rows + L - 1) / L, pieces = (n + PIECE - 1) / PIECE;
    std::vector<Sums> mine(groups * pieces, Sums::none()), theirs(WEIGHTED ? groups * pieces : 0, Sums::none());
#pragma omp parallel
    {
        std::vector<V> best(groups);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pieces; ++p) {
            const int64_t from = p * PIECE * rows, some = std::min(PIECE, n - p * PIECE), at = p * groups;
            if (WEIGHTED) over_piece<false>(other + from, nullptr, rows, some, &theirs[at], best.data());
            over_piece<WEIGHTED>(z + from, WEIGHTED ? other + from : nullptr, rows, some, &mine[at], best.data());
        }
    }
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t p = 1; p < pieces; ++p) {
            mine[g].merge(mine[p * groups + g]);
            if (WEIGHTED) theirs[g].merge(theirs[p * groups + g]);
        }
        found(g * L, mine[g], WEIGHTED ? theirs[g] : mine[g]);
    }
}

// out: gradient(place, row, how many rows are left) of each sixteen rows and every candidate.
template <class F> void pull_columns(int64_t rows, int64_t n, float* out, const F& gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < n; ++k)
        for (int64_t i = 0; i < rows; i += L) store_some(out + k * rows + i, rows - i, gradient(k * rows + i, i, rows - i));
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

// out: the gradient of these for t, given that of the mean and of t's log-sum-exp.
extern "C" void softmax_gap_teach_float32(const float* z, int64_t rows, int64_t n, const float* t, const float* lse_t,
                                          const float* gap, const float* grad_gap, const float* grad_lse, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *student = z + row * n, *teacher = t + row * n;
        float* to = out + row * n;
        const float shift = lse_t[row], mean = gap[row], gt = grad_gap[row], even = grad_lse[row] + gt;
        int64_t i = 0;
        for (; i + L <= n; i += L) {
            const V x = load(teacher + i);
            store(to + i, exponential(x - shift) * ((x - load(student + i) - mean) * gt + even));
        }
        for (; i < n; ++i) to[i] = std::exp(teacher[i] - shift) * ((teacher[i] - student[i] - mean) * gt + even);
    }
}

extern "C" void logsumexp_columns_float32(const float* z, int64_t rows, int64_t n, float* lse) {
    over_columns<false>(z, nullptr, rows, n, [=](int64_t i, const Sums& sums, const Sums&) {
        for (int l = 0; l < L && i + l < rows; ++l) lse[i + l] = sums.log_sum_exp(l);
    });
}

extern "C" void logsumexp_pull_columns_float32(const float* z, int64_t rows, int64_t n, const float* lse,
                                               const float* grad, float* out) {
    pull_columns(rows, n, out, [=](int64_t at, int64_t i, int64_t m) {
        return exponential(load_some(z + at, m) - load_some(lse + i, m)) * load_some(grad + i, m);
    });
}

extern "C" void softmax_gap_columns_float32(const float* z, int64_t rows, int64_t n, const float* t, float* lse_t,
                                            float* gap, float* lse_z) {
    over_columns<true>(t, z, rows, n, [=](int64_t i, const Sums& teacher, const Sums& student) {
        for (int l = 0; l < L && i + l < rows; ++l) {
            lse_t[i + l] = teacher.log_sum_exp(l);
            gap[i + l] = (float)(teacher.weighted[l] / teacher.total[l]);
            lse_z[i + l] = student.log_sum_exp(l);
        }
    });
}

extern "C" void softmax_gap_pull_columns_float32(const float* z, int64_t rows, int64_t n, const float* t,
                                                 const float* lse_t, const float* lse_z, const float* grad_gap,
                                                 const float* grad_lse, float* out) {
    pull_columns(rows, n, out, [=](int64_t at, int64_t i, int64_t m) {
        const V student = exponential(load_some(z + at, m) - load_some(lse_z + i, m)) * load_some(grad_lse + i, m);
        const V teacher = exponential(load_some(t + at, m) - load_some(lse_t + i, m)) * load_some(grad_gap + i, m);
        return student - teacher;
    });
}

extern "C" void softmax_gap_teach_columns_float32(const float* z, int64_t rows, int64_t n, const float* t,
                                                  const float* lse_t, const float* gap, const float* grad_gap,
                                                  const float* grad_lse, float* out) {
    pull_columns(rows, n, out, [=](int64_t at, int64_t i, int64_t m) {
        const V x = load_some(t + at, m), gt = load_some(grad_gap + i, m);
        const V further = x - load_some(z + at, m) - load_some(gap + i, m);
        const V share = exponential(x - load_some(lse_t + i, m));
        return share * (further * gt + (load_some(grad_lse + i, m) + gt));
    });
}

// at_most, below [rows]: how many scores are at most high, and how many are below low. A NaN is neither.
extern "C" void count_float32(const float* z, int64_t rows, int64_t n, const float* high, const float* low,
                              int64_t* at_most, int64_t* below) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = z + row * n;
        const float to_high = high[row], under = low[row];
        int64_t most = 0, less = 0, i = 0;
        while (i + L <= n) {
            I first{}, second{};
            for (const int64_t end = std::min(n, i + (int64_t(1) << 24)); i + L <= end; i += L) {
                const V x = load(from + i);
                first -= (I)(x <= to_high);
                second -= (I)(x < under);
            }
            for (int l = 0; l < L; ++l) most += first[l], less += second[l];
        }
        for (; i < n; ++i) most += from[i] <= to_high, less += from[i] < under;
        at_most[row] = most;
        below[row] = less;
    }
}
