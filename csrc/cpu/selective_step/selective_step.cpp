// One step of the selective scan, on the CPU.
//
// A channel's contiguous states fill the lanes and are read, updated and written once. As many channels as lanes share
// vectors of step sizes, inputs and gates, and one tree of additions for their outputs. 1536 channels of 16 states are
// some 30,000 instructions: only far larger problems start threads.
#include "cpu/common/load_store.h"
#include "cpu/common/parallel.h"
#include "cpu/dispatch/isa.h"
#include "cpu/simd/shuffle.h"

namespace wmk::WMK_ISA {
namespace {

constexpr int64_t kMaxStates = 1024;
constexpr int64_t kStatesPerThread = 100000;

template <class T>
static Vector<T> gather_view(const wmk_view& view, int64_t dtype, int64_t offset, int64_t stride, int count) {
  if constexpr (sizeof(T) == 8) {
    return gather<T>((const double*)view.data + offset, stride, count);
  } else {
    if (dtype == WMK_BFLOAT16) return gather<T>((const BFloat16*)view.data + offset, stride, count);
    if (dtype == WMK_FLOAT16) return gather<T>((const Float16*)view.data + offset, stride, count);
    return gather<T>((const float*)view.data + offset, stride, count);
  }
}
template <class T>
static void scatter_view(const wmk_view& view, int64_t dtype, int64_t offset, int64_t stride, int count,
                         Vector<T> values) {
  if constexpr (sizeof(T) == 8) {
    scatter<T>((double*)view.data + offset, stride, count, values);
  } else {
    if (dtype == WMK_FLOAT32) scatter<T>((float*)view.data + offset, stride, count, values);
    if (dtype == WMK_BFLOAT16) scatter<T>((BFloat16*)view.data + offset, stride, count, values);
    if (dtype == WMK_FLOAT16) scatter<T>((Float16*)view.data + offset, stride, count, values);
  }
}

template <class T, class State>
class Step {
 public:
  explicit Step(const wmk_selective_step& step) : step_(step), per_group_(step.channels / step.groups) {
    tiles_ = ceil_div(per_group_, lanes);
  }

