// Turning a matrix into panels, for whoever says where its entries go.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// Past the cache: what is packed is next read after all the rest of it, and lines would be fetched to be overwritten.
static inline void put_aside(float* to, lanes some) {
#if defined(__AVX512F__)
    if ((uintptr_t)to % sizeof(lanes) == 0) return _mm512_stream_ps(to, (__m512)some);
#endif
    *(lanes*)to = some;
}

// A matrix [depth, width] of any strides, one of them 1. Panel p has the outputs from PANEL p on, and `place`
// (p, k, j) says where LANES of its entries go, from input k and output j on: zeros beyond depth, up to `deep`,
// and beyond width.
template <class Place>
static void pack_panels(const float* from, long depth, long deep, long width, long by_depth, long by_width,
                        const Place& place) {
    constexpr long PANEL = LANES * WIDE;
    const long columns = (width + PANEL - 1) / PANEL * WIDE, blocks = (deep + LANES - 1) / LANES;
    const bool along = by_width == 1;  // squares in the order in which the matrix lies
#pragma omp parallel
    {
        const long who = omp_get_thread_num(), all = omp_get_num_threads();
        const long first = columns * who / all, mine = columns * (who + 1) / all - first;
        for (long n = 0; n < mine * blocks; n++) {
            const long j = (first + (along ? n % mine : n / blocks)) * LANES, k = (along ? n / mine : n % blocks) * LANES;
            const long inputs = std::clamp<long>(depth - k, 0, LANES), outputs = std::clamp<long>(width - j, 0, LANES);
            const float* source = from + k * by_depth + j * by_width;
            lanes square[LANES] = {};
            if (along)
                for (long i = 0; i < inputs; i++) std::memcpy(&square[i], source + i * by_depth, outputs * 4);
            else {
                for (long i = 0; i < outputs; i++) std::memcpy(&square[i], source + i * by_width, inputs * 4);
                transpose(square);
            }
            for (long i = 0; i < std::min<long>(LANES, deep - k); i++)
                put_aside(place(j / PANEL, k + i, j % PANEL), square[i]);
        }
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }
}
