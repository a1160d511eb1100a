// Products of rows with a packed matrix by the processor's tiles (AMX), to the precision of fp32.
//
// Tiles multiply numbers of 8 significant bits. An fp32 number is the sum of three, x = x0 + x1 + x2, each what is
// left of it cut to 8 bits, so that
//
//     x w = x0 w0 + (x0 w1 + x1 w0) + (x0 w2 + x1 w1 + x2 w0) + terms below 2^-23 |x w|
//
// (Henry, Tang and Heinecke 2019, arXiv:1904.06376). Products of 8 bits are exact and sums are fp32. That is six
// products at sixteen times the rate of fp32's. The matrix stays in fp32 in memory, whose bytes are what a
// product of few rows waits for, and is split on its way.
#include "pack.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

constexpr long PANEL = LANES * WIDE;
constexpr long DEEP = 32, TALL_TILE = 16, TILE = DEEP * TALL_TILE;  // inputs of a tile, its rows, its entries
constexpr long SPLIT = 3 * TILE;                                    // entries of a tile in three parts
// A panel's pairs of inputs lie in so many places, read in turn: the processor fetches ahead 20 lines in each,
// which in one place alone would be too few to hide the memory behind the products (30 ms a step for 38).
constexpr long STREAMS = 8, PAIRS = DEEP / 2, CHUNK = DEEP * PANEL / STREAMS;
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

template <int T>
static inline void load(const void* from) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(T), "r"(from), "r"(64L) : "memory");
}
template <int T>
static inline void store(void* to) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(T), "r"(to), "r"(64L) : "memory");
}
template <int... T>
static inline void zero() {
    (..., [] { asm volatile("tilezero %%tmm%c0" ::"n"(T)); }());
}
template <int SUM, int A, int B>
static inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(A), "n"(B));
}

static inline __m512 rest(__m512 x) {  // what is left without the first 8 bits
    return x - _mm512_castsi512_ps(_mm512_castps_si512(x) & _mm512_set1_epi32(0xffff0000));
}
static inline __m512i paired(__m512 even, __m512 odd) {  // the first 8 bits of both, with sign and exponent
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16), mask = _mm512_set1_epi32(0xffff0000);
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), mask, low, 0xEA);  // odd & mask | low
}

// The i-th twelfth of a block of a panel, w, in three parts -> b [WIDE][3][TILE].
static inline void split_part(int i, const float* w, long stream, uint16_t* b) {
    for (int n = 4 * i; n < 4 * i + 4; n++) {
        const long item = n / STREAMS, pair = n % STREAMS * (PAIRS / STREAMS) + item / WIDE;
        const float* from = w + n % STREAMS * stream + item * 2 * LANES;
        uint16_t* to = b + item % WIDE * SPLIT + pair * 2 * LANES;
        __m512 even = _mm512_loadu_ps(from), odd = _mm512_loadu_ps(from + LANES);
        for (int part = 0; part < 3; part++, even = rest(even), odd = rest(odd))
            _mm512_store_si512(to + part * TILE, paired(even, odd));
    }
    asm volatile("" ::: "memory");
}

// One row [depth] in three parts -> its row of tiles [blocks][3][TILE]; zeros up to the end of the last block.
static void split_row(const float* x, long depth, uint16_t* to) {
    for (long k = 0; k < tiles_depth(depth); k += LANES) {
        const __mmask16 valid = depth - k >= LANES ? 0xffff : depth <= k ? 0 : (1 << (depth - k)) - 1;
        __m512 some = _mm512_maskz_loadu_ps(valid, x + k);
        uint16_t* at = to + k / DEEP * SPLIT + k % DEEP;
        for (int part = 0; part < 3; part++, some = rest(some)) {
            const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(some), 16);
            _mm256_storeu_si256((__m256i*)(at + part * TILE), _mm512_cvtepi32_epi16(bits));
        }
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
        const uint16_t *now = b + (k & ring) * WIDE * SPLIT, *first = a + k * SPLIT, *second = first + blocks * SPLIT;
        const auto between = [=](int i) {
            if (FRESH) split_part(i, next, stream, b + ((k + 1) & ring) * WIDE * SPLIT);
        };
        level<0, 3>(first, now, 0, between);
        level<0, 2>(first + TILE, now, 3, between);
        level<0, 1>(first + 2 * TILE, now, 5, between);
        if (TWO) {
            level<3, 3>(second, now, 6, between);
            level<3, 2>(second + TILE, now, 9, between);
            level<3, 1>(second + 2 * TILE, now, 11, between);
        } else
            for (int i = 6; i < 12; i++) between(i);
    }
}

// The sums of one tile of rows, in `sums` [WIDE][rows][LANES], plus bias -> y.
static void write(const float (*sums)[TALL_TILE * LANES], long rows, const float* bias, long wide, float* y,
                  long width) {
    for (int j = 0; j < WIDE; j++) {
        const long here = wide - j * LANES;
        const __mmask16 valid = here >= LANES ? 0xffff : here <= 0 ? 0 : (1 << here) - 1;
        const __m512 start = bias ? _mm512_maskz_loadu_ps(valid, bias + j * LANES) : __m512{};
        for (long r = 0; r < rows; r++)
            _mm512_mask_storeu_ps(y + r * width + j * LANES, valid, _mm512_load_ps(sums[j] + r * LANES) + start);
    }
}

// Memory that a thread keeps from call to call.
static uint16_t* kept(std::unique_ptr<uint16_t, decltype(&std::free)>& room, long& size, long needed) {
    if (size < needed) {
        room.reset((uint16_t*)std::aligned_alloc(64, needed * sizeof(uint16_t)));
        size = needed;
    }
    return room.get();
}

// x [rows, depth] times a packed matrix [depth, width], plus bias [width] or null -> y [rows, width].
extern "C" void product_tiles(const float* x, long rows, long depth, const float* packed, long width,
                              const float* bias, float* y) {
    static thread_local std::unique_ptr<uint16_t, decltype(&std::free)> a_room(nullptr, &std::free);
    static thread_local long a_size = 0;
    const long blocks = tiles_depth(depth) / DEEP, panels = (width + PANEL - 1) / PANEL;
    const long stream = panels * blocks * CHUNK;
    const long count = (rows + TALL_TILE - 1) / TALL_TILE, tall = (rows + count - 1) / count;
    uint16_t* const a = kept(a_room, a_size, count * blocks * SPLIT);
#pragma omp parallel
    {
        static thread_local std::unique_ptr<uint16_t, decltype(&std::free)> b_room(nullptr, &std::free);
        static thread_local long b_size = 0;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) split_row(x + r * depth, depth, a + r / tall * blocks * SPLIT + r % tall * DEEP);
        const long ring = count > 2 ? -1 : 1;  // two blocks in turn, or all of them for the tiles of rows to come
        uint16_t* const b = kept(b_room, b_size, (count > 2 ? blocks + 1 : 2) * WIDE * SPLIT);
        alignas(64) unsigned char shape[64] = {1};  // a palette, then the bytes of a row and the rows of each tile
        for (int i = 0; i < 8; i++) shape[16 + 2 * i] = 64, shape[48 + i] = i == 7 ? DEEP / 2 : tall;
        _tile_loadconfig(shape);
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
