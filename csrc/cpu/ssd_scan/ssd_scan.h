// What forward and backward share: the cut of sequences into chunks, loads, decays within a chunk, the scores C_i ·
// B_j, and the step from chunk to chunk.
//
// Matrices of a chunk have rows of whole vectors, [step][d], [step][n] or [step][step]; a state is [n][d], d as lanes.
// What is behind a row's last vector is never read; no sum reads the lanes behind its last number.
#pragma once

#include <math.h>

#include <type_traits>

#include "cpu/common/gemm_tiles.h"
#include "cpu/common/tile.h"

namespace wmk::WMK_ISA {

// Rows that are needed soon, requested a few lines at a time: each is on a page of its own, beyond what the hardware
// foresees, and a burst of requests would wait for memory that the arithmetic between them hides.
struct RowsAhead {
  const char* row;
  int64_t stride;
  int64_t lines, rows, share;  // per row; left; per call
  int64_t line;

  __attribute__((noinline)) void fetch() {  // inlined, it takes registers from the products
    for (int64_t i = 0; i < share && rows; ++i) {
      __builtin_prefetch(row + 64 * line, 0, 2);
      if (++line == lines) line = 0, row += stride, --rows;
    }
  }
};

// Steps of a sequence without a cut.
struct SSDChunk {
  int64_t batch, begin, steps;
  bool has_state;     // false: the state before it is zero
  int64_t state_row;  // of chunk_states; -1: none
};

struct Nothing {
  void operator()() const {}
};

template <class T>
class SSD {
 public:
  // `spread`: rows of an odd number of cache lines. Columns of rows an even number apart share few sets of the first
  // cache, but states that fill the second have no room for it.
  SSD(const wmk_ssd_scan& op, int64_t most_heads, bool spread) : op_(op) {
    n_width_ = round_up(op.n, kLanes<T>), n_pitch_ = pitch_of(n_width_, spread);
    d_width_ = round_up(op.d, kLanes<T>), d_pitch_ = pitch_of(d_width_, spread);
    width_ = round_up(op.chunk, kLanes<T>), pitch_ = pitch_of(width_, spread);
    group_heads_ = op.heads / op.groups;
    blocks_ = 1;  // a power of two: equal work for two threads and more, whatever their number
    while (blocks_ * most_heads < group_heads_) blocks_ *= 2;
    block_heads_ = ceil_div(group_heads_, blocks_);
  }

 protected:
  // Some heads of a group over one sequence.
  struct WorkItem {
    int64_t sequence, batch, begin, end;  // steps
    int64_t group, first_head, heads;
  };
  int64_t work_items() const { return op_.sequences * op_.groups * blocks_; }
  WorkItem work_item(int64_t index) const {
    const int64_t block = index % blocks_, group = index / blocks_ % op_.groups,
                  sequence = index / blocks_ / op_.groups;
    const int64_t first = group_heads_ * block / blocks_, end = group_heads_ * (block + 1) / blocks_;
    const int64_t head = group * group_heads_ + first;
    const int64_t* bounds = (const int64_t*)op_.cu_seqlens.data;
    if (!bounds) return {sequence, sequence, 0, op_.time, group, head, end - first};
    return {sequence, 0, bounds[sequence], bounds[sequence + 1], group, head, end - first};
  }
  int64_t team() const { return min(op_.threads, work_items()); }

  bool is_reset(const WorkItem& w, int64_t t) const {
    const char* reset = (const char*)op_.reset.data;
    return reset && reset[w.batch * op_.reset.stride[0] + t * op_.reset.stride[1]];
  }
  // The chunk that ends before `end`, and the one that begins at `begin`.
  SSDChunk chunk_before(const WorkItem& w, int64_t end) const {
    int64_t begin = end - 1;
    const int64_t first = w.begin + (begin - w.begin) / op_.chunk * op_.chunk;
    while (begin > first && !is_reset(w, begin)) --begin;
    return chunk(w, begin, end);
  }
  SSDChunk chunk_from(const WorkItem& w, int64_t begin) const {
    int64_t end = begin + 1;
    const int64_t last = min(w.end, w.begin + ((begin - w.begin) / op_.chunk + 1) * op_.chunk);
    while (end < last && !is_reset(w, end)) ++end;
    return chunk(w, begin, end);
  }

