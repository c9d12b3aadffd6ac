// Attention of new positions to all positions so far, in the cache.
#pragma once

#include <limits>

#include "product.h"

// One stack's heads: `groups` key and value heads, each with `queries` query heads.
struct Heads {
  int64_t groups;
  int64_t queries;
  int64_t size;
  int64_t rotary_size;

  int64_t fused_width() const { return groups * (queries + 2) * size; }
  int64_t context_width() const { return groups * queries * size; }
};

// What may be attended to: by new position t of sequence b, `allowed[b * of_sequence + t * of_position + key]`.
// Without it everything up to the position itself.
struct Mask {
  const bool* allowed;
  int64_t of_sequence;
  int64_t of_position;
};

// Tables [capacity, size] of all positions; the sine has the sign that the other half has in each half.
struct Rotary {
  const float* cosine;
  const float* sine;
};

// Keys and values [2, sequences, groups, capacity, size] of one layer, of which each sequence holds `length` positions.
struct Cache {
  float* data;
  int64_t sequences;
  int64_t capacity;
  int64_t length;

  float* keys(const Heads& heads, int64_t sequence, int64_t group) const {
    return data + (sequence * heads.groups + group) * capacity * heads.size;
  }
  float* values(const Heads& heads, int64_t sequence, int64_t group) const {
    return keys(heads, sequences + sequence, group);
  }
};

inline void rotate(float* head, const Heads& heads, const Rotary& rotary, int64_t position) {
  const int64_t half = heads.rotary_size / 2;
  const float* cosine = rotary.cosine + position * heads.rotary_size;
  const float* sine = rotary.sine + position * heads.rotary_size;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cosine[i] + second * sine[i];
    head[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

inline float dot(const float* left, const float* right, int64_t size) {
  Vector sums{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) sums += load(left + i) * load(right + i);
  float total = sum(sums);
  for (; i < size; ++i) total += left[i] * right[i];
  return total;
}

// Scores of `count` keys become weights, of which the sum is returned; those from `count` to `padded` become 0.
inline float soften(float* scores, int64_t count, int64_t padded, float scale, const bool* allowed) {
  const float lowest = -std::numeric_limits<float>::infinity();
  if (allowed != nullptr) {
    for (int64_t key = 0; key < count; ++key) scores[key] = allowed[key] ? scores[key] : lowest;
  }
  std::fill(scores + count, scores + padded, lowest);
  Vector largest = load(scores);
  for (int64_t key = LANES; key < padded; key += LANES) {
    const Vector next = load(scores + key);
    largest = next > largest ? next : largest;
  }
  float maximum = largest[0];
  for (int lane = 1; lane < LANES; ++lane) maximum = std::max(maximum, largest[lane]);
  Vector total{};
  for (int64_t key = 0; key < padded; key += LANES) {
    const Vector weight = exponential((load(scores + key) - maximum) * scale);
    store(scores + key, weight);
    total += weight;
  }
  return sum(total);
}

// Values [count, size] times their weights, summed into `result` [size].
inline void blend(const float* weights, const float* values, int64_t count, int64_t size, float scale, float* result) {
  int64_t i = 0;
  for (; i + 2 * LANES <= size; i += 2 * LANES) {
    Vector sums[4] = {};
    int64_t key = 0;
    for (; key + 2 <= count; key += 2) {
      const float* here = values + key * size + i;
      sums[0] += weights[key] * load(here);
      sums[1] += weights[key] * load(here + LANES);
      sums[2] += weights[key + 1] * load(here + size);
      sums[3] += weights[key + 1] * load(here + size + LANES);
    }
    if (key < count) {
      sums[0] += weights[key] * load(values + key * size + i);
      sums[1] += weights[key] * load(values + key * size + i + LANES);
    }
    store(result + i, (sums[0] + sums[2]) * scale);
    store(result + i + LANES, (sums[1] + sums[3]) * scale);
  }
  for (; i + LANES <= size; i += LANES) {
    Vector sums{};
    for (int64_t key = 0; key < count; ++key) sums += weights[key] * load(values + key * size + i);
    store(result + i, sums * scale);
  }
  for (; i < size; ++i) {
    float total = 0.0f;
    for (int64_t key = 0; key < count; ++key) total += weights[key] * values[key * size + i];
    result[i] = total * scale;
  }
}

inline int64_t padded_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// One query over `count` keys as they lie in the cache.
inline void attend_one(
    const float* query, const float* keys, const float* values, int64_t count, int64_t size, const bool* allowed,
    float* scores, float* result) {
  for (int64_t key = 0; key < count; ++key) scores[key] = dot(query, keys + key * size, size);
  const float total = soften(scores, count, padded_to(count, LANES), 1.0f / std::sqrt((float)size), allowed);
  blend(scores, values, count, size, 1.0f / total, result);
}

// Keys and values of one head as panels of matrices, for products with many queries.
struct PackedHead {
  float* keys;    // [positions / PANEL][size][PANEL]
  float* values;  // [size / PANEL][positions][PANEL]

  static int64_t floats(int64_t positions, int64_t size) {
    return padded_to(positions, PANEL) * size + padded_to(size, PANEL) * positions;
  }

  void pack(const float* from_keys, const float* from_values, int64_t positions, int64_t size) const {
    for (int64_t first = 0; first < positions; first += PANEL) {
      float* panel = keys + first * size;
      const int64_t count = std::min<int64_t>(PANEL, positions - first);
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t key = 0; key < count; ++key) panel[i * PANEL + key] = from_keys[(first + key) * size + i];
        std::fill(panel + i * PANEL + count, panel + (i + 1) * PANEL, 0.0f);
      }
    }
    for (int64_t first = 0; first < size; first += PANEL) {
      float* panel = values + first * positions;
      const int64_t count = std::min<int64_t>(PANEL, size - first);
      for (int64_t key = 0; key < positions; ++key) {
        std::copy_n(from_values + key * size + first, count, panel + key * PANEL);
        std::fill(panel + key * PANEL + count, panel + (key + 1) * PANEL, 0.0f);
      }
    }
  }
};

