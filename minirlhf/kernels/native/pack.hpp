// Turning a matrix into panels, for whoever says where its entries go.
#pragma once

#include <algorithm>
#include <cstring>

#include "lanes.hpp"

static inline void transpose(lanes (&a)[LANES]) {
    places low, high;
    for (int i = 0; i < LANES; i++) low[i] = i / 2 + i % 2 * LANES, high[i] = low[i] + LANES / 2;
    for (int round = 1; round < LANES; round *= 2) {  // each interleaves one half of the rows with the other
        lanes b[LANES];
        for (int i = 0; i < LANES / 2; i++) {
#if defined(__clang__)
            for (int j = 0; j < LANES; j++) {
                b[2 * i][j] = a[i + j % 2 * (LANES / 2)][j / 2];
                b[2 * i + 1][j] = a[i + j % 2 * (LANES / 2)][j / 2 + LANES / 2];
            }
#else
            b[2 * i] = __builtin_shuffle(a[i], a[i + LANES / 2], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + LANES / 2], high);
#endif
        }
        std::copy(b, b + LANES, a);
    }
}

// A matrix [depth, width] of any strides, one of them 1. Panel p has the outputs from PANEL p on, and `place`
// (p, k, j) says where LANES of its entries go, from input k and output j on: zeros beyond depth, up to `deep`,
// and beyond width.
template <class Place>
static void pack_panels(const float* from, long depth, long deep, long width, long by_depth, long by_width,
                        const Place& place) {
    constexpr long PANEL = LANES * WIDE;
    const long panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++)
        for (long k = 0; k < deep; k += LANES)
            for (long j = 0; j < PANEL; j += LANES) {
                const long inputs = std::clamp<long>(depth - k, 0, LANES);
                const long outputs = std::clamp<long>(width - p * PANEL - j, 0, LANES);
                const float* source = from + k * by_depth + (p * PANEL + j) * by_width;
                lanes square[LANES] = {};
                if (by_width == 1)
                    for (long i = 0; i < inputs; i++) std::memcpy(&square[i], source + i * by_depth, outputs * 4);
                else {
                    for (long i = 0; i < outputs; i++) std::memcpy(&square[i], source + i * by_width, inputs * 4);
                    transpose(square);
                }
                for (long i = 0; i < std::min<long>(LANES, deep - k); i++) *(lanes*)place(p, k + i, j) = square[i];
            }
}