  T* take_matrix(Arena& arena, int64_t rows, int64_t pitch) const { return arena.take<T>(rows * pitch); }
  T* take_state(Arena& arena, int64_t count = 1) const { return arena.take<T>(count * state_size()); }
  int64_t state_size() const { return op_.n * d_pitch_; }

  // `index`: of a head or a group. [step][size].
  void load_rows(T* to, int64_t pitch, const wmk_view& view, int64_t batch, int64_t begin, int64_t steps, int64_t index,
                 int64_t size) const {
    if (view.stride[3] == 1) {
      // step by step: rows of other steps share few sets of the first cache
      with_rows(view, batch, begin, index, [&](auto* from) {
        for (int64_t t = 0; t < steps; ++t, from += view.stride[1])
          for (int64_t i = 0; i < size; i += kLanes<T>)
            store(to + t * pitch + i, gather<T>(from + i, 1, int(min(kLanes<T>, size - i))));
      });
      return;
    }
    const Plane plane = rows_plane(view, batch, index);
    for (int64_t i = 0; i < size; i += kLanes<T>)
      load_plane(to + i, pitch, plane, op_.dtype, i, int(min(kLanes<T>, size - i)), begin, steps);
  }
  void load_rows(T* to, int64_t pitch, const wmk_view& view, const SSDChunk& c, int64_t index, int64_t size) const {
    load_rows(to, pitch, view, c.batch, c.begin, c.steps, index, size);
  }
  // Of steps that are needed soon; none of a view whose rows are not contiguous.
  RowsAhead rows_ahead(const wmk_view& view, int64_t batch, int64_t begin, int64_t steps, int64_t index, int64_t size,
                       int64_t calls) const {
    if (!view.data || view.stride[3] != 1 || steps < 1) return {};
    const int64_t bytes = bytes_of(op_.dtype), lines = ceil_div(size * bytes, 64);
    const char* row =
        (const char*)view.data + (batch * view.stride[0] + begin * view.stride[1] + index * view.stride[2]) * bytes;
    return {row, view.stride[1] * bytes, lines, steps, ceil_div(steps * lines, calls), 0};
  }
  void store_rows(const T* from, int64_t pitch, const wmk_view& view, const SSDChunk& c, int64_t index,
                  int64_t size) const {
    if (view.stride[3] == 1) {
      with_rows(view, c.batch, c.begin, index, [&](auto* to) {
        for (int64_t t = 0; t < c.steps; ++t, to += view.stride[1])
          for (int64_t i = 0; i < size; i += kLanes<T>)
            scatter<T>(to + i, 1, int(min(kLanes<T>, size - i)), load(from + t * pitch + i));
      });
      return;
    }
    const Plane plane = rows_plane(view, c.batch, index);
    for (int64_t i = 0; i < size; i += kLanes<T>)
      store_plane(from + i, pitch, plane, op_.dtype, i, int(min(kLanes<T>, size - i)), c.begin, c.steps);
  }
  // to[column][row] = from[row][column].
  static void transpose_matrix(T* to, int64_t to_pitch, const T* from, int64_t pitch, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kLanes<T>)
      load_tile(to + i, to_pitch, from + i * pitch, pitch, 1, int(min(kLanes<T>, rows - i)), columns);
  }
  // From and to [d][n] of any strides.
  void load_state(T* to, const wmk_view& view, int64_t index, int64_t head) const {
    const T* from = (const T*)view.data + index * view.stride[0] + head * view.stride[1];
    for (int64_t i = 0; i < op_.d; i += kLanes<T>)
      load_tile(to + i, d_pitch_, from + i * view.stride[2], view.stride[2], view.stride[3],
                int(min(kLanes<T>, op_.d - i)), op_.n);
  }
  void store_state(const T* from, const wmk_view& view, int64_t index, int64_t head) const {
    T* to = (T*)view.data + (index * op_.heads + head) * op_.d * op_.n;
    for (int64_t i = 0; i < op_.d; i += kLanes<T>)
      store_tile(from + i, d_pitch_, to + i * op_.n, op_.n, 1, int(min(kLanes<T>, op_.d - i)), op_.n);
  }
  T* kept_state(int64_t row, int64_t head) const {
    return (T*)op_.chunk_states.data + (row * op_.heads + head) * op_.n * op_.d;
  }
  T per_head(const wmk_view& view, const SSDChunk& c, int64_t t, int64_t head) const {
    return ((const T*)view.data)[c.batch * view.stride[0] + (c.begin + t) * view.stride[1] + head * view.stride[2]];
  }

