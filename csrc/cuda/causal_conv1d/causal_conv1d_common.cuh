// Causal convolution on a GPU: tiles, windows and sequences.
//
// A tile is 32 channels x some steps in shared memory, [step][channel] with a pitch of 33: neither groups of four
// steps, nor groups of four channels, nor a warp that holds a channel per lane has bank conflicts. A lane walks over
// time with the last three inputs in registers. A reset clears them, a sequence's first step replaces them by its
// window.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

constexpr int kConvChannels = 32, kConvThreads = 128, kConvWarps = kConvThreads / 32;
constexpr int kConvPitch = kConvChannels + 1;
constexpr int kConvTaps = 4, kConvPast = kConvTaps - 1;  // of the kernels with taps in registers

// What happens at a step: bits.
constexpr int32_t kConvReset = 1, kConvBegins = 2, kConvEnds = 4;

struct ConvSequence {
  int64_t index, begin, end;
};

__device__ __forceinline__ ConvSequence sequence_of(const wmk_causal_conv1d& p, int64_t index) {
  const int64_t* bounds = static_cast<const int64_t*>(p.cu_seqlens.data);
  if (bounds == nullptr) return {index, 0, p.time};
  return {index, bounds[index], bounds[index + 1]};
}

// The sequence that holds a step: the last one that begins at or before it.
__device__ __forceinline__ ConvSequence sequence_at(const wmk_causal_conv1d& p, int64_t batch, int64_t time) {
  const int64_t* bounds = static_cast<const int64_t*>(p.cu_seqlens.data);
  if (bounds == nullptr) return {batch, 0, p.time};
  int64_t low = 0, high = p.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (bounds[middle] <= time) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sequence_of(p, low);
}

__device__ __forceinline__ bool is_reset(const wmk_causal_conv1d& p, int64_t batch, int64_t time) {
  if (p.reset.data == nullptr) return false;
  return static_cast<const uint8_t*>(p.reset.data)[batch * p.reset.stride[0] + time * p.reset.stride[1]] != 0;
}

// An element of a tensor of the state dtype, which is T.
template <typename T>
__device__ __forceinline__ T& state_at(const wmk_view& view, int64_t first, int64_t second = 0, int64_t third = 0) {
  return static_cast<T*>(view.data)[first * view.stride[0] + second * view.stride[1] + third * view.stride[2]];
}

template <typename T>
__device__ __forceinline__ T load_activation(const wmk_causal_conv1d& p, const wmk_view& view, int64_t batch,
                                             int64_t channel, int64_t time) {
  return load_element<T>(view.data, p.dtype, batch * view.stride[0] + channel * view.stride[1] + time * view.stride[2]);
}

template <typename T>
__device__ __forceinline__ T silu_slope(T sum, bool precise) {
  const T s = sigmoid(sum, precise);
  return s * (T(1) + sum * (T(1) - s));
}

// A block's channels of one batch element.
struct ConvTileCoord {
  int64_t batch, first_channel, chunk;
  int channels;

  __device__ __forceinline__ ConvTileCoord(const wmk_causal_conv1d& p, int64_t chunks) {
    const int64_t tiles = ceil_div(p.channels, kConvChannels);
    first_channel = blockIdx.x % tiles * kConvChannels;
    chunk = blockIdx.x / tiles % chunks;
    batch = blockIdx.x / tiles / chunks;
    channels =
        static_cast<int>(p.channels - first_channel < kConvChannels ? p.channels - first_channel : kConvChannels);
  }

  __device__ __forceinline__ StridedRows rows_of(const wmk_view& view, int64_t dtype) const {
    char* data = static_cast<char*>(view.data);
    return {data + (batch * view.stride[0] + first_channel * view.stride[1]) * element_size(dtype), view.stride[1],
            view.stride[2]};
  }
};

// Events of steps [first, first + count), none outside the tensor.
__device__ __forceinline__ void load_events(const wmk_causal_conv1d& p, int64_t batch, int64_t first, int count,
                                            int32_t* events) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kConvThreads) {
    const int64_t time = first + i;
    int32_t event = 0;
    if (time >= 0 && time < p.time) {
      const ConvSequence sequence = sequence_at(p, batch, time);
      if (is_reset(p, batch, time)) event |= kConvReset;
      if (sequence.begin == time) event |= kConvBegins;
      if (sequence.end == time + 1) event |= kConvEnds;
    }
    events[i] = event;
  }
}

template <typename T, int DTYPE, int STEPS>
struct ConvTile {
  static constexpr int kGroups = kConvChannels * STEPS / 4 / kConvThreads;  // of four elements, per thread
  static_assert(STEPS % 32 == 0, "a warp's groups are 8 along time x 4 channels");

