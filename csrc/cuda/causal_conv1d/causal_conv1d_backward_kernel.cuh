// Causal convolution, backward, on a GPU.
//
// With g the gradient of the sum, which silu's slope scales, a step of the reverse walk is the adjoint of a window's
// shift: dwindow[k] = dwindow'[k] + weight[k] g_t, of which the newest is dx_t and the others are those of the step
// before. A block loads 32 channels x 64 steps of x and of grad_out, three more on either side; each warp sums silu's
// argument again, replaces grad_out by g, then walks back over its quarter and writes dx over x.
//
// Gradients of weights and bias are summed in registers over a chunk of four tiles, then over warps and chunks in a
// fixed order. Bound by memory: 12 bytes per element in fp32, 6 in 16 bits; partials add 1%.
#pragma once

#include "cuda/causal_conv1d/causal_conv1d_common.cuh"

namespace wmk {

constexpr int kConvBackwardSteps = 64, kConvChunkTiles = 4;
constexpr int kConvChunk = kConvBackwardSteps * kConvChunkTiles;

template <typename T>
struct ConvBackwardShared {
  T x[(2 * kConvPast + kConvBackwardSteps) * kConvPitch];  // from the third step before; then grad_x
  T g[(kConvBackwardSteps + kConvPast) * kConvPitch];
  T sums[kConvWarps * (kConvTaps + 1) * kConvChannels];
  int32_t events[2 * kConvPast + kConvBackwardSteps];
};

// `partials`: [batch, chunks, width + 1, channels], gradients of taps, newest first, and of the bias.
template <typename T>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) == 8 ? 4 : 5)
    causal_conv1d_backward_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, T* partials) {
  constexpr int kSteps = kConvBackwardSteps;
  using Tile = ConvTile<T, kSteps>;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<ConvBackwardShared<T>*>(memory);
  T* x_tile = shared.x + kConvPast * kConvPitch;
  const int32_t* events = shared.events + kConvPast;
  const ConvTileCoord at(p, ceil_div(p.time, kConvChunk));
  const ConvLane<T> lane(p, at);
  const bool precise = p.dtype == WMK_FLOAT32;
  const int column = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T grad_taps[kConvTaps] = {}, grad_bias = T(0);

  for (int tile = 0; tile < kConvChunkTiles; ++tile) {
    const int64_t begin = at.chunk * kConvChunk + tile * kSteps;
    if (begin >= p.time) break;
    const int steps = static_cast<int>(p.time - begin < kSteps ? p.time - begin : kSteps);
    if (tile > 0) __syncthreads();  // the previous tile's results have been written
    const StridedRows x = at.rows_of(p.x, p.dtype), grad_out = at.rows_of(p.grad_out, p.dtype);
    Tile::load(x_tile, x, begin, p.dtype, at.channels, steps);
    Tile::load(shared.g, grad_out, begin, p.dtype, at.channels, steps);
    Tile::load_halo(shared.x, x, begin - kConvPast, kConvPast, p.time, p.dtype, at.channels);
    Tile::load_halo(x_tile + kSteps * kConvPitch, x, begin + kSteps, kConvPast, p.time, p.dtype, at.channels);
    Tile::load_halo(shared.g + kSteps * kConvPitch, grad_out, begin + kSteps, kConvPast, p.time, p.dtype, at.channels);
    load_events(p, at.batch, begin - kConvPast, 2 * kConvPast + kSteps, shared.events);
    __syncthreads();  // both tiles are there

    const int run = (steps + kConvWarps - 1) / kConvWarps, first = warp * run;
    const int last = first + run < steps ? first + run : steps;
    const int end = last == steps && first < steps ? last + kConvPast : last;  // g of the next tile's first steps too
    T window[kConvTaps] = {};
#pragma unroll 1
    for (int i = first - kConvPast; i < end; ++i) {
      lane.enter(events[i], begin + i, window);
      window[0] = x_tile[i * kConvPitch + column];
      if (i >= first) {
        T g = shared.g[i * kConvPitch + column];
        if (p.silu) {
          g *= silu_slope(lane.sum_taps(window), precise);
          shared.g[i * kConvPitch + column] = g;
        }
        if (i < last) {
#pragma unroll
          for (int k = 0; k < kConvTaps; ++k) grad_taps[k] += g * window[k];
          grad_bias += g;
        }
      }
      lane.shift(window);
    }
    __syncthreads();  // g is there, inputs have been read
    // Steps behind the tensor have no defined g: its last step drops what they add.
    T grad_window[kConvTaps] = {};  // of the inputs at a step and 1 and 2 steps back, then 1, 2 and 3 back
#pragma unroll 1
    for (int i = last + kConvPast - 1; i >= first; --i) {
      const int32_t event = events[i];
      if (event & kConvEnds) {
        lane.load_window(p.grad_last_state, sequence_at(p, at.batch, begin + i).index, grad_window);
#pragma unroll
        for (int k = 1; k < kConvTaps; ++k) grad_window[k - 1] = grad_window[k];
        grad_window[kConvTaps - 1] = T(0);
      }
      const T g = shared.g[i * kConvPitch + column];
#pragma unroll
      for (int k = 0; k < kConvTaps; ++k) grad_window[k] += g * lane.taps[k];
      if (i < last) x_tile[i * kConvPitch + column] = grad_window[0];
      const bool reset = event & kConvReset;
#pragma unroll
      for (int k = 1; k < kConvTaps; ++k) {
        if (reset || k > lane.past) grad_window[k] = T(0);
      }
      if (event & kConvBegins && i < last && p.grad_initial_state.data != nullptr) {
        lane.store_window(p.grad_initial_state, sequence_at(p, at.batch, begin + i).index, grad_window);
      }
#pragma unroll
      for (int k = 1; k < kConvTaps; ++k) grad_window[k - 1] = grad_window[k];
      grad_window[kConvTaps - 1] = T(0);
    }
    __syncthreads();  // grad_x is there
    Tile::write(x_tile, at.rows_of(p.grad_x, p.dtype), begin, p.dtype, at.channels, steps);
  }

  T* sums = shared.sums + column;
#pragma unroll
  for (int k = 0; k <= kConvTaps; ++k) {
    sums[(warp * (kConvTaps + 1) + k) * kConvChannels] = k < kConvTaps ? grad_taps[k] : grad_bias;
  }
  __syncthreads();  // the warps' sums are there
  if (warp > 0 || !lane.exists) return;
  const int64_t row = at.batch * ceil_div(p.time, kConvChunk) + at.chunk;
  T* partial = partials + row * (p.width + 1) * p.channels + lane.channel;
#pragma unroll
  for (int k = 0; k <= kConvTaps; ++k) {
    T sum = T(0);
#pragma unroll
    for (int from = 0; from < kConvWarps; ++from) sum += sums[(from * (kConvTaps + 1) + k) * kConvChannels];
    if (k == kConvTaps) {
      partial[p.width * p.channels] = sum;
    } else if (k <= lane.past) {
      partial[k * p.channels] = sum;
    }
  }
}

// Sums `count` partials; a warp adds a quarter of them.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_sum_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, const T* partials, int64_t count) {
  WMK_SHARED_ARRAY(T, sums, [kConvThreads]);
  const int64_t elements = (p.width + 1) * p.channels;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int64_t quarter = ceil_div(count, kConvWarps), first = threadIdx.x / 32 * quarter;
  const int64_t last = first + quarter < count ? first + quarter : count;
  T sum = T(0);
  if (element < elements) {
#pragma unroll 8
    for (int64_t i = first; i < last; ++i) sum += partials[i * elements + element];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();  // the warps' sums are there
  if (threadIdx.x >= 32 || element >= elements) return;
#pragma unroll
  for (int warp = 1; warp < kConvWarps; ++warp) sum += sums[warp * 32 + threadIdx.x];
  const int64_t tap = element / p.channels, channel = element % p.channels;
  if (tap < p.width) {
    static_cast<T*>(p.grad_weight.data)[channel * p.width + p.width - 1 - tap] = sum;
  } else if (p.grad_bias.data != nullptr) {
    static_cast<T*>(p.grad_bias.data)[channel] = sum;
  }
}

}  // namespace wmk
