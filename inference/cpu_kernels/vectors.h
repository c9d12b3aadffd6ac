// Vectors of floats in the compiler's own notation (GCC and Clang), as wide as the processor that is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// LANES: floats of a vector. TILE: rows of a product whose sums stay in registers, two vectors for each row.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE = 12;
#else
constexpr int LANES = 4, TILE = 6;
#endif
constexpr int PANEL = 2 * LANES;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntegerVector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector load(const float* source) {
  Vector values;
  std::memcpy(&values, source, sizeof(values));
  return values;
}

inline void store(float* target, Vector values) { std::memcpy(target, &values, sizeof(values)); }

inline Vector filled(float value) { return value - Vector{}; }

// Halves a vector until one number is left; the order of the sum does not depend on anything.
template <typename Wide, int SIZE>
inline float sum_of_halves(Wide values) {
  if constexpr (SIZE == 1) {
    return values[0];
  } else {
    typedef float Half __attribute__((vector_size(SIZE / 2 * sizeof(float))));
    Half halves[2];
    std::memcpy(halves, &values, sizeof(values));
    return sum_of_halves<Half, SIZE / 2>(halves[0] + halves[1]);
  }
}

inline float sum(Vector values) { return sum_of_halves<Vector, LANES>(values); }

// e^x to about two units in the last place; 0 where it would be denormal, infinity is not reached.
inline Vector exponential(Vector x) {
  const Vector low = filled(-87.0f), high = filled(88.0f);
  const Vector bounded = x < low ? low : x > high ? high : x;
  const Vector shift = filled(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector whole = (bounded * 1.44269504f + shift) - shift;
  const Vector rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vector power = filled(1.0f / 5040.0f);
  for (float coefficient : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    power = power * rest + coefficient;
  }
  const IntegerVector exponent = (__builtin_convertvector(whole, IntegerVector) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  // NaN fails every comparison and must come out as NaN.
  return x < low ? Vector{} : power * scale;
}

// x times the normal distribution's cumulative probability; its erf is Abramowitz and Stegun's 7.1.26, to 1.5e-7.
inline Vector gelu(Vector x) {
  const Vector scaled = x * 0.70710678f;
  const Vector size = scaled < 0.0f ? -scaled : scaled;
  const Vector t = 1.0f / (1.0f + 0.3275911f * size);
  Vector tail = filled(1.061405429f);
  for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    tail = tail * t + coefficient;
  }
  tail = 0.5f * tail * t * exponential(-size * size);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }
