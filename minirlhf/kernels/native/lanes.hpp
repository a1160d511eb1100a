// Vectors as wide as the machine's registers, and what the kernels do with them.
#pragma once

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 3, TALL = 8;  // 24 of 32 registers hold sums
#elif defined(__aarch64__)
constexpr int LANES = 4, WIDE = 3, TALL = 8;
#else
constexpr int LANES = 8, WIDE = 2, TALL = 6;  // 12 of 16
#endif

typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int places __attribute__((vector_size(LANES * 4)));

// e^x for x <= 0, within 2 units in the last place; 0 below -87, where fp32 has no normal number, and for -inf.
static inline lanes exp_lanes(lanes x) {
    const places tiny = x < -87.f;
    x = tiny ? lanes{} : x;
    const places whole = __builtin_convertvector(x * 1.44269504f - 0.5f, places);  // towards 0: the nearest
    const lanes n = __builtin_convertvector(whole, lanes);
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
    lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes, expf
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    return tiny ? lanes{} : y * (lanes)((whole + 127) << 23);
}
