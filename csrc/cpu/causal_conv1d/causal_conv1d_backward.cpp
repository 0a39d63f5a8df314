// Causal convolution, backward, on the CPU.
//
// With g the gradient of the sum, which silu's slope scales:
//   dx_t = sum_k weight[width - 1 - k] g_{t + k},  dweight[k] = sum_t g_t x_{t - (width - 1) + k},  dbias = sum_t g_t
// Nothing was kept for it: a tile loads its inputs and output gradients, `width` - 1 more steps on either side, and
// sums silu's argument again, 3 `width` multiply-adds per element in all. Memory is read twice and written once.
// Where time is contiguous and no sequence begins, ends or is reset, lanes hold steps (causal_conv1d_forward.cpp).
// Weight gradients of a work item are added in registers per tile, then over work items in a fixed order.
#include "cpu/causal_conv1d/causal_conv1d.h"

namespace wmk::WMK_ISA {
namespace {

template <class T>
struct BackwardScratch {
  T *x, *sum, *g, *grad_x, *weights;
  T *row, *row_g;  // inputs and g of a channel, where lanes hold steps
  int64_t* back;
  BackwardScratch(Arena& arena, const wmk_causal_conv1d& op, const ConvPartition& split) {
    constexpr int lanes = kLanes<T>;
    x = arena.take<T>((split.steps + 2 * op.width) * lanes);
    sum = arena.take<T>((split.steps + op.width) * lanes);
    g = arena.take<T>((split.steps + op.width) * lanes);
    grad_x = arena.take<T>((split.steps + op.width) * lanes);
    weights = arena.take<T>(split.per_group * (op.width + 1) * lanes);
    for (T** of_row : {&row, &row_g}) *of_row = arena.take<T>(row_size(op, split, lanes));
    back = arena.take<int64_t>(split.steps + round_up(op.width, lanes));
  }
};

template <class T, class S>
class ConvBackward {
 public:
  explicit ConvBackward(const wmk_causal_conv1d& op)
      : op_(op),
        split_(op, lanes, {&op.x, &op.grad_out, &op.grad_x}),
        past_(op.width - 1),
        weights_((op.width + 1) * lanes) {}

  int64_t workspace() const {
    return split_.threads * scratch_bytes<BackwardScratch<T>>(op_, split_) +
           split_.spans * split_.vectors * weights_ * int64_t(sizeof(T));
  }