  // What the steps of a chunk pass on. Products of decays are built step by step, as the reference does: they never
  // divide, and are exact for a decay of zero.
  struct Decays {
    T* between;  // [i][j]: from step j to i, for j <= i; the last row: to the chunk's end
    T *since_start, *weight, *own_weight;
    T* entering;  // times the weight, to the chunk's end
  };
  Decays take_decays(Arena& arena) const {
    T* between = take_matrix(arena, op_.chunk, pitch_);
    T* rows[4];
    for (T*& row : rows) row = arena.take<T>(pitch_);
    return {between, rows[0], rows[1], rows[2], rows[3]};
  }
  void compute_decays(const Decays& to, const SSDChunk& c, int64_t head) const {
    T product = 1;
    const wmk_view& own = op_.own_weight.data ? op_.own_weight : op_.weight;
    for (int64_t i = 0; i < c.steps; ++i) {
      const T decay = exp(per_head(op_.gate, c, i, head));
      to.weight[i] = per_head(op_.weight, c, i, head);
      to.own_weight[i] = per_head(own, c, i, head);
      to.since_start[i] = product *= decay;
      T* row = to.between + i * pitch_;
      for (int64_t j = 0; j <= i; j += kLanes<T>) {
        const auto step = lane_numbers<T>() + int(j);
        const Vector<T> before = j < i ? load(row - pitch_ + j) : Vector<T>{};
        store(row + j, step < int(i) ? before * decay : step == int(i) ? Vector<T>{} + 1 : Vector<T>{});
      }
    }
    const T* last = to.between + (c.steps - 1) * pitch_;
    for (int64_t j = 0; j < c.steps; ++j) to.entering[j] = last[j] * to.weight[j];
  }

  // [i][j] = C_i · B_j for j <= i. `B_by_step` is [n][step].
  void compute_scores(T* scores, const T* C, const T* B_by_step, int64_t steps) const {
    for (int64_t j = 0; j < steps; j += 2 * kLanes<T>) {
      if (j + kLanes<T> < width_) {
        score_panel<2>(scores, C, B_by_step, j, steps);
      } else {
        score_panel<1>(scores, C, B_by_step, j, steps);
      }
    }
  }

