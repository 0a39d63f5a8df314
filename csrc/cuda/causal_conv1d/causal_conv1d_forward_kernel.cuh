// Causal convolution, forward, on a GPU.
//
// A block loads 32 channels x 128 steps (fp64: 64), each warp walks over a quarter of the steps, a channel per lane,
// and writes outputs over inputs in shared memory. Only the three steps before a tile are read twice, from the caches.
// Bound by memory: an element is read and written once, 8 bytes in fp32 and 4 in 16 bits.
#pragma once

#include "cuda/causal_conv1d/causal_conv1d_common.cuh"

namespace wmk {

template <typename T>
struct ConvForwardShared {
  static constexpr int kSteps = sizeof(T) == 8 ? 64 : 128;
  T tile[(kConvPast + kSteps) * kConvPitch];  // from the third step before
  int32_t events[kConvPast + kSteps];
};

// Steps [first, last) of a warp, in place.
template <typename T, bool PRECISE, bool SILU, bool EVENTS>
__device__ __forceinline__ void convolve(const ConvLane<T>& lane, const int32_t* events, int64_t begin, int first,
                                         int last, T* column, T (&window)[kConvTaps]) {
#pragma unroll(EVENTS ? 1 : 4)
  for (int i = first; i < last; ++i) {
    if (EVENTS) lane.enter(events[i], begin + i, window);
    window[0] = column[i * kConvPitch];
    const T sum = lane.sum_taps(window);
    column[i * kConvPitch] = SILU ? sum * sigmoid(sum, PRECISE) : sum;
    lane.shift(window);
    if (EVENTS && events[i] & kConvEnds) {
      lane.store_window(lane.p.last_state, sequence_at(lane.p, lane.batch, begin + i).index, window);
    }
  }
}

template <typename T, int DTYPE, bool SILU>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) == 8 ? 4 : 8)
    causal_conv1d_forward_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p) {
  using Shared = ConvForwardShared<T>;
  using Tile = ConvTile<T, DTYPE, Shared::kSteps>;
  constexpr bool kPrecise = DTYPE == WMK_FLOAT32;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<Shared*>(memory);
  T* tile = shared.tile + kConvPast * kConvPitch;
  const int32_t* events = shared.events + kConvPast;
  const ConvTileCoord at(p, ceil_div(p.time, Shared::kSteps));
  const int64_t begin = at.chunk * Shared::kSteps;
  const int steps = static_cast<int>(p.time - begin < Shared::kSteps ? p.time - begin : Shared::kSteps);

  const StridedRows x = at.rows_of(p.x, DTYPE);
  Tile::load(tile, x, begin, at.channels, steps);
  Tile::load_halo(shared.tile, x, begin - kConvPast, kConvPast, p.time, at.channels);
  load_events(p, at.batch, begin - kConvPast, kConvPast + steps, shared.events);
  const ConvLane<T> lane(p, at);
  T* column = tile + threadIdx.x % 32;
  const int run = (steps + kConvWarps - 1) / kConvWarps, warp = static_cast<int>(threadIdx.x) / 32;
  const int first = warp * run < steps ? warp * run : steps, last = first + run < steps ? first + run : steps;
  __syncthreads();  // the tile is there

  T window[kConvTaps] = {};
  for (int i = first - kConvPast; i < first; ++i) {
    lane.enter(events[i], begin + i, window);
    window[0] = column[i * kConvPitch];
    lane.shift(window);
  }
  __syncthreads();  // the inputs before each warp's steps have been read
  if (lane.any_event(events, first, last)) {
    convolve<T, kPrecise, SILU, true>(lane, events, begin, first, last, column, window);
  } else {
    convolve<T, kPrecise, SILU, false>(lane, events, begin, first, last, column, window);
  }
  __syncthreads();  // outputs are there
  Tile::write(tile, at.rows_of(p.out, DTYPE), begin, at.channels, steps);
}

// One step of every sequence, a channel per thread: bound by latency, as all loads of up to four taps are independent.
template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_step_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
  if (index >= p.batch * p.channels) return;
  const int64_t batch = index / p.channels, channel = index % p.channels, past = p.width - 1;
  const bool empty = p.initial_state.data == nullptr || is_reset(p, batch, 0);
  const T x = load_activation<T>(p, p.x, batch, channel, 0);
  T sum = p.bias.data != nullptr ? state_at<T>(p.bias, channel) : T(0);
  sum += state_at<T>(p.weight, channel, past) * x;
  if (past > 0) state_at<T>(p.last_state, batch, channel, past - 1) = x;
#pragma unroll 4
  for (int64_t k = 1; k <= past; ++k) {
    const T value = empty ? T(0) : state_at<T>(p.initial_state, batch, channel, past - k);
    sum += state_at<T>(p.weight, channel, past - k) * value;
    if (k < past) state_at<T>(p.last_state, batch, channel, past - 1 - k) = value;
  }
  if (p.silu) sum *= sigmoid(sum, p.dtype == WMK_FLOAT32);
  store_element<T>(p.out.data, p.dtype, batch * p.out.stride[0] + channel * p.out.stride[1], sum);
}

}  // namespace wmk
