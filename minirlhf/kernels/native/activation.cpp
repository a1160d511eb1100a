// gelu in its tanh form, and its derivative: one pass each.
//
//     y = x s,   s = σ(2u) = 1 / (1 + e^-2u),   u = √(2/π) (x + 0.044715 x³)     (½ (1 + tanh u) = σ(2u))
//     ∂y/∂x = s + x s (1 - s) 2u',   u' = √(2/π) (1 + 3 · 0.044715 x²)
#include <algorithm>

#include "lanes.hpp"

constexpr float TWICE = 1.5957691216f, CUBIC = 0.044715f;  // 2 √(2/π)

static inline lanes sigmoid_of_twice_u(lanes x) {
    const lanes z = TWICE * (x + CUBIC * x * x * x);
    const lanes small = exp_lanes(z > 0.f ? -z : z), whole = 1.f / (1.f + small);
    return z > 0.f ? whole : small * whole;
}

// work(first, count) for pieces of LANES entries, the last one shorter.
template <class Work>
static void over_pieces(long size, const Work& work) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < size / LANES; i++) work(i * LANES, LANES);
    if (size % LANES) work(size / LANES * LANES, size % LANES);
}
static inline lanes read(const float* from, long count) {
    if (count == LANES) return *(const lanes*)from;
    float some[LANES] = {};
    std::copy(from, from + count, some);
    return *(const lanes*)some;
}
static inline void write(lanes values, float* to, long count) {
    if (count == LANES)
        *(lanes*)to = values;
    else
        std::copy((float*)&values, (float*)&values + count, to);
}

extern "C" void gelu(const float* x, long size, float* y) {
    over_pieces(size, [=](long i, long count) {
        const lanes some = read(x + i, count);
        write(some * sigmoid_of_twice_u(some), y + i, count);
    });
}

extern "C" void gelu_gradient(const float* by_y, const float* x, long size, float* by_x) {
    over_pieces(size, [=](long i, long count) {
        const lanes some = read(x + i, count), s = sigmoid_of_twice_u(some);
        const lanes slope = s + some * s * (1.f - s) * TWICE * (1.f + 3.f * CUBIC * some * some);
        write(read(by_y + i, count) * slope, by_x + i, count);
    });
}
