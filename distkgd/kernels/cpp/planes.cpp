// Sums over each of several equal blocks of coordinates ("planes") of (query, candidate) pairs, and their gradients.
// A plane is narrower than a vector, so that the lanes of one hold candidates: a plane's columns of them are turned
// first. That does not pay where few queries meet the same candidates: there the lanes hold coordinates.
//
// Shapes: q [groups, queries, planes * width], c [groups, candidates, planes * width], out and grad [planes, groups,
// queries, candidates]. Every group and every plane is summed by one thread, in an order of its own.

#include <type_traits>
#include <vector>

#include "terms.h"

namespace {

constexpr int64_t kFew = 4;       // queries of a group, below which its candidates are not turned
constexpr int64_t kColumns = 16;  // of a plane, at most, of which gradients are made together

template <class T> struct Task {
    const T *q, *c;
    T factor;  // on all sums
    int64_t groups, queries, candidates, planes, width;

    int64_t dim() const { return planes * width; }
    int64_t query(int64_t g, int64_t i) const { return (g * queries + i) * dim(); }
    int64_t candidate(int64_t g, int64_t j) const { return (g * candidates + j) * dim(); }
    // Where plane p of query i of group g begins in out or grad.
    int64_t place(int64_t p, int64_t g, int64_t i) const { return ((p * groups + g) * queries + i) * candidates; }
    // Candidates of a group, rounded up to whole vectors.
    int64_t stride() const { return (candidates + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes; }
};

// to [columns, stride]: columns from k0 on of the candidates of group g.
template <class T> void turn(const Task<T>& t, int64_t g, int64_t k0, int64_t columns, T* to) {
    const int64_t stride = t.stride();
    for (int64_t k = 0; k < columns; k += 16) {
        const int64_t stop = std::min(columns, k + 16);
        for (int64_t j = 0; j < t.candidates; ++j) {
            const T* from = t.c + t.candidate(g, j) + k0;
            for (int64_t m = k; m < stop; ++m) to[m * stride + j] = from[m];
        }
    }
}

// Calls `some` with as many vectors of candidates as are there, at most four, until none is left.
template <class F> INLINE void by_fours(int64_t vectors, const F& some) {
    for (; vectors >= 4; vectors -= 4) some(std::integral_constant<int, 4>{});
    if (vectors >= 2) some(std::integral_constant<int, 2>{}), vectors -= 2;
    if (vectors) some(std::integral_constant<int, 1>{});
}

// The sums of NQ queries with NV vectors of candidates c; n candidates count.
template <class P, class T, int NQ, int NV>
INLINE void meet(const Task<T>& t, const T* const* q, const T* c, int64_t stride, T* const* out, int64_t n) {
    constexpr int L = Vec<T>::lanes, U = P::unit;
    V<T> sum[NQ][NV] = {};
    for (int64_t k = 0; k < t.width; k += U) {
        V<T> x[NV][U];
        for (int b = 0; b < NV; ++b)
            for (int u = 0; u < U; ++u) x[b][u] = load<T>(c + (k + u) * stride + b * L);
        for (int a = 0; a < NQ; ++a) {
            V<T> y[U], none{};
            for (int u = 0; u < U; ++u) y[u] = V<T>{} + q[a][k + u];
            for (int b = 0; b < NV; ++b) {
                if constexpr (U == 1) P::add(sum[a][b], y[0], none, x[b][0]);
                else P::add_apart(sum[a][b], y, x[b]);
            }
        }
    }
    for (int a = 0; a < NQ; ++a)
        for (int b = 0; b < NV; ++b) store_some<T>(out[a] + b * L, n - b * L, sum[a][b] * t.factor);
}

template <class P, class T, int NQ>
INLINE void meet_all(const Task<T>& t, int64_t g, int64_t i, int64_t p, const T* c, T* out) {
    constexpr int L = Vec<T>::lanes;
    const T* q[NQ];
    T* to[NQ];
    for (int a = 0; a < NQ; ++a) {
        q[a] = t.q + t.query(g, i + a) + p * t.width;
        to[a] = out + t.place(p, g, i + a);
    }
    int64_t j = 0;
    by_fours(t.stride() / L, [&](auto vectors) __attribute__((always_inline)) {
        constexpr int NV = decltype(vectors)::value;
        meet<P, T, NQ, NV>(t, q, c + j, t.stride(), to, t.candidates - j);
        for (int a = 0; a < NQ; ++a) to[a] += NV * L;
        j += NV * L;
    });
}

template <class P, class T> void forward(const Task<T>& t, T* out) {
#pragma omp parallel
    {
        std::vector<T> c(t.width * t.stride());
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < t.groups; ++g)
            for (int64_t p = 0; p < t.planes; ++p) {
                turn(t, g, p * t.width, t.width, c.data());
                int64_t i = 0;
                for (; i + 4 <= t.queries; i += 4) meet_all<P, T, 4>(t, g, i, p, c.data(), out);
                for (; i < t.queries; ++i) meet_all<P, T, 1>(t, g, i, p, c.data(), out);
            }
    }
}

// Adds gradients of NQ queries to dq [NQ, columns, lanes], those of NV vectors of candidates to dc [columns, stride].
template <class P, class T, int NQ, int NV>
INLINE void pull(const Task<T>& t, const T* const* q, const T* c, int64_t columns, const T* const* g, T* dq, T* dc) {
    constexpr int L = Vec<T>::lanes, U = P::unit;
    const int64_t stride = t.stride();
    for (int64_t k = 0; k < columns; k += U) {
        V<T> x[NV][U], dx[NV][U];
        for (int b = 0; b < NV; ++b)
            for (int u = 0; u < U; ++u) {
                x[b][u] = load<T>(c + (k + u) * stride + b * L);
                dx[b][u] = load<T>(dc + (k + u) * stride + b * L);
            }
        for (int a = 0; a < NQ; ++a) {
            V<T> y[U], dy[U], none{};
            for (int u = 0; u < U; ++u) {
                y[u] = V<T>{} + q[a][k + u];
                dy[u] = load<T>(dq + (a * columns + k + u) * L);
            }
            for (int b = 0; b < NV; ++b) {
                const V<T> up = load<T>(g[a] + b * L) * t.factor;
                if constexpr (U == 1) P::pull(up, y[0], none, x[b][0], dy[0], none, dx[b][0]);
                else P::pull_apart(up, y, x[b], dy, dx[b]);
            }
            for (int u = 0; u < U; ++u) store<T>(dq + (a * columns + k + u) * L, dy[u]);
        }
        for (int b = 0; b < NV; ++b)
            for (int u = 0; u < U; ++u) store<T>(dc + (k + u) * stride + b * L, dx[b][u]);
    }
}

// What a thread needs: some columns of all candidates of a group, their gradients, and those of four queries.
template <class T> struct Space {
    std::vector<T> c, dc, dq;
    explicit Space(int64_t stride) : c(stride * kColumns), dc(stride * kColumns), dq(4 * kColumns * Vec<T>::lanes) {}
};

// Some columns, those from k0 on, which belong to plane p.
struct Columns {
    int64_t p, k0, number;
};

template <class P, class T, int NQ>
INLINE void pull_all(const Task<T>& t, int64_t g, int64_t i, Columns of, const T* grad, T* dq, Space<T>& space) {
    constexpr int L = Vec<T>::lanes;
    const int64_t whole = t.candidates / L;
    const T *q[NQ], *up[NQ];
    for (int a = 0; a < NQ; ++a) {
        q[a] = t.q + t.query(g, i + a) + of.k0;
        up[a] = grad + t.place(of.p, g, i + a);
    }
    T *c = space.c.data(), *dc = space.dc.data(), *sums = space.dq.data();
    std::fill(sums, sums + NQ * of.number * L, T(0));
    by_fours(whole, [&](auto vectors) __attribute__((always_inline)) {
        constexpr int NV = decltype(vectors)::value;
        pull<P, T, NQ, NV>(t, q, c, of.number, up, sums, dc);
        for (int a = 0; a < NQ; ++a) up[a] += NV * L;
        c += NV * L, dc += NV * L;
    });
    if (const int64_t left = t.candidates - whole * L) {
        T rest[NQ][L] = {};
        const T* padded[NQ];
        for (int a = 0; a < NQ; ++a) {
            std::memcpy(rest[a], up[a], left * sizeof(T));
            padded[a] = rest[a];
        }
        pull<P, T, NQ, 1>(t, q, c, of.number, padded, sums, dc);
    }
    for (int a = 0; a < NQ; ++a)
        for (int64_t k = 0; k < of.number; ++k)
            dq[t.query(g, i + a) + of.k0 + k] = total<T>(load<T>(sums + (a * of.number + k) * L));
}

template <class P, class T> void backward(const Task<T>& t, const T* grad, T* dq, T* dc) {
    const int64_t pieces = (t.width + kColumns - 1) / kColumns, stride = t.stride();
    const int64_t each = (t.width / P::unit + pieces - 1) / pieces * P::unit;
#pragma omp parallel
    {
        Space<T> space(stride);
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < t.groups; ++g)
            for (int64_t work = 0; work < t.planes * pieces; ++work) {
                const int64_t p = work / pieces, from = work % pieces * each;
                const Columns of{p, p * t.width + from, std::min(each, t.width - from)};
                if (of.number <= 0) continue;
                turn(t, g, of.k0, of.number, space.c.data());
                std::fill(space.dc.begin(), space.dc.end(), T(0));
                int64_t i = 0;
                for (; i + 4 <= t.queries; i += 4) pull_all<P, T, 4>(t, g, i, of, grad, dq, space);
                for (; i < t.queries; ++i) pull_all<P, T, 1>(t, g, i, of, grad, dq, space);
                for (int64_t j = 0; j < t.candidates; ++j)
                    for (int64_t k = 0; k < of.number; ++k)
                        dc[t.candidate(g, j) + of.k0 + k] = space.dc[k * stride + j];
            }
    }
}