  void run() const {
    parallel_for(split_.spans * split_.groups, split_.threads,
                 [&](int64_t item, int64_t thread) { run_item(ConvItem(op_, split_, item), scratch(thread)); });
    parallel_for(split_.vectors, split_.threads, [&](int64_t vector, int64_t thread) {
      reduce_partials(ConvTile<T, S>(op_, vector), scratch(thread).weights);
    });
    if (!op_.grad_initial_state.data || past_ == 0) return;
    parallel_for(op_.sequences, split_.threads, [&](int64_t index, int64_t thread) {
      const ConvSequence sequence = sequence_at(op_, index);
      if (sequence.begin == sequence.end) pass_state(sequence, scratch(thread).grad_x);
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  BackwardScratch<T> scratch(int64_t thread) const {
    return scratch_of<BackwardScratch<T>>(op_, split_, op_.workspace, thread);
  }
  // dweight and dbias of a work item, as its weights.
  T* partial(int64_t span, int64_t vector) const {
    T* first = (T*)((char*)op_.workspace + split_.threads * scratch_bytes<BackwardScratch<T>>(op_, split_));
    return first + (span * split_.vectors + vector) * weights_;
  }

  void run_item(const ConvItem& item, const BackwardScratch<T>& s) const {
    for (int64_t i = 0; i < item.vectors; ++i) {
      ConvTile<T, S>(op_, item.vector + i).load_weights(s.weights + i * weights_);
      T* sums = partial(item.span, item.vector + i);
      for (int64_t j = 0; j < weights_; ++j) sums[j] = 0;
    }
    for_each_tile(op_, item, stretch_steps(op_, split_), [&](const ConvSequence& sequence, int64_t t, int64_t steps) {
      const ConvRows rows(op_, split_, sequence, t, steps, round_up(past_, lanes), lanes, s.back);
      run_tiles(item, s, sequence, t, rows.first);
      run_rows(item, s, sequence, rows);
      run_tiles(item, s, sequence, rows.last, t + steps);
    });
  }

  void run_tiles(const ConvItem& item, const BackwardScratch<T>& s, const ConvSequence& sequence, int64_t t,
                 int64_t last) const {
    for (int64_t steps; t < last; t += steps) {
      steps = min(split_.steps, last - t);
      const int64_t known = steps + min(past_, sequence.end - t - steps);  // steps whose g the tile needs
      const int64_t* back = count_valid_taps(op_, sequence, t, t + known, s.back) ? s.back : nullptr;
      for (int64_t i = 0; i < item.vectors; ++i) {
        const T* weights = s.weights + i * weights_;
        ConvTile<T, S> tile(op_, item.vector + i);
        tile.load_inputs(s.x, sequence, t - past_, t + known);
        tile.template load_steps<S>(s.g, op_.grad_out, sequence.batch, t, known);
        if (op_.silu) {
          convolve(s.x, weights, s.sum, known, op_.width, back);
          for (int64_t j = 0; j < known; ++j)
            store(s.g + j * lanes, load(s.g + j * lanes) * silu_slope(load(s.sum + j * lanes)));
        }
        T* sums = partial(item.span, item.vector + i);
        with_width(op_.width,
                   [&](auto width) { add_weight_gradients<decltype(width)::value>(s.x, s.g, steps, back, sums); });
        const int64_t before = t == sequence.begin && op_.grad_initial_state.data ? past_ : 0;
        with_width(op_.width, [&](auto width) {
          input_gradients<decltype(width)::value>(weights, s.g, before, steps, known, back, s.grad_x);
        });
        add_state_gradient(tile, sequence, t - before, t + steps, back ? back[known - 1] : op_.width, s);
        tile.template store_steps<S>(s.grad_x + before * lanes, op_.grad_x, sequence.batch, t, steps);
        if (before) tile.template store_steps<T>(s.grad_x, op_.grad_initial_state, sequence.index, 0, past_);
      }
    }
  }

  void run_rows(const ConvItem& item, const BackwardScratch<T>& s, const ConvSequence& sequence,
                const ConvRows& rows) const {
    if (rows.first == rows.last) return;
    ConvTile<T, S> tile(op_, item.vector);  // the item's only one
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t batch = sequence.batch, steps = rows.last - rows.first;
      const T* x = tile.load_row(s.row, batch, row, rows.first - past_, rows.last + round_up(past_, lanes));
      const S* grad_out = tile.row_at(op_.grad_out, batch, row, rows.first);
      S* grad_x = tile.row_at(op_.grad_x, batch, row, rows.first);
      T* sums = partial(item.span, item.vector) + row;
      with_width(op_.width, [&](auto width) {
        const RowTaps<decltype(width)::value, T> taps(s.weights + row, op_.width);
        add_row_weight_gradients(taps, x, grad_out, s.row_g, steps, sums);
        for (int64_t i = 0; i < steps; i += lanes) store_as(grad_x + i, taps.transposed_sum(s.row_g + i));
      });
    }
  }

  // g of the steps, and of those behind them that their inputs reach.
  template <int K>
  void add_row_weight_gradients(const RowTaps<K, T>& taps, const T* x, const S* grad_out, T* g, int64_t steps,
                                T* sums) const {
    const auto g_at = [&](int64_t i) {
      Vector<T> value = load_as(grad_out + i, T(0));
      if (op_.silu) value *= silu_slope(taps.sum(x + i));
      store(g + i, value);
      return value;
    };
    Vector<T> total[K + 1] = {};
    for (int64_t i = 0; i < steps; i += lanes) {
      const Vector<T> g_i = g_at(i);
      for (int k = 0; k < K; ++k) total[k] += g_i * load(x + i + k);
      total[K] += g_i;
    }
    for (int64_t i = steps; i < steps + past_; i += lanes) g_at(i);
    for (int k = 0; k < K; ++k) sums[k * lanes] += lane_sum(total[k]);
    sums[op_.width * lanes] += lane_sum(total[K]);
    for (int64_t k = K; k < (K > 0 ? K : op_.width); ++k) {
      Vector<T> of_tap{};
      for (int64_t i = 0; i < steps; i += lanes) of_tap += load(g + i) * load(x + i + k);
      sums[k * lanes] += lane_sum(of_tap);
    }
  }

  template <int K>
  void add_weight_gradients(const T* x, const T* g, int64_t steps, const int64_t* back, T* sums) const {
    Vector<T> bias{};
    for (int64_t i = 0; i < steps; ++i) bias += load(g + i * lanes);
    store(sums + op_.width * lanes, load(sums + op_.width * lanes) + bias);
    if constexpr (K > 0) {
      if (!back) {
        Vector<T> total[K] = {};
        for (int64_t i = 0; i < steps; ++i) {
          const Vector<T> g_i = load(g + i * lanes);
          for (int k = 0; k < K; ++k) total[k] += g_i * load(x + (i + k) * lanes);
        }
        for (int k = 0; k < K; ++k) store(sums + k * lanes, load(sums + k * lanes) + total[k]);
        return;
      }
    }
    for (int64_t k = 0; k < op_.width; ++k) {
      Vector<T> total{};
      for (int64_t i = 0; i < steps; ++i) {
        const bool valid = !back || op_.width - k <= back[i];
        total += load(g + i * lanes) * (valid ? load(x + (i + k) * lanes) : Vector<T>{});
      }
      store(sums + k * lanes, load(sums + k * lanes) + total);
    }
  }

  // Of steps -before .. steps of a tile whose g begins at step 0 and ends at step `known`, which is the sequence's end
  // or more than any step reaches.
  template <int K>
  void input_gradients(const T* weights, const T* g, int64_t before, int64_t steps, int64_t known, const int64_t* back,
                       T* grad_x) const {
    for (int64_t i = -before; i < steps; ++i) {
      const int64_t first = max(0, -i), end = min(op_.width, known - i);
      Vector<T> sum{};
      if (K > 0 && !back && first == 0 && end == op_.width) {
        for (int k = 0; k < K; ++k) sum += load(weights + (K - 1 - k) * lanes) * load(g + (i + k) * lanes);
      } else {
        for (int64_t k = first; k < end && (!back || back[i + k] > k); ++k)
          sum += load(weights + (past_ - k) * lanes) * load(g + (i + k) * lanes);
      }
      store(grad_x + (i + before) * lanes, sum);
    }
  }

  // The last state's gradient belongs to the sequence's last inputs, `back` of them after the last reset.
  void add_state_gradient(const ConvTile<T, S>& tile, const ConvSequence& sequence, int64_t first, int64_t last,
                          int64_t back, const BackwardScratch<T>& s) const {
    const int64_t begin = max(first, sequence.end - min(past_, back));
    if (!op_.grad_last_state.data || begin >= last) return;
    tile.template load_steps<T>(s.sum, op_.grad_last_state, sequence.index, begin - (sequence.end - past_),
                                last - begin);
    for (int64_t i = 0; i < last - begin; ++i) {
      T* to = s.grad_x + (begin - first + i) * lanes;
      store(to, load(to) + load(s.sum + i * lanes));
    }
  }

  void pass_state(const ConvSequence& sequence, T* state) const {
    for (int64_t vector = 0; vector < split_.vectors; ++vector) {
      ConvTile<T, S> tile(op_, vector);
      if (op_.grad_last_state.data) {
        tile.template load_steps<T>(state, op_.grad_last_state, sequence.index, 0, past_);
      } else {
        for (int64_t i = 0; i < past_ * lanes; ++i) state[i] = 0;
      }
      tile.template store_steps<T>(state, op_.grad_initial_state, sequence.index, 0, past_);
    }
  }

  void reduce_partials(const ConvTile<T, S>& tile, T* total) const {
    for (int64_t j = 0; j < weights_; j += lanes) {
      Vector<T> sum{};
      for (int64_t span = 0; span < split_.spans; ++span) sum += load(partial(span, tile.channel / lanes) + j);
      store(total + j, sum);
    }
    store_tile(total, lanes, (T*)op_.grad_weight.data + tile.channel * op_.width, op_.width, 1, tile.rows, op_.width);
    if (op_.grad_bias.data)
      scatter<T>((T*)op_.grad_bias.data + tile.channel, 1, tile.rows, load(total + op_.width * lanes));
  }

  const wmk_causal_conv1d& op_;
  ConvPartition split_;
  int64_t past_, weights_;  // width - 1; elements of a vector's weights and bias
};

}  // namespace

int64_t causal_conv1d_backward_workspace(const wmk_causal_conv1d& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    return ConvBackward<decltype(arithmetic), decltype(storage)>(op).workspace();
  });
}

int causal_conv1d_backward(const wmk_causal_conv1d& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    ConvBackward<decltype(arithmetic), decltype(storage)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
