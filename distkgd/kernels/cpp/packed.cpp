// Rows of few bits (distkgd/kernels/quantiser.py): as floats, and their products with queries, straight from codes.
//
// Products are sums of whole numbers. A query is rounded to whole numbers of 24 bits, each three signed bytes
// ("limbs"), by which the codes are multiplied where they lie: 32 or 64 codes an instruction. Nothing is lost but the
// last bit of the query's largest number, which float32 would lose in the sum. Queries that are whole numbers of 8 bits
// already take one limb, or two where digits of the same number differ in what they count.
//
// A row is read as digits of 1, 2 or 4 bits that lie side by side in whole bytes: 8 bits are two digits of 4 (the upper
// one counts 16), 3 bits are three of 1. So one loop serves all: shift, mask, multiply.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int LANE = 4;                              // bytes of a row that are summed in one 32-bit number
constexpr int32_t LARGEST = 0x7f7f7f;                // whose three limbs are all 127
constexpr int LARGEST_OF_8_BITS = 127;
constexpr int64_t ROWS_AT_ONCE = 256;                // of one query before the next one: they stay in the cache

inline float widened(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

int64_t bytes_of(int64_t columns, int bits) { return (columns * bits + 7) / 8; }

typedef uint32_t Eight __attribute__((vector_size(32)));
typedef int32_t EightSigned __attribute__((vector_size(32)));
typedef float EightFloats __attribute__((vector_size(32)));

// Eight codes less the middle one, of the bytes they fill.
template <int bits> inline EightFloats levels(const uint8_t* codes) {
    constexpr float middle = ((1 << bits) - 1) / 2.0f;
    uint64_t word = 0;
    std::memcpy(&word, codes, bits);
    Eight code;
    if constexpr (bits == 8) {
        typedef uint8_t EightBytes __attribute__((vector_size(8)));
        code = __builtin_convertvector((EightBytes)word, Eight);
    } else {
        const Eight shifts = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
        code = (Eight{} + (uint32_t)word) >> shifts & ((1u << bits) - 1);
    }
    return __builtin_convertvector((EightSigned)code, EightFloats) - middle;
}

template <int bits>
void unpack(const uint8_t* codes, const uint16_t* step, const uint16_t* bias, int64_t n, int64_t columns,
            int64_t groups, int64_t biases, float* out) {
    const int64_t bytes = bytes_of(columns, bits), group = columns / std::max<int64_t>(1, groups);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
        float* to = out + row * (biases + columns);
        for (int64_t k = 0; k < biases; ++k) to[k] = widened(bias[row * biases + k]);
        to += biases;
        const uint8_t* from = codes + row * bytes;
        int64_t k = 0;
        for (; k + 8 <= columns; k += 8, from += bits) {
            const EightFloats x = levels<bits>(from);
            std::memcpy(to + k, &x, sizeof x);
        }
        if (k < columns) {
            uint8_t last[8] = {};
            std::memcpy(last, from, bytes - k / 8 * bits);
            const EightFloats x = levels<bits>(last);
            std::memcpy(to + k, &x, (columns - k) * sizeof(float));
        }
        for (int64_t g = 0; g < groups; ++g) {
            const float one = widened(step[row * groups + g]);
            for (k = g * group; k < (g + 1) * group; ++k) to[k] *= one;
        }
    }
}

// A query as the loops of packed_lanes.h meet it; W bytes of a row are one block of them, `chunk` blocks are summed in
// 16 bits before they are widened: 2 * 15 * 128 four times is the most that fits.
struct Query {
    int W, digit, steps, chunk, count;  // count: limbs of a number
    int64_t blocks, chunks;
    double unit;                  // what half a whole number is worth
    std::vector<int8_t> limbs;    // [blocks][digits of a byte][count][W]
    std::vector<int32_t> centre;  // [chunks][W / LANE]: what a row of middle codes would sum to, twice

