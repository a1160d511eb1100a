// Products of two matrices of many rows by the processor's tiles, to the precision of fp32; see amx.hpp.
//
// Both are split into their parts first, 6 bytes for 4, and laid out as tiles: of x as much as the last cache
// holds, by all threads together; of w what fits into a thread's own, for all rows of x in turn. A kernel makes
// 32 x 32 outputs: of a block of inputs 12 KB are read for 24 products of tiles, 32 of their flops for a byte.
#include "amx.hpp"
#include "pack.hpp"

#ifdef HAS_TILES
#include <omp.h>

constexpr long SIDE = 2 * TALL_TILE;          // rows and columns of what a kernel makes
constexpr long ROUND = 24;                    // blocks of DEEP inputs at most until sums go back to memory
constexpr long OWN = 192 * ROUND * DEEP;      // entries of w that a thread splits at a time: 0.9 MB of its cache
constexpr long SHARED = 1024 * ROUND * DEEP;  // entries of x at a time: 4.7 MB

// A matrix of which `along` counts rows (or columns), `deep` inputs; one of the strides is 1.
struct Matrix {
    const float* at;
    long along, deep;
    Matrix from(long i, long k) const { return {at + i * along + k * deep, along, deep}; }
};

// LANES lines of LANES inputs: vectors of inputs where these lie side by side, otherwise of lines.
static inline void square(const Matrix& m, long lines, long inputs, lanes (&to)[LANES]) {
    const bool sides = m.deep == 1;
    const long count = sides ? lines : inputs, wide = sides ? inputs : lines, step = sides ? m.along : m.deep;
    for (long i = 0; i < LANES; i++) {
        const float* from = m.at + i * step;
        to[i] = i < count ? (lanes)_mm512_maskz_loadu_ps(first(wide), from) : lanes{};
    }
}

// A tile of x: TALL_TILE rows of DEEP inputs -> [3][TALL_TILE][DEEP].
static void split_rows(const Matrix& x, long rows, long inputs, uint16_t* to) {
    lanes some[LANES], more[LANES];
    square(x, rows, inputs, some), square(x.from(0, LANES), rows, inputs - LANES, more);
    if (x.deep != 1) transpose(some), transpose(more);
    for (long r = 0; r < TALL_TILE; r++) split_inputs((__m512)some[r], (__m512)more[r], to + r * DEEP);
}

// A tile of w: LANES columns of DEEP inputs -> [3][DEEP / 2][LANES][2].
static void split_columns(const Matrix& w, long columns, long inputs, uint16_t* to) {
    for (long half = 0; half < DEEP; half += LANES) {
        lanes some[LANES];
        square(w.from(0, half), columns, inputs - half, some);
        if (w.deep == 1) transpose(some);
        for (long k = 0; k < LANES; k += 2)
            split_pair((__m512)some[k], (__m512)some[k + 1], to + (half + k) * LANES);
    }
}

// Registers 0 .. 3 += a part of two tiles of x times a part of two tiles of w, all of them loaded.
template <bool TWO>
static inline void quarter() {
    multiply<0, 4, 6>(), multiply<1, 4, 7>();
    if (TWO) multiply<2, 5, 6>(), multiply<3, 5, 7>();
}

// All six products of the parts, over some blocks; x_step, w_step: from a tile to the one beside it.
template <bool TWO>
static inline void multiply_blocks(const uint16_t* x, long x_step, const uint16_t* w, long w_step, long blocks) {
    const auto rows = [&](int part) {
        load<4>(x + part * TILE);
        if (TWO) load<5>(x + x_step + part * TILE);
    };
    const auto columns = [&](int part) { load<6>(w + part * TILE), load<7>(w + w_step + part * TILE); };
    for (long k = 0; k < blocks; k++, x += SPLIT, w += SPLIT) {  // in an order that reloads one side at a time
        rows(0), columns(2), quarter<TWO>();
        columns(1), quarter<TWO>();
        rows(1), quarter<TWO>();
        columns(0), quarter<TWO>();
        rows(2), quarter<TWO>();
        rows(0), quarter<TWO>();
    }
}

// What a kernel makes: y [rows, columns], of SIDE x SIDE at most.
struct Output {
    float* y;
    long stride, rows, columns;
};

// out = its product, plus bias unless null, or plus what is there already if `more`.
template <bool TWO>
static void kernel(const Output& out, bool more, const float* bias, const uint16_t* x, long x_step,
                   const uint16_t* w, long w_step, long blocks) {
    alignas(64) float sums[SIDE * SIDE];
    const long rows = std::min(TWO ? SIDE : TALL_TILE, out.rows);
    for (long r = 0; r < rows; r++)  // to be there when the sums are
        for (long j = 0; j < std::min(SIDE, out.columns); j += LANES)
            __builtin_prefetch(out.y + r * out.stride + j, 1, 2);
    zero<0, 1, 2, 3>();
    multiply_blocks<TWO>(x, x_step, w, w_step, blocks);
    store<0>(sums, 4 * SIDE), store<1>(sums + LANES, 4 * SIDE);
    if (TWO) store<2>(sums + TALL_TILE * SIDE, 4 * SIDE), store<3>(sums + TALL_TILE * SIDE + LANES, 4 * SIDE);
    const __mmask16 left = first(out.columns), right = first(out.columns - LANES);
    __m512 before = {}, beside = {};
    if (bias) before = _mm512_maskz_loadu_ps(left, bias), beside = _mm512_maskz_loadu_ps(right, bias + LANES);
    for (long r = 0; r < rows; r++) {
        float* y = out.y + r * out.stride;
        if (more) before = _mm512_maskz_loadu_ps(left, y), beside = _mm512_maskz_loadu_ps(right, y + LANES);
        _mm512_mask_storeu_ps(y, left, _mm512_load_ps(sums + r * SIDE) + before);
        _mm512_mask_storeu_ps(y + LANES, right, _mm512_load_ps(sums + r * SIDE + LANES) + beside);
    }
}

