#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/common/parallel.h"
#include "cpu/common/tile.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

constexpr int64_t kConvTile = 64;            // steps
constexpr int64_t kConvChunk = 512;          // steps of a work item
constexpr int64_t kConvRow = 2048;           // steps of a work item where time is contiguous
constexpr int64_t kConvVectors = 8;          // vectors of channels of a work item whose channels are contiguous
constexpr int64_t kConvPerThread = 1 << 14;  // elements

// Work items: a vector of channels (several where channels are contiguous) x a chunk of time of one batch element, or
// several short ones. Their bounds do not depend on the number of threads, so sums over them do not, either.
struct ConvPartition {
  int64_t vectors, per_group, groups;  // vectors of channels, those per work item, work items across channels
  int64_t steps, chunk, chunks;        // steps per tile and per chunk, chunks per batch element
  bool rows;                           // time is contiguous: lanes may hold steps
  int64_t batch, spans;                // batch elements per work item; work items along batch and time
  int64_t threads;

  ConvPartition(const wmk_causal_conv1d& op, int lanes, std::initializer_list<const wmk_view*> views) {
    rows = true;
    for (const wmk_view* view : views) rows = rows && view->stride[2] == 1;
    vectors = ceil_div(op.channels, lanes);
    per_group = op.x.stride[1] == 1 && !rows ? min(vectors, kConvVectors) : 1;
    groups = ceil_div(vectors, per_group);
    steps = round_up(op.width, kConvTile);
    chunk = max(rows ? kConvRow : kConvChunk, 8 * steps);
    chunks = ceil_div(op.time, chunk);
    batch = max(1, chunk / max(1, op.time));
    spans = ceil_div(op.batch, batch) * chunks;
    threads = min(op.threads, 1 + op.batch * op.channels * op.time / kConvPerThread);
  }
};

// What one work item computes.
struct ConvItem {
  int64_t vector, vectors;     // first and number
  int64_t first_batch, batch;  // first and one behind the last
  int64_t first, last, span;

  ConvItem(const wmk_causal_conv1d& op, const ConvPartition& split, int64_t item) {
    span = item / split.groups;
    vector = item % split.groups * split.per_group;
    vectors = min(split.per_group, split.vectors - vector);
    first_batch = span / split.chunks * split.batch;
    batch = min(op.batch, first_batch + split.batch);
    first = span % split.chunks * split.chunk;
    last = min(op.time, first + split.chunk);
  }
};

// Steps [begin, end) of a sequence; those before `begin` are its window.
struct ConvSequence {
  int64_t batch, index, begin, end;
};

// Calls work(sequence, first step, steps) for an item's tiles of time, none of two sequences.
template <class Work>
static void for_each_tile(const wmk_causal_conv1d& op, const ConvItem& item, int64_t steps, const Work& work) {
  const int64_t* bounds = (const int64_t*)op.cu_seqlens.data;
  for (int64_t batch = item.first_batch; batch < item.batch; ++batch) {
    ConvSequence sequence{batch, batch, 0, op.time};
    if (bounds) {
      int64_t low = 0, high = op.sequences - 1;  // the last sequence that begins at or before the first step
      while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (bounds[middle] <= item.first) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      sequence.index = low;
    }
    for (int64_t t = item.first; t < item.last;) {
      if (bounds) {
        while (bounds[sequence.index + 1] <= t) ++sequence.index;
        sequence.begin = bounds[sequence.index];
        sequence.end = bounds[sequence.index + 1];
      }
      int64_t count = min(min(item.last, sequence.end) - t, steps);
      work(sequence, t, count);
      t += count;
    }
  }
}

WMK_INLINE ConvSequence sequence_at(const wmk_causal_conv1d& op, int64_t index) {
  const int64_t* bounds = (const int64_t*)op.cu_seqlens.data;
  if (!bounds) return {index, index, 0, op.time};
  return {0, index, bounds[index], bounds[index + 1]};
}

// Steps in one call of for_each_tile: with resets short, so that few rows are near one.
WMK_INLINE int64_t stretch_steps(const wmk_causal_conv1d& op, const ConvPartition& split) {
  return split.rows && !op.reset.data ? split.chunk : split.steps;
}
// Elements of a row of these steps with the inputs before and behind them, in whole vectors.
WMK_INLINE int64_t row_size(const wmk_causal_conv1d& op, const ConvPartition& split, int lanes) {
  return split.rows ? stretch_steps(op, split) + 2 * round_up(op.width, lanes) : 0;
}