  // First channel and step of group `i`.
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void position(int i, int& channel, int& step) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 + i * kConvWarps;
    if (ALONG_TIME) {
      channel = lane / 8 + 4 * (row % 8);
      step = 4 * (lane % 8) + 32 * (row / 8);
    } else {
      channel = 4 * (lane % 8);
      step = lane / 8 + 4 * row;
    }
  }

  static __device__ __forceinline__ const char* begin_of(const StridedRows& tensor, int64_t time) {
    return tensor.data + time * tensor.time_stride * element_size(DTYPE);
  }
  static __device__ __forceinline__ bool is_full(const StridedRows& tensor, int64_t time, int channels, int steps) {
    return channels == kConvChannels && steps == STEPS && tensor.aligned(begin_of(tensor, time), element_size(DTYPE));
  }

  // Steps [time, time + steps), zero outside the tensor. A call, as is `write`: inlined, addresses that do not depend
  // on the time would occupy registers during the walk.
  static __device__ __noinline__ void load(T* tile, StridedRows tensor, int64_t time, int channels, int steps) {
    if (!is_full(tensor, time, channels, steps)) {
      load_general(tile, begin_of(tensor, time), tensor, channels, steps);
    } else if (tensor.along_time()) {
      load_full<true>(tile, tensor, time);
    } else {
      load_full<false>(tile, tensor, time);
    }
  }
  // The same of two tensors, whose loads wait together.
  static __device__ __noinline__ void load_pair(T* first, StridedRows first_tensor, T* second,
                                                StridedRows second_tensor, int64_t time, int channels, int steps) {
    const bool along_time = first_tensor.along_time();
    const bool full = is_full(first_tensor, time, channels, steps) && is_full(second_tensor, time, channels, steps);
    if (!full || along_time != second_tensor.along_time()) {
      load(first, first_tensor, time, channels, steps);
      load(second, second_tensor, time, channels, steps);
    } else if (along_time) {
      load_full_pair<true>(first, first_tensor, second, second_tensor, time);
    } else {
      load_full_pair<false>(first, first_tensor, second, second_tensor, time);
    }
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void load_full(T* tile, const StridedRows& tensor, int64_t time) {
    Vec4<T> groups[kGroups];
    load_groups<ALONG_TIME>(groups, tensor, time);
    store_groups<ALONG_TIME>(tile, groups);
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void load_full_pair(T* first, const StridedRows& first_tensor, T* second,
                                                        const StridedRows& second_tensor, int64_t time) {
    Vec4<T> first_groups[kGroups], second_groups[kGroups];
    load_groups<ALONG_TIME>(first_groups, first_tensor, time);
    load_groups<ALONG_TIME>(second_groups, second_tensor, time);
    store_groups<ALONG_TIME>(first, first_groups);
    store_groups<ALONG_TIME>(second, second_groups);
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void load_groups(Vec4<T> (&groups)[kGroups], const StridedRows& tensor,
                                                     int64_t time) {
    const char* begin = begin_of(tensor, time);
    const int64_t channel_bytes = tensor.row_stride * element_size(DTYPE);
    const int64_t step_bytes = tensor.time_stride * element_size(DTYPE);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      int channel, step;
      position<ALONG_TIME>(i, channel, step);
      const char* source = begin + channel * channel_bytes + step * step_bytes;
      groups[i] = unpack(reinterpret_cast<const unsigned char*>(source), DTYPE, T(0));
    }
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void store_groups(T* tile, const Vec4<T> (&groups)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      int channel, step;
      position<ALONG_TIME>(i, channel, step);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        tile[(ALONG_TIME ? step + j : step) * kConvPitch + (ALONG_TIME ? channel : channel + j)] = groups[i].value[j];
      }
    }
  }
  static __device__ __forceinline__ void load_general(T* tile, const char* begin, StridedRows tensor, int channels,
                                                      int steps) {
    const bool along_time = tensor.along_time();
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kConvChannels * STEPS; i += kConvThreads) {
      const int channel = along_time ? i / STEPS : i % kConvChannels;
      const int step = along_time ? i % STEPS : i / kConvChannels;
      T value = T(0);
      if (channel < channels && step < steps) {
        value = load_element<T>(begin, DTYPE, channel * tensor.row_stride + step * tensor.time_stride);
      }
      tile[step * kConvPitch + channel] = value;
    }
  }

  // Up to three steps [time, time + count) beside the tile, zero outside [0, end).
  static __device__ __forceinline__ void load_halo(T* rows, const StridedRows& tensor, int64_t time, int count,
                                                   int64_t end, int channels) {
    static_assert(kConvPast * kConvChannels <= kConvThreads, "an element per thread");
    const int channel = static_cast<int>(threadIdx.x) % kConvChannels;
    const int step = static_cast<int>(threadIdx.x) / kConvChannels;
    if (step >= count) return;
    T value = T(0);
    if (channel < channels && time + step >= 0 && time + step < end) {
      value = load_element<T>(tensor.data, DTYPE, channel * tensor.row_stride + (time + step) * tensor.time_stride);
    }
    rows[step * kConvPitch + channel] = value;
  }

  static __device__ __noinline__ void write(const T* tile, StridedRows tensor, int64_t time, int channels, int steps) {
    char* begin = tensor.data + time * tensor.time_stride * element_size(DTYPE);
    if (!is_full(tensor, time, channels, steps)) {
      write_general(tile, begin, tensor, channels, steps);
    } else if (tensor.along_time()) {
      write_full<true>(tile, begin, tensor);
    } else {
      write_full<false>(tile, begin, tensor);
    }
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void write_full(const T* tile, char* begin, const StridedRows& tensor) {
    const int64_t size = element_size(DTYPE);
    const int64_t channel_bytes = tensor.row_stride * size, step_bytes = tensor.time_stride * size;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      int channel, step;
      position<ALONG_TIME>(i, channel, step);
      Vec4<T> group;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        group.value[j] = tile[(ALONG_TIME ? step + j : step) * kConvPitch + (ALONG_TIME ? channel : channel + j)];
      }
      Tile<T, kConvChannels, STEPS, kConvThreads, false>::write_group(
          group, begin + channel * channel_bytes + step * step_bytes, DTYPE);
    }
  }
  static __device__ __forceinline__ void write_general(const T* tile, char* begin, StridedRows tensor, int channels,
                                                       int steps) {
    const bool along_time = tensor.along_time();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kConvChannels * STEPS; i += kConvThreads) {
      const int channel = along_time ? i / STEPS : i % kConvChannels;
      const int step = along_time ? i % STEPS : i / kConvChannels;
      if (channel >= channels || step >= steps) continue;
      store_element<T>(begin, DTYPE, channel * tensor.row_stride + step * tensor.time_stride,
                       tile[step * kConvPitch + channel]);
    }
  }
};

