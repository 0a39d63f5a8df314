// One step of the SSD scan, on a GPU: a warp reads and writes the state of four channels of a head once, 32 states at a
// time, with all loads independent. Bound by the state's traffic, two numbers per state and channel, or by the latency
// of a launch and one chain of loads. Predicted, not measured.
#pragma once

#include "cuda/common/primitives.cuh"

namespace wmk {

constexpr int kStepThreads = 128, kStepWarps = kStepThreads / 32, kStepChannels = 4;

template <typename T>
__global__ void __launch_bounds__(kStepThreads) ssd_scan_step_kernel(const WMK_GRID_CONSTANT wmk_ssd_scan p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t quads = ceil_div(p.d, kStepChannels);
  int64_t warp = blockIdx.x * static_cast<int64_t>(kStepWarps) + threadIdx.x / 32;
  if (warp >= p.batch * p.heads * quads) return;
  const int64_t first = warp % quads * kStepChannels, head = warp / quads % p.heads, row = warp / quads / p.heads;
  const int channels = static_cast<int>(p.d - first < kStepChannels ? p.d - first : kStepChannels);
  const auto at = [&](const wmk_view& view, int64_t index) { return row * view.stride[0] + index * view.stride[2]; };
  const auto scalar = [&](const wmk_view& view) { return static_cast<const T*>(view.data)[at(view, head)]; };
  const bool is_reset = p.reset.data != nullptr && static_cast<const uint8_t*>(p.reset.data)[row * p.reset.stride[0]];
  const bool has_state = p.initial_state.data != nullptr && !is_reset;
  const T decay = has_state ? exp(scalar(p.gate)) : T(0), weight = scalar(p.weight);
  const T own = p.own_weight.data != nullptr ? scalar(p.own_weight) : weight;
  T x[kStepChannels], sums[kStepChannels] = {};
#pragma unroll
  for (int r = 0; r < kStepChannels; ++r)
    x[r] = r < channels ? load_element<T>(p.x.data, p.dtype, at(p.x, head) + (first + r) * p.x.stride[3]) : T(0);
  const int64_t group = head / (p.heads / p.groups);
  const wmk_view& from = p.initial_state;
  const int64_t given = row * from.stride[0] + head * from.stride[1] + first * from.stride[2];
  T* to = static_cast<T*>(p.last_state.data) + ((row * p.heads + head) * p.d + first) * p.n;
  for (int64_t k = lane; k < p.n; k += 32) {
    const T B = load_element<T>(p.B.data, p.dtype, at(p.B, group) + k * p.B.stride[3]);
    const T C = load_element<T>(p.C.data, p.dtype, at(p.C, group) + k * p.C.stride[3]);
#pragma unroll
    for (int r = 0; r < kStepChannels; ++r) {
      if (r >= channels) continue;
      T state = T(0);
      if (has_state) state = decay * static_cast<const T*>(from.data)[given + r * from.stride[2] + k * from.stride[3]];
      to[r * p.n + k] = state + weight * x[r] * B;
      sums[r] += (state + own * x[r] * B) * C;
    }
  }
#pragma unroll
  for (int r = 0; r < kStepChannels; ++r) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], distance);
    if (lane != 0 || r >= channels) continue;
    T y = sums[r];
    const int64_t channel = first + r;
    if (p.D.data != nullptr)
      y += static_cast<const T*>(p.D.data)[head * p.D.stride[0] + channel * p.D.stride[1]] * x[r];
    if (p.z.data != nullptr) {
      const T z = load_element<T>(p.z.data, p.dtype, at(p.z, head) + channel * p.z.stride[3]);
      y *= z * sigmoid(z, true);
    }
    store_element(p.out.data, p.dtype, at(p.out, head) + channel * p.out.stride[3], y);
  }
}

}  // namespace wmk
