// What forward and backward share: the cut of sequences into chunks, and the triangular matrices of a chunk.
//
// Matrices of a chunk have rows of whole vectors: [d_k][step] with steps as lanes, or [step][d_v] with values as lanes.
// No sum reads the lanes behind the end of a row.
#pragma once

#include <math.h>

#include "cpu/common/gemm_tiles.h"
#include "cpu/common/tile.h"

namespace wmk::WMK_ISA {

// Steps of a sequence without a cut.
struct DeltaRuleChunk {
  int64_t batch, head, begin, steps;
  bool has_state;     // false: the state before it is zero
  int64_t state_row;  // of chunk_states; -1: none, a reset between saved states
};

template <class T>
class DeltaRule {
 public:
  explicit DeltaRule(const wmk_gated_delta_rule& op) : op_(op) {
    memcpy(&scale_, &op.scale, sizeof(scale_));
    k_pitch_ = round_up(op.d_k, kLanes<T>);
    v_pitch_ = round_up(op.d_v, kLanes<T>);
    pitch_ = round_up(op.chunk, kLanes<T>);
  }

 protected:
  // A sequence's head.
  struct Sequence {
    int64_t index, batch, head, begin, end;
  };
  Sequence sequence(int64_t item) const {
    const int64_t index = item / op_.heads, head = item % op_.heads;
    const int64_t* bounds = (const int64_t*)op_.cu_seqlens.data;
    if (!bounds) return {index, index, head, 0, op_.time};
    return {index, 0, head, bounds[index], bounds[index + 1]};
  }
  bool is_reset(const Sequence& s, int64_t t) const {
    const char* reset = (const char*)op_.reset.data;
    return reset && reset[s.batch * op_.reset.stride[0] + t * op_.reset.stride[1]];
  }
  // The chunk that ends before `end`, for the backward pass, and the one that begins at `begin`, for the forward pass.
  DeltaRuleChunk chunk_before(const Sequence& s, int64_t end) const {
    int64_t begin = end - 1;
    const int64_t first = s.begin + (begin - s.begin) / op_.chunk * op_.chunk;
    while (begin > first && !is_reset(s, begin)) --begin;
    return chunk(s, begin, end);
  }
  DeltaRuleChunk chunk_from(const Sequence& s, int64_t begin) const {
    int64_t end = begin + 1;
    const int64_t last = min(s.end, s.begin + ((begin - s.begin) / op_.chunk + 1) * op_.chunk);
    while (end < last && !is_reset(s, end)) ++end;
    return chunk(s, begin, end);
  }

  // Threads with a sequence.
  int64_t team() const { return min(op_.threads, op_.sequences * op_.heads); }

  T* take_matrix(Arena& arena, int64_t rows, int64_t pitch) const { return arena.take<T>(rows * pitch); }

  // [size][step].
  void load_by_step(T* to, const wmk_view& view, const DeltaRuleChunk& c, int64_t size) const {
    const Plane plane = {(char*)view.data + offset(view, c), view.stride[3], view.stride[2]};
    for (int64_t t = 0; t < c.steps; t += kLanes<T>)
      load_plane(to + t, pitch_, plane, op_.dtype, c.begin + t, int(min(kLanes<T>, c.steps - t)), 0, size);
  }
  // [step][size].
  void load_rows(T* to, int64_t pitch, const wmk_view& view, const DeltaRuleChunk& c, int64_t size) const {
    const Plane plane = {(char*)view.data + offset(view, c), view.stride[2], view.stride[3]};
    for (int64_t i = 0; i < size; i += kLanes<T>)
      load_plane(to + i, pitch, plane, op_.dtype, i, int(min(kLanes<T>, size - i)), c.begin, c.steps);
  }
  void store_rows(const T* from, int64_t pitch, const wmk_view& view, const DeltaRuleChunk& c, int64_t size) const {
    const Plane plane = {(char*)view.data + offset(view, c), view.stride[2], view.stride[3]};
    for (int64_t i = 0; i < size; i += kLanes<T>)
      store_plane(from + i, pitch, plane, op_.dtype, i, int(min(kLanes<T>, size - i)), c.begin, c.steps);
  }
  // to[column][row] = from[row][column]; `to` may have rows of other pitch.
  static void transpose_matrix(T* to, int64_t to_pitch, const T* from, int64_t pitch, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kLanes<T>)
      load_tile(to + i, to_pitch, from + i * pitch, pitch, 1, int(min(kLanes<T>, rows - i)), columns);
  }
  // A state [d_k][d_v] of any strides.
  void load_state(T* to, const wmk_view& view, int64_t index, int64_t head) const {
    const T* from = (const T*)view.data + index * view.stride[0] + head * view.stride[1];
    for (int64_t i = 0; i < op_.d_v; i += kLanes<T>) {
      load_tile(to + i, v_pitch_, from + i * view.stride[3], view.stride[3], view.stride[2],
                int(min(kLanes<T>, op_.d_v - i)), op_.d_k);
    }
  }
  void store_state(const T* from, const wmk_view& view, int64_t index, int64_t head) const {
    T* to = (T*)view.data + (index * op_.heads + head) * op_.d_k * op_.d_v;
    for (int64_t i = 0; i < op_.d_k; ++i) memcpy(to + i * op_.d_v, from + i * v_pitch_, op_.d_v * sizeof(T));
  }
  T* residuals(const DeltaRuleChunk& c) const {
    return (T*)op_.residuals.data + ((c.batch * op_.heads + c.head) * op_.time + c.begin) * op_.d_v;
  }
  T gate_at(const wmk_view& view, const DeltaRuleChunk& c, int64_t t) const {
    return ((const T*)view.data)[c.batch * view.stride[0] + c.head * view.stride[1] + (c.begin + t) * view.stride[2]];
  }

