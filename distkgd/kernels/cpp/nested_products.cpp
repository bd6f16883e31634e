// Sums over the candidates of nested models' scores, and their gradients, where all queries meet the same candidates
// and contribution b_i is the inner product of the i-th block of `width` columns of a query and a candidate. Products,
// sums and gradients are made tile by tile, so that no b is ever in memory, and of the scores only those of the largest
// model, from which backward goes down to the smaller ones; for contributions that are in memory, see nested.cpp.
//
// The lanes hold candidates, which come in turned tiles: c [tiles, planes * width, kTile]. What a thread sums does not
// depend on how many there are: forward it has some queries and all candidates, backward a slab of candidates and all
// queries.

#include <cmath>

#include "nested.h"

namespace {

constexpr int A = 4;               // queries at once
constexpr int B = 4;               // vectors of candidates at once
constexpr int64_t kPart = B * L;   // candidates at once
constexpr int64_t kTile = 256;     // candidates of a tile, some of these parts
constexpr int64_t kGroup = 16;     // queries that meet a tile while it is in the cache, a multiple of A
constexpr int64_t kSlabs = 8;      // of candidates, at most
constexpr int64_t kState = 6 * L;  // numbers that are kept of each model and query: top, odds, loss, gap, rate, tilt
constexpr float kStale = 40;       // how far a kept top may lie below the true one before it is raised
constexpr float kLowest = -1e20f;  // below all logits of pairs that count, above those of others: their share is 0

struct Task {
    const float *q, *c;
    int64_t queries, n, planes, width;
    float margin, delta;
    int64_t gaps;            // whether Huber's loss of what a model adds is asked for
    const int64_t* starts;   // [queries + 1]: where a query's pairs that do not count begin in `skipped`; or null
    const int64_t* skipped;  // candidates, ascending for each query
    int64_t weighted;        // as in nested.cpp, pointwise
    float w;
    const float* sharp;  // [planes]: a model's logits are this times its scores; listwise

    int64_t dim() const { return planes * width; }
    const float* tile(int64_t i) const { return c + i * dim() * kTile; }
    int64_t tiles() const { return (n + kTile - 1) / kTile; }
};

// Some queries, the last one repeated where they are fewer than A.
struct Some {
    const float* q[A];

    Some(const Task& t, int64_t first) {
        for (int a = 0; a < A; ++a) q[a] = t.q + std::min(first + a, t.queries - 1) * t.dim();
    }
};

// x: products of columns from `first` to before `stop` of some queries and a tile's part c.
INLINE void products(const Some& some, const float* c, int64_t first, int64_t stop, V (&x)[A][B]) {
    for (int a = 0; a < A; ++a)
        for (int b = 0; b < B; ++b) x[a][b] = V{};
    for (int64_t k = first; k < stop; ++k) {
        V y[B];
        for (int b = 0; b < B; ++b) y[b] = load(c + k * kTile + b * L);
        for (int a = 0; a < A; ++a) {
            const V s = some.q[a][k] - V{};
            for (int b = 0; b < B; ++b) x[a][b] += s * y[b];
        }
    }
}

// What a group and a tile need: of each query [kTile] scores, how steep Huber's loss may get, and gradients for scores.
// A query's lie together: were they whole pages apart, stores would hold up loads.
class Work {
    Floats all{kGroup * 3 * kTile};

public:
    float* z(int64_t i) { return &all[i * 3 * kTile]; }
    float* most(int64_t i) { return z(i) + kTile; }
    float* pulled(int64_t i) { return z(i) + 2 * kTile; }

