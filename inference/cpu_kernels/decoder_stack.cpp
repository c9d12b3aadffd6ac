// The layers of a decoder over new positions behind cached ones, in one parallel region; see parallel/decoder_layer.py
// for what a layer computes.

#include <omp.h>

#include "attention.h"
#include "norms.h"
#include "product.h"

namespace {

// Rows that go through all layers together, so that what they make stays in the processor's caches.
constexpr int64_t ROWS_AT_A_TIME = 256;

struct Layer {
  Norm attention_norm;
  Norm feed_forward_norm;
  Norm query_norm;  // of each head; may be missing
  Norm key_norm;
  Matrix query_key_value;
  Matrix dense;
  Matrix gate;  // only of SwiGLU
  Matrix expand;
  Matrix contract;
};

struct Stack {
  const Layer* layers;
  int64_t num_layers;
  int64_t width;
  int64_t inner_width;
  Heads heads;
  int64_t is_parallel;
};

struct Step {
  const float* hidden;  // [sequences, positions, width]
  float* result;        // [sequences, width], of the last positions
  float* cache;         // [layers, 2, sequences, groups, capacity, head size]
  Rotary rotary;
  Mask mask;
  int64_t sequences;
  int64_t positions;
  int64_t length;  // positions that the cache holds
  int64_t capacity;
  float* workspace;
};

// Memory for the rows that are on their way, and for each thread's attention.
struct Workspace {
  Rows hidden, attention_input, feed_forward_input, fused, context, inner;
  float* scratch;
  int64_t scratch_size;

  Workspace(const Stack& stack, int64_t rows, int64_t keys, float* memory) : scratch(memory) {
    hidden = take(rows, stack.width);
    attention_input = take(rows, stack.width);
    feed_forward_input = take(rows, stack.width);
    fused = take(rows, stack.heads.fused_width());
    context = take(rows, stack.heads.context_width());
    inner = take(rows, stack.inner_width);
    scratch_size = TILE * spaced(padded_to(keys, PANEL)) + PackedHead::floats(keys, stack.heads.size);
  }

  int64_t floats(int64_t threads, const float* memory) const { return scratch - memory + threads * scratch_size; }

 private:
  Rows take(int64_t rows, int64_t width) {
    const Rows taken{scratch, spaced(width), rows};
    scratch += rows * taken.stride;
    return taken;
  }
};

// Sequences that go through the layers together, and the thread that computes its part of them.
struct Chunk {
  const Stack& stack;
  const Step& step;
  const Workspace& space;
  Member member;
  int64_t first;
  int64_t sequences;

  Rows all(Rows rows) const { return {rows.data, rows.stride, sequences * step.positions}; }
  Rows last(Rows rows) const { return {rows[step.positions - 1], rows.stride * step.positions, sequences}; }

