// Products of rows with a packed matrix by the processor's tiles, to the precision of fp32; see amx.hpp.
//
// The matrix stays in fp32 in memory, whose bytes are what a product of few rows waits for, and is split on its
// way.
#include "amx.hpp"
#include "pack.hpp"

#ifdef HAS_TILES
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr long PANEL = LANES * WIDE;
// A panel's pairs of inputs lie in so many places, read in turn: the processor fetches ahead 20 lines in each,
// which in one place alone would be too few to hide the memory behind the products (30 ms a step for 38).
constexpr long STREAMS = 8, PAIRS = DEEP / 2, CHUNK = DEEP * PANEL / STREAMS;
constexpr long AHEAD = 4 * CHUNK;  // asked for besides: the processor's own stops at pages (22 ms a step for 19)
static_assert(LANES == 16 && WIDE == 3, "registers are numbered for this");

extern "C" int has_tiles() {  // asks the system, which has to make room for them when it switches threads
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0;
    return granted;
}

extern "C" long tiles_depth(long depth) { return (depth + DEEP - 1) / DEEP * DEEP; }

// Panels [STREAMS][⌈width / PANEL⌉][blocks of DEEP inputs][pairs of a stream][WIDE][2][LANES].
extern "C" void pack_tiles(const float* from, long depth, long width, long by_depth, long by_width, float* to) {
    const long deep = tiles_depth(depth), blocks = deep / DEEP;
    const long stream = (width + PANEL - 1) / PANEL * blocks * CHUNK;
    pack_panels(from, depth, deep, width, by_depth, by_width, [=](long p, long k, long j) {
        const long pair = k % DEEP / 2, each = PAIRS / STREAMS;
        const long item = pair % each * WIDE + j / LANES;
        return to + pair / each * stream + (p * blocks + k / DEEP) * CHUNK + (2 * item + k % 2) * LANES;
    });
}

// The i-th twelfth of a block of a panel, w, in three parts -> b [WIDE][3][TILE].
static inline void split_part(int i, const float* w, long stream, uint16_t* b) {
    for (int n = 4 * i; n < 4 * i + 4; n++) {
        const long item = n / STREAMS, pair = n % STREAMS * (PAIRS / STREAMS) + item / WIDE;
        const float* from = w + n % STREAMS * stream + item * 2 * LANES;
        uint16_t* to = b + item % WIDE * SPLIT + pair * 2 * LANES;
        for (int l = 0; l < 2; l++) __builtin_prefetch(from + AHEAD + l * LANES, 0, 2);
        split_pair(_mm512_loadu_ps(from), _mm512_loadu_ps(from + LANES), to);
    }
    asm volatile("" ::: "memory");
}

// One row [depth] in three parts -> its row of tiles [blocks][3][TILE]; zeros up to the end of the last block.
static void split_row(const float* x, long depth, uint16_t* to) {
    for (long k = 0; k < depth; k += DEEP) {
        const __m512 some = _mm512_maskz_loadu_ps(first(depth - k), x + k);
        split_inputs(some, _mm512_maskz_loadu_ps(first(depth - k - LANES), x + k + LANES), to + k / DEEP * SPLIT);
    }
}

// Registers SUM .. SUM + 2 += a's part from `a` times the first `COUNT` parts of b [WIDE][3][TILE]; between the
// products, as many twelfths of the next block are split.
template <int SUM, int COUNT, class Between>
static inline void level(const uint16_t* a, const uint16_t* b, int at, const Between& between) {
    load<6>(a);
    for (int part = 0; part < COUNT; part++) {
        load<7>(b + part * TILE), multiply<SUM, 6, 7>();
        load<7>(b + SPLIT + part * TILE), multiply<SUM + 1, 6, 7>();
        load<7>(b + 2 * SPLIT + part * TILE), multiply<SUM + 2, 6, 7>();
        between(at + part);
    }
}