template <class P, class T> void forward_few(const Task<T>& t, T* out) {
    constexpr int L = Vec<T>::lanes;
    const int64_t dim = t.dim(), n = t.candidates;
#pragma omp parallel
    {
        std::vector<T> terms(dim + L), sums(t.planes * n);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < t.groups; ++g)
            for (int64_t i = 0; i < t.queries; ++i) {
                const T* q = t.q + t.query(g, i);
                for (int64_t j = 0; j < n; ++j) {
                    const T* c = t.c + t.candidate(g, j);
                    for (int64_t k = 0; k < dim; k += L) {
                        V<T> v{}, none{};
                        P::add(v, load_some(q + k, dim - k), none, load_some(c + k, dim - k));
                        store<T>(terms.data() + k, v);
                    }
                    for (int64_t p = 0; p < t.planes; ++p) {
                        T sum = 0;
                        for (int64_t k = p * t.width; k < (p + 1) * t.width; ++k) sum += terms[k];
                        sums[p * n + j] = sum * P::scale * t.factor;
                    }
                }
                for (int64_t p = 0; p < t.planes; ++p)
                    std::copy_n(sums.data() + p * n, n, out + t.place(p, g, i));
            }
    }
}

template <class P, class T> void backward_few(const Task<T>& t, const T* grad, T* dq, T* dc) {
    constexpr int L = Vec<T>::lanes;
    const int64_t dim = t.dim(), n = t.candidates;
#pragma omp parallel
    {
        std::vector<T> upstream(t.planes * n), spread(dim + L);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < t.groups; ++g) {
            std::fill(dc + t.candidate(g, 0), dc + t.candidate(g, n), T(0));
            std::fill(dq + t.query(g, 0), dq + t.query(g, t.queries), T(0));
            for (int64_t i = 0; i < t.queries; ++i) {
                const T* q = t.q + t.query(g, i);
                T* to = dq + t.query(g, i);
                for (int64_t p = 0; p < t.planes; ++p)
                    for (int64_t j = 0; j < n; ++j) upstream[j * t.planes + p] = grad[t.place(p, g, i) + j] * t.factor;
                for (int64_t j = 0; j < n; ++j) {
                    // Each plane's gradient for all its columns; what a vector writes beyond them, the next one mends.
                    for (int64_t p = 0; p < t.planes; ++p)
                        for (int64_t k = 0; k < t.width; k += L)
                            store<T>(spread.data() + p * t.width + k, V<T>{} + upstream[j * t.planes + p]);
                    const T* c = t.c + t.candidate(g, j);
                    T* row = dc + t.candidate(g, j);
                    for (int64_t k = 0; k < dim; k += L) {
                        const int64_t left = dim - k;
                        V<T> first = load_some(to + k, left), other = load_some(row + k, left), none{};
                        P::pull(load<T>(spread.data() + k), load_some(q + k, left), none, load_some(c + k, left), first,
                                none, other);
                        store_some(to + k, left, first);
                        store_some(row + k, left, other);
                    }
                }
            }
        }
    }
}

template <class P, class T> void run(const Task<T>& t, const T* grad, T* out, T* dq, T* dc) {
    const bool few = t.queries < kFew;
    if (out) few ? forward_few<P, T>(t, out) : forward<P, T>(t, out);
    if (dq || dc) few ? backward_few<P, T>(t, grad, dq, dc) : backward<P, T>(t, grad, dq, dc);
}

}  // namespace

// out: sums, or null. dq, dc: gradients for `grad`, or null. All are written over; an empty tensor has no address.
#define PLANES(NAME, T)                                                                                              \
    extern "C" void planes_##NAME(int64_t kind, const T* q, const T* c, double factor, int64_t groups,              \
                                  int64_t queries, int64_t candidates, int64_t planes, int64_t width, const T* grad, \
                                  T* out, T* dq, T* dc) {                                                            \
        const Task<T> t{q, c, (T)factor, groups, queries, candidates, planes, width};                                \
        with_kind<T>(kind, [&](auto term) {                                                                          \
            if constexpr (decltype(term)::parts == 1) run<decltype(term), T>(t, grad, out, dq, dc);                  \
        });                                                                                                          \
    }

PLANES(float32, float)
PLANES(float64, double)
