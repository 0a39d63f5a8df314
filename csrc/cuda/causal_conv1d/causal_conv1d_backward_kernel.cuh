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

// A lane's sums over a chunk.
template <typename T>
struct ConvWeightGradients {
  T taps[kConvTaps], bias;

  __device__ __forceinline__ void add(T g, const T (&window)[kConvTaps]) {
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) taps[k] += g * window[k];
    bias += g;
  }
};

// Replaces grad_out of steps [first, end) by g, and adds the weight gradients of steps before `last`.
template <typename T, bool PRECISE, bool SILU, bool EVENTS>
__device__ __forceinline__ void sum_gradients(const ConvLane<T>& lane, const int32_t* events, int64_t begin, int first,
                                              int last, int end, const T* x, T* g, ConvWeightGradients<T>& gradients) {
  T window[kConvTaps] = {};
  const auto enter = [&](int i) {
    if (EVENTS) lane.enter(events[i], begin + i, window);
    window[0] = x[i * kConvPitch];
  };
  const auto scaled = [&](int i) {
    T gradient = g[i * kConvPitch];
    if (SILU) {
      gradient *= silu_slope(lane.sum_taps(window), PRECISE);
      g[i * kConvPitch] = gradient;
    }
    return gradient;
  };
#pragma unroll(EVENTS ? 1 : kConvPast)
  for (int i = first - kConvPast; i < first; ++i) {
    enter(i);
    lane.shift(window);
  }
#pragma unroll(EVENTS ? 1 : 4)
  for (int i = first; i < last; ++i) {
    enter(i);
    gradients.add(scaled(i), window);
    lane.shift(window);
  }
#pragma unroll 1
  for (int i = last; SILU && i < end; ++i) {
    enter(i);
    scaled(i);
    lane.shift(window);
  }
}

// Writes grad_x of steps [first, last) over x. Steps behind the tensor have no defined g: its last step drops what
// they add.
template <typename T, bool EVENTS>
__device__ __forceinline__ void input_gradients(const ConvLane<T>& lane, const int32_t* events, int64_t begin,
                                                int first, int last, T* x, const T* g) {
  const wmk_causal_conv1d& p = lane.p;
  T window[kConvTaps] = {};  // gradients of the inputs at a step and 1 and 2 steps back, then 1, 2 and 3 back
  const auto next = [&] {
#pragma unroll
    for (int k = 1; k < kConvTaps; ++k) window[k - 1] = window[k];
    window[kConvTaps - 1] = T(0);
  };
  const auto step = [&](int i, bool inside) {
    const int32_t event = EVENTS ? events[i] : 0;
    if (event & kConvEnds) {
      lane.load_window(p.grad_last_state, sequence_at(p, lane.batch, begin + i).index, window);
      next();
    }
    const T gradient = g[i * kConvPitch];
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) window[k] += gradient * lane.taps[k];
    if (inside) x[i * kConvPitch] = window[0];
#pragma unroll
    for (int k = 1; k < kConvTaps; ++k) {
      if (event & kConvReset || k > lane.past) window[k] = T(0);
    }
    if (event & kConvBegins && inside && p.grad_initial_state.data != nullptr) {
      lane.store_window(p.grad_initial_state, sequence_at(p, lane.batch, begin + i).index, window);
    }
    next();
  };
#pragma unroll 1
  for (int i = last + kConvPast - 1; i >= last; --i) step(i, false);
#pragma unroll(EVENTS ? 1 : 4)
  for (int i = last - 1; i >= first; --i) step(i, true);
}

// `partials`: [batch, chunks, width + 1, channels], gradients of taps, newest first, and of the bias.
template <typename T, int DTYPE, bool SILU>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) == 8         ? 4
                                                : DTYPE == WMK_FLOAT32 ? 5
                                                                       : 6)
    causal_conv1d_backward_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, T* partials) {
  constexpr int kSteps = kConvBackwardSteps;
  constexpr bool kPrecise = DTYPE == WMK_FLOAT32;
  using Tile = ConvTile<T, DTYPE, kSteps>;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<ConvBackwardShared<T>*>(memory);
  T* x_tile = shared.x + kConvPast * kConvPitch;
  const int32_t* events = shared.events + kConvPast;
  const ConvTileCoord at(p, ceil_div(p.time, kConvChunk));
  const ConvLane<T> lane(p, at);
  const int column = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  ConvWeightGradients<T> gradients = {};

  for (int tile = 0; tile < kConvChunkTiles; ++tile) {
    const int64_t begin = at.chunk * kConvChunk + tile * kSteps;
    if (begin >= p.time) break;
    const int steps = static_cast<int>(p.time - begin < kSteps ? p.time - begin : kSteps);
    if (tile > 0) __syncthreads();  // the previous tile's results have been written
    const StridedRows x = at.rows_of(p.x, DTYPE), grad_out = at.rows_of(p.grad_out, DTYPE);
    Tile::load_pair(x_tile, x, shared.g, grad_out, begin, at.channels, steps);
    Tile::load_halo(shared.x, x, begin - kConvPast, kConvPast, p.time, at.channels);
    Tile::load_halo(x_tile + kSteps * kConvPitch, x, begin + kSteps, kConvPast, p.time, at.channels);
    Tile::load_halo(shared.g + kSteps * kConvPitch, grad_out, begin + kSteps, kConvPast, p.time, at.channels);
    load_events(p, at.batch, begin - kConvPast, 2 * kConvPast + kSteps, shared.events);
    __syncthreads();  // both tiles are there

    const int run = (steps + kConvWarps - 1) / kConvWarps;
    const int first = warp * run < steps ? warp * run : steps, last = first + run < steps ? first + run : steps;
    // g of the next tile's first steps too
    const int end = first < last && last == steps ? last + kConvPast : last;
    const bool any_event = lane.any_event(events, first - kConvPast, last + kConvPast);
    const T* inputs = x_tile + column;
    T* g = shared.g + column;
    if (any_event) {
      sum_gradients<T, kPrecise, SILU, true>(lane, events, begin, first, last, end, inputs, g, gradients);
    } else {
      sum_gradients<T, kPrecise, SILU, false>(lane, events, begin, first, last, end, inputs, g, gradients);
    }
    __syncthreads();  // g is there, inputs have been read
    if (any_event) {
      input_gradients<T, true>(lane, events, begin, first, last, x_tile + column, g);
    } else {
      input_gradients<T, false>(lane, events, begin, first, last, x_tile + column, g);
    }
    __syncthreads();  // grad_x is there
    Tile::write(x_tile, at.rows_of(p.grad_x, DTYPE), begin, at.channels, steps);
  }

  T* sums = shared.sums + column;
#pragma unroll
  for (int k = 0; k <= kConvTaps; ++k) {
    sums[(warp * (kConvTaps + 1) + k) * kConvChannels] = k < kConvTaps ? gradients.taps[k] : gradients.bias;
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