// Scratch of each thread: structures made from an Arena.
template <class Scratch>
static int64_t scratch_bytes(const wmk_causal_conv1d& op, const ConvPartition& split) {
  Arena arena(nullptr);
  Scratch scratch(arena, op, split);
  return arena.used();
}
template <class Scratch>
static Scratch scratch_of(const wmk_causal_conv1d& op, const ConvPartition& split, void* workspace, int64_t thread) {
  Arena arena((char*)workspace + thread * scratch_bytes<Scratch>(op, split));
  return Scratch(arena, op, split);
}

template <class T, class S>
struct ConvTile {
  static constexpr int lanes = kLanes<T>;
  const wmk_causal_conv1d& op;
  int64_t channel;
  int rows;

  ConvTile(const wmk_causal_conv1d& op_, int64_t vector)
      : op(op_), channel(vector * lanes), rows(int(min(lanes, op_.channels - vector * lanes))) {}

  int64_t past() const { return op.width - 1; }
  // One of the channels, where lanes hold steps.
  S* row_at(const wmk_view& view, int64_t batch, int row, int64_t t) const {
    return (S*)view.data + batch * view.stride[0] + (channel + row) * view.stride[1] + t;
  }
  // Its inputs: in place, or, of 16 bits, converted once for all taps.
  const T* load_row(T* scratch, int64_t batch, int row, int64_t first, int64_t last) const {
    const S* from = row_at(op.x, batch, row, first);
    if constexpr (std::is_same_v<S, T>) {
      return from;
    } else {
      for (int64_t i = 0; i < last - first; i += lanes)
        store(scratch + i, gather<T>(from + i, 1, int(min(lanes, last - first - i))));
      return scratch;
    }
  }
  bool is_reset(int64_t batch, int64_t t) const {
    return op.reset.data && ((const char*)op.reset.data)[batch * op.reset.stride[0] + t * op.reset.stride[1]];
  }

  // Taps to [width][lanes], bias behind them.
  void load_weights(T* weights) const {
    const wmk_view& view = op.weight;
    load_tile(weights, lanes, (const T*)view.data + channel * view.stride[0], view.stride[0], view.stride[1], rows,
              op.width);
    Vector<T> bias{};
    if (op.bias.data) bias = gather<T>((const T*)op.bias.data + channel * op.bias.stride[0], op.bias.stride[0], rows);
    store(weights + op.width * lanes, bias);
  }

  template <class U>
  void load_steps(T* tile, const wmk_view& view, int64_t row, int64_t t, int64_t steps) const {
    const U* from = (const U*)view.data + row * view.stride[0] + channel * view.stride[1] + t * view.stride[2];
    load_tile(tile, lanes, from, view.stride[1], view.stride[2], rows, steps);
  }
  template <class U>
  void store_steps(const T* tile, const wmk_view& view, int64_t row, int64_t t, int64_t steps) const {
    U* to = (U*)view.data + row * view.stride[0] + channel * view.stride[1] + t * view.stride[2];
    store_tile(tile, lanes, to, view.stride[1], view.stride[2], rows, steps);
  }

  // Inputs of steps [first, last), those before the sequence from its window.
  void load_inputs(T* tile, const ConvSequence& sequence, int64_t first, int64_t last) const {
    int64_t before = max(0, min(last, sequence.begin) - first);
    if (before && op.initial_state.data) {
      load_steps<T>(tile, op.initial_state, sequence.index, first - sequence.begin + past(), before);
    } else {
      for (int64_t i = 0; i < before * lanes; ++i) tile[i] = 0;
    }
    first += before;
    if (first < last) load_steps<S>(tile + before * lanes, op.x, sequence.batch, first, last - first);
  }
};

// How far taps reach in steps [first, last) of a sequence: `back[i]` inputs up to step first + i come after the last
// reset at or before it, at most width. False if no reset is near.
WMK_INLINE bool count_valid_taps(const wmk_causal_conv1d& op, const ConvSequence& sequence, int64_t first, int64_t last,
                                 int64_t* back) {
  if (!op.reset.data) return false;
  const char* flags = (const char*)op.reset.data + sequence.batch * op.reset.stride[0];
  int64_t since = op.width;
  bool any = false;
  for (int64_t t = max(sequence.begin, first - op.width + 1); t < last; ++t) {
    since = flags[t * op.reset.stride[1]] ? 1 : min(op.width, since + 1);
    if (t >= first) {
      back[t - first] = since;
      any |= since < op.width;
    }
  }
  return any;
}

