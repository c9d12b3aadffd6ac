// Products of few or many rows with a matrix that is packed into panels.
#pragma once

#include <algorithm>

#include "vectors.h"

// W [outputs, inputs] as panels [outputs / PANEL][inputs][PANEL], the last one filled up with zeros; without a panel
// there is no matrix. `bias` [outputs] may be missing.
struct Matrix {
  const float* panels;
  const float* bias;
  int64_t inputs;
  int64_t outputs;
};

// Rows in memory, the first values of each `stride` apart.
struct Rows {
  float* data;
  int64_t stride;
  int64_t count;

  float* operator[](int64_t row) const { return data + row * stride; }
};

// Which thread of how many.
struct Member {
  int64_t place;
  int64_t size;

  int64_t first(int64_t units) const { return units * place / size; }
  int64_t last(int64_t units) const { return units * (place + 1) / size; }
};

// Values between rows, so that rows of 4 KiB do not all fall on the same lines of the cache.
inline int64_t spaced(int64_t width) { return (width + LANES - 1) / LANES * LANES + 16; }

// Weights of so many inputs ahead are fetched where they come from memory; measured.
constexpr int AHEAD = 48;

// [COUNT rows, inputs] times a panel [inputs, PANEL]; each sum is taken in the order of the inputs, whatever COUNT is.
template <int COUNT, bool FETCHES>
void multiply_tile(const float* panel, int64_t inputs, const float* rows, int64_t stride, float* result) {
  Vector sums[COUNT][2] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Vector left = load(panel + i * PANEL), right = load(panel + i * PANEL + LANES);
    if constexpr (FETCHES) {
      __builtin_prefetch(panel + (i + AHEAD) * PANEL);
      __builtin_prefetch(panel + (i + AHEAD) * PANEL + LANES);
    }
#pragma GCC unroll 16
    for (int row = 0; row < COUNT; ++row) {
      const float value = rows[row * stride + i];
      sums[row][0] += left * value;
      sums[row][1] += right * value;
    }
  }
  for (int row = 0; row < COUNT; ++row) {
    store(result + row * PANEL, sums[row][0]);
    store(result + row * PANEL + LANES, sums[row][1]);
  }
}

template <bool FETCHES, int COUNT = TILE>
void multiply_rows(
    int64_t count, const float* panel, int64_t inputs, const float* rows, int64_t stride, float* result) {
  if constexpr (COUNT > 0) {
    if (count == COUNT) {
      multiply_tile<COUNT, FETCHES>(panel, inputs, rows, stride, result);
    } else {
      multiply_rows<FETCHES, COUNT - 1>(count, panel, inputs, rows, stride, result);
    }
  }
}

// A tile of a result: `rows` from `row` on, `columns` from `column` on, lying [TILE][PANEL].
struct Tile {
  int64_t row, rows, column, columns;
};

// This thread's part of x W^T. `finish` gets each tile and its values, which it may change, and has to add the bias.
template <typename Finish>
void multiply(const Matrix& matrix, Rows x, Member member, Finish finish) {
  alignas(64) float values[TILE * PANEL];
  const int64_t panels = (matrix.outputs + PANEL - 1) / PANEL, tiles = (x.count + TILE - 1) / TILE;
  for (int64_t unit = member.first(panels * tiles); unit < member.last(panels * tiles); ++unit) {
    const int64_t index = unit / tiles, part = unit % tiles;
    const int64_t row = x.count * part / tiles, rows = x.count * (part + 1) / tiles - row;
    const float* panel = matrix.panels + index * matrix.inputs * PANEL;
    auto* multiplied = part == 0 ? multiply_rows<true> : multiply_rows<false>;
    multiplied(rows, panel, matrix.inputs, x[row], x.stride, values);
    finish(Tile{row, rows, index * PANEL, std::min<int64_t>(PANEL, matrix.outputs - index * PANEL)}, values);
  }
}

inline void add_bias(const Matrix& matrix, const Tile& tile, float* values) {
  if (matrix.bias == nullptr) return;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.columns; ++i) values[row * PANEL + i] += matrix.bias[tile.column + i];
  }
}

inline void write(const Tile& tile, const float* values, Rows target) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    std::memcpy(target[tile.row + row] + tile.column, values + row * PANEL, tile.columns * sizeof(float));
  }
}

inline void add(const Tile& tile, const float* values, Rows target) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    float* here = target[tile.row + row] + tile.column;
    for (int64_t i = 0; i < tile.columns; ++i) here[i] += values[row * PANEL + i];
  }
}
