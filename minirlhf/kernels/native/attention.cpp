// Attention of one new token per row over the pages of a cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.hpp"

// Which pages the rows of a decode step read. Row b reads entries first[b] .. first[b + 1] - 1: page at[e] of
// arena[e], whose first token has the position start[e]; its new token, at position[b], goes into page into[b]
// of the arena `own`.
struct Reads {
    long rows, heads, group, size, page, own;
    const long *first, *arena, *at, *start, *position, *into;
};

// A softmax over pages, one after the other: what was summed is rescaled when a larger score appears.
template <int SIZE>
static void attend_row(const Reads& r, long row, long head, const float* const* keys, const float* const* values,
                       const float* q, long q_head, float scale, long window, float* out, float* scores) {
    const long size = SIZE ? SIZE : r.size, last = r.position[row];
    for (long g = 0; g < r.group; g++) {
        const float* query = q + (head * r.group + g) * q_head;
        float* sum = out + g * size;
        float top = 0, total = 0;
        std::fill(sum, sum + size, 0.f);
        for (long e = r.first[row]; e < r.first[row + 1]; e++) {
            const long begin = window ? std::max(0L, last - window + 1 - r.start[e]) : 0;
            const long end = std::min(r.page, last - r.start[e] + 1);
            if (begin >= end) continue;
            const long offset = (r.at[e] * r.heads + head) * r.page * size;
            const float *k = keys[r.arena[e]] + offset, *v = values[r.arena[e]] + offset;
            std::fill(scores, scores + begin, -INFINITY);  // before the window
            float most = -INFINITY;
            for (long t = begin; t < end; t++) {
                for (long d = 0; d < size; d += 16) __builtin_prefetch(v + t * size + d, 0, 3);
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (long d = 0; d < size; d++) dot += query[d] * k[t * size + d];
                scores[t] = dot * scale;
                most = std::max(most, scores[t]);
            }
            if (total == 0) top = most;
            if (most > top) {
                const float shrink = std::exp(top - most);
                for (long d = 0; d < size; d++) sum[d] *= shrink;
                total *= shrink, top = most;
            }
            std::fill(scores + end, scores + (end + LANES - 1) / LANES * LANES, -INFINITY);
            lanes sums = {};
            for (long t = begin / LANES * LANES; t < end; t += LANES) {
                lanes* some = (lanes*)(scores + t);
                sums += *some = exp_lanes(*some - top);
            }
            for (int j = 0; j < LANES; j++) total += sums[j];
            // What is read next: the row's next page, or its first one for the next head.
            const bool more = e + 1 < r.first[row + 1];
            const long n = more ? e + 1 : r.first[row], next_head = more ? head : std::min(head + 1, r.heads - 1);
            const float* next = keys[r.arena[n]] + (r.at[n] * r.heads + next_head) * r.page * size;
            const long ahead = std::min(r.page, last - r.start[n] + 1);
            for (long t = begin; t < end; t++) {
                for (long d = 0; t < ahead && d < size; d += 16) __builtin_prefetch(next + t * size + d, 0, 3);
#pragma omp simd
                for (long d = 0; d < size; d++) sum[d] += scores[t] * v[t * size + d];
            }
        }
        for (long d = 0; d < size; d++) sum[d] /= total;
    }
}

// q [rows, heads * group, size], k and v [rows, heads, size] by strides {q row, q head, k row, ...};
// keys, values: of each arena [pages, heads, page, size]. Writes k and v first. window: 0 for none.
extern "C" void attend(const Reads* reads, float* const* keys, float* const* values, const float* q,
                       const float* k, const float* v, const long* strides, float scale, long window,
                       float* out) {
    const Reads& r = *reads;
#pragma omp parallel
    {
        std::vector<float> scores(r.page + LANES);
#pragma omp for schedule(static)
        for (long item = 0; item < r.rows * r.heads; item++) {
            // Pages lie head by head. Where rows share pages, a page is read by all rows while it is in the cache.
            const bool shared = r.own > 0;
            const long row = shared ? item % r.rows : item / r.heads, head = shared ? item / r.rows : item % r.heads;
            const long place = r.position[row] % r.page;
            const long to = ((r.into[row] * r.heads + head) * r.page + place) * r.size;
            std::memcpy(keys[r.own] + to, k + row * strides[2] + head * strides[3], r.size * 4);
            std::memcpy(values[r.own] + to, v + row * strides[4] + head * strides[5], r.size * 4);
            const auto body = r.size == 64 ? attend_row<64> : r.size == 128 ? attend_row<128> : attend_row<0>;
            body(r, row, head, keys, values, q + row * strides[0], strides[1], scale, window,
                 out + (row * r.heads + head) * r.group * r.size, scores.data());
        }
    }
}
