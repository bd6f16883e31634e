// Sums over coordinates of (query, candidate) pairs, and their gradients, without a [queries, candidates, coordinates]
// tensor and without a copy of the candidates: those are rows of a table, named by an index.
//
// Shapes: q [groups, queries, width], table [rows, dim], index [groups, candidates] (none: row g * candidates + j),
// out and grad [groups, queries, candidates]. Width is dim, or twice that where a query has two parts.
//
// Whatever the number of threads, every sum runs in the same order: forward splits pairs among threads, backward
// coordinates.

#include <omp.h>
#include <type_traits>
#include <vector>

#include "terms.h"

namespace {

constexpr int64_t kBlock = 64;  // queries and candidates of a forward tile: rows of both stay in the second-level cache

template <class T> struct Task {
    const T* q;
    const T* table;
    const int64_t* index;
    int64_t groups, queries, candidates, dim, width, rows;

    const T* query(int64_t g, int64_t i) const { return q + (g * queries + i) * width; }
    int64_t row(int64_t g, int64_t j) const { return index ? index[g * candidates + j] : g * candidates + j; }
};

// out[i, j] of NQ queries and NC candidates.
template <class P, class T, int NQ, int NC>
INLINE void tile(const T* const* q, const T* const* c, int64_t d, T* const* out) {
    constexpr int L = Vec<T>::lanes;
    V<T> sum[NQ][NC] = {};
    int64_t k = 0;
    for (; k + L <= d; k += L) {
        V<T> a[NQ], b[NQ];
        for (int i = 0; i < NQ; ++i) {
            a[i] = load<T>(q[i] + k);
            b[i] = P::parts == 2 ? load<T>(q[i] + d + k) : a[i];
        }
        for (int j = 0; j < NC; ++j) {
            V<T> x = load<T>(c[j] + k);
            for (int i = 0; i < NQ; ++i) P::add(sum[i][j], a[i], b[i], x);
        }
    }
    for (int i = 0; i < NQ; ++i)
        for (int j = 0; j < NC; ++j) {
            T value = total<T>(sum[i][j]) * P::scale;
            for (int64_t m = k; m < d; m += P::unit) {
                if constexpr (P::unit == 2) P::add_apart(value, q[i] + m, c[j] + m);
                else P::add(value, q[i][m], q[i][P::parts == 2 ? d + m : m], c[j][m]);
            }
            out[i][j] = value;
        }
}

template <class P, class T, int NQ>
INLINE void strip_of_tiles(const Task<T>& t, int64_t g, int64_t i, int64_t j0, int64_t j1, T* out) {
    const T *q[NQ], *c[4];
    T* to[NQ];
    for (int a = 0; a < NQ; ++a) q[a] = t.query(g, i + a);
    int64_t j = j0;
    for (; j + 4 <= j1; j += 4) {
        for (int b = 0; b < 4; ++b) c[b] = t.table + t.row(g, j + b) * t.dim;
        if (NQ == 1 && t.index && j + 8 <= j1)  // rows lie anywhere: ask for the next ones early
            for (int b = 0; b < 4; ++b) {
                const T* next = t.table + t.row(g, j + 4 + b) * t.dim;
                for (int64_t k = 0; k < t.dim; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(next + k);
            }
        for (int a = 0; a < NQ; ++a) to[a] = out + (g * t.queries + i + a) * t.candidates + j;
        tile<P, T, NQ, 4>(q, c, t.dim, to);
    }
    for (; j < j1; ++j) {
        c[0] = t.table + t.row(g, j) * t.dim;
        for (int a = 0; a < NQ; ++a) to[a] = out + (g * t.queries + i + a) * t.candidates + j;
        tile<P, T, NQ, 1>(q, c, t.dim, to);
    }
}

template <class P, class T> void forward(const Task<T>& t, T* out) {
    const int64_t query_blocks = (t.queries + kBlock - 1) / kBlock, blocks = (t.candidates + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(3) schedule(static)
    for (int64_t g = 0; g < t.groups; ++g)
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t a = 0; a < query_blocks; ++a) {
                const int64_t i1 = std::min(t.queries, (a + 1) * kBlock);
                const int64_t j0 = b * kBlock, j1 = std::min(t.candidates, j0 + kBlock);
                int64_t i = a * kBlock;
                for (; i + 4 <= i1; i += 4) strip_of_tiles<P, T, 4>(t, g, i, j0, j1, out);
                for (; i < i1; ++i) strip_of_tiles<P, T, 1>(t, g, i, j0, j1, out);
            }
}

// Gradients of W vectors of coordinates from k on; sums over a block of queries stay in `local`.
template <class P, class T, int W>
void pull_strip(const Task<T>& t, const T* grad, T* dq, T* dtable, int64_t k, T* local) {
    constexpr int L = Vec<T>::lanes;
    const int64_t d = t.dim;
    for (int64_t g = 0; g < t.groups; ++g)
        for (int64_t i0 = 0; i0 < t.queries; i0 += kBlock)
            for (int64_t j0 = 0; j0 < t.candidates; j0 += 4 * kBlock) {
                const int64_t n = std::min(kBlock, t.queries - i0), j1 = std::min(t.candidates, j0 + 4 * kBlock);
                std::fill(local, local + n * W * L * P::parts, T(0));
                const T* upstream = grad + (g * t.queries + i0) * t.candidates;
                for (int64_t j = j0; j < j1; ++j) {
                    const int64_t row = t.row(g, j);
                    V<T> c[W], dc[W] = {}, none{};
                    for (int w = 0; w < W; ++w) c[w] = load(t.table + row * d + k + w * L);
                    for (int64_t i = 0; i < n; ++i) {
                        const T* q = t.query(g, i0 + i) + k;
                        const V<T> u = V<T>{} + upstream[i * t.candidates + j];
                        T* mine = local + i * W * L * P::parts;
                        for (int w = 0; w < W; ++w) {
                            V<T> first = load<T>(mine + w * L);
                            if (P::parts == 2) {
                                V<T> second = load<T>(mine + (W + w) * L);
                                P::pull(u, load(q + w * L), load(q + d + w * L), c[w], first, second, dc[w]);
                                store<T>(mine + (W + w) * L, second);
                            } else {
                                P::pull(u, load(q + w * L), none, c[w], first, none, dc[w]);
                            }
                            store<T>(mine + w * L, first);
                        }
                    }
                    T* to = dtable + row * d + k;
                    for (int w = 0; w < W; ++w) store(to + w * L, load(to + w * L) + dc[w]);
                }
                for (int64_t i = 0; i < n; ++i)
                    for (int p = 0; p < P::parts; ++p) {
                        T* to = dq + (g * t.queries + i0 + i) * t.width + p * d + k;
                        const T* from = local + (i * P::parts + p) * W * L;
                        for (int w = 0; w < W; ++w) store(to + w * L, load(to + w * L) + load(from + w * L));
                    }
            }
}

// The pairs (group, candidate) by table row: those of row r are order[offsets[r]] … order[offsets[r + 1] - 1].
struct ByRow {
    std::vector<int64_t> offsets, order;

    ByRow(const int64_t* index, int64_t pairs, int64_t rows) : offsets(rows + 1, 0), order(pairs) {
        for (int64_t p = 0; p < pairs; ++p) ++offsets[(index ? index[p] : p) + 1];
        for (int64_t r = 0; r < rows; ++r) offsets[r + 1] += offsets[r];
        std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
        for (int64_t p = 0; p < pairs; ++p) order[next[index ? index[p] : p]++] = p;
    }
};

// Gradients of coordinates k0 … k1 - 1 where groups are small: row by row, so that each is read and written once.
// Writes all rows of dtable.
template <class P, class T>
void pull_rows(const Task<T>& t, const ByRow& by_row, const T* grad, T* dq, T* dtable, int64_t k0, int64_t k1) {
    constexpr int L = Vec<T>::lanes;
    const int64_t d = t.dim, rows = (int64_t)by_row.offsets.size() - 1;
    for (int64_t r = 0; r < rows; ++r) {
        const T* c = t.table + r * d;
        T* dc = dtable + r * d;
        if (r + 2 < rows)
            for (int64_t k = k0; k < k1; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(c + 2 * d + k);
        int64_t k = k0;
        const auto strip = [&](auto width) __attribute__((always_inline)) {
            constexpr int W = decltype(width)::value;
            V<T> x[W], dx[W] = {};
            for (int w = 0; w < W; ++w) x[w] = load(c + k + w * L);
            for (int64_t p = by_row.offsets[r]; p < by_row.offsets[r + 1]; ++p) {
                const int64_t g = by_row.order[p] / t.candidates, j = by_row.order[p] % t.candidates;
                for (int64_t i = g * t.queries; i < (g + 1) * t.queries; ++i) {
                    const V<T> u = V<T>{} + grad[i * t.candidates + j];
                    const T* q = t.q + i * t.width + k;
                    T* to = dq + i * t.width + k;
                    for (int w = 0; w < W; ++w) {
                        V<T> first = load(to + w * L), second{}, b{};
                        if (P::parts == 2) {
                            second = load(to + d + w * L);
                            b = load(q + d + w * L);
                        }
                        P::pull(u, load(q + w * L), b, x[w], first, second, dx[w]);
                        store(to + w * L, first);
                        if (P::parts == 2) store(to + d + w * L, second);
                    }
                }
            }
            for (int w = 0; w < W; ++w) store(dc + k + w * L, dx[w]);
            k += W * L;
        };
        while (k + 8 * L <= k1) strip(std::integral_constant<int, 8>{});
        while (k < k1) strip(std::integral_constant<int, 1>{});
    }
}

// Gradients of the coordinates from k on that do not fill a vector.
template <class P, class T> void pull_rest(const Task<T>& t, const T* grad, T* dq, T* dtable, int64_t k) {
    for (int64_t g = 0; g < t.groups; ++g)
        for (int64_t i = 0; i < t.queries; ++i)
            for (int64_t j = 0; j < t.candidates; ++j) {
                const int64_t at = g * t.queries + i, row = t.row(g, j);
                const T *q = t.q + at * t.width, *c = t.table + row * t.dim, u = grad[at * t.candidates + j];
                T *to = dq + at * t.width, *dc = dtable + row * t.dim;
                for (int64_t m = k; m < t.dim; m += P::unit) {
                    const int64_t second = P::parts == 2 ? t.dim + m : m;
                    if constexpr (P::unit == 2) P::pull_apart(u, q + m, c + m, to + m, dc + m);
                    else P::pull(u, q[m], q[second], c[m], to[m], to[second], dc[m]);
                }
            }
}

template <class T> void clear(T* to, int64_t n) {
    constexpr int64_t piece = 1 << 16;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += piece) std::memset(to + i, 0, sizeof(T) * std::min(piece, n - i));
}

template <class P, class T> void backward(const Task<T>& t, const T* grad, T* dq, T* dtable) {
    constexpr int L = Vec<T>::lanes;
    const int64_t vectors = t.dim / L;
    // Where rows of a table are listed for few queries each, going through the table once beats going through lists.
    const bool by_rows = t.queries < 4;
    const ByRow by_row(t.index, by_rows ? t.groups * t.candidates : 0, by_rows ? t.rows : 0);
    clear(dq, t.groups * t.queries * t.width);
    if (!by_rows) clear(dtable, t.rows * t.dim);
    for (int64_t r = 0; by_rows && r < t.rows; ++r)
        std::fill(dtable + r * t.dim + vectors * L, dtable + (r + 1) * t.dim, T(0));
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t k = vectors * me / threads * L;
        const int64_t stop = vectors * (me + 1) / threads * L;
        if (by_rows) {
            if (k < stop) pull_rows<P, T>(t, by_row, grad, dq, dtable, k, stop);
        } else {
            std::vector<T> local(kBlock * 4 * L * P::parts);
            for (; k + 4 * L <= stop; k += 4 * L) pull_strip<P, T, 4>(t, grad, dq, dtable, k, local.data());
            for (; k + 2 * L <= stop; k += 2 * L) pull_strip<P, T, 2>(t, grad, dq, dtable, k, local.data());
            for (; k < stop; k += L) pull_strip<P, T, 1>(t, grad, dq, dtable, k, local.data());
        }
        if (me == threads - 1 && vectors * L < t.dim) pull_rest<P, T>(t, grad, dq, dtable, vectors * L);
    }
}

}  // namespace

// rows: of the table. out: sums, or null. dq, dtable: gradients for `grad`, or null. All are written over; an empty
// tensor has no address.
#define PAIRS(NAME, T)                                                                                              \
    extern "C" void pairs_##NAME(int64_t kind, const T* q, const T* table, const int64_t* index, int64_t groups,    \
                                 int64_t queries, int64_t candidates, int64_t dim, int64_t width, int64_t rows,     \
                                 const T* grad, T* out, T* dq, T* dtable) {                                         \
        const Task<T> t{q, table, index, groups, queries, candidates, dim, width, rows};                            \
        with_kind<T>(kind, [&](auto term) {                                                                         \
            if (out) forward<decltype(term), T>(t, out);                                                            \
            if (dq || dtable) backward<decltype(term), T>(t, grad, dq, dtable);                                     \
        });                                                                                                         \
    }

PAIRS(float32, float)
PAIRS(float64, double)
