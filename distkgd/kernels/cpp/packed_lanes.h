// Products of one query and packed rows by one set of instructions; packed.cpp includes this once for each, and says
// what it is by macros: NAME, TARGET, WIDTH (bytes), and the two instructions that no operator stands for.
// No include guard: each inclusion makes a namespace of its own.

namespace NAME {

typedef uint8_t W8 __attribute__((vector_size(WIDTH)));
typedef uint16_t W16 __attribute__((vector_size(WIDTH)));
typedef uint32_t W32 __attribute__((vector_size(WIDTH)));
typedef int32_t WI __attribute__((vector_size(WIDTH)));
typedef float WF __attribute__((vector_size(WIDTH)));
constexpr int LANES = WIDTH / LANE;

template <class T, class U> TARGET inline T at(const U* p) { T x; std::memcpy(&x, p, sizeof x); return x; }

// What the limbs' sums say together, in floats.
template <int count> TARGET inline WF joined(W16 low, W16 middle, W16 high, const int32_t* centre) {
    W32 whole = WIDEN(low);
    if constexpr (count > 1) whole += WIDEN(middle) << 8;
    if constexpr (count > 2) whole += WIDEN(high) << 16;
    return __builtin_convertvector((WI)(whole + whole - at<W32>(centre)), WF);
}

TARGET inline float total(WF x) {
    float parts[LANES], quarter[4] = {};
    std::memcpy(parts, &x, WIDTH);
    for (int k = 0; k < LANES; ++k) quarter[k % 4] += parts[k];
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// Of two rows at once, which share each load of the query. steps: of several groups, those of each lane; else null.
template <int digit, int count>
TARGET inline void sums(const Query& query, const uint8_t* const* rows, const float* const* steps, float* found) {
    const W8 mask = W8{} + (uint8_t)((1 << digit) - 1);
    const uint8_t *row0 = rows[0], *row1 = rows[1];
    const int8_t* limbs = query.limbs.data();
    const int32_t* centre = query.centre.data();
    WF x0 = {}, x1 = {};
    for (int64_t c = 0, block = 0; c < query.chunks; ++c, centre += LANES) {
        W16 low0 = {}, middle0 = {}, high0 = {}, low1 = {}, middle1 = {}, high1 = {};
        for (const int64_t stop = std::min(query.blocks, block + query.chunk); block < stop; ++block) {
            const W16 raw0 = at<W16>(row0 + block * WIDTH), raw1 = at<W16>(row1 + block * WIDTH);
#pragma GCC unroll 8
            for (int shift = 0; shift < 8; shift += digit, limbs += count * WIDTH) {
                const W8 code0 = (W8)(raw0 >> shift) & mask, code1 = (W8)(raw1 >> shift) & mask;
                const W8 low = at<W8>(limbs);
                low0 += MULTIPLY(code0, low), low1 += MULTIPLY(code1, low);
                if constexpr (count > 1) {
                    const W8 middle = at<W8>(limbs + WIDTH);
                    middle0 += MULTIPLY(code0, middle), middle1 += MULTIPLY(code1, middle);
                }
                if constexpr (count > 2) {
                    const W8 high = at<W8>(limbs + 2 * WIDTH);
                    high0 += MULTIPLY(code0, high), high1 += MULTIPLY(code1, high);
                }
            }
        }
        const WF y0 = joined<count>(low0, middle0, high0, centre), y1 = joined<count>(low1, middle1, high1, centre);
        x0 += steps ? y0 * at<WF>(steps[0] + c * LANES) : y0;
        x1 += steps ? y1 * at<WF>(steps[1] + c * LANES) : y1;
    }
    found[0] = total(x0), found[1] = total(x1);
}

template <int digit, int count> TARGET void of_digit(const Query& query, const Rows& rows, float* out) {
    const int64_t read = query.blocks * WIDTH, lanes = query.chunks * LANES;
    const int64_t per_group = rows.bytes / LANE / rows.groups;
    const bool grouped = rows.groups > 1;
    std::vector<uint8_t> copies(2 * read);
    std::vector<float> spread(grouped ? 2 * lanes : 0);
    for (int64_t i = 0; i < rows.n; i += 2) {
        const uint8_t* from[2];
        const float* steps[2];
        for (int r = 0; r < 2; ++r) {
            const int64_t row = std::min(i + r, rows.n - 1);  // the last one may be its own neighbour
            from[r] = rows.codes + row * rows.bytes;
            if (from[r] + read > rows.end) {
                std::memcpy(copies.data() + r * read, from[r], rows.bytes);
                from[r] = copies.data() + r * read;
            }
            for (int64_t g = 0; grouped && g < rows.groups; ++g)
                std::fill_n(spread.data() + r * lanes + g * per_group, per_group,
                            widened(rows.step[row * rows.groups + g]));
            steps[r] = spread.data() + r * lanes;
        }
        float found[2];
        sums<digit, count>(query, from, grouped ? steps : nullptr, found);
        for (int r = 0; r < 2 && i + r < rows.n; ++r)
            out[i + r] = (float)(found[r] * query.unit * (grouped ? 1.0f : widened(rows.step[i + r])));
    }
}

template <int count> TARGET void of_count(const Query& query, const Rows& rows, float* out) {
    const auto call = query.digit == 1 ? of_digit<1, count> : query.digit == 2 ? of_digit<2, count> : of_digit<4, count>;
    call(query, rows, out);
}

TARGET void products(const Query& query, const Rows& rows, float* out) {
    const auto call = query.count == 1 ? of_count<1> : query.count == 2 ? of_count<2> : of_count<3>;
    call(query, rows, out);
}

}  // namespace NAME

#undef NAME
#undef TARGET
#undef WIDTH
#undef MULTIPLY
#undef WIDEN