    // False where a number is NaN or infinite. whole_bytes: all are whole numbers of 8 bits, and stay as they are.
    bool set(const float* q, int64_t columns, int bits, bool grouped, int width, bool whole_bytes) {
        W = width;
        digit = bits == 3 ? 1 : bits == 8 ? 4 : bits;
        steps = 8 / digit;
        chunk = grouped ? 1 : digit == 4 ? 2 : 4;
        blocks = (bytes_of(columns, bits) + W - 1) / W;
        chunks = (blocks + chunk - 1) / chunk;
        double largest = 0;
        for (int64_t i = 0; i < columns; ++i) {
            if (!(std::fabs(q[i]) <= 3.4028235e38f)) return false;
            largest = std::max(largest, (double)std::fabs(q[i]));
        }
        largest *= 1 << (bits - digit);
        unit = whole_bytes ? 0.5 : largest / LARGEST / 2;
        const double whole = whole_bytes ? 1 : largest > 0 ? LARGEST / largest : 0;
        count = !whole_bytes ? 3 : bits > digit ? 2 : 1;
        if (whole_bytes && largest > (LARGEST_OF_8_BITS << (bits - digit))) return false;
        limbs.assign(blocks * steps * count * W, 0);
        centre.assign(chunks * W / LANE, 0);
        const int64_t digits = columns * (bits / digit);
        for (int64_t p = 0; p < digits; ++p) {
            const int64_t byte = p * digit / 8, at = byte / W, within = byte % W;
            const double x = (double)q[p * digit / bits] * (1 << (p * digit % bits)) * whole;
            int32_t rest = (int32_t)std::lrint(x);
            centre[at / chunk * (W / LANE) + within / LANE] += rest * ((1 << digit) - 1);
            int8_t* to = limbs.data() + (at * steps + p * digit % 8 / digit) * count * W + within;
            for (int l = 0; l < count; ++l) {
                to[l * W] = (int8_t)(rest & 255);
                rest = (rest - to[l * W]) >> 8;
            }
        }
        return true;
    }
};

// codes [n, bytes] and step [n, groups]. Each row is read in whole blocks; one that would be read on beyond `end` is
// copied first.
struct Rows {
    const uint8_t* codes;
    const uint16_t* step;
    int64_t n, bytes, groups;
    const uint8_t* end;
};

}  // namespace

#ifdef __x86_64__
#define NAME avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 32
#define MULTIPLY(codes, limbs) (W16) _mm256_maddubs_epi16((__m256i)(codes), (__m256i)(limbs))
#define WIDEN(sums) (W32) _mm256_madd_epi16((__m256i)(sums), _mm256_set1_epi16(1))
#include "packed_lanes.h"

#define NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,fma")))
#define WIDTH 64
#define MULTIPLY(codes, limbs) (W16) _mm512_maddubs_epi16((__m512i)(codes), (__m512i)(limbs))
#define WIDEN(sums) (W32) _mm512_madd_epi16((__m512i)(sums), _mm512_set1_epi16(1))
#include "packed_lanes.h"
#endif

// The widest instructions of this processor: 0 none of these, 1 AVX2, 2 AVX-512.
extern "C" int packed_level() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

// [n, biases + columns] floats.
extern "C" void packed_unpack(const uint8_t* codes, const uint16_t* step, const uint16_t* bias, int bits, int64_t n,
                              int64_t columns, int64_t groups, int64_t biases, float* out) {
    const auto call = bits == 1   ? unpack<1>
                      : bits == 2 ? unpack<2>
                      : bits == 3 ? unpack<3>
                      : bits == 4 ? unpack<4>
                                  : unpack<8>;
    call(codes, step, bias, n, columns, groups, biases, out);
}

// [num, n] inner products of queries [num, columns] and rows; 0 where a number of a query is NaN or infinite, which
// whole numbers cannot say, or the level is none of this file's. Several groups: each must fill whole lanes.
// whole_bytes: the queries are whole numbers of -127 to 127.
extern "C" int packed_products(int level, const uint8_t* codes, const uint16_t* step, int bits, int64_t n,
                               int64_t columns, int64_t groups, const float* queries, int64_t num, int whole_bytes,
                               float* out) {
#ifdef __x86_64__
    if (level != 1 && level != 2) return 0;
    std::vector<Query> made(num);
    for (int64_t i = 0; i < num; ++i)
        if (!made[i].set(queries + i * columns, columns, bits, groups > 1, level == 2 ? 64 : 32, whole_bytes)) return 0;
    const int64_t bytes = bytes_of(columns, bits);
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += ROWS_AT_ONCE) {
        const Rows rows{codes + at * bytes, step + at * groups, std::min(ROWS_AT_ONCE, n - at), bytes, groups,
                        codes + n * bytes};
        for (int64_t i = 0; i < num; ++i) {
            const auto call = level == 2 ? avx512::products : avx2::products;
            call(made[i], rows, out + i * n + at);
        }
    }
    return 1;
#else
    return 0;
#endif
}
