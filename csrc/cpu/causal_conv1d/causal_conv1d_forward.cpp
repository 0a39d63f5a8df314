// Causal convolution, forward, on the CPU.
//
// Memory is read and written once, 8 bytes per element in fp32; PyTorch writes and reads the sum in between. Where time
// is contiguous, a lane holds a step: a vector of outputs takes 23 vector instructions for 4 taps and silu, 13 of them
// multiply-adds. That is 6.5 cycles at two per cycle, about as long as the division takes.
//
// Elsewhere, and where a sequence begins, ends or is reset, a lane holds a channel: an output is `width` multiply-adds
// of rows that a tile of time holds in L1, whatever the strides and the dtype. Every tile loads the last inputs of the
// one before again, which makes tiles independent. Both layouts add in the same order.
#include "cpu/causal_conv1d/causal_conv1d.h"

namespace wmk::WMK_ISA {
namespace {

template <class T>
struct ForwardScratch {
  T *x, *out, *weights;
  T* row;  // inputs of a channel, where lanes hold steps
  int64_t* back;
  ForwardScratch(Arena& arena, const wmk_causal_conv1d& op, const ConvPartition& split) {
    constexpr int lanes = kLanes<T>;
    x = arena.take<T>((split.steps + op.width) * lanes);
    out = arena.take<T>(split.steps * lanes);
    weights = arena.take<T>(split.per_group * (op.width + 1) * lanes);
    row = arena.take<T>(row_size(op, split, lanes));
    back = arena.take<int64_t>(split.steps);
  }
};

template <class T, class S>
class ConvForward {
 public:
  explicit ConvForward(const wmk_causal_conv1d& op) : op_(op), split_(op, lanes, {&op.x, &op.out}) {}

  int64_t workspace() const { return split_.threads * scratch_bytes<ForwardScratch<T>>(op_, split_); }

  void run() const {
    parallel_for(split_.spans * split_.groups, split_.threads,
                 [&](int64_t item, int64_t thread) { run_item(ConvItem(op_, split_, item), scratch(thread)); });
    if (op_.width == 1) return;
    parallel_for(op_.sequences, split_.threads,
                 [&](int64_t index, int64_t thread) { store_last_state(sequence_at(op_, index), scratch(thread)); });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  ForwardScratch<T> scratch(int64_t thread) const {
    return scratch_of<ForwardScratch<T>>(op_, split_, op_.workspace, thread);
  }

  void run_item(const ConvItem& item, const ForwardScratch<T>& s) const {
    const int64_t weights = (op_.width + 1) * lanes;
    for (int64_t i = 0; i < item.vectors; ++i)
      ConvTile<T, S>(op_, item.vector + i).load_weights(s.weights + i * weights);
    for_each_tile(op_, item, stretch_steps(op_, split_), [&](const ConvSequence& sequence, int64_t t, int64_t steps) {
      const ConvRows rows(op_, split_, sequence, t, steps, 0, lanes, s.back);
      run_tiles(item, s, sequence, t, rows.first);
      run_rows(item, s, sequence, rows);
      run_tiles(item, s, sequence, rows.last, t + steps);
    });
  }

  void run_tiles(const ConvItem& item, const ForwardScratch<T>& s, const ConvSequence& sequence, int64_t t,
                 int64_t last) const {
    for (int64_t steps; t < last; t += steps) {
      steps = min(split_.steps, last - t);
      const int64_t* back = count_valid_taps(op_, sequence, t, t + steps, s.back) ? s.back : nullptr;
      for (int64_t i = 0; i < item.vectors; ++i) {
        ConvTile<T, S> tile(op_, item.vector + i);
        tile.load_inputs(s.x, sequence, t - tile.past(), t + steps);
        convolve(s.x, s.weights + i * (op_.width + 1) * lanes, s.out, steps, op_.width, back);
        if (op_.silu) {
          for (int64_t j = 0; j < steps; ++j) store(s.out + j * lanes, silu(load(s.out + j * lanes)));
        }
        tile.template store_steps<S>(s.out, op_.out, sequence.batch, t, steps);
      }
    }
  }

  void run_rows(const ConvItem& item, const ForwardScratch<T>& s, const ConvSequence& sequence,
                const ConvRows& rows) const {
    if (rows.first == rows.last) return;
    ConvTile<T, S> tile(op_, item.vector);  // the item's only one
    for (int row = 0; row < tile.rows; ++row) {
      const T* x = tile.load_row(s.row, sequence.batch, row, rows.first - tile.past(), rows.last);
      S* out = tile.row_at(op_.out, sequence.batch, row, rows.first);
      with_width(op_.width, [&](auto width) {
        const RowTaps<decltype(width)::value, T> taps(s.weights + row, op_.width);
        if (op_.silu) {
          for (int64_t i = 0; i < rows.last - rows.first; i += lanes) store_as(out + i, silu(taps.sum(x + i)));
        } else {
          for (int64_t i = 0; i < rows.last - rows.first; i += lanes) store_as(out + i, taps.sum(x + i));
        }
      });
    }
  }

  void store_last_state(const ConvSequence& sequence, const ForwardScratch<T>& s) const {
    int64_t first = sequence.end - (op_.width - 1), valid = sequence.end;  // inputs from `valid` on count
    while (valid > max(first, sequence.begin) && !ConvTile<T, S>(op_, 0).is_reset(sequence.batch, valid - 1)) --valid;
    if (valid > max(first, sequence.begin)) {
      --valid;  // the reset itself
    } else {
      valid = first;
    }
    for (int64_t vector = 0; vector < split_.vectors; ++vector) {
      ConvTile<T, S> tile(op_, vector);
      tile.load_inputs(s.x, sequence, first, sequence.end);
      for (int64_t i = 0; i < (valid - first) * lanes; ++i) s.x[i] = 0;
      tile.template store_steps<T>(s.x, op_.last_state, sequence.index, 0, op_.width - 1);
    }
  }

  const wmk_causal_conv1d& op_;
  ConvPartition split_;
};

}  // namespace

int64_t causal_conv1d_forward_workspace(const wmk_causal_conv1d& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    return ConvForward<decltype(arithmetic), decltype(storage)>(op).workspace();
  });
}

int causal_conv1d_forward(const wmk_causal_conv1d& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    ConvForward<decltype(arithmetic), decltype(storage)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