  // What the steps of a chunk pass on. Products of decays are built step by step, as the reference does: they never
  // divide, and are exact for a decay of zero.
  struct Decays {
    T* between;  // [i][j]: from step j to i, zero for j > i
    T *since_start, *beta;
    T whole(int64_t steps) const { return since_start[steps - 1]; }
    const T* to_end(int64_t steps, int64_t pitch) const { return between + (steps - 1) * pitch; }
  };
  Decays take_decays(Arena& arena) const {
    return {take_matrix(arena, op_.chunk, pitch_), arena.take<T>(pitch_), arena.take<T>(pitch_)};
  }
  void compute_decays(const Decays& to, const DeltaRuleChunk& c) const {
    T product = 1;
    for (int64_t i = 0; i < c.steps; ++i) {
      const T decay = exp(gate_at(op_.gate, c, i));
      to.beta[i] = gate_at(op_.beta, c, i);
      to.since_start[i] = product *= decay;
      T* row = to.between + i * pitch_;
      for (int64_t j = 0; j < c.steps; j += kLanes<T>) {
        const auto step = lane_numbers<T>() + int(j);
        const Vector<T> before = i ? load(row - pitch_ + j) : Vector<T>{};
        store(row + j, step < int(i) ? before * decay : step == int(i) ? Vector<T>{} + 1 : Vector<T>{});
      }
    }
  }

  // recall = -D k_i.k_j for j < i, attention = scale D q_i.k_j for j <= i, else zero.
  void compute_scores(T* recall, T* attention, const T* keys, const T* queries, const Decays& decays,
                      int64_t steps) const {
    constexpr int lanes = kLanes<T>;
    for (int64_t j = 0; j < steps; j += lanes) {
      for_row_tiles<8>(j, steps, [&](auto M, int64_t i) {
        constexpr int rows = decltype(M)::value;
        Vector<T> products[rows][1] = {}, matches[rows][1] = {};
        multiply_accumulate<T, rows, 1>(products, keys + i, 1, pitch_, keys + j, pitch_, op_.d_k);
        multiply_accumulate<T, rows, 1>(matches, queries + i, 1, pitch_, keys + j, pitch_, op_.d_k);
        for (int m = 0; m < rows; ++m) {
          const int64_t at = (i + m) * pitch_ + j;
          const auto step = lane_numbers<T>() + int(j);
          const Vector<T> decay = load(decays.between + at);
          store(recall + at, step < int(i + m) ? -decay * products[m][0] : Vector<T>{});
          store(attention + at, step <= int(i + m) ? T(scale_) * decay * matches[m][0] : Vector<T>{});
        }
      });
    }
  }

  const wmk_gated_delta_rule& op_;
  double scale_;
  int64_t k_pitch_, v_pitch_, pitch_;  // of rows of keys, of values and of steps

 private:
  DeltaRuleChunk chunk(const Sequence& s, int64_t begin, int64_t end) const {
    const int64_t since = begin - s.begin;
    const bool has_state = !is_reset(s, begin) && (since > 0 || op_.initial_state.data);
    const int64_t rows_before =
        op_.cu_seqlens.data ? s.begin / op_.chunk + s.index : s.index * ceil_div(op_.time, op_.chunk);
    const int64_t row = since % op_.chunk == 0 ? rows_before + since / op_.chunk : -1;
    return {s.batch, s.head, begin, end - begin, has_state, row};
  }
  int64_t offset(const wmk_view& view, const DeltaRuleChunk& c) const {
    return (c.batch * view.stride[0] + c.head * view.stride[1]) * bytes_of(op_.dtype);
  }
};

}  // namespace wmk::WMK_ISA