    // Scores begin at the margin, or far below zero where a pair does not count.
    void begin(const Task& t, int64_t group, int64_t size, int64_t tile) {
        const int64_t first = tile * kTile, num = std::min(t.n - first, kTile);
        for (int64_t i = 0; i < size; ++i) {
            std::fill(z(i), z(i) + num, t.margin), std::fill(z(i) + num, z(i) + kTile, NEVER);
            std::fill(most(i), most(i) + num, t.delta), std::fill(most(i) + num, most(i) + kTile, 0.0f);
            std::fill(pulled(i), pulled(i) + kTile, 0.0f);
            if (!t.starts) continue;
            const int64_t* stop = t.skipped + t.starts[group + i + 1];
            const int64_t* one = std::lower_bound(t.skipped + t.starts[group + i], stop, first);
            for (; one < stop && *one < first + num; ++one) z(i)[*one - first] = NEVER, most(i)[*one - first] = 0.0f;
        }
    }
};

// Takes the scores of a model for one query and a part into its state. x: what it adds to z, those of the model below.
template <bool listwise>
INLINE void take(const Task& t, int64_t p, const V (&x)[B], const float* most, float* z, float* state) {
    const bool lower = t.weighted && p;
    V top = load(state), odds = load(state + L), loss = load(state + 2 * L), rate{}, tilt{};
    V below[B], s[B], logit[B];
    for (int b = 0; b < B; ++b) {
        below[b] = load(z + b * L);
        s[b] = below[b] + x[b];
        store(z + b * L, s[b]);
        if (listwise) logit[b] = s[b] * t.sharp[p];
        else logit[b] = s[b] > 0.5f * NEVER ? (lower ? below[b] * t.w : V{}) : V{} + 2 * NEVER;
    }
    if (lower) rate = load(state + 4 * L), tilt = load(state + 5 * L);
    V high = logit[0];
    for (int b = 1; b < B; ++b) high = maximum(high, logit[b]);
    if (any(high > top + kStale)) {
        const V raised = maximum(top, high), kept = exponential2((top - raised) * LOG2E);
        odds *= kept, loss *= kept, rate *= kept, tilt *= kept, top = raised;
        store(state, top);
    }
    const V shift = top * LOG2E;
    for (int b = 0; b < B; ++b) {
        const V share = exponential2(logit[b] * LOG2E - shift);
        odds += share;
        if (listwise) continue;
        const V part = share * softplus(s[b], tail(s[b]));
        loss += part;
        if (lower) rate += share * below[b], tilt += part * below[b];
    }
    store(state + L, odds);
    if (!listwise) store(state + 2 * L, loss);
    if (lower) store(state + 4 * L, rate), store(state + 5 * L, tilt);
    if (!t.gaps || !p) return;
    V gap = load(state + 3 * L);
    for (int b = 0; b < B; ++b) gap += huber(x[b], load(most + b * L));
    store(state + 3 * L, gap);
}

// [planes, queries] each: what forward finds; unless listwise also the mean loss, and the slopes of it and of lse in w.
struct Sums {
    float *lse, *gap, *mean, *mean_w, *lse_w;
    float* z;  // [queries, tiles, kTile]: the largest model's scores; or null
};

// What the lanes of a state come to.
template <bool listwise> void finish(const float* state, const Sums& to, int64_t at) {
    const float most = largest(load(state));
    double odds = 0, loss = 0, rate = 0, tilt = 0;
    for (int l = 0; l < L; ++l) {
        const double scale = std::exp((double)state[l] - most);
        odds += state[L + l] * scale;
        loss += state[2 * L + l] * scale;
        rate += state[4 * L + l] * scale;
        tilt += state[5 * L + l] * scale;
    }
    // NaN stays NaN.
    to.lse[at] = odds == 0 ? NEVER : most + (float)std::log(odds);
    to.gap[at] = total(load(state + 3 * L));
    if (listwise) return;
    const double over = odds == 0 && loss == 0 ? 1.0 : odds;
    to.mean[at] = (float)(loss / over);
    to.lse_w[at] = (float)(rate / over);
    to.mean_w[at] = (float)(tilt / over - loss / over * (rate / over));
}

template <bool listwise> void forward(const Task& t, const Sums& to) {
#pragma omp parallel
    {
        const NoDenormals fast;
        Floats states(kGroup * t.planes * kState);
        Work work;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < t.queries; group += kGroup) {
            const int64_t size = std::min(kGroup, t.queries - group);
            states.clear();
            for (int64_t i = 0; i < kGroup * t.planes; ++i) store(&states[i * kState], V{} + kLowest);
            for (int64_t tile = 0; tile < t.tiles(); ++tile) {
                work.begin(t, group, size, tile);
                for (int64_t p = 0; p < t.planes; ++p)
                    for (int64_t i = 0; i < size; i += A)
                        for (int64_t part = 0; part < kTile; part += kPart) {
                            V x[A][B];
                            products(Some(t, group + i), t.tile(tile) + part, p * t.width, (p + 1) * t.width, x);
                            for (int64_t a = 0; a < std::min<int64_t>(A, size - i); ++a) {
                                float* state = &states[(p * kGroup + i + a) * kState];
                                take<listwise>(t, p, x[a], work.most(i + a) + part, work.z(i + a) + part, state);
                            }
                        }
                if (!to.z) continue;
                for (int64_t i = 0; i < size; ++i)
                    std::copy_n(work.z(i), kTile, to.z + ((group + i) * t.tiles() + tile) * kTile);
            }
            for (int64_t i = 0; i < size; ++i)
                for (int64_t p = 0; p < t.planes; ++p)
                    finish<listwise>(&states[(p * kGroup + i) * kState], to, p * t.queries + group + i);
        }
    }
}

