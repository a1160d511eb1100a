// From log-probs and a uniform to a token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.hpp"

typedef double wide __attribute__((vector_size(LANES * 8), aligned(8)));

// Σ e^((x - top) scale), in fp64; `each` gets the terms.
static inline double mass(const float* x, long count, float top, float scale, double* each) {
    wide sums = {};
    const long full = count / LANES * LANES;
    for (long i = 0; i < full; i += LANES) {
        const wide masses = __builtin_convertvector(exp_lanes((*(const lanes*)(x + i) - top) * scale), wide);
        sums += masses;
        if (each) *(wide*)(each + i) = masses;
    }
    if (full < count) {
        float rest[LANES];
        std::fill(std::copy(x + full, x + count, rest), rest + LANES, -INFINITY);
        const wide masses = __builtin_convertvector(exp_lanes((*(const lanes*)rest - top) * scale), wide);
        sums += masses;
        if (each) *(wide*)(each + full) = masses;
    }
    double total = 0;
    for (int j = 0; j < LANES; j++) total += sums[j];
    return total;
}

static float largest(const float* x, long width) {
    lanes most;
    for (int j = 0; j < LANES; j++) most[j] = x[0];
    const long full = width / LANES * LANES;
    for (long i = 0; i < full; i += LANES) {
        const lanes some = *(const lanes*)(x + i);
        most = most > some ? most : some;
    }
    float top = most[0];
    for (int j = 1; j < LANES; j++) top = std::max(top, most[j]);
    for (long i = full; i < width; i++) top = std::max(top, x[i]);
    return top;
}

// The place of u in a cumulative sum, at most the first entry that reaches the total: the last with mass.
static inline long place(const double* begin, long count, double u, long* last) {
    *last = std::lower_bound(begin, begin + count, begin[count - 1]) - begin;
    return std::min<long>(std::upper_bound(begin, begin + count, u) - begin, *last);
}

constexpr long BLOCK = 256;
static inline long blocks(long width) { return (width + BLOCK - 1) / BLOCK; }

// A row of masses e^((x - top) scale), and their sums up to the end of each block.
struct Masses {
    const float* x;
    long width;
    float top, scale;
    std::vector<double> up_to = std::vector<double>(blocks(width)), inside = std::vector<double>(BLOCK);

    double total() {
        double sum = 0;
        for (long b = 0; b < blocks(width); b++)
            up_to[b] = sum += mass(x + b * BLOCK, std::min(BLOCK, width - b * BLOCK), top, scale, nullptr);
        return sum;
    }

    // The entry whose interval of the cumulative sum holds u, once `total` has been asked for.
    long at(double u, double boundary, bool* near) {
        long last_block, last;
        const long block = place(up_to.data(), blocks(width), u, &last_block);
        const long size = std::min(BLOCK, width - block * BLOCK);
        const double before = block ? up_to[block - 1] : 0;
        mass(x + block * BLOCK, size, top, scale, inside.data());
        double sum = before;
        for (long i = 0; i < size; i++) inside[i] = sum += inside[i];
        const long at = place(inside.data(), size, u, &last);
        const double lower = at ? inside[at - 1] : before, upper = inside[at];
        *near = (lower > 0 && u - lower < boundary) ||  // nobody lies below 0, nor above the last token
                ((block < last_block || at < last) && upper - u < boundary);
        return block * BLOCK + at;
    }
};

// The token whose interval of the cumulative law holds the uniform, and whether another's is within `boundary`.
extern "C" void draw(const float* logp, long rows, long width, const double* uniform, double boundary,
                     long* token, bool* near) {
#pragma omp parallel
    {
        Masses law{nullptr, width, 0, 1};
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            law.x = logp + row * width;
            law.total();
            token[row] = law.at(uniform[row], boundary, near + row);
        }
    }
}

// The same from logits, for the law softmax(z / temperature), which is not written down; and the token's
// log-probs under the raw model and under the law.
extern "C" void draw_tempered(const float* logits, long rows, long width, float temperature, const double* uniform,
                              double boundary, long* token, bool* near, float* raw_logp, float* law_logp) {
#pragma omp parallel
    {
        Masses law{nullptr, width, 0, 1 / temperature};
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            law.x = logits + row * width, law.top = largest(law.x, width);
            const double total = law.total();
            const double raw = temperature == 1 ? total : mass(law.x, width, law.top, 1, nullptr);
            token[row] = law.at(uniform[row] * total, boundary * total, near + row);
            const double below = (double)law.x[token[row]] - law.top;
            raw_logp[row] = below - std::log(raw);
            law_logp[row] = below / temperature - std::log(total);
        }
    }
}

// log sum exp of every row.
extern "C" void logsumexp(const float* x, long rows, long width, float* out) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float* z = x + row * width;
        const float top = largest(z, width);
        out[row] = top + (float)std::log(mass(z, width, top, 1, nullptr));
    }
}
