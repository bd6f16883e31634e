// Sums over the candidates of nested models' scores, and their gradients. Model i scores margin + b_0 + … + b_i, with
// b [planes, rows, n]; a pair that does not count has b_0 far below zero. All planes of a row are summed together, so
// that b is read once forward and twice backward, and no scores are written.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "nested.h"

namespace {

// Sums of few vectors stay in single precision; every so often they move into double.
struct Total {
    V part{};
    double sum = 0;
    int held = 0;
    static inline void add(Total& t, V x) {
        t.part += x;
        if (++t.held == 64) t.flush();
    }
    void flush() { sum += total(part), part = V{}, held = 0; }
    double done() { flush(); return sum; }
};

// The vectors of one row of one plane; lanes beyond n do not count.
struct Row {
    const float* from;
    int64_t n;
    bool first;
    static inline V at(const Row& row, int64_t i) {
        if (i + L <= row.n) return load(row.from + i);
        V x = V{} + (row.first ? NEVER : 0.0f);
        std::memcpy(&x, row.from + i, (row.n - i) * sizeof(float));
        return x;
    }
};

INLINE void put(float* to, int64_t i, int64_t n, V x) {
    if (i + L <= n) store(to + i, x);
    else std::memcpy(to + i, &x, (n - i) * sizeof(float));
}

struct Space {
    Floats z, e;
    explicit Space(int64_t n) : z(n), e(n) {}
};

// z [n]: what the largest model scores in one row, whose part of plane i begins at b + i * stride.
INLINE void last_scores(const float* b, int64_t planes, int64_t stride, int64_t n, float margin, float* z) {
    for (int64_t i = 0; i < n; i += L) store(z + i, V{} + margin);
    for (int64_t plane = 0; plane < planes; ++plane) {
        const Row mine{b + plane * stride, n, plane == 0};
        for (int64_t i = 0; i < n; i += L) store(z + i, load(z + i) + Row::at(mine, i));
    }
}

}  // namespace

// listwise: lse [planes, rows] of each model's scores times sharp [planes]. gap [planes, rows]: sum of Huber's loss of b_i (0 for i = 0), or
// null.
extern "C" void nested_listwise_float32(const float* b, int64_t planes, int64_t rows, int64_t n, float margin,
                                        float delta, const float* sharp, float* lse, float* gap) {
#pragma omp parallel
    {
        Space space(n);
        const NoDenormals fast;
        float* z = space.z.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < n; i += L) store(z + i, V{} + margin);
            for (int64_t plane = 0; plane < planes; ++plane) {
                const int64_t at = plane * rows + row;
                const Row mine{b + at * n, n, plane == 0};
                V top = V{} + 4 * planes * NEVER;
                Total apart;
                for (int64_t i = 0; i < n; i += L) {
                    const V x = Row::at(mine, i), sum = load(z + i) + x;
                    store(z + i, sum);
                    top = maximum(top, sum);
                    if (gap && plane) Total::add(apart, sum > 0.5f * NEVER ? huber(x, V{} + delta) : V{});
                }
                const float most = largest(top), scale = sharp[plane];
                Total odds;
                for (int64_t i = 0; i < n; i += L) Total::add(odds, exponential2((load(z + i) - most) * (scale * LOG2E)));
                lse[at] = scale * most + (float)std::log(odds.done());
                if (gap) gap[at] = (float)apart.done();
            }
        }
    }
}

// out [planes, rows, n]: the gradient for b, given those for lse and gap [planes, rows].
extern "C" void nested_listwise_pull_float32(const float* b, int64_t planes, int64_t rows, int64_t n, float margin,
                                             float delta, const float* sharp, const float* lse, const float* grad_lse,
                                             const float* grad_gap, float* out) {
#pragma omp parallel
    {
        Space space(n);
        const NoDenormals fast;
        float *z = space.z.data(), *pulled = space.e.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            last_scores(b + row * n, planes, rows * n, n, margin, z);
            space.e.clear();
            for (int64_t plane = planes - 1; plane >= 0; --plane) {
                const int64_t at = plane * rows + row;
                const Row mine{b + at * n, n, plane == 0};
                const float scale = sharp[plane], shift = lse[at], g = grad_lse[at] * scale;
                const float slope = grad_gap && plane ? grad_gap[at] : 0.0f;
                for (int64_t i = 0; i < n; i += L) {
                    const V x = Row::at(mine, i), score = load(z + i);
                    const V sum = load(pulled + i) + exponential2((score * scale - shift) * LOG2E) * g;
                    store(z + i, score - x);
                    store(pulled + i, sum);
                    const V all = sum + huber_slope(x, V{} + delta) * slope;
                    put(out + at * n, i, n, score > 0.5f * NEVER ? all : V{});
                }
            }
        }
    }
}

