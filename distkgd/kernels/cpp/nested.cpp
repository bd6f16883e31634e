// Sums over the candidates of nested models' scores, and their gradients. Model i scores margin + b_0 + … + b_i, with
// b [planes, rows, n]; a pair that does not count has b_0 far below zero. All planes of a row are summed together, so
// that b is read once forward and twice backward, and no scores are written.

#include <cmath>

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

struct Task {
    const float* b;
    int64_t planes, rows, n;
    float margin, delta;

    int64_t place(int64_t plane, int64_t row) const { return plane * rows + row; }
    // A vector of one row of one plane, from its i-th candidate on; lanes beyond n do not count.
    __attribute__((always_inline)) V at(int64_t plane, int64_t row, int64_t i) const {
        return load_some(b + place(plane, row) * n + i, n - i, plane ? 0.0f : NEVER);
    }
};

// body(row, z, e) for each row; z, e: room for a number per candidate, zeros at first.
template <class F> void by_rows(const Task& t, const F& body) {
#pragma omp parallel
    {
        Floats z(t.n), e(t.n);
        const NoDenormals fast;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < t.rows; ++row) body(row, z.data(), e.data());
    }
}

// The gradient for b of one row. model(plane, place) makes what adds to the gradient for the scores of that model, from
// these and those of the model below.
template <class M>
INLINE void pull_row(const Task& t, int64_t row, const float* grad_gap, float* out, float* z, float* pulled,
                     const M& model) {
    // What the largest model scores; the smaller ones follow by subtraction.
    for (int64_t i = 0; i < t.n; i += L) store(z + i, V{} + t.margin), store(pulled + i, V{});
    for (int64_t plane = 0; plane < t.planes; ++plane)
        for (int64_t i = 0; i < t.n; i += L) store(z + i, load(z + i) + t.at(plane, row, i));
    for (int64_t plane = t.planes - 1; plane >= 0; --plane) {
        const int64_t at = t.place(plane, row);
        const float slope = grad_gap && plane ? grad_gap[at] : 0.0f;
        auto more = model(plane, at);
        for (int64_t i = 0; i < t.n; i += L) {
            const V x = t.at(plane, row, i), score = load(z + i), below = score - x;
            const V sum = load(pulled + i) + more(score, below);
            store(z + i, below);
            store(pulled + i, sum);
            const V all = sum + huber_slope(x, V{} + t.delta) * slope;
            store_some(out + at * t.n + i, t.n - i, score > 0.5f * NEVER ? all : V{});
        }
    }
}

}  // namespace

// listwise: lse [planes, rows] of each model's scores times sharp [planes]. gap [planes, rows]: sum of Huber's loss of
// b_i (0 for i = 0), or null.
extern "C" void nested_listwise(const float* b, int64_t planes, int64_t rows, int64_t n, double margin, double delta,
                                const float* sharp, float* lse, float* gap) {
    const Task t{b, planes, rows, n, (float)margin, (float)delta};
    by_rows(t, [=](int64_t row, float* z, float*) {
        for (int64_t i = 0; i < n; i += L) store(z + i, V{} + t.margin);
        for (int64_t plane = 0; plane < planes; ++plane) {
            const int64_t at = t.place(plane, row);
            V top = V{} + 4 * planes * NEVER;
            Total apart;
            for (int64_t i = 0; i < n; i += L) {
                const V x = t.at(plane, row, i), sum = load(z + i) + x;
                store(z + i, sum);
                top = maximum(top, sum);
                if (gap && plane) Total::add(apart, sum > 0.5f * NEVER ? huber(x, V{} + t.delta) : V{});
            }
            const float most = largest(top), scale = sharp[plane];
            Total odds;
            for (int64_t i = 0; i < n; i += L) Total::add(odds, exponential2((load(z + i) - most) * (scale * LOG2E)));
            lse[at] = scale * most + (float)std::log(odds.done());
            if (gap) gap[at] = (float)apart.done();
        }
    });
}