// Steps [first, last) whose taps all are of the sequence, as are the `after` steps behind them, with no reset among
// them: there, lanes hold steps of one channel. Whole vectors; none where time is not contiguous.
struct ConvRows {
  int64_t first, last;

  ConvRows(const wmk_causal_conv1d& op, const ConvPartition& split, const ConvSequence& sequence, int64_t t,
           int64_t steps, int64_t after, int lanes, int64_t* back) {
    first = max(t, sequence.begin + round_up(op.width - 1, lanes));
    last = min(t + steps, sequence.end - after);
    if (!split.rows || last < first + lanes || count_valid_taps(op, sequence, first, last + after, back)) {
      first = last = t + steps;
    } else {
      last -= (last - first) % lanes;
    }
  }
};

// Calls work with the width as a constant, 0 for one that is read.
template <class Work>
WMK_INLINE void with_width(int64_t width, const Work& work) {
  switch (width) {
    case 2:
      return work(std::integral_constant<int, 2>());
    case 3:
      return work(std::integral_constant<int, 3>());
    case 4:
      return work(std::integral_constant<int, 4>());
    default:
      return work(std::integral_constant<int, 0>());
  }
}

// bias + sum_k weight[k] x[k], newest first: a sequence, its chunks and single steps round equally.
template <int K, class T>
WMK_INLINE Vector<T> sum_taps(const T* x, const T* weights, Vector<T> sum, int64_t width, int64_t valid) {
  constexpr int lanes = kLanes<T>;
  if constexpr (K > 0) {
    for (int k = K - 1; k >= 0; --k) sum += load(weights + k * lanes) * load(x + k * lanes);
  } else {
    for (int64_t k = width - 1; k >= width - valid; --k) sum += load(weights + k * lanes) * load(x + k * lanes);
    for (int64_t k = width - valid - 1; k >= 0; --k) sum += load(weights + k * lanes) * Vector<T>{};
  }
  return sum;
}

// The same sum where lanes hold steps: every tap is one number of `weights`, which are a vector of channels.
template <int K, class T>
class RowTaps {
 public:
  RowTaps(const T* weights, int64_t width) : weights_(weights), width_(width) {
    for (int k = 0; k < K; ++k) taps_[k] = broadcast(weights[k * lanes]);
    taps_[K] = broadcast(weights[width * lanes]);
  }
  Vector<T> sum(const T* x) const {
    Vector<T> sum = taps_[K];
    for (int64_t k = count() - 1; k >= 0; --k) sum += tap(k) * load(x + k);
    return sum;
  }
  // An input's gradient, from those of the sums it is part of.
  Vector<T> transposed_sum(const T* g) const {
    Vector<T> sum{};
    for (int64_t k = 0; k < count(); ++k) sum += tap(count() - 1 - k) * load(g + k);
    return sum;
  }

 private:
  static constexpr int lanes = kLanes<T>;

  int64_t count() const { return K > 0 ? K : width_; }
  Vector<T> tap(int64_t k) const { return K > 0 ? taps_[k] : broadcast(weights_[k * lanes]); }

  Vector<T> taps_[K + 1];  // then the bias
  const T* weights_;
  int64_t width_;
};

// out[i] from x[i .. i + width); `back` from count_valid_taps, or null.
template <int K, class T>
static void convolve_width(const T* x, const T* weights, T* out, int64_t steps, int64_t width, const int64_t* back) {
  constexpr int lanes = kLanes<T>;
  const Vector<T> bias = load(weights + width * lanes);
  for (int64_t i = 0; i < steps; ++i) {
    const bool whole = K > 0 && (!back || back[i] == width);
    store(out + i * lanes, whole ? sum_taps<K>(x + i * lanes, weights, bias, width, width)
                                 : sum_taps<0>(x + i * lanes, weights, bias, width, back ? back[i] : width));
  }
}
template <class T>
static void convolve(const T* x, const T* weights, T* out, int64_t steps, int64_t width, const int64_t* back) {
  with_width(width,
             [&](auto constant) { convolve_width<decltype(constant)::value>(x, weights, out, steps, width, back); });
}

}  // namespace wmk::WMK_ISA
