// Sums over the candidates of nested models' scores, and their gradients, where all queries meet the same candidates and
// contribution b_i is the inner product of the i-th block of `width` columns of a query and a candidate. Products, sums
// and gradients are made tile by tile, so that no b is ever in memory; for contributions that are, see nested.cpp.
//
// The lanes hold candidates, which come turned: c [planes * width, stride], stride a multiple of kTile. What a thread
// sums does not depend on how many there are: forward it has some queries and all candidates, backward a slab of
// candidates and all queries.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "nested.h"

namespace {

constexpr int A = 4;               // queries at once
constexpr int B = 4;               // vectors of candidates at once
constexpr int64_t kTile = B * L;   // candidates of a tile
constexpr int64_t kGroup = 16;     // queries that meet a tile while it is in the cache
constexpr int64_t kSlabs = 8;      // of candidates, at most
constexpr int64_t kState = 4 * L;  // numbers that are kept of each model and query: top, odds, loss, gap

struct Task {
    const float *q, *c;
    int64_t queries, n, stride, planes, width;
    float margin, delta;
    const int64_t* starts;   // [queries + 1]: where a query's pairs that do not count begin in `skipped`; or null
    const int64_t* skipped;  // candidates, ascending for each query
    int64_t weighted;        // as in nested.cpp, pointwise
    float w;

    int64_t dim() const { return planes * width; }
};

// Some queries, the last one repeated where they are fewer than A.
struct Some {
    int64_t at[A];
    const float* q[A];

    Some(const Task& t, int64_t first) {
        for (int a = 0; a < A; ++a) {
            at[a] = std::min(first + a, t.queries - 1);
            q[a] = t.q + at[a] * t.dim();
        }
    }
};

// x: products of plane p of some queries and the tile of candidates at c.
INLINE void products(const Task& t, const Some& some, const float* c, int64_t p, V (&x)[A][B]) {
    for (int a = 0; a < A; ++a)
        for (int b = 0; b < B; ++b) x[a][b] = V{};
    for (int64_t k = p * t.width; k < (p + 1) * t.width; ++k) {
        V y[B];
        for (int b = 0; b < B; ++b) y[b] = load(c + k * t.stride + b * L);
        for (int a = 0; a < A; ++a) {
            const V s = V{} + some.q[a][k];
            for (int b = 0; b < B; ++b) x[a][b] += s * y[b];
        }
    }
}

// z [A, kTile]: where the scores of a tile begin, the margin, or far below zero where a pair does not count.
void begin(const Task& t, const Some& some, int64_t tile, float* z) {
    const int64_t first = tile * kTile, last = std::min(t.n, first + kTile);
    for (int a = 0; a < A; ++a, z += kTile) {
        std::fill(z, z + (last - first), t.margin);
        std::fill(z + (last - first), z + kTile, NEVER);
        if (!t.starts) continue;
        const int64_t* stop = t.skipped + t.starts[some.at[a] + 1];
        const int64_t* one = std::lower_bound(t.skipped + t.starts[some.at[a]], stop, first);
        for (; one < stop && *one < last; ++one) z[*one - first] = NEVER;
    }
}

// Takes the scores of a model for one query and a tile into its state. x: what it adds to z, those of the model below.
template <bool listwise> INLINE void take(const Task& t, int64_t p, const V (&x)[B], float* z, float* state) {
    const bool lower = t.weighted && p;
    V top = load(state), odds = load(state + L), loss = load(state + 2 * L), gap = load(state + 3 * L);
    V below[B], s[B], logit[B];
    const V before = top;
    for (int b = 0; b < B; ++b) {
        below[b] = load(z + b * L);
        s[b] = below[b] + x[b];
        store(z + b * L, s[b]);
        if (p) gap += s[b] > 0.5f * NEVER ? huber(x[b], t.delta) : V{};
        logit[b] = listwise ? s[b] : lower ? below[b] * t.w : V{};
        if (!listwise) logit[b] = s[b] > 0.5f * NEVER ? logit[b] : V{} + 2 * NEVER;
        top = maximum(top, logit[b]);
    }
    const V kept = exponential(before - top);
    odds *= kept, loss *= kept;
    for (int b = 0; b < B; ++b) {
        V share = exponential(logit[b] - top);
        if (!listwise) {
            share = s[b] > 0.5f * NEVER ? share : V{};
            loss += share * softplus(s[b], exponential(V{} - absolute(s[b])));
        }
        odds += share;
    }
    store(state, top), store(state + L, odds), store(state + 2 * L, loss), store(state + 3 * L, gap);
}

// What the lanes of a state come to: log of the sum of odds, mean loss, gap.
void finish(const float* state, float* lse, float* mean, float* gap) {
    const float most = largest(load(state));
    double odds = 0, loss = 0;
    for (int l = 0; l < L; ++l) {
        const double scale = std::exp((double)state[l] - most);
        odds += state[L + l] * scale;
        loss += state[2 * L + l] * scale;
    }
    *lse = odds > 0 ? most + (float)std::log(odds) : NEVER;
    if (mean) *mean = odds > 0 ? (float)(loss / odds) : 0.0f;
    *gap = total(load(state + 3 * L));
}

template <bool listwise> void forward(const Task& t, float* lse, float* mean, float* gap) {
#pragma omp parallel
    {
        const NoDenormals fast;
        std::vector<float> states(kGroup * t.planes * kState), z(A * kTile);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < t.queries; group += kGroup) {
            const int64_t size = std::min(kGroup, t.queries - group);
            std::fill(states.begin(), states.end(), 0.0f);
            for (int64_t i = 0; i < kGroup * t.planes; ++i) store(&states[i * kState], V{} - 3e38f);
            for (int64_t tile = 0; tile * kTile < t.n; ++tile)
                for (int64_t i = 0; i < size; i += A) {
                    const Some some(t, group + i);
                    begin(t, some, tile, z.data());
                    for (int64_t p = 0; p < t.planes; ++p) {
                        V x[A][B];
                        products(t, some, t.c + tile * kTile, p, x);
                        for (int a = 0; a < A; ++a)
                            take<listwise>(t, p, x[a], &z[a * kTile], &states[((i + a) * t.planes + p) * kState]);
                    }
                }
            for (int64_t i = 0; i < size; ++i)
                for (int64_t p = 0; p < t.planes; ++p) {
                    const int64_t at = p * t.queries + group + i;
                    finish(&states[(i * t.planes + p) * kState], lse + at, mean ? mean + at : nullptr, gap + at);
                }
        }
    }
}

