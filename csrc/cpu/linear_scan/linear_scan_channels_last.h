#pragma once

#include "cpu/linear_scan/linear_scan.h"

namespace wmk::WMK_ISA {

constexpr int64_t kRowBytes = 4096;  // of states per item

template <class T, class S>
class ChannelsLastScan {
 public:
  static bool applies(const wmk_linear_scan& op, bool backward) {
    const wmk_view* views[] = {&op.gates, backward ? &op.grad_out : &op.tokens, &op.out, &op.grad_gates,
                               &op.grad_tokens};
    for (const wmk_view* view : views)
      if (view->data && view->stride[1] != 1) return false;
    return op.channels >= kLanes<T>;
  }
  ChannelsLastScan(const wmk_linear_scan& op, bool backward) : scan_{op, backward}, op_(op) {
    int64_t vectors = ceil_div(op.channels, lanes), most = kRowBytes / kVectorBytes;
    vectors_ = max(1, min(most, ceil_div(vectors * op.batch, op.threads)));
    blocks_ = ceil_div(vectors, vectors_);
  }
  void run() const {
    parallel_for(op_.batch * blocks_, op_.threads, [&](int64_t item, int64_t) {
      int64_t batch = item / blocks_, channel = item % blocks_ * vectors_ * lanes;
      int64_t channels = min(vectors_ * lanes, op_.channels - channel);
      if (scan_.backward) {
        run_backward(batch, channel, int(channels));
      } else {
        run_forward(batch, channel, int(channels));
      }
      flush_streams();
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  const S* from(const wmk_view& view, int64_t batch, int64_t channel, int64_t time) const {
    return (const S*)view.data + batch * view.stride[0] + channel + time * view.stride[2];
  }
  S* to(const wmk_view& view, int64_t batch, int64_t channel, int64_t time) const {
    return (S*)from(view, batch, channel, time);
  }
  const S* ahead(const wmk_view& view, int64_t batch, int64_t channel, int64_t position, int64_t distance) const {
    int64_t there = position + distance;
    return from(view, batch, channel, scan_.time_at(there < 0 || there >= op_.time ? position : there));
  }
  // Every row starts at a multiple of a vector.
  bool aligned(const wmk_view& view, int64_t batch, int64_t channel) const {
    int64_t width = lanes * int64_t(sizeof(S));
    return int64_t(from(view, batch, channel, 0)) % width == 0 && view.stride[2] * int64_t(sizeof(S)) % width == 0;
  }

  void run_forward(int64_t batch, int64_t channel, int channels) const {
    alignas(64) T state[kRowBytes / sizeof(T)];
    for (int i = 0; i < channels; ++i) state[i] = scan_.incoming(batch, channel + i);
    bool stream = scan_.streams() && aligned(op_.out, batch, channel);
    int whole = channels / lanes * lanes;
    for (int64_t p = 0; p < op_.time; ++p) {
      int64_t time = scan_.time_at(p);
      const S *gates = from(op_.gates, batch, channel, time), *tokens = from(op_.tokens, batch, channel, time);
      S* out = to(op_.out, batch, channel, time);
      bool reset = scan_.is_reset(batch, p);
      const S *next_gates = ahead(op_.gates, batch, channel, p, 2),
              *next_tokens = ahead(op_.tokens, batch, channel, p, 2);
      auto advance = [&](int i, int count) {
        __builtin_prefetch(next_gates + i, 0, 2);
        __builtin_prefetch(next_tokens + i, 0, 2);
        Vector<T> h = load_lanes<T>(tokens + i, count);
        if (!reset) h += load_lanes<T>(gates + i, count) * load(state + i);
        store(state + i, h);
        return h;
      };
      if (stream) {
        for (int i = 0; i < whole; i += lanes) stream_as(out + i, advance(i, lanes));
      } else {
        for (int i = 0; i < whole; i += lanes) store_as(out + i, advance(i, lanes));
      }
      if (whole < channels) store_lanes<T>(out + whole, advance(whole, channels - whole), channels - whole);
    }
    for (int i = 0; i < channels; ++i) scan_.store_outgoing(batch, channel + i, state[i]);
  }

  void run_backward(int64_t batch, int64_t channel, int channels) const {
    alignas(64) T dh[kRowBytes / sizeof(T)], initial[kRowBytes / sizeof(T)];
    for (int i = 0; i < channels; ++i) {
      dh[i] = scan_.incoming(batch, channel + i);
      initial[i] = scan_.initial(batch, channel + i);
    }
    bool stream =
        scan_.streams() && aligned(op_.grad_gates, batch, channel) && aligned(op_.grad_tokens, batch, channel);
    int whole = channels / lanes * lanes;
    for (int64_t p = op_.time - 1; p >= 0; --p) {
      int64_t time = scan_.time_at(p);
      const S *gates = from(op_.gates, batch, channel, time), *grad_out = from(op_.grad_out, batch, channel, time);
      const S* before = p > 0 ? from(op_.out, batch, channel, scan_.time_at(p - 1)) : nullptr;
      S* grad_gates = to(op_.grad_gates, batch, channel, time);
      S* grad_tokens = to(op_.grad_tokens, batch, channel, time);
      bool reset = scan_.is_reset(batch, p);
      const S *next_gates = ahead(op_.gates, batch, channel, p, -2), *next_out = ahead(op_.out, batch, channel, p, -3);
      const S* next_grad = ahead(op_.grad_out, batch, channel, p, -2);
      auto advance = [&](int i, int count, Vector<T>& grad_gate) {
        __builtin_prefetch(next_gates + i, 0, 2);
        __builtin_prefetch(next_out + i, 0, 2);
        __builtin_prefetch(next_grad + i, 0, 2);
        Vector<T> grad = load_lanes<T>(grad_out + i, count) + load(dh + i);
        Vector<T> previous = before ? load_lanes<T>(before + i, count) : load(initial + i);
        grad_gate = reset ? Vector<T>{} : grad * previous;
        store(dh + i, reset ? Vector<T>{} : load_lanes<T>(gates + i, count) * grad);
        return grad;
      };
      Vector<T> grad_gate;
      for (int i = 0; i < whole; i += lanes) {
        Vector<T> grad = advance(i, lanes, grad_gate);
        if (stream) {
          stream_as(grad_tokens + i, grad);
          stream_as(grad_gates + i, grad_gate);
        } else {
          store_as(grad_tokens + i, grad);
          store_as(grad_gates + i, grad_gate);
        }
      }
      if (whole < channels) {
        Vector<T> grad = advance(whole, channels - whole, grad_gate);
        store_lanes<T>(grad_tokens + whole, grad, channels - whole);
        store_lanes<T>(grad_gates + whole, grad_gate, channels - whole);
      }
    }
    for (int i = 0; i < channels; ++i) scan_.store_outgoing(batch, channel + i, dh[i]);
  }

  Scan<T> scan_;
  const wmk_linear_scan& op_;
  int64_t vectors_, blocks_;  // per item, per batch element
};

}  // namespace wmk::WMK_ISA