  // y = d C S + (scores D weight) x; `lower` is scores times decays and weights. `before` is called before each tile.
  template <class Before = Nothing>
  void compute_outputs(T* y, const SSDChunk& c, const T* C, const T* state, const T* lower, const Decays& decays,
                       const T* x, const Before& before = Before()) const {
    for_tiles<T>(c.steps, d_width_, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
      before();
      Vector<T> sums[M][N] = {};
      if (c.has_state) {
        multiply_accumulate<T, M, N>(sums, C + row * n_pitch_, n_pitch_, 1, state + column, d_pitch_, op_.n);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) sums[m][n] *= decays.since_start[row + m];
      }
      const T* left = lower + row * pitch_;
      multiply_accumulate<T, M, N>(sums, left, pitch_, 1, x + column, d_pitch_, row);
      accumulate_triangle<T, true, true, M, N>(sums, left + row, pitch_, 1, x + row * d_pitch_ + column, d_pitch_);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(y + (row + m) * d_pitch_ + column + n * kLanes<T>, sums[m][n]);
    });
  }
  void compute_lower(T* lower, const T* scores, const Decays& decays, int64_t steps) const {
    for (int64_t i = 0; i < steps; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes<T>) {
        const int64_t at = i * pitch_ + j;
        store(lower + at, load(scores + at) * load(decays.between + at) * load(decays.weight + j));
      }
      lower[i * pitch_ + i] = scores[i * pitch_ + i] * decays.own_weight[i];
    }
  }
  void compute_entering(T* entering, const T* x, const Decays& decays, int64_t steps) const {
    for (int64_t j = 0; j < steps; ++j)
      for (int64_t i = 0; i < d_width_; i += kLanes<T>)
        store(entering + j * d_pitch_ + i, decays.entering[j] * load(x + j * d_pitch_ + i));
  }

  // to = kept from + left^T right, of [step][n] and [step][d]; `from` null: zero. `to` may be `from`.
  template <class Before = Nothing>
  void pass_state(T* to, const T* from, T kept, const T* left, const T* right, int64_t steps,
                  const Before& before = Before()) const {
    for_tiles<T>(op_.n, d_width_, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
      before();
      Vector<T> sums[M][N] = {};
      multiply_accumulate<T, M, N>(sums, left + row, 1, n_pitch_, right + column, d_pitch_, steps);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const int64_t at = (row + m) * d_pitch_ + column + n * kLanes<T>;
          store(to + at, from ? kept * load(from + at) + sums[m][n] : sums[m][n]);
        }
    });
  }

  // Tiles of a product with `rows` rows, about.
  int64_t tiles_of(int64_t rows) const {
    return ceil_div(rows, kTileRows<kTileVectors>) * ceil_div(d_width_, kTileVectors * kLanes<T>);
  }

  const wmk_ssd_scan& op_;
  int64_t n_width_, d_width_, width_;  // of rows of B, of x and of steps
  int64_t n_pitch_, d_pitch_, pitch_;
  int64_t group_heads_, blocks_, block_heads_;

 private:
  static int64_t pitch_of(int64_t width, bool spread) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t lines = ceil_div(width, line);
    return lines < 2 || !spread ? width : (lines | 1) * line;
  }
  template <int N>
  void score_panel(T* scores, const T* C, const T* B_by_step, int64_t j, int64_t steps) const {
    for_row_tiles<kTileRows<N>>(j, steps, [&](auto rows, int64_t i) {
      constexpr int M = decltype(rows)::value;
      Vector<T> sums[M][N] = {};
      multiply_accumulate<T, M, N>(sums, C + i * n_pitch_, n_pitch_, 1, B_by_step + j, pitch_, op_.n);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(scores + (i + m) * pitch_ + j + n * kLanes<T>, sums[m][n]);
    });
  }
  SSDChunk chunk(const WorkItem& w, int64_t begin, int64_t end) const {
    const int64_t since = begin - w.begin;
    const bool has_state = !is_reset(w, begin) && (since > 0 || op_.initial_state.data);
    const int64_t rows_before = op_.cu_seqlens.data ? w.begin / op_.kept_interval + w.sequence
                                                    : w.sequence * ceil_div(op_.time, op_.kept_interval);
    const int64_t row = since % op_.kept_interval == 0 ? rows_before + since / op_.kept_interval : -1;
    return {w.batch, begin, end - begin, has_state, row};
  }
  // Calls work(pointer to the first number).
  template <class Work>
  void with_rows(const wmk_view& view, int64_t batch, int64_t begin, int64_t index, const Work& work) const {
    with_types(op_.dtype, [&](auto type, auto storage) {
      using S = decltype(storage);
      if constexpr (std::is_same_v<decltype(type), T>)
        work((S*)view.data + batch * view.stride[0] + begin * view.stride[1] + index * view.stride[2]);
    });
  }
  Plane rows_plane(const wmk_view& view, int64_t batch, int64_t index) const {
    char* data = (char*)view.data + (batch * view.stride[0] + index * view.stride[2]) * bytes_of(op_.dtype);
    return {data, view.stride[3], view.stride[1]};
  }
};

}  // namespace wmk::WMK_ISA
