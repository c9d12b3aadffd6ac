// The largest of many values, and where it is.

#include <omp.h>

#include <limits>
#include <vector>

#include "product.h"

namespace {

constexpr int64_t PART = 16 * LANES;

struct Largest {
  float value;
  int64_t place;
};

// Of equal values the first; NaN if any is.
Largest largest_of(const float* values, int64_t first, int64_t last) {
  Largest best{-std::numeric_limits<float>::infinity(), first};
  Vector sums{};  // NaN where a value is NaN, whatever else there is
  int64_t i = first;
  for (; i + PART <= last; i += PART) {
    Vector highest = load(values + i);
    for (int64_t lane = 0; lane < PART; lane += LANES) {
      const Vector next = load(values + i + lane);
      highest = next > highest ? next : highest;
      sums += next == next ? Vector{} : next;
    }
    float value = highest[0];
    for (int lane = 1; lane < LANES; ++lane) value = std::max(value, highest[lane]);
    if (value > best.value) best = {value, i};
  }
  // Where all are NaN it is not found.
  const int64_t end = std::min(best.place + PART, last) - 1;
  best.place = std::find(values + best.place, values + end, best.value) - values;
  for (; i < last; ++i) {
    if (values[i] > best.value) best = {values[i], i};
    if (values[i] != values[i]) sums[0] = values[i];
  }
  const float total = sum(sums);
  if (total != total) best.value = total;
  return best;
}

}  // namespace

extern "C" {

// Of each row [columns], `stride` apart: the largest value and its place; NaN if there is one.
void find_most_likely(
    const float* logits, int64_t rows, int64_t columns, int64_t stride, float* highest, int64_t* places,
    int64_t threads) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, columns / PART));
  std::vector<Largest> found(rows * parts);
#pragma omp parallel for num_threads(threads)
  for (int64_t unit = 0; unit < rows * parts; ++unit) {
    const Member member{unit % parts, parts};
    found[unit] = largest_of(logits + unit / parts * stride, member.first(columns), member.last(columns));
  }
  for (int64_t row = 0; row < rows; ++row) {
    Largest best = found[row * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Largest& next = found[row * parts + part];
      // Once NaN, it stays so.
      if (next.value > best.value || next.value != next.value) best = next;
    }
    highest[row] = best.value;
    places[row] = best.place;
  }
}
}
