// Any strides: a channel per lane, in lanes x lanes blocks.
#pragma once

#include "cpu/linear_scan/linear_scan.h"

namespace wmk::WMK_ISA {

constexpr int64_t kBusyItems = 8;        // with fewer items, time is cut
constexpr int64_t kSegmentSteps = 4096;  // minimum
constexpr int64_t kMaxSegments = 16;

template <class T, class S>
class StridedScan {
 public:
  StridedScan(const wmk_linear_scan& op, bool backward) : scan_{op, backward}, op_(op) {
    merged_ = merges(op.gates) && merges(op.tokens) && merges(op.out) && merges(op.grad_out) && merges(op.grad_gates) &&
              merges(op.grad_tokens);
    rows_ = merged_ ? op.batch * op.channels : op.channels;
    tiles_ = ceil_div(rows_, lanes);
    groups_ = merged_ ? 1 : op.batch;
    segments_ = 1;
    if (groups_ * tiles_ < kBusyItems) segments_ = max(1, min(kMaxSegments, op.time / kSegmentSteps));
    segment_ = round_up(ceil_div(max(op.time, 1), segments_), kPassSteps);
    segments_ = max(1, ceil_div(op.time, segment_));
  }
  // Incoming state and affine map (offset, factor): [groups][tiles][segments][lanes].
  int64_t workspace() const {
    Arena arena(nullptr);
    Scratch(arena, segments_ > 1 ? groups_ * tiles_ * segments_ * lanes : 0);
    return arena.used();
  }
  void run() const {
    Arena arena(op_.workspace);
    Scratch s(arena, segments_ > 1 ? groups_ * tiles_ * segments_ * lanes : 0);
    if (segments_ > 1) {
      parallel_for(groups_ * tiles_ * segments_, op_.threads, [&](int64_t item, int64_t) {
        Tile tile = tile_of(item / segments_);
        Vector<T> sum{}, product = broadcast(T(1));
        run_segment<true>(tile, item % segments_, sum, product);
        store(s.offset + item * lanes, sum);
        store(s.factor + item * lanes, product);
      });
      for (int64_t item = 0; item < groups_ * tiles_; ++item) pass_state(s, item);
    }
    parallel_for(groups_ * tiles_ * segments_, op_.threads, [&](int64_t item, int64_t) {
      Tile tile = tile_of(item / segments_);
      int64_t segment = item % segments_;
      Vector<T> state = segments_ > 1 ? load(s.incoming + item * lanes) : incoming(tile), unused{};
      run_segment<false>(tile, segment, state, unused);
      if (segment == (scan_.backward ? 0 : segments_ - 1))
        for (int i = 0; i < tile.rows; ++i) scan_.store_outgoing(batch_of(tile, i), channel_of(tile, i), state[i]);
      flush_streams();
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;
  static constexpr int kPassSteps = 4 * lanes;  // four blocks, which overlap in the pipeline
  typedef typename Scan<T>::Mask Mask;

  struct Scratch {
    T *offset, *factor, *incoming;
    Scratch(Arena& arena, int64_t count)
        : offset(arena.take<T>(count)), factor(arena.take<T>(count)), incoming(arena.take<T>(count)) {}
  };
  struct Tile {
    int64_t group, row;
    int rows;
  };

  // Whether batch and channels merge to rows at one stride.
  bool merges(const wmk_view& view) const {
    return !view.data || op_.batch == 1 || op_.channels == 1 || view.stride[0] == op_.channels * view.stride[1];
  }
  Plane plane(const wmk_view& view, int64_t group) const {
    int64_t row_stride = merged_ && op_.channels == 1 ? view.stride[0] : view.stride[1];
    return {(char*)view.data + group * view.stride[0] * int64_t(sizeof(S)), row_stride, view.stride[2]};
  }
  Tile tile_of(int64_t item) const {
    int64_t row = item % tiles_ * lanes;
    return {item / tiles_, row, int(min(lanes, rows_ - row))};
  }
  int64_t batch_of(const Tile& tile, int lane) const { return merged_ ? (tile.row + lane) / op_.channels : tile.group; }
  int64_t channel_of(const Tile& tile, int lane) const {
    return merged_ ? (tile.row + lane) % op_.channels : tile.row + lane;
  }
  Vector<T> incoming(const Tile& tile) const {
    Vector<T> values{};
    for (int i = 0; i < tile.rows; ++i) values[i] = scan_.incoming(batch_of(tile, i), channel_of(tile, i));
    return values;
  }

  // Combines affine maps into incoming states. A zero state stays zero for any factor; NaN does not cross a reset,
  // whose factor is 0.
  void pass_state(const Scratch& s, int64_t item) const {
    Vector<T> state = incoming(tile_of(item));
    for (int64_t i = 0; i < segments_; ++i) {
      int64_t segment = scan_.backward ? segments_ - 1 - i : i, at = (item * segments_ + segment) * lanes;
      store(s.incoming + at, state);
      Vector<T> offset = load(s.offset + at), factor = load(s.factor + at);
      state = ((state == 0) | (factor == 0)) ? offset : factor * state + offset;
    }
  }

  // False if none.
  bool load_resets(Mask* reset, const Tile& tile, int64_t position, int64_t steps) const {
    if (!op_.reset.data) return false;
    bool any = false;
    for (int64_t step = 0; step < steps; ++step) {
      reset[step] = Mask{};
      for (int lane = 0; lane < tile.rows;) {
        int64_t batch = batch_of(tile, lane);
        bool here = scan_.is_reset(batch, position + step);
        for (; lane < tile.rows && batch_of(tile, lane) == batch; ++lane)
          if (here) reset[step][lane] = -1;
        any |= here;
      }
    }
    return any;
  }

  // [position, position + steps) of a plane to [position][lane].
  void load_square(T* square, const wmk_view& view, const Tile& tile, int64_t position, int64_t steps) const {
    Plane p = plane(view, tile.group);
    int64_t time = scan_.time_at(position), step = op_.reverse ? -1 : 1;
    const S* from = (const S*)p.data + tile.row * p.row_stride + time * p.time_stride;
    if (step < 0 && p.time_stride == 1 && steps % lanes == 0) {
      // whole lines forwards, into reversed rows
      load_tile(square + (steps - 1) * lanes, -lanes, from - (steps - 1), p.row_stride, 1, tile.rows, steps);
    } else {
      load_tile(square, lanes, from, p.row_stride, step * p.time_stride, tile.rows, steps);
    }
  }
  void store_square(const T* square, const wmk_view& view, const Tile& tile, int64_t position, int64_t steps,
                    bool stream) const {
    Plane p = plane(view, tile.group);
    int64_t time = scan_.time_at(position), step = op_.reverse ? -1 : 1, pitch = lanes;
    S* to = (S*)p.data + tile.row * p.row_stride + time * p.time_stride;
    if (step < 0 && p.time_stride == 1 && steps % lanes == 0) {
      square += (steps - 1) * lanes;
      pitch = -lanes;
      to -= steps - 1;
      step = 1;
    }
    if (stream && p.time_stride == 1 && step == 1 && steps % lanes == 0 && tile.rows == lanes &&
        sizeof(S) == sizeof(T) && int64_t(to) % kVectorBytes == 0 && p.row_stride % lanes == 0) {
      for (int64_t done = 0; done < steps; done += lanes) {
        Vector<T> flipped[lanes];
        for (int i = 0; i < lanes; ++i) flipped[i] = load(square + (done + i) * pitch);
        transpose<T>(flipped);
        for (int i = 0; i < lanes; ++i) stream_as(to + i * p.row_stride + done, flipped[i]);
      }
    } else {
      store_tile(square, pitch, to, p.row_stride, step * p.time_stride, tile.rows, steps);
    }
  }
  // The pass after the next.
  void prefetch(const wmk_view& view, const Tile& tile, int64_t position) const {
    int64_t ahead = position + (scan_.backward ? -2 : 2) * kPassSteps;
    if (ahead < 0 || ahead + kPassSteps > op_.time) return;
    Plane p = plane(view, tile.group);
    int64_t time = min(scan_.time_at(ahead), scan_.time_at(ahead + kPassSteps - 1));
    const char* from = (const char*)((const S*)p.data + tile.row * p.row_stride + time * p.time_stride);
    int64_t bytes = p.time_stride == 1 ? kPassSteps * int64_t(sizeof(S)) : 1;
    for (int row = 0; row < tile.rows; ++row)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(from + row * p.row_stride * int64_t(sizeof(S)) + byte, 0, 2);
  }

  // Ends: only the segment's outgoing state and product of gates.
  template <bool Ends>
  void run_segment(const Tile& tile, int64_t segment, Vector<T>& state, Vector<T>& product) const {
    int64_t begin = segment * segment_, end = min(op_.time, begin + segment_);
    bool stream = !Ends && scan_.streams();
    int64_t passes = ceil_div(end - begin, kPassSteps);
    for (int64_t i = 0; i < passes; ++i) {
      int64_t position = begin + (scan_.backward ? passes - 1 - i : i) * kPassSteps;
      int64_t steps = min(kPassSteps, end - position);
      alignas(64) T gates[kPassSteps * lanes], values[kPassSteps * lanes];
      Mask reset[kPassSteps];
      prefetch(op_.gates, tile, position);
      prefetch(scan_.backward ? op_.grad_out : op_.tokens, tile, position);
      bool any = load_resets(reset, tile, position, steps);
      load_square(gates, op_.gates, tile, position, steps);
      load_square(values, scan_.backward ? op_.grad_out : op_.tokens, tile, position, steps);
      if (!scan_.backward) {
        for (int64_t t = 0; t < steps; ++t) {
          Vector<T> gate = load(gates + t * lanes), token = load(values + t * lanes), moved = gate * state + token;
          state = any ? reset[t] ? token : moved : moved;
          if (Ends) product = any ? reset[t] ? Vector<T>{} : product * gate : product * gate;
          store(values + t * lanes, state);
        }
        if (!Ends) store_square(values, op_.out, tile, position, steps, stream);
      } else {
        for (int64_t t = steps; t-- > 0;) {
          Vector<T> gate = load(gates + t * lanes), grad = load(values + t * lanes) + state, moved = gate * grad;
          state = any ? reset[t] ? Vector<T>{} : moved : moved;
          if (Ends) product = any ? reset[t] ? Vector<T>{} : product * gate : product * gate;
          store(values + t * lanes, grad);
        }
        if (!Ends) backward_epilogue(values, reset, any, tile, position, steps, stream);
      }
    }
  }

  // A gate's gradient is the state's times the previous state.
  void backward_epilogue(const T* grads, const Mask* reset, bool any, const Tile& tile, int64_t position, int64_t steps,
                         bool stream) const {
    alignas(64) T before[(kPassSteps + 1) * lanes];
    prefetch(op_.out, tile, position);
    load_square(before + lanes, op_.out, tile, position, steps);
    if (position > 0) {
      load_square(before, op_.out, tile, position - 1, 1);
    } else {
      for (int i = 0; i < lanes; ++i)
        before[i] = i < tile.rows ? scan_.initial(batch_of(tile, i), channel_of(tile, i)) : T(0);
    }
    for (int64_t t = 0; t < steps; ++t) {
      Vector<T> grad = load(grads + t * lanes) * load(before + t * lanes);
      store(before + t * lanes, any ? reset[t] ? Vector<T>{} : grad : grad);
    }
    store_square(grads, op_.grad_tokens, tile, position, steps, stream);
    store_square(before, op_.grad_gates, tile, position, steps, stream);
  }

  Scan<T> scan_;
  const wmk_linear_scan& op_;
  bool merged_;                    // rows: channels of all batch elements
  int64_t rows_, tiles_, groups_;  // rows and tiles per group
  int64_t segments_, segment_;     // number and length
};

}  // namespace wmk::WMK_ISA