  float* scratch() const { return space.scratch + member.place * space.scratch_size; }
};

// The query, key and value heads of one group at a new position: normalizes, rotates, and stores the latter two.
void prepare_heads(const Layer& layer, const Heads& heads, const Rotary& rotary, int64_t position, float* fused,
                   float* key, float* value) {
  for (int64_t i = 0; i <= heads.queries; ++i) {
    const Norm& norm = i < heads.queries ? layer.query_norm : layer.key_norm;
    float* head = fused + i * heads.size;
    if (norm.weight != nullptr) normalize_row(norm, head, heads.size, head);
    rotate(head, heads, rotary, position);
  }
  std::copy_n(fused + heads.queries * heads.size, heads.size, key);
  std::copy_n(fused + (heads.queries + 1) * heads.size, heads.size, value);
}

// The new positions of one key and value head of one sequence.
void attend_group(const Chunk& chunk, const Layer& layer, Cache cache, int64_t sequence, int64_t group, bool is_last) {
  const Step& step = chunk.step;
  const Heads& heads = chunk.stack.heads;
  const int64_t positions = step.positions, size = heads.size, offset = group * (heads.queries + 2) * size;
  float* keys = cache.keys(heads, chunk.first + sequence, group);
  float* values = cache.values(heads, chunk.first + sequence, group);
  for (int64_t t = 0; t < positions; ++t) {
    const int64_t position = cache.length + t;
    float* fused = chunk.space.fused[sequence * positions + t] + offset;
    prepare_heads(layer, heads, step.rotary, position, fused, keys + position * size, values + position * size);
  }
  const int64_t total = cache.length + positions, wanted = is_last ? positions - 1 : 0;
  const bool* allowed = step.mask.allowed;
  if (allowed != nullptr) allowed += (chunk.first + sequence) * step.mask.of_sequence;
  const PackedHead packed{chunk.scratch(), chunk.scratch() + padded_to(total, PANEL) * size};
  const Rows scores{chunk.scratch() + PackedHead::floats(total, size), spaced(padded_to(total, PANEL)), TILE};
  const bool packs = positions - wanted >= TILE;
  if (packs) packed.pack(keys, values, total, size);
  for (int64_t query = 0; query < heads.queries; ++query) {
    for (int64_t t = wanted; t < positions; t += packs ? TILE : 1) {
      const int64_t row = sequence * positions + t, visible = cache.length + t + 1;
      const bool* of_row = allowed == nullptr ? nullptr : allowed + t * step.mask.of_position;
      float* from = chunk.space.fused[row] + offset + query * size;
      float* to = chunk.space.context[row] + (group * heads.queries + query) * size;
      if (packs) {
        const int64_t count = std::min<int64_t>(TILE, positions - t);
        attend_tile(
            {from, chunk.space.fused.stride, count}, packed, visible, total, size, of_row, step.mask.of_position,
            scores, {to, chunk.space.context.stride, count});
      } else {
        attend_one(from, keys, values, of_row == nullptr ? visible : total, size, of_row, scores.data, to);
      }
    }
  }
}

void attend(const Chunk& chunk, int64_t index, bool is_last) {
  const Step& step = chunk.step;
  const Heads& heads = chunk.stack.heads;
  const int64_t of_layer = 2 * step.sequences * heads.groups * step.capacity * heads.size;
  const Cache cache{step.cache + index * of_layer, step.sequences, step.capacity, step.length};
  const int64_t units = chunk.sequences * heads.groups;
  for (int64_t unit = chunk.member.first(units); unit < chunk.member.last(units); ++unit) {
    attend_group(chunk, chunk.stack.layers[index], cache, unit / heads.groups, unit % heads.groups, is_last);
  }
}

// The inner values of the feed-forward part.
void expand(const Chunk& chunk, const Layer& layer, Rows input, Rows inner) {
  if (layer.gate.panels == nullptr) {
    multiply(layer.expand, input, chunk.member, [&](const Tile& tile, float* values) {
      add_bias(layer.expand, tile, values);
      for (int64_t i = 0; i < tile.rows * PANEL; i += LANES) store(values + i, gelu(load(values + i)));
      write(tile, values, inner);
    });
    return;
  }
  multiply(layer.gate, input, chunk.member, [&](const Tile& tile, float* values) {
    add_bias(layer.gate, tile, values);
    for (int64_t i = 0; i < tile.rows * PANEL; i += LANES) store(values + i, silu(load(values + i)));
    write(tile, values, inner);
  });
  // Each thread multiplies the same tiles that it has just written.
  multiply(layer.expand, input, chunk.member, [&](const Tile& tile, float* values) {
    add_bias(layer.expand, tile, values);
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* here = inner[tile.row + row] + tile.column;
      for (int64_t i = 0; i < tile.columns; ++i) here[i] *= values[row * PANEL + i];
    }
  });
}