// Queries of positions `first` to `first + queries.count` of one head over `total` packed positions, of which the
// cached ones come first; `allowed` is that of the first query.
inline void attend_tile(
    Rows queries, const PackedHead& packed, int64_t visible, int64_t total, int64_t size, const bool* allowed,
    int64_t of_position, Rows scores, Rows result) {
  const float scale = 1.0f / std::sqrt((float)size);
  // Without a mask the last query of a tile sees the most keys.
  const int64_t most = allowed == nullptr ? visible + queries.count - 1 : total;
  alignas(64) float values[TILE * PANEL];
  for (int64_t key = 0; key < most; key += PANEL) {
    multiply_rows<false>(queries.count, packed.keys + key * size, size, queries.data, queries.stride, values);
    for (int64_t row = 0; row < queries.count; ++row) {
      std::memcpy(scores[row] + key, values + row * PANEL, PANEL * sizeof(float));
    }
  }
  float totals[TILE];
  for (int64_t row = 0; row < queries.count; ++row) {
    const bool* of_row = allowed == nullptr ? nullptr : allowed + row * of_position;
    totals[row] = soften(scores[row], of_row == nullptr ? visible + row : total, padded_to(most, LANES), scale, of_row);
  }
  for (int64_t column = 0; column < size; column += PANEL) {
    const float* panel = packed.values + column * total;
    multiply_rows<false>(queries.count, panel, most, scores.data, scores.stride, values);
    const int64_t columns = std::min<int64_t>(PANEL, size - column);
    for (int64_t row = 0; row < queries.count; ++row) {
      for (int64_t i = 0; i < columns; ++i) result[row][column + i] = values[row * PANEL + i] / totals[row];
    }
  }
}