// out [planes, rows, n]: the gradient for b, given those for lse and gap [planes, rows].
extern "C" void nested_listwise_pull(const float* b, int64_t planes, int64_t rows, int64_t n, double margin,
                                     double delta, const float* sharp, const float* lse, const float* grad_lse,
                                     const float* grad_gap, float* out) {
    const Task t{b, planes, rows, n, (float)margin, (float)delta};
    by_rows(t, [=](int64_t row, float* z, float* pulled) {
        pull_row(t, row, grad_gap, out, z, pulled, [=](int64_t plane, int64_t at) {
            const float scale = sharp[plane], shift = lse[at], g = grad_lse[at] * scale;
            return [=](V score, V) { return exponential2((score * scale - shift) * LOG2E) * g; };
        });
    });
}

// pointwise: mean [planes, rows] of softplus of each model's scores, model i weighed by exp(w z) of the scores of model
// i - 1 (the first model, and all if not weighted, evenly); lse: log of the sum of those weights. gap as above.
extern "C" void nested_pointwise(const float* b, int64_t planes, int64_t rows, int64_t n, double margin, double delta,
                                 int64_t weighted, double power, float* lse, float* mean, float* gap) {
    const Task t{b, planes, rows, n, (float)margin, (float)delta};
    const float w = (float)power;
    by_rows(t, [=](int64_t row, float* z, float* e) {
        // Even weights, of whatever counts.
        Total weights;
        for (int64_t i = 0; i < n; i += L) {
            const V here = t.at(0, row, i) > 0.5f * NEVER ? V{} + 1.0f : V{};
            store(z + i, V{} + t.margin), store(e + i, here);
            Total::add(weights, here);
        }
        double odds = weights.done();
        float most = 0;
        for (int64_t plane = 0; plane < planes; ++plane) {
            const int64_t at = t.place(plane, row);
            V top = V{} + NEVER;
            Total loss, apart;
            for (int64_t i = 0; i < n; i += L) {
                const V x = t.at(plane, row, i), sum = load(z + i) + x;
                store(z + i, sum);
                Total::add(loss, load(e + i) * softplus(sum, tail(sum)));
                const V here = sum > 0.5f * NEVER ? V{} + 1.0f : V{};
                top = maximum(top, here > 0.5f ? sum * w : V{} + NEVER);
                if (gap && plane) Total::add(apart, huber(x, V{} + t.delta) * here);
            }
            if (gap) gap[at] = (float)apart.done();
            lse[at] = odds > 0 ? most + (float)std::log(odds) : NEVER;
            mean[at] = odds > 0 ? (float)(loss.done() / odds) : 0.0f;
            if (!weighted || plane + 1 == planes) continue;
            most = largest(top);
            weights = Total{};
            for (int64_t i = 0; i < n; i += L) {
                const V score = load(z + i);
                const V weight = score > 0.5f * NEVER ? exponential2((score * w - most) * LOG2E) : V{};
                store(e + i, weight);
                Total::add(weights, weight);
            }
            odds = weights.done();
        }
    });
}

// out [planes, rows, n]: the gradient for b, and grad_w [rows] that for w, given those for lse, mean and gap.
extern "C" void nested_pointwise_pull(const float* b, int64_t planes, int64_t rows, int64_t n, double margin,
                                      double delta, int64_t weighted, double power, const float* lse,
                                      const float* mean, const float* grad_lse, const float* grad_mean,
                                      const float* grad_gap, float* out, float* grad_w) {
    const Task t{b, planes, rows, n, (float)margin, (float)delta};
    const float w = (float)power;
    by_rows(t, [=](int64_t row, float* z, float* pulled) {
        Total slopes;
        pull_row(t, row, grad_gap, out, z, pulled, [=, &slopes](int64_t plane, int64_t at) {
            const bool lower = weighted && plane;
            const float shift = lse[at], g = grad_mean[at], of_lse = grad_lse[at] - g * mean[at];
            const float even = std::exp(-std::max(shift, 0.0f));
            return [=, &slopes](V score, V below) {
                const V t = tail(score);
                V share = V{} + even;
                if (lower) share = exponential2((below * w - shift) * LOG2E);
                share = score > 0.5f * NEVER ? share : V{};
                if (lower) {
                    const V counted = score > 0.5f * NEVER ? below : V{};
                    Total::add(slopes, share * counted * (softplus(score, t) * g + of_lse));
                }
                return share * sigmoid(score, t) * g;
            };
        });
        grad_w[row] = (float)slopes.done();
    });
}
