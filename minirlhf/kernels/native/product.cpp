// Products of a few rows with a packed matrix, by multiplications and additions of vectors.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "pack.hpp"

constexpr long PANEL = LANES * WIDE;  // outputs that one pass over the inputs makes
constexpr long DEEP = 1024;           // inputs of a panel at a time: 196 kB, which stay in the second cache
constexpr long SLAB = 256;            // rows at a time: their inputs stay in the second cache, too

extern "C" long panel() { return PANEL; }

// A matrix [depth, width] of any strides, one of them 1 -> panels [⌈width / PANEL⌉][depth][PANEL], zero padded.
extern "C" void pack(const float* from, long depth, long width, long by_depth, long by_width, float* to) {
    pack_panels(from, depth, depth, width, by_depth, by_width,
                [=](long p, long k, long j) { return to + (p * depth + k) * PANEL + j; });
}

// sums [ROWS, PANEL] += x [deep, TALL] w [deep, PANEL], from `start` or, without one, from y itself. Meanwhile
// it asks for `lines` cache lines from `ahead` on, `rate` at a step: what this thread reads next.
template <int ROWS>
static void tile(const float* __restrict x, const float* __restrict w, long deep, const float* start,
                 float* __restrict y, long stride, const float* ahead, long lines, int rate) {
    lanes sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < WIDE; j++) sum[r][j] = *(const lanes*)((start ? start : y + r * stride) + j * LANES);
    for (long k = 0; k < deep; k++) {
        lanes row[WIDE];
        for (int j = 0; j < WIDE; j++) {
            row[j] = *(const lanes*)(w + k * PANEL + j * LANES);
            __builtin_prefetch(w + (k + 24) * PANEL + j * LANES, 0, 3);
        }
        for (long i = k * rate; i < std::min(lines, (k + 1) * rate); i++) __builtin_prefetch(ahead + 16 * i, 0, 2);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < WIDE; j++) sum[r][j] += row[j] * x[k * TALL + r];
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < WIDE; j++) *(lanes*)(y + r * stride + j * LANES) = sum[r][j];
}

typedef void (*Tile)(const float*, const float*, long, const float*, float*, long, const float*, long, int);
static const Tile tiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

// One panel for all rows of a slab; x is [bands][depth][TALL].
static void multiply_panel(const float* x, long rows, long depth, const float* w, const float* bias, float* y,
                           long stride, bool more) {
    const long bands = (rows + TALL - 1) / TALL;
    for (long at = 0; at < depth; at += DEEP) {
        const long deep = std::min(DEEP, depth - at), left = depth - at - deep;
        // A single band is one stream, read 128 steps ahead; several ask for the next block, each for its share.
        const float* next = w + (bands > 1 ? at + deep : at + 128) * PANEL;
        const long lines = (left ? std::min(DEEP, left) : more ? std::min(DEEP, depth) : 0) * PANEL / 16;
        const long share = bands > 1 ? (lines + bands - 1) / bands : deep * PANEL / 16;
        const int rate = bands > 1 ? 1 : PANEL / 16;  // more at a time than this waits for free line buffers
        for (long b = 0; b < bands; b++)
            tiles[std::min<long>(TALL, rows - b * TALL)](
                x + (b * depth + at) * TALL, w + at * PANEL, deep, at ? nullptr : bias, y + b * TALL * stride,
                stride, next + b * share * 16, bands > 1 ? std::min(share, lines - b * share) : share, rate);
    }
}

// x [rows, depth] times a packed matrix [depth, width], plus bias [width] or null -> y [rows, width].
extern "C" void product(const float* x, long rows, long depth, const float* packed, long width,
                        const float* bias, float* y) {
    const long panels = (width + PANEL - 1) / PANEL, slab = std::min(rows, SLAB);
    const std::unique_ptr<float[]> turned(new float[(slab + TALL - 1) / TALL * TALL * depth]);
    for (long top = 0; top < rows; top += SLAB) {
        const long count = std::min(SLAB, rows - top), bands = (count + TALL - 1) / TALL;
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (long b = 0; b < bands; b++)
                for (long r = 0; r < std::min<long>(TALL, count - b * TALL); r++) {
                    const float* row = x + (top + b * TALL + r) * depth;
                    for (long k = 0; k < depth; k++) turned[(b * depth + k) * TALL + r] = row[k];
                }
            const long who = omp_get_thread_num(), all = omp_get_num_threads();
            const long first = panels * who / all, end = panels * (who + 1) / all;
            std::vector<float> edge(end == panels && width % PANEL ? count * PANEL : 0);
            for (long p = first; p < end; p++) {
                const long wide = std::min(PANEL, width - p * PANEL);
                float start[PANEL] = {}, *out = y + top * width + p * PANEL;
                if (bias) std::memcpy(start, bias + p * PANEL, wide * 4);
                float* whole = wide == PANEL ? out : edge.data();
                multiply_panel(turned.get(), count, depth, packed + p * depth * PANEL, start, whole,
                               wide == PANEL ? width : PANEL, p + 1 < end);
                for (long r = 0; wide < PANEL && r < count; r++)
                    std::memcpy(out + r * width, whole + r * PANEL, wide * 4);
            }
        }
    }
}