// [planes, queries] each: lse as forward found it, and the gradients for what it found; z as in `Sums`.
struct Found {
    const float *lse, *of_lse, *of_mean, *of_gap, *z;
};

// Of one query and a part: z: the scores of a model, and then of the one below it, to which it adds x; up: the gradient
// for x; pulled: for the scores of the models above, and then of this one too.
template <bool listwise>
INLINE void pull(const Task& t, const Found& f, int64_t at, int64_t p, const V (&x)[B], Work& work, int64_t i,
                 int64_t part, V (&up)[B]) {
    float *z = work.z(i) + part, *most = work.most(i) + part, *pulled = work.pulled(i) + part;
    const bool lower = t.weighted && p, gaps = t.gaps && p;
    const float sharp = listwise ? t.sharp[p] : 1.0f;
    const float lse = f.lse[at], shift = lse * LOG2E, g = listwise ? f.of_lse[at] * sharp : f.of_mean[at];
    const float even = listwise || lower ? 0.0f : std::exp(-std::max(lse, 0.0f));
    const float of_gap = gaps ? f.of_gap[at] : 0.0f;
    for (int b = 0; b < B; ++b) {
        const V s = load(z + b * L), below = s - x[b];
        V mine;
        if (listwise) {
            mine = exponential2(s * (sharp * LOG2E) - shift) * g;
        } else {
            V share = V{} + even;
            if (lower) share = exponential2(below * (t.w * LOG2E) - shift);
            share = s > 0.5f * NEVER ? share : V{};
            mine = share * sigmoid(s, tail(s)) * g;
        }
        const V sum = load(pulled + b * L) + mine;
        store(z + b * L, below), store(pulled + b * L, sum);
        up[b] = gaps ? sum + huber_slope(x[b], load(most + b * L)) * of_gap : sum;
    }
}

// What a thread needs in backward: sums of the queries' gradients [kGroup, dim, L] and the gradient of its slab of
// candidates, in turned tiles.
struct Space {
    Work work;
    Floats sums, dc;
    Space(const Task& t, int64_t tiles) : sums(kGroup * t.dim() * L), dc(tiles * t.dim() * kTile) {}
};

// The gradients `up` of some queries and a tile's part c, of columns from `first` to before `stop`: times c into the
// queries' sums [A, dim, L], times the queries into dc.
INLINE void spread(const Some& some, const V (&up)[A][B], const float* c, int64_t first, int64_t stop, int64_t dim,
                   float* sums, float* dc) {
    for (int64_t k = first; k < stop; ++k) {
        V sum[A], s[A];
        for (int a = 0; a < A; ++a) sum[a] = load(sums + (a * dim + k) * L), s[a] = some.q[a][k] - V{};
        for (int b = 0; b < B; ++b) {
            const int64_t at = k * kTile + b * L;
            const V y = load(c + at);
            V d = load(dc + at);
            for (int a = 0; a < A; ++a) sum[a] += up[a][b] * y, d += up[a][b] * s[a];
            store(dc + at, d);
        }
        for (int a = 0; a < A; ++a) store(sums + (a * dim + k) * L, sum[a]);
    }
}

// A group of queries and a tile, whose gradient is dc.
template <bool listwise>
void meet(const Task& t, const Found& f, int64_t group, int64_t size, int64_t tile, Space& space, float* dc) {
    const float* c = t.tile(tile);
    Work& work = space.work;
    work.begin(t, group, size, tile);
    for (int64_t i = 0; i < size; ++i)
        std::copy_n(f.z + ((group + i) * t.tiles() + tile) * kTile, kTile, work.z(i));
    V x[A][B];
    for (int64_t p = t.planes - 1; p >= 0; --p) {
        const int64_t first = p * t.width, stop = first + t.width;
        for (int64_t part = 0; part < kTile; part += kPart)
            for (int64_t i = 0; i < size; i += A) {
                const Some some(t, group + i);
                products(some, c + part, first, stop, x);
                V up[A][B];
                for (int a = 0; a < A; ++a) {
                    const int64_t at = p * t.queries + group + i + a;
                    if (i + a < size) pull<listwise>(t, f, at, p, x[a], work, i + a, part, up[a]);
                    else std::fill(up[a], up[a] + B, V{});
                }
                spread(some, up, c + part, first, stop, t.dim(), &space.sums[i * t.dim() * L], dc + part);
            }
    }
}

