// One step of the causal convolution, on the CPU: a sequence of one input, without workspace.
//
// A lane holds a channel. A step reads its window and its weights once and writes the window shifted: some 1,500
// channels are microseconds, so threads start only for far more.
#include "cpu/causal_conv1d/causal_conv1d.h"

namespace wmk::WMK_ISA {
namespace {

constexpr int64_t kStepWidth = 16;           // taps in scratch; wider ones in several rounds
constexpr int64_t kStepPerThread = 1 << 17;  // taps

template <class T>
class ConvStep {
 public:
  explicit ConvStep(const wmk_causal_conv1d& op) : op_(op), vectors_(ceil_div(op.channels, lanes)) {}

  void run() const {
    const int64_t threads = min(op_.threads, 1 + op_.batch * op_.channels * op_.width / kStepPerThread);
    const int64_t parts = threads == 1 ? 1 : min(vectors_, 2 * threads);
    parallel_for(op_.batch * parts, threads, [&](int64_t item, int64_t) {
      const int64_t part = item % parts;
      for (int64_t v = vectors_ * part / parts; v < vectors_ * (part + 1) / parts; ++v) run_vector(item / parts, v);
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  static T* at(const wmk_view& view, int64_t first, int64_t second, int64_t third = 0) {
    return (T*)view.data + first * view.stride[0] + second * view.stride[1] + third * view.stride[2];
  }

  void run_vector(int64_t batch, int64_t vector) const {
    const int64_t channel = vector * lanes, past = op_.width - 1;
    const int rows = int(min(lanes, op_.channels - channel));
    const bool reset = op_.reset.data && ((const char*)op_.reset.data)[batch * op_.reset.stride[0]];
    const auto tap = [&](int64_t k) { return gather<T>(at(op_.weight, channel, k), op_.weight.stride[0], rows); };
    const Vector<T> x = gather<T>(at(op_.x, batch, channel), op_.x.stride[1], rows);
    Vector<T> sum{};
    if (op_.bias.data)
      sum = gather<T>((const T*)op_.bias.data + channel * op_.bias.stride[0], op_.bias.stride[0], rows);
    sum += tap(past) * x;
    alignas(64) T window[kStepWidth * lanes];
    // Newest first; the state may be written only after it was read, so the first round is the last inputs.
    for (int64_t end = past; end > 0; end -= min(end, kStepWidth)) {
      const int64_t count = min(end, kStepWidth), begin = end - count;
      if (reset || !op_.initial_state.data) {
        for (int64_t i = 0; i < count * lanes; ++i) window[i] = 0;
      } else {
        load_tile(window, lanes, at(op_.initial_state, batch, channel, begin), op_.initial_state.stride[1],
                  op_.initial_state.stride[2], rows, count);
      }
      for (int64_t k = count - 1; k >= 0; --k) sum += tap(begin + k) * load(window + k * lanes);
      // Input begin + k becomes begin + k - 1; the oldest is dropped.
      const int64_t dropped = begin == 0;
      if (count > dropped)
        store_tile(window + dropped * lanes, lanes, at(op_.last_state, batch, channel, begin + dropped - 1),
                   op_.last_state.stride[1], op_.last_state.stride[2], rows, count - dropped);
    }
    if (past) scatter<T>(at(op_.last_state, batch, channel, past - 1), op_.last_state.stride[1], rows, x);
    if (op_.silu) sum = silu(sum);
    scatter<T>(at(op_.out, batch, channel), op_.out.stride[1], rows, sum);
  }

  const wmk_causal_conv1d& op_;
  int64_t vectors_;
};

}  // namespace

int causal_conv1d_step(const wmk_causal_conv1d& op) {
  if (op.dtype == WMK_FLOAT32) {
    ConvStep<float>(op).run();
  } else if (op.dtype == WMK_FLOAT64) {
    ConvStep<double>(op).run();
  } else {
    return WMK_UNSUPPORTED;
  }
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