// [planes, queries] each: what forward found, and the gradients for it.
struct Found {
    const float *lse, *mean, *of_lse, *of_mean, *of_gap;
};

// up: the gradient for what a model of one query adds to the scores z of the one below; pulled: of the models above it,
// and then its own too. Returns that of w.
template <bool listwise>
INLINE V pull(const Task& t, const Found& f, int64_t at, int64_t p, const float* below, const float* z, float* pulled,
              V (&up)[B]) {
    const bool lower = t.weighted && p;
    const float shift = f.lse[at], slope = p ? f.of_gap[at] : 0.0f;
    const float g = listwise ? f.of_lse[at] : f.of_mean[at];
    const float even = listwise ? 0.0f : std::exp(-std::max(shift, 0.0f));
    const float of_share = listwise ? 0.0f : f.of_lse[at] - g * f.mean[at];
    V slopes{};
    for (int b = 0; b < B; ++b) {
        const V s = load(z + b * L), under = load(below + b * L);
        V mine;
        if (listwise) {
            mine = exponential(s - shift) * g;
        } else {
            const V tail = exponential(V{} - absolute(s)), over = 1.0f / (tail + 1.0f);
            V share = V{} + even;
            if (lower) share = exponential(under * t.w - shift);
            share = s > 0.5f * NEVER ? share : V{};
            mine = share * (s >= 0 ? over : tail * over) * g;
            if (lower) slopes += share * (s > 0.5f * NEVER ? under : V{}) * (softplus(s, tail) * g + of_share);
        }
        const V sum = load(pulled + b * L) + mine;
        store(pulled + b * L, sum);
        up[b] = s > 0.5f * NEVER ? sum + huber_slope(s - under, t.delta) * slope : V{};
    }
    return slopes;
}

// What a thread needs in backward: scores of all models, gradients of the models above, sums of the queries' gradients
// [kGroup, dim, L], and the gradient of its slab of candidates, turned.
struct Space {
    std::vector<float> scores, pulled, sums, dc;
    explicit Space(const Task& t) : scores((t.planes + 1) * A * kTile), pulled(A * kTile), sums(kGroup * t.dim() * L) {}
};

// One tile with some queries, of which `real` count; sums: of their gradients, dc: of the tile's, rows `wide` apart.
template <bool listwise>
void meet(const Task& t, const Found& f, const Some& some, int real, int64_t tile, Space& space, float* sums, float* dc,
          int64_t wide, double& slope_of_w) {
    const float* c = t.c + tile * kTile;
    float *z = space.scores.data(), *pulled = space.pulled.data();
    begin(t, some, tile, z);
    for (int64_t p = 0; p < t.planes; ++p, z += A * kTile) {
        V x[A][B];
        products(t, some, c, p, x);
        for (int a = 0; a < A; ++a)
            for (int b = 0; b < B; ++b) {
                const int64_t at = a * kTile + b * L;
                store(z + A * kTile + at, load(z + at) + x[a][b]);
            }
    }
    std::fill(pulled, pulled + A * kTile, 0.0f);
    for (int64_t p = t.planes - 1; p >= 0; --p, z -= A * kTile) {
        V up[A][B] = {};
        for (int a = 0; a < real; ++a) {
            const int64_t at = a * kTile;
            const V slopes = pull<listwise>(t, f, p * t.queries + some.at[a], p, z - A * kTile + at, z + at, pulled + at, up[a]);
            if (!listwise) slope_of_w += total(slopes);
        }
        for (int64_t k = p * t.width; k < (p + 1) * t.width; ++k) {
            V y[B], dy[B];
            for (int b = 0; b < B; ++b) {
                y[b] = load(c + k * t.stride + b * L);
                dy[b] = load(dc + k * wide + b * L);
            }
            for (int a = 0; a < A; ++a) {
                float* to = sums + (a * t.dim() + k) * L;
                V sum = load(to);
                for (int b = 0; b < B; ++b) {
                    sum += up[a][b] * y[b];
                    dy[b] += up[a][b] * some.q[a][k];
                }
                store(to, sum);
            }
            for (int b = 0; b < B; ++b) store(dc + k * wide + b * L, dy[b]);
        }
    }
}