// pointwise: mean [planes, rows] of softplus of each model's scores, model i weighed by exp(w z) of the scores of model
// i - 1 (the first model, and all if not weighted, evenly); lse: log of the sum of those weights. gap as above.
extern "C" void nested_pointwise_float32(const float* b, int64_t planes, int64_t rows, int64_t n, float margin,
                                         float delta, int64_t weighted, float w, float* lse, float* mean, float* gap) {
#pragma omp parallel
    {
        Space space(n);
        const NoDenormals fast;
        float *z = space.z.data(), *e = space.e.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < n; i += L) store(z + i, V{} + margin);
            double odds = 0;
            float most = 0;
            for (int64_t plane = 0; plane < planes; ++plane) {
                const int64_t at = plane * rows + row;
                const Row mine{b + at * n, n, plane == 0};
                if (plane == 0) {
                    // Even weights, of whatever counts.
                    for (int64_t i = 0; i < n; i += L) {
                        const V x = Row::at(mine, i);
                        store(e + i, x > 0.5f * NEVER ? V{} + 1.0f : V{});
                    }
                    Total present;
                    for (int64_t i = 0; i < n; i += L) Total::add(present, load(e + i));
                    odds = present.done();
                }
                V top = V{} + NEVER;
                Total loss, apart;
                for (int64_t i = 0; i < n; i += L) {
                    const V x = Row::at(mine, i), sum = load(z + i) + x;
                    store(z + i, sum);
                    Total::add(loss, load(e + i) * softplus(sum, tail(sum)));
                    const V here = sum > 0.5f * NEVER ? V{} + 1.0f : V{};
                    top = maximum(top, here > 0.5f ? sum * w : V{} + NEVER);
                    if (gap && plane) Total::add(apart, huber(x, V{} + delta) * here);
                }
                if (gap) gap[at] = (float)apart.done();
                if (odds > 0) {
                    lse[at] = most + (float)std::log(odds);
                    mean[at] = (float)(loss.done() / odds);
                } else {
                    lse[at] = NEVER;
                    mean[at] = 0;
                }
                if (!weighted || plane + 1 == planes) continue;
                most = largest(top);
                Total weights;
                for (int64_t i = 0; i < n; i += L) {
                    const V score = load(z + i);
                    const V weight = score > 0.5f * NEVER ? exponential2((score * w - most) * LOG2E) : V{};
                    store(e + i, weight);
                    Total::add(weights, weight);
                }
                odds = weights.done();
            }
        }
    }
}

// out [planes, rows, n]: the gradient for b, and grad_w [rows] that for w, given those for lse, mean and gap.
extern "C" void nested_pointwise_pull_float32(const float* b, int64_t planes, int64_t rows, int64_t n, float margin,
                                              float delta, int64_t weighted, float w, const float* lse,
                                              const float* mean, const float* grad_lse, const float* grad_mean,
                                              const float* grad_gap, float* out, float* grad_w) {
#pragma omp parallel
    {
        Space space(n);
        const NoDenormals fast;
        float *z = space.z.data(), *pulled = space.e.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            last_scores(b + row * n, planes, rows * n, n, margin, z);
            space.e.clear();
            double slope_of_w = 0;
            for (int64_t plane = planes - 1; plane >= 0; --plane) {
                const int64_t at = plane * rows + row;
                const Row mine{b + at * n, n, plane == 0};
                const bool lower = weighted && plane;
                const float shift = lse[at], g = grad_mean[at], slope = grad_gap && plane ? grad_gap[at] : 0.0f;
                const float of_lse = grad_lse[at] - g * mean[at];
                const float even = std::exp(-std::max(shift, 0.0f));
                Total slopes;
                for (int64_t i = 0; i < n; i += L) {
                    const V x = Row::at(mine, i), score = load(z + i), below = score - x;
                    const V t = tail(score);
                    V share = V{} + even;
                    if (lower) share = exponential2((below * w - shift) * LOG2E);
                    share = score > 0.5f * NEVER ? share : V{};
                    const V sum = load(pulled + i) + share * sigmoid(score, t) * g;
                    store(z + i, below);
                    store(pulled + i, sum);
                    if (lower) {
                        const V counted = score > 0.5f * NEVER ? below : V{};
                        Total::add(slopes, share * counted * (softplus(score, t) * g + of_lse));
                    }
                    const V all = sum + huber_slope(x, V{} + delta) * slope;
                    put(out + at * n, i, n, score > 0.5f * NEVER ? all : V{});
                }
                slope_of_w += slopes.done();
            }
            grad_w[row] = (float)slope_of_w;
        }
    }
}