// All blocks of a panel times one or two tiles of rows, into registers 0 .. 2 (and 3 .. 5). FRESH: w is split on
// the way, into the ring b of `ring` + 1 blocks, a power of 2; otherwise b holds all blocks already.
template <bool FRESH, bool TWO>
static void multiply_panel(const uint16_t* a, long blocks, const float* w, long stream, uint16_t* b, long ring) {
    zero<0, 1, 2, 3, 4, 5>();
    for (int i = 0; FRESH && i < 12; i++) split_part(i, w, stream, b);
    for (long k = 0; k < blocks; k++) {
        const float* next = w + std::min(k + 1, blocks - 1) * CHUNK;  // after the last, in vain
        const uint16_t *now = b + (k & ring) * WIDE * SPLIT, *upper = a + k * SPLIT, *lower = upper + blocks * SPLIT;
        const auto between = [=](int i) {
            if (FRESH) split_part(i, next, stream, b + ((k + 1) & ring) * WIDE * SPLIT);
        };
        level<0, 3>(upper, now, 0, between);
        level<0, 2>(upper + TILE, now, 3, between);
        level<0, 1>(upper + 2 * TILE, now, 5, between);
        if (TWO) {
            level<3, 3>(lower, now, 6, between);
            level<3, 2>(lower + TILE, now, 9, between);
            level<3, 1>(lower + 2 * TILE, now, 11, between);
        } else
            for (int i = 6; i < 12; i++) between(i);
    }
}

// The sums of one tile of rows, in `sums` [WIDE][rows][LANES], plus bias -> y.
static void write(const float (*sums)[TALL_TILE * LANES], long rows, const float* bias, long wide, float* y,
                  long width) {
    for (int j = 0; j < WIDE; j++) {
        const long here = wide - j * LANES;
        const __mmask16 valid = first(here);
        const __m512 start = bias ? _mm512_maskz_loadu_ps(valid, bias + j * LANES) : __m512{};
        for (long r = 0; r < rows; r++)
            _mm512_mask_storeu_ps(y + r * width + j * LANES, valid, _mm512_load_ps(sums[j] + r * LANES) + start);
    }
}

// x [rows, depth] times a packed matrix [depth, width], plus bias [width] or null -> y [rows, width].
extern "C" void product_tiles(const float* x, long rows, long depth, const float* packed, long width,
                              const float* bias, float* y) {
    static thread_local Kept a_room;
    const long blocks = tiles_depth(depth) / DEEP, panels = (width + PANEL - 1) / PANEL;
    const long stream = panels * blocks * CHUNK;
    const long count = (rows + TALL_TILE - 1) / TALL_TILE, tall = (rows + count - 1) / count;
    uint16_t* const a = a_room.take(count * blocks * SPLIT);
#pragma omp parallel
    {
        static thread_local Kept b_room;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            split_row(x + r * depth, depth, a + r / tall * blocks * SPLIT + r % tall * DEEP);
        const long ring = count > 2 ? -1 : 1;  // two blocks in turn, or all of them for the tiles of rows to come
        uint16_t* const b = b_room.take((count > 2 ? blocks + 1 : 2) * WIDE * SPLIT);
        configure(tall);
        alignas(64) float sums[2 * WIDE][TALL_TILE * LANES];
        const long who = omp_get_thread_num(), all = omp_get_num_threads();
        for (long p = panels * who / all; p < panels * (who + 1) / all; p++) {
            const float* w = packed + p * blocks * CHUNK;
            for (long t = 0; t < count; t += 2) {
                const bool two = t + 1 < count;
                const auto body = t ? two ? multiply_panel<false, true> : multiply_panel<false, false>
                                    : two ? multiply_panel<true, true> : multiply_panel<true, false>;
                body(a + t * blocks * SPLIT, blocks, w, stream, b, ring);
                store<0>(sums[0]), store<1>(sums[1]), store<2>(sums[2]);
                if (two) store<3>(sums[3]), store<4>(sums[4]), store<5>(sums[5]);
                for (long h = t; h < t + 1 + two; h++)
                    write(sums + (h - t) * WIDE, std::min(tall, rows - h * tall), bias ? bias + p * PANEL : nullptr,
                          width - p * PANEL, y + h * tall * width + p * PANEL, width);
            }
        }
        _tile_release();
    }
}
#else
extern "C" int has_tiles() { return 0; }
#endif