void add_product(const Chunk& chunk, const Matrix& matrix, Rows input, Rows hidden) {
  multiply(matrix, input, chunk.member, [&](const Tile& tile, float* values) {
    add_bias(matrix, tile, values);
    add(tile, values, hidden);
  });
}

// In the last layer, behind the attention's keys and values, only the last positions go on.
void run_layer(const Chunk& chunk, int64_t index) {
  const Layer& layer = chunk.stack.layers[index];
  const Workspace& space = chunk.space;
  const int64_t width = chunk.stack.width;
  const bool is_last = index + 1 == chunk.stack.num_layers;
  const auto chosen = [&](Rows rows) { return is_last ? chunk.last(rows) : chunk.all(rows); };
  const Rows hidden = chosen(space.hidden), input = chosen(space.feed_forward_input), inner = chosen(space.inner);
  normalize(layer.attention_norm, chunk.all(space.hidden), width, space.attention_input, chunk.member);
  if (chunk.stack.is_parallel) normalize(layer.feed_forward_norm, hidden, width, input, chunk.member);
#pragma omp barrier
  const Rows fused = chunk.all(space.fused);
  multiply(layer.query_key_value, chunk.all(space.attention_input), chunk.member, [&](const Tile& tile, float* values) {
    add_bias(layer.query_key_value, tile, values);
    write(tile, values, fused);
  });
  if (chunk.stack.is_parallel) expand(chunk, layer, input, inner);
#pragma omp barrier
  attend(chunk, index, is_last);
#pragma omp barrier
  add_product(chunk, layer.dense, chosen(space.context), hidden);
  if (!chunk.stack.is_parallel) {
#pragma omp barrier
    normalize(layer.feed_forward_norm, hidden, width, input, chunk.member);
#pragma omp barrier
    expand(chunk, layer, input, inner);
#pragma omp barrier
  }
  // The same thread as before adds to the same values.
  add_product(chunk, layer.contract, inner, hidden);
#pragma omp barrier
}

void copy_rows(const float* from, Rows to, int64_t width, Member member) {
  for (int64_t row = member.first(to.count); row < member.last(to.count); ++row) {
    std::copy_n(from + row * width, width, to[row]);
  }
}

void run_chunk(const Chunk& chunk) {
  const int64_t width = chunk.stack.width;
  copy_rows(
      chunk.step.hidden + chunk.first * chunk.step.positions * width, chunk.all(chunk.space.hidden), width,
      chunk.member);
#pragma omp barrier
  for (int64_t index = 0; index < chunk.stack.num_layers; ++index) run_layer(chunk, index);
  const Rows last = chunk.last(chunk.space.hidden);
  for (int64_t row = chunk.member.first(last.count); row < chunk.member.last(last.count); ++row) {
    std::copy_n(last[row], width, chunk.step.result + (chunk.first + row) * width);
  }
#pragma omp barrier
}

int64_t sequences_at_a_time(int64_t sequences, int64_t positions) {
  return std::min(sequences, std::max<int64_t>(1, ROWS_AT_A_TIME / positions));
}

}  // namespace

extern "C" {

// Floats of the workspace that a step needs.
int64_t workspace_size(const Stack* stack, const Step* step, int64_t threads) {
  const int64_t rows = sequences_at_a_time(step->sequences, step->positions) * step->positions;
  return Workspace(*stack, rows, step->length + step->positions, nullptr).floats(threads, nullptr);
}

void run_stack(const Stack* stack, const Step* step, int64_t threads) {
  const int64_t at_a_time = sequences_at_a_time(step->sequences, step->positions);
  const Workspace space(*stack, at_a_time * step->positions, step->length + step->positions, step->workspace);
#pragma omp parallel num_threads(threads)
  {
    const Member member{omp_get_thread_num(), omp_get_num_threads()};
    for (int64_t first = 0; first < step->sequences; first += at_a_time) {
      run_chunk({*stack, *step, space, member, first, std::min(at_a_time, step->sequences - first)});
    }
  }
}
}