// A lane's channel: its taps, newest first; those beyond the width are zero, as are channels that do not exist.
template <typename T>
struct ConvLane {
  const wmk_causal_conv1d& p;
  int64_t batch, channel;
  bool exists;
  int past;  // width - 1
  T taps[kConvTaps], bias;

  __device__ __forceinline__ ConvLane(const wmk_causal_conv1d& arguments, const ConvTileCoord& at) : p(arguments) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    batch = at.batch;
    channel = at.first_channel + lane;
    exists = lane < at.channels;
    past = static_cast<int>(p.width) - 1;
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) {
      taps[k] = exists && k <= past ? state_at<T>(p.weight, channel, past - k) : T(0);
    }
    bias = exists && p.bias.data != nullptr ? state_at<T>(p.bias, channel) : T(0);
  }

  // Newest first: a sequence, its chunks and single steps round equally.
  __device__ __forceinline__ T sum_taps(const T (&window)[kConvTaps]) const {
    T sum = bias;
#pragma unroll
    for (int k = 0; k < kConvTaps; ++k) sum += taps[k] * window[k];
    return sum;
  }

  // `window` before a step: the inputs 1, 2 and 3 steps back at 1, 2 and 3.
  __device__ __forceinline__ void enter(int32_t event, int64_t time, T (&window)[kConvTaps]) const {
    if (event & kConvBegins) load_window(p.initial_state, sequence_at(p, batch, time).index, window);
    if (event & kConvReset) {
#pragma unroll
      for (int k = 1; k < kConvTaps; ++k) window[k] = T(0);
    }
  }
  // Whether anything happens at steps [first, last): the same for all lanes of a warp.
  static __device__ __forceinline__ bool any_event(const int32_t* events, int first, int last) {
    int32_t found = 0;
    for (int i = first + static_cast<int>(threadIdx.x) % 32; i < last; i += 32) found |= events[i];
    return __any_sync(0xffffffffu, found) != 0;
  }
  __device__ __forceinline__ void shift(T (&window)[kConvTaps]) const {
#pragma unroll
    for (int k = kConvTaps - 1; k > 0; --k) window[k] = k <= past ? window[k - 1] : T(0);
  }

  // A sequence's window, oldest first in memory, at 1, 2 and 3.
  __device__ __forceinline__ void load_window(const wmk_view& state, int64_t sequence, T (&window)[kConvTaps]) const {
#pragma unroll
    for (int k = 1; k < kConvTaps; ++k) {
      const bool held = exists && k <= past && state.data != nullptr;
      window[k] = held ? state_at<T>(state, sequence, channel, past - k) : T(0);
    }
  }
  __device__ __forceinline__ void store_window(const wmk_view& state, int64_t sequence,
                                               const T (&window)[kConvTaps]) const {
#pragma unroll
    for (int k = 1; k < kConvTaps; ++k) {
      if (exists && k <= past) state_at<T>(state, sequence, channel, past - k) = window[k];
    }
  }
};

}  // namespace wmk
