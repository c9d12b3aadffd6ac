// LayerNorm and RMSNorm.
#pragma once

#include "product.h"

// `bias` may be missing.
struct Norm {
  const float* weight;
  const float* bias;
  float epsilon;
  int32_t is_rms;
};

inline float sum_of(const float* values, int64_t width) {
  Vector sums{};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) sums += load(values + i);
  float total = sum(sums);
  for (; i < width; ++i) total += values[i];
  return total;
}

inline float sum_of_squares(const float* values, int64_t width, float mean) {
  Vector sums{};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const Vector distance = load(values + i) - mean;
    sums += distance * distance;
  }
  float total = sum(sums);
  for (; i < width; ++i) total += (values[i] - mean) * (values[i] - mean);
  return total;
}

inline void normalize_row(const Norm& norm, const float* row, int64_t width, float* result) {
  const float mean = norm.is_rms ? 0.0f : sum_of(row, width) / width;
  const float scale = 1.0f / std::sqrt(sum_of_squares(row, width, mean) / width + norm.epsilon);
  for (int64_t i = 0; i < width; ++i) {
    result[i] = (row[i] - mean) * scale * norm.weight[i] + (norm.bias == nullptr ? 0.0f : norm.bias[i]);
  }
}

// This thread's part of the rows.
inline void normalize(const Norm& norm, Rows rows, int64_t width, Rows result, Member member) {
  for (int64_t row = member.first(rows.count); row < member.last(rows.count); ++row) {
    normalize_row(norm, rows[row], width, result[row]);
  }
}
