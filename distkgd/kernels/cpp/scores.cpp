// What is made of a block of scores z [rows, n], row by row, in one or two visits.
//
// columns: the same of scores that lie candidate by candidate, [n, rows], as the faster matrix product leaves them:
// sixteen rows at a time, a few candidates at a time while these are in the cache. Pieces of n have a fixed size and
// are merged in order, so that nothing depends on the number of threads.

#include <cmath>
#include <limits>

#include "floats.h"

namespace {

constexpr float NOTHING = -1e38f;  // in place of scores that there are not: its exponential is 0

float largest(const float* z, int64_t n) {
    V lanes = V{} - std::numeric_limits<float>::infinity();
    by_vectors<float>(n, [&](auto how, int64_t i) __attribute__((always_inline)) {
        const V x = how.get(z + i, NOTHING);
        lanes = x > lanes ? x : lanes;
    });
    float top = lanes[0];
    for (int l = 1; l < L; ++l) top = std::max(top, lanes[l]);
    return top;
}

// Sums along a row of single-precision vectors: short ones in their own precision, long ones in double.
template <class F> INLINE double summed(int64_t n, const F& term) {
    double total = 0;
    for (int64_t i = 0; i < n;) {
        V sum{};
        for (const int64_t end = std::min(n, i + 64 * L); i + L <= end; i += L) sum += term(Whole<float>{}, i);
        if (i < n && i + L > n) sum += term(Part<float>{n - i}, i), i = n;
        for (int l = 0; l < L; ++l) total += sum[l];
    }
    return total;
}

float log_sum_exp(const float* z, int64_t n) {
    const float top = largest(z, n);
    return top + (float)std::log(summed(n, [=](auto how, int64_t i) __attribute__((always_inline)) {
        return exponential(how.get(z + i, NOTHING) - top);
    }));
}

typedef double D __attribute__((vector_size(128)));  // sixteen

constexpr int64_t PIECE = 1024, CACHED = 32;  // candidates

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

// out: gradient(here, of) of each sixteen scores, `here` reading what lies as the scores do, `of` holding what is given
// by row.
template <bool COLUMNS, int GIVEN, class F>
void pull(int64_t rows, int64_t n, float* out, const float* const (&given)[GIVEN], const F& gradient) {
    const int64_t lines = COLUMNS ? n : rows, length = COLUMNS ? rows : n;
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < lines; ++line) {
        V of[GIVEN];
        for (int k = 0; k < GIVEN && !COLUMNS; ++k) of[k] = V{} + given[k][line];
        by_vectors<float>(length, [&](auto how, int64_t i) __attribute__((always_inline)) {
            for (int k = 0; k < GIVEN && COLUMNS; ++k) of[k] = how.get(given[k] + i);
            const int64_t at = line * length + i;
            how.put(out + at, gradient([=](const float* p) { return how.get(p + at); }, of));
        });
    }
}

template <int GIVEN, class F>
void pull(int64_t columns, int64_t rows, int64_t n, float* out, const float* const (&given)[GIVEN], const F& gradient) {
    columns ? pull<true>(rows, n, out, given, gradient) : pull<false>(rows, n, out, given, gradient);
}

}  // namespace

// lse [rows]: log of the sum of exp(z). Rows must not be empty.
extern "C" void logsumexp(const float* z, int64_t columns, int64_t rows, int64_t n, float* lse) {
    if (columns)
        return over_columns<false>(z, nullptr, rows, n, [=](int64_t i, const Sums& sums, const Sums&) {
            for (int l = 0; l < L && i + l < rows; ++l) lse[i + l] = sums.log_sum_exp(l);
        });
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) lse[row] = log_sum_exp(z + row * n, n);
}

// out: grad * exp(z - lse), the gradient of logsumexp for upstream gradients [rows]. It may be z itself.
extern "C" void logsumexp_pull(const float* z, int64_t columns, int64_t rows, int64_t n, const float* lse,
                               const float* grad, float* out) {
    pull(columns, rows, n, out, {lse, grad}, [=](auto here, const V* of) __attribute__((always_inline)) {
        return exponential(here(z) - of[0]) * of[1];
    });
}

// Of a student's scores z and a teacher's t: both log-sum-exps, and the mean of t - z under softmax(t).
extern "C" void softmax_gap(const float* z, int64_t columns, int64_t rows, int64_t n, const float* t, float* lse_t,
                            float* gap, float* lse_z) {
    if (columns)
        return over_columns<true>(t, z, rows, n, [=](int64_t i, const Sums& teacher, const Sums& student) {
            for (int l = 0; l < L && i + l < rows; ++l) {
                lse_t[i + l] = teacher.log_sum_exp(l);
                gap[i + l] = (float)(teacher.weighted[l] / teacher.total[l]);
                lse_z[i + l] = student.log_sum_exp(l);
            }
        });
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *student = z + row * n, *teacher = t + row * n;
        lse_z[row] = log_sum_exp(student, n);
        const float lse = lse_t[row] = log_sum_exp(teacher, n);
        gap[row] = (float)summed(n, [=](auto how, int64_t i) __attribute__((always_inline)) {
            const V x = how.get(teacher + i, NOTHING);
            return exponential(x - lse) * (x - how.get(student + i));
        });
    }
}

// out: the gradient of these for z, given that of the mean and of z's log-sum-exp. It may be t itself.
extern "C" void softmax_gap_pull(const float* z, int64_t columns, int64_t rows, int64_t n, const float* t,
                                 const float* lse_t, const float* lse_z, const float* grad_gap, const float* grad_lse,
                                 float* out) {
    pull(columns, rows, n, out, {lse_t, lse_z, grad_gap, grad_lse},
         [=](auto here, const V* of) __attribute__((always_inline)) {
             return exponential(here(z) - of[1]) * of[3] - exponential(here(t) - of[0]) * of[2];
         });
}

// out: the gradient of these for t, given that of the mean and of t's log-sum-exp.
extern "C" void softmax_gap_teach(const float* z, int64_t columns, int64_t rows, int64_t n, const float* t,
                                  const float* lse_t, const float* gap, const float* grad_gap, const float* grad_lse,
                                  float* out) {
    pull(columns, rows, n, out, {lse_t, gap, grad_gap, grad_lse},
         [=](auto here, const V* of) __attribute__((always_inline)) {
             const V x = here(t);
             return exponential(x - of[0]) * ((x - here(z) - of[1]) * of[2] + (of[3] + of[2]));
         });
}

// at_most, below [rows]: how many scores are at most high, and how many are below low. A NaN is neither.
extern "C" void count(const float* z, int64_t rows, int64_t n, const float* high, const float* low,
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