static inline long over(long a, long b) { return (a + b - 1) / b; }

// What a product is made of; `deep`: blocks of inputs at a time.
struct Product {
    Matrix x, w;
    long rows, depth, columns, deep;
    const float* bias;
    float* y;
    long stride;
};

// One round of a range of columns: blocks k .. k + now of all inputs, for `pairs` of x's tiles, the first of which
// begins at `row`. Splits w on the way, as many columns at a time as fit into `room`.
static void multiply_columns(const Product& a, bool more, long k, long now, const uint16_t* x, long row, long pairs,
                             long begin, long end, long wide, uint16_t* room) {
    for (long column = begin; column < end; column += wide) {
        const long tiles = over(std::min(wide, end - column), SIDE) * 2, step = now * SPLIT;
        for (long b = 0; b < now; b++)
            for (long t = 0; t < tiles; t++) {
                const long at = column + t * LANES, input = (k + b) * DEEP;
                split_columns(a.w.from(at, input), a.columns - at, a.depth - input, room + t * step + b * SPLIT);
            }
        for (long p = 0; p < pairs; p++)
            for (long t = 0; t < tiles; t += 2) {
                const long top = row + p * SIDE, at = column + t * LANES;
                const Output out{a.y + top * a.stride + at, a.stride, a.rows - top, a.columns - at};
                const auto body = out.rows > TALL_TILE ? kernel<true> : kernel<false>;
                body(out, more, a.bias ? a.bias + at : nullptr, x + 2 * p * step, step, room + t * step, step, now);
            }
    }
}

// y [rows, columns] (a row every y_step entries) = x [rows, depth] w [depth, columns], plus bias [columns] unless
// null, or plus what is in y already if `more`. Of the strides of x, and of w, one is 1.
extern "C" void matmul_tiles(const float* x, long x_row, long x_deep, const float* w, long w_column,
                             long w_deep, long rows, long depth, long columns, const float* bias, int more,
                             float* y, long y_step) {
    static thread_local Kept x_room;
    const long blocks = over(depth, DEEP), deep = over(blocks, over(blocks, ROUND));
    const long all_tiles = over(rows, TALL_TILE);
    const Product a{{x, x_row, x_deep}, {w, w_column, w_deep}, rows, depth, columns, deep, bias, y, y_step};
    const long tall = std::min(all_tiles, SHARED / (deep * DEEP) / SIDE * 2);  // tiles of x at a time
    uint16_t* const x_split = x_room.take(tall * deep * SPLIT);
#pragma omp parallel
    {
        static thread_local Kept w_room;
        configure(TALL_TILE);
        const long who = omp_get_thread_num(), all = omp_get_num_threads(), sides = over(columns, SIDE);
        const long across = std::min(all, sides), down = all / across;  // threads beside and below one another
        const long place = who % across, part = who / across;           // those that are left over only split x
        const long begin = sides * place / across * SIDE;
        const long end = std::min(columns, sides * (place + 1) / across * SIDE);
        const long wide = std::min(over(end - begin, SIDE) * SIDE, OWN / (deep * DEEP) / SIDE * SIDE);
        uint16_t* const w_split = w_room.take(wide / LANES * deep * SPLIT);
        for (long top = 0; top < all_tiles; top += tall)
            for (long k = 0; k < blocks; k += deep) {
                const long count = std::min(tall, all_tiles - top), now = std::min(deep, blocks - k);
                for (long b = 0; b < now; b++)  // in this order a column of x, too, is read in one piece
                    for (long t = count * who / all; t < count * (who + 1) / all; t++) {
                        const long row = (top + t) * TALL_TILE, input = (k + b) * DEEP;
                        uint16_t* const to = x_split + (t * now + b) * SPLIT;
                        split_rows(a.x.from(row, input), rows - row, depth - input, to);
                    }
#pragma omp barrier
                const long pairs = over(count, 2), first_pair = pairs * part / down;
                const long last_pair = part < down ? pairs * (part + 1) / down : first_pair;
                if (first_pair < last_pair)
                    multiply_columns(a, k || more, k, now, x_split + 2 * first_pair * now * SPLIT,
                                     top * TALL_TILE + first_pair * SIDE, last_pair - first_pair, begin, end, wide,
                                     w_split);
#pragma omp barrier
            }
        _tile_release();
    }
}
#endif
