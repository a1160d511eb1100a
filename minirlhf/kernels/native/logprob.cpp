// What the fused log-prob does with a piece of logits [rows, width] besides the products: one pass, in place.
#include <algorithm>
#include <cmath>

#include "lanes.hpp"

// The sums of a softmax, over one more piece: most = max s, total = Σ e^(s - most), weighted = Σ e^(s - most) s.
extern "C" void absorb(const float* logits, long rows, long width, float* most, float* total, float* weighted) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float* s = logits + row * width;
        const long full = width / LANES * LANES;
        lanes tops;
        for (int j = 0; j < LANES; j++) tops[j] = most[row];
        for (long i = 0; i < full; i += LANES) {
            const lanes some = *(const lanes*)(s + i);
            tops = tops > some ? tops : some;
        }
        float rest[LANES], top = tops[0];
        std::fill(std::copy(s + full, s + width, rest), rest + LANES, -INFINITY);
        for (int j = 0; j < LANES; j++) top = std::max(top, std::max(tops[j], rest[j]));
        lanes sums = {}, products = {};
        for (long i = 0; i < full; i += LANES) {
            const lanes x = *(const lanes*)(s + i), e = exp_lanes(x - top);
            sums += e;
            products += e * x;
        }
        const lanes x = *(const lanes*)rest, e = exp_lanes(x - top);
        sums += e;
        products += e > 0.f ? e * x : lanes{};  // 0 times -inf is NaN
        const double shrink = std::exp((double)most[row] - top);
        double sum = total[row] * shrink, product = weighted[row] * shrink;
        for (int j = 0; j < LANES; j++) sum += sums[j], product += products[j];
        most[row] = top, total[row] = sum, weighted[row] = product;
    }
}

// Logits become -p (g + h (log p + H)), p = e^(s - lse): the gradient by them of g log π(token) + h H, but for
// the token's own g.
extern "C" void to_gradient(float* logits, long rows, long width, const float* lse, const float* by_logp,
                            const float* by_entropy, const float* entropy) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        float* s = logits + row * width;
        const float normaliser = lse[row], g = by_logp[row], h = by_entropy[row], base = g + h * entropy[row];
        for (long i = 0; i < width; i += LANES) {
            float piece[LANES] = {};
            const long count = std::min<long>(LANES, width - i);
            std::copy(s + i, s + i + count, piece);
            const lanes logp = *(const lanes*)piece - normaliser;
            const lanes p = exp_lanes(logp);
            *(lanes*)piece = p > 0.f ? -p * (base + h * logp) : lanes{};
            std::copy(piece, piece + count, s + i);
        }
    }
}