  // A work item is one group of a batch element, or some of its tiles if threads would idle.
  void run() const {
    int64_t threads = min(step_.threads, 1 + step_.batch * step_.channels * step_.state / kStatesPerThread);
    int64_t batch_groups = step_.batch * step_.groups;
    int64_t splits = max(1, min(tiles_, ceil_div(2 * threads, batch_groups)));
    if (threads == 1) splits = 1;
    parallel_for(batch_groups * splits, threads, [&](int64_t item, int64_t) {
      int64_t batch_group = item / splits, split = item % splits;
      run_tiles(batch_group / step_.groups, batch_group % step_.groups, tiles_ * split / splits,
                tiles_ * (split + 1) / splits);
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  static int64_t at(const wmk_view& view, int64_t first, int64_t second) {
    return first * view.stride[0] + second * view.stride[1];
  }
  Vector<T> parameter(const wmk_view& view, int64_t channel, int rows) const {
    return view.data ? gather<T>((const T*)view.data + channel * view.stride[0], view.stride[0], rows) : Vector<T>{};
  }

  void run_tiles(int64_t batch, int64_t group, int64_t first, int64_t last) const {
    int64_t state_row = batch;
    if (step_.indices.data) state_row = ((const int64_t*)step_.indices.data)[batch * step_.indices.stride[0]];
    bool reset = step_.reset.data && ((const char*)step_.reset.data)[batch * step_.reset.stride[0]];
    alignas(64) T B[kMaxStates + 64], C[kMaxStates + 64];
    for (int64_t n = 0; n < step_.state; n += lanes) {
      int count = int(min(lanes, step_.state - n));
      auto projection = [&](const wmk_view& view) {
        return gather_view<T>(view, step_.dtype, at(view, batch, group) + n * view.stride[2], view.stride[2], count);
      };
      store(B + n, projection(step_.B));
      store(C + n, projection(step_.C));
    }
    for (int64_t tile = first; tile < last; ++tile) {
      int64_t channel = group * per_group_ + tile * lanes;
      int rows = int(min(lanes, per_group_ - tile * lanes));
      Vector<T> out = state_row < 0 ? Vector<T>{} : run_tile(batch, state_row, channel, rows, reset, B, C);
      scatter_view<T>(step_.out, step_.dtype, at(step_.out, batch, channel), step_.out.stride[1], rows, out);
    }
  }

  Vector<T> run_tile(int64_t batch, int64_t state_row, int64_t channel, int rows, bool reset, const T* B,
                     const T* C) const {
    auto activation = [&](const wmk_view& view) {
      return gather_view<T>(view, step_.dtype, at(view, batch, channel), view.stride[1], rows);
    };
    Vector<T> u = activation(step_.u), size = activation(step_.delta) + parameter(step_.delta_bias, channel, rows);
    if (step_.delta_softplus) size = softplus(size);
    Vector<T> input = size * u, scaled = size * kLog2e<T>;
    alignas(64) T scales[lanes], inputs[lanes];
    store(scales, scaled);
    store(inputs, input);
    Vector<T> products[lanes] = {};
    const TilePointers pointers = {(const State*)step_.state_in.data + at(step_.state_in, state_row, channel),
                                   (State*)step_.state_out.data + at(step_.state_out, state_row, channel),
                                   (const T*)step_.A.data + channel * step_.A.stride[0],
                                   step_.state_in.stride[1],
                                   step_.state_out.stride[1],
                                   step_.A.stride[0],
                                   step_.state_in.stride[2],
                                   step_.state_out.stride[2],
                                   step_.A.stride[1]};
    bool contiguous = pointers.from_stride == 1 && pointers.to_stride == 1 && pointers.A_stride == 1;
    if (contiguous && step_.state % lanes == 0 && !reset) {
      for (int64_t n = 0; n < step_.state; n += lanes)
        update_vectors(pointers, n, rows, scales, inputs, B, C, products);
    } else {
      for (int row = 0; row < rows; ++row) products[row] = update(pointers, row, scales[row], inputs[row], reset, B, C);
    }
    Vector<T> out = sum_lanes<T>([&](int row) { return products[row]; });
    if (step_.D.data) out += parameter(step_.D, channel, rows) * u;
    if (step_.z.data) {
      Vector<T> z = activation(step_.z);
      out *= silu(z);
    }
    return out;
  }

  // To the first channel; strides by channel and state.
  struct TilePointers {
    const State* from;
    State* to;
    const T* A;
    int64_t from_row, to_row, A_row;
    int64_t from_stride, to_stride, A_stride;
  };

  // One vector of contiguous states per channel. Locals only: stores may alias the pointers.
  __attribute__((always_inline)) static void update_vectors(const TilePointers& r, int64_t n, int rows, const T* scales,
                                                            const T* inputs, const T* B, const T* C,
                                                            Vector<T>* products) {
    const State* from = r.from + n;
    State* to = r.to + n;
    const T* A = r.A + n;
    const int64_t from_row = r.from_row, to_row = r.to_row, A_row = r.A_row;
    const Vector<T> B_n = load(B + n), C_n = load(C + n);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      Vector<T> decay = exp2(scales[row] * load(A));
      Vector<T> h = decay * load_as(from, T(0)) + inputs[row] * B_n;
      store_as(to, h);
      products[row] += h * C_n;
      from += from_row, to += to_row, A += A_row;
    }
  }

  // A channel's states, at any stride; returns products with C.
  Vector<T> update(const TilePointers& r, int64_t row, T scale, T input, bool reset, const T* B, const T* C) const {
    const State* from = r.from + row * r.from_row;
    State* to = r.to + row * r.to_row;
    const T* A = r.A + row * r.A_row;
    Vector<T> products{};
    for (int64_t n = 0; n < step_.state; n += lanes) {
      int count = int(min(lanes, step_.state - n));
      Vector<T> h = input * load(B + n);
      if (!reset) {
        Vector<T> decay = exp2(scale * gather<T>(A + n * r.A_stride, r.A_stride, count));
        h += decay * gather<T>(from + n * r.from_stride, r.from_stride, count);
      }
      scatter<T>(to + n * r.to_stride, r.to_stride, count, h);
      products += h * load(C + n);
    }
    return products;
  }

  const wmk_selective_step& step_;
  int64_t per_group_, tiles_;
};

}  // namespace

int selective_step(const wmk_selective_step& step) {
  if (step.state > kMaxStates || (step.dtype == WMK_FLOAT64) != (step.state_dtype == WMK_FLOAT64))
    return WMK_UNSUPPORTED;
  if (step.state_dtype == WMK_FLOAT32) Step<float, float>(step).run();
  if (step.state_dtype == WMK_FLOAT64) Step<double, double>(step).run();
  if (step.state_dtype == WMK_BFLOAT16) Step<float, BFloat16>(step).run();
  if (step.state_dtype == WMK_FLOAT16) Step<float, Float16>(step).run();
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