// parts [kSlabs, queries, dim]: of dq, each slab's.
template <bool listwise> void backward(const Task& t, const Found& f, float* parts, float* dq, float* dc) {
    const int64_t dim = t.dim(), tiles = t.tiles(), slabs = std::min(kSlabs, tiles);
#pragma omp parallel
    {
        const NoDenormals fast;
#pragma omp for schedule(static)
        for (int64_t slab = 0; slab < slabs; ++slab) {
            const int64_t first = tiles * slab / slabs, last = tiles * (slab + 1) / slabs;
            Space space(t, last - first);
            for (int64_t group = 0; group < t.queries; group += kGroup) {
                const int64_t size = std::min(kGroup, t.queries - group);
                space.sums.clear();
                for (int64_t tile = first; tile < last; ++tile)
                    meet<listwise>(t, f, group, size, tile, space, &space.dc[(tile - first) * dim * kTile]);
                float* part = parts + (slab * t.queries + group) * dim;
                for (int64_t i = 0; i < size * dim; ++i) part[i] = total(load(&space.sums[i * L]));
            }
            for (int64_t j = first * kTile; j < std::min(t.n, last * kTile); j += L) {
                const float* tile = &space.dc[(j / kTile - first) * dim * kTile + j % kTile];
                const int64_t rows = std::min<int64_t>(L, t.n - j);
                for (int64_t k = 0; k < dim; ++k)
                    for (int64_t l = 0; l < rows; ++l) dc[(j + l) * dim + k] = tile[k * kTile + l];
            }
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

// to [tiles, dim, kTile]: candidates [n, dim] in turned tiles, zeros behind them.
extern "C" void nested_products_turn(const float* c, int64_t n, int64_t dim, float* to) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += kTile)
        for (int64_t j = first; j < first + kTile; j += L) {
            const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(L, n - j));
            for (int64_t k = 0; k < dim; ++k) {
                float* row = to + (first / kTile * dim + k) * kTile + j - first;
                for (int64_t l = 0; l < L; ++l) row[l] = l < rows ? c[(j + l) * dim + k] : 0.0f;
            }
        }
}

// [planes, queries] each: lse of the scores times `sharp`, or where `mean` is not null of the weights of a mean
// softplus, as in nested.cpp; gap: sum of Huber's loss of b_i, 0 for i = 0 and without `gaps`; mean_w, lse_w: slopes of
// the two in w; z [queries, tiles, kTile], if not null: the largest model's scores.
extern "C" void nested_products(const float* q, const float* c, int64_t queries, int64_t n, int64_t planes,
                                int64_t width, double margin, double delta, int64_t gaps, const int64_t* starts,
                                const int64_t* skipped, int64_t weighted, double w, const float* sharp, float* lse,
                                float* gap, float* mean, float* mean_w, float* lse_w, float* z) {
    const Task t{q, c, queries, n, planes, width, (float)margin, (float)delta,
                 gaps, starts, skipped, weighted, (float)w, sharp};
    const Sums to{lse, gap, mean, mean_w, lse_w, z};
    mean ? forward<false>(t, to) : forward<true>(t, to);
}

// dq [queries, dim], dc [n, dim] for the gradients of lse, of gap and, unless listwise, where they are null, of mean;
// parts [kSlabs, queries, dim]: space.
extern "C" void nested_products_pull(const float* q, const float* c, int64_t queries, int64_t n, int64_t planes,
                                     int64_t width, double margin, double delta, int64_t gaps, const int64_t* starts,
                                     const int64_t* skipped, int64_t weighted, double w, const float* sharp,
                                     const float* lse, const float* z, const float* of_lse, const float* of_gap,
                                     const float* of_mean, float* parts, float* dq, float* dc) {
    const Task t{q, c, queries, n, planes, width, (float)margin, (float)delta,
                 gaps, starts, skipped, weighted, (float)w, sharp};
    const Found f{lse, of_lse, of_mean, of_gap, z};
    of_mean ? backward<false>(t, f, parts, dq, dc) : backward<true>(t, f, parts, dq, dc);
}
