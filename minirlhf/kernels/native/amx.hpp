// The processor's tiles (AMX), and fp32 numbers for them: each in three parts of 8 significant bits.
//
// Tiles multiply numbers of 8 significant bits. An fp32 number is the sum of three, x = x0 + x1 + x2, each what is
// left of it cut to 8 bits, so that
//
//     x w = x0 w0 + (x0 w1 + x1 w0) + (x0 w2 + x1 w1 + x2 w0) + terms below 2^-23 |x w|
//
// (Henry, Tang and Heinecke 2019, arXiv:1904.06376). Products of 8 bits are exact and sums are fp32. That is six
// products at sixteen times the rate of fp32's. Infinite numbers give NaN: their parts have no sum.
#pragma once

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

constexpr long DEEP = 32, TALL_TILE = 16, TILE = DEEP * TALL_TILE;  // inputs of a tile, its rows, its entries
constexpr long SPLIT = 3 * TILE;                                    // entries of a tile in three parts

typedef uint16_t places_16 __attribute__((vector_size(64)));

template <int T>
static inline void load(const void* from, long stride = 64) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
static inline void store(void* to, long stride = 64) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(T), "r"(to), "r"(stride) : "memory");
}
template <int... T>
static inline void zero() {
    (..., [] { asm volatile("tilezero %%tmm%c0" ::"n"(T)); }());
}
template <int SUM, int A, int B>
static inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(A), "n"(B));
}

// Tiles of `rows` rows each, the last one of DEEP / 2 pairs of inputs.
static inline void configure(long rows) {
    alignas(64) unsigned char shape[64] = {1};  // a palette, then the bytes of a row and the rows of each tile
    for (int i = 0; i < 8; i++) shape[16 + 2 * i] = 64, shape[48 + i] = i == 7 ? DEEP / 2 : rows;
    _tile_loadconfig(shape);
}

static inline __m512 rest(__m512 x) {  // what is left without the first 8 bits
    return x - _mm512_castsi512_ps(_mm512_castps_si512(x) & _mm512_set1_epi32(0xffff0000));
}
static inline __m512i paired(__m512 even, __m512 odd) {  // the first 8 bits of both, with sign and exponent
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16), mask = _mm512_set1_epi32(0xffff0000);
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), mask, low, 0xEA);  // odd & mask | low
}
// The first `count` entries, of LANES at most.
static inline __mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// DEEP inputs of a row, in three parts -> a row of a tile of rows [3][TALL_TILE][DEEP].
static inline void split_inputs(__m512 some, __m512 more, uint16_t* to) {
    places_16 tops;
    for (int i = 0; i < DEEP; i++) tops[i] = 2 * i + 1;
    for (int part = 0; part < 3; part++, some = rest(some), more = rest(more))
        _mm512_store_si512(to + part * TILE, _mm512_permutex2var_epi16((__m512i)some, (__m512i)tops, (__m512i)more));
}
// Two inputs of LANES outputs each, in three parts -> a pair of a tile of a matrix [3][DEEP / 2][LANES][2].
static inline void split_pair(__m512 even, __m512 odd, uint16_t* to) {
    for (int part = 0; part < 3; part++, even = rest(even), odd = rest(odd))
        _mm512_store_si512(to + part * TILE, paired(even, odd));
}

// Memory that a thread keeps from call to call, on large pages.
struct Kept {
    std::unique_ptr<uint16_t, decltype(&std::free)> room{nullptr, &std::free};
    long size = 0;
    uint16_t* take(long needed) {
        constexpr long PAGE = 1L << 21;
        if (size < needed) {
            const long bytes = (needed * (long)sizeof(uint16_t) + PAGE - 1) / PAGE * PAGE;
            room.reset((uint16_t*)std::aligned_alloc(PAGE, bytes));
            madvise(room.get(), bytes, MADV_HUGEPAGE);
            size = needed;
        }
        return room.get();
    }
};
#endif
