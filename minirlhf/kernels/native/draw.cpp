// From log-probs and a uniform to a token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.hpp"

typedef double wide __attribute__((vector_size(LANES * 8), aligned(8)));

// Σ e^(x - top), in fp64; `each` gets the terms.
static inline double mass(const float* x, long count, float top, double* each) {
    wide sums = {};
    const long full = count / LANES * LANES;
    for (long i = 0; i < full; i += LANES) {
        const wide masses = __builtin_convertvector(exp_lanes(*(const lanes*)(x + i) - top), wide);
        sums += masses;
        if (each) *(wide*)(each + i) = masses;
    }
    if (full < count) {
        float rest[LANES];
        std::fill(std::copy(x + full, x + count, rest), rest + LANES, -INFINITY);
        const wide masses = __builtin_convertvector(exp_lanes(*(const lanes*)rest - top), wide);
        sums += masses;
        if (each) *(wide*)(each + full) = masses;
    }
    double total = 0;
    for (int j = 0; j < LANES; j++) total += sums[j];
    return total;
}

// The place of u in a cumulative sum, at most the first entry that reaches the total: the last with mass.
static inline long place(const double* begin, long count, double u, long* last) {
    *last = std::lower_bound(begin, begin + count, begin[count - 1]) - begin;
    return std::min<long>(std::upper_bound(begin, begin + count, u) - begin, *last);
}

// The token whose interval of the cumulative law holds the uniform, and whether another's is within `boundary`.
extern "C" void draw(const float* logp, long rows, long width, const double* uniform, double boundary,
                     long* token, bool* near) {
    constexpr long BLOCK = 256;
    const long count = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        std::vector<double> up_to(count), inside(BLOCK);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const float* law = logp + row * width;
            const double u = uniform[row];
            double total = 0;
            for (long b = 0; b < count; b++)
                up_to[b] = total += mass(law + b * BLOCK, std::min(BLOCK, width - b * BLOCK), 0, nullptr);
            long last_block, last;
            const long block = place(up_to.data(), count, u, &last_block);
            const long size = std::min(BLOCK, width - block * BLOCK);
            const double before = block ? up_to[block - 1] : 0;
            mass(law + block * BLOCK, size, 0, inside.data());
            total = before;
            for (long i = 0; i < size; i++) inside[i] = total += inside[i];
            const long at = place(inside.data(), size, u, &last);
            const double lower = at ? inside[at - 1] : before, upper = inside[at];
            token[row] = block * BLOCK + at;  // nobody lies below 0, nor above the last token
            near[row] = (lower > 0 && u - lower < boundary) ||
                        ((block < last_block || at < last) && upper - u < boundary);
        }
    }
}

// log sum exp of every row.
extern "C" void logsumexp(const float* x, long rows, long width, float* out) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float* z = x + row * width;
        lanes most;
        for (int j = 0; j < LANES; j++) most[j] = z[0];
        const long full = width / LANES * LANES;
        for (long i = 0; i < full; i += LANES) {
            const lanes some = *(const lanes*)(z + i);
            most = most > some ? most : some;
        }
        float top = most[0];
        for (int j = 1; j < LANES; j++) top = std::max(top, most[j]);
        for (long i = full; i < width; i++) top = std::max(top, z[i]);
        const double total = mass(z, width, top, nullptr);
        out[row] = top + (float)std::log(total);
    }
}