// parts [kSlabs, queries, dim]: of dq, each slab's. dw [kSlabs] too.
template <bool listwise>
void backward(const Task& t, const Found& f, float* parts, float* dq, float* dc, double* dw) {
    const int64_t dim = t.dim(), tiles = (t.n + kTile - 1) / kTile, slabs = std::min(kSlabs, tiles);
#pragma omp parallel
    {
        const NoDenormals fast;
        Space space(t);
#pragma omp for schedule(static)
        for (int64_t slab = 0; slab < slabs; ++slab) {
            const int64_t first = tiles * slab / slabs, last = tiles * (slab + 1) / slabs, wide = (last - first) * kTile;
            space.dc.assign(dim * wide, 0.0f);
            double slope = 0;
            for (int64_t group = 0; group < t.queries; group += kGroup) {
                const int64_t size = std::min(kGroup, t.queries - group);
                std::fill(space.sums.begin(), space.sums.end(), 0.0f);
                for (int64_t tile = first; tile < last; ++tile)
                    for (int64_t i = 0; i < size; i += A)
                        meet<listwise>(t, f, Some(t, group + i), (int)std::min<int64_t>(A, size - i), tile, space,
                                       &space.sums[i * dim * L], space.dc.data() + (tile - first) * kTile, wide, slope);
                float* part = parts + (slab * t.queries + group) * dim;
                for (int64_t i = 0; i < size * dim; ++i) part[i] = total(load(&space.sums[i * L]));
            }
            if (dw) dw[slab] = slope;
            for (int64_t j = first * kTile; j < std::min(t.n, last * kTile); ++j)
                for (int64_t k = 0; k < dim; ++k) dc[j * dim + k] = space.dc[k * wide + j - first * kTile];
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.queries * dim; ++i) {
            float sum = 0;
            for (int64_t slab = 0; slab < slabs; ++slab) sum += parts[slab * t.queries * dim + i];
            dq[i] = sum;
        }
    }
}

}  // namespace

// to [dim, stride]: candidates [n, dim], turned, zeros behind them.
extern "C" void nested_products_turn_float32(const float* c, int64_t n, int64_t dim, int64_t stride, float* to) {
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < dim; k += 16)
        for (int64_t j = 0; j < stride; ++j)
            for (int64_t m = k; m < std::min(dim, k + 16); ++m) to[m * stride + j] = j < n ? c[j * dim + m] : 0.0f;
}

// [planes, queries] each: lse of the scores, or without `mean` null of the weights of a mean softplus, as in nested.cpp;
// gap: sum of Huber's loss of b_i, 0 for i = 0.
extern "C" void nested_products_float32(const float* q, const float* c, int64_t queries, int64_t n, int64_t stride,
                                        int64_t planes, int64_t width, float margin, float delta, const int64_t* starts,
                                        const int64_t* skipped, int64_t weighted, float w, float* lse, float* mean,
                                        float* gap) {
    const Task t{q, c, queries, n, stride, planes, width, margin, delta, starts, skipped, weighted, w};
    mean ? forward<false>(t, lse, mean, gap) : forward<true>(t, lse, mean, gap);
}

// dq [queries, dim], dc [n, dim], dw [kSlabs] (its sum is the gradient of w; parts beyond what there is stay as they
// are) for the gradients of lse, mean and gap; parts [kSlabs, queries, dim]: space.
extern "C" void nested_products_pull_float32(const float* q, const float* c, int64_t queries, int64_t n, int64_t stride,
                                             int64_t planes, int64_t width, float margin, float delta,
                                             const int64_t* starts, const int64_t* skipped, int64_t weighted, float w,
                                             const float* lse, const float* mean, const float* of_lse,
                                             const float* of_mean, const float* of_gap, float* parts, float* dq,
                                             float* dc, double* dw) {
    const Task t{q, c, queries, n, stride, planes, width, margin, delta, starts, skipped, weighted, w};
    const Found f{lse, mean, of_lse, of_mean, of_gap};
    mean ? backward<false>(t, f, parts, dq, dc, dw) : backward<true>(t, f, parts, dq, dc, dw);
}
