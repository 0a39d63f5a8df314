// Selective scan on a GPU: work tiles and data layout.
//
// kLanes threads of a warp share a channel, with kStates states each in registers. Thread `state_lane` holds states 4 *
// state_lane + 4 * kLanes * j + (0..3), so B and C are read in 16-byte words. Padding states stay zero.
//
// A work tile is a channel tile by one segment of a sequence. With several segments, a local pass scans each from zero,
// combine_kernel.cuh finds the initial states, and the main pass scans again: parallelism for twice the exponentials.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

// Backward warps per multiprocessor, as shared memory allows: 227 KB on sm_90 and sm_100, 99 KB on the smallest others.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBackwardWarps = 8;
#else
constexpr int kBackwardWarps = 12;
#endif

// DTYPE -1: any dtype of arithmetic type T.
template <typename T_, int STATES_, int LANES_, int DTYPE_ = -1>
struct KernelTraits {
  using T = T_;
  static constexpr int kDtype = DTYPE_;
  static constexpr int kStates = STATES_;
  static constexpr int kLanes = LANES_;
  static constexpr int kPaddedStates = STATES_ * LANES_;
  static constexpr int kWarps = LANES_ < 4 ? LANES_ : 4;
  static constexpr int kThreads = 32 * kWarps;
  // Blocks per multiprocessor, for __launch_bounds__.
  static constexpr int kForwardBlocks = (kStates == 4 && sizeof(T) == 4 ? 12 : 8) / kWarps;
  static constexpr int kBackwardBlocks = (kStates == 4 && sizeof(T) == 4 ? kBackwardWarps : 8) / kWarps;
  static constexpr int kChannels = kThreads / LANES_;  // per block
  static constexpr int kWarpChannels = 32 / LANES_;
  // Backward stays below 99 KB of shared memory, sm_120's limit.
  static constexpr int kSteps = sizeof(T) == 4 ? (kPaddedStates > 64 ? 8 : 32) : (kPaddedStates > 64 ? 4 : 8);
  // With eight fp64 states, registers hold one step.
  static constexpr int kUnroll = kStates == 4 || sizeof(T) == 4 ? 4 : 1;
  static constexpr int kPitch = kSteps + 4;              // channel tile
  static constexpr int kStatePitch = kPaddedStates + 4;  // tile of B or C
  static constexpr int kStateRows = kChannels > kSteps ? kChannels : kSteps;

  static __device__ __forceinline__ int64_t dtype(const wmk_selective_scan& p) {
    return DTYPE_ >= 0 ? DTYPE_ : sizeof(T) == 8 ? static_cast<int64_t>(WMK_FLOAT64) : p.dtype;
  }
  static __device__ __forceinline__ bool precise(const wmk_selective_scan& p) { return dtype(p) == WMK_FLOAT32; }

  using ChannelTile = Tile<T, kChannels, kSteps, kThreads, false>;
  using StateTile = Tile<T, kPaddedStates, kSteps, kThreads, true>;
};

// Sized by the dtype: more blocks fit with 16-bit data.
template <typename Traits>
struct StageBuffers {
  static constexpr int kChannelElements = Traits::kChannels * Traits::kSteps;
  static constexpr int kStateElements = Traits::kPaddedStates * Traits::kSteps;
  unsigned char *B, *C, *u, *delta, *z, *grad;

  // Only the first `channel_tiles` of u, delta, z, grad exist.
  static int64_t bytes(int64_t dtype, int channel_tiles) {
    return element_size(dtype) * (2 * kStateElements + channel_tiles * kChannelElements);
  }
  __device__ __forceinline__ StageBuffers(unsigned char* memory, int64_t dtype) {
    const int size = static_cast<int>(element_size(dtype));
    B = memory;
    C = B + size * kStateElements;
    u = C + size * kStateElements;
    delta = u + size * kChannelElements;
    z = delta + size * kChannelElements;
    grad = z + size * kChannelElements;
  }
};

struct ScanPlan {
  int64_t segment_steps;  // multiple of the chunk if states are saved, else of kSteps
  int64_t segments_per_sequence;
  int64_t segment_count;  // packed: an upper bound
  int64_t tiles;          // of channels
  int64_t tiles_per_group;
  bool split;

  void* boundary;  // [segments, channels, state]: final state from zero, then (combine) initial state
  void* decay;     // [segments, channels, state]
  int32_t* reset;  // [segments, tiles]

  void* partial_A;  // [segments, channels, state]
  void* partial_B;  // [segments, channels, state], if B does not vary
  void* partial_C;
  void* partial_D;  // [segments, channels]
  void* partial_bias;
  void* tile_partial_B;  // [batch, tiles, state, time], if B varies
  void* tile_partial_C;
};

// One thread computes it, shared memory holds it: saves registers.
struct WorkTile {
  bool exists;
  int64_t segment, tile;
  int64_t sequence, batch;
  int64_t segment_in_sequence, segments_in_sequence;
  int64_t offset;      // sequence start in the batch element
  int64_t length;      // of the sequence
  int64_t begin, end;  // of the segment, from the sequence's start
  int64_t group, channel;
  int channels;         // valid
  int64_t chunk_base;   // sequence's first row in chunk_states
  int64_t first_chunk;  // of the segment, from the sequence's start
  int64_t last_chunk;
};

__device__ __forceinline__ int64_t packed_bound(const wmk_selective_scan& p, int64_t sequence) {
  const int64_t bound = static_cast<const int64_t*>(p.cu_seqlens.data)[sequence];
  return bound < 0 ? 0 : bound > p.time ? p.time : bound;
}

__device__ __forceinline__ WorkTile locate_segment(const wmk_selective_scan& p, const ScanPlan& plan, int64_t segment) {
  WorkTile work;
  work.segment = segment;
  if (p.cu_seqlens.data != nullptr) {
    int64_t low = 0, high = p.sequences - 1;  // the last sequence whose first segment is not beyond this one
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (packed_bound(p, middle) / plan.segment_steps + middle <= segment) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    work.sequence = low;
    work.batch = 0;
    work.offset = packed_bound(p, low);
    work.length = packed_bound(p, low + 1) - work.offset;
    if (work.length < 0) work.length = 0;
    work.segment_in_sequence = segment - (work.offset / plan.segment_steps + low);
  } else {
    work.sequence = work.batch = segment / plan.segments_per_sequence;
    work.segment_in_sequence = segment % plan.segments_per_sequence;
    work.offset = 0;
    work.length = p.time;
  }
  work.segments_in_sequence = work.length == 0 ? 1 : (work.length + plan.segment_steps - 1) / plan.segment_steps;
  work.exists = work.segment_in_sequence < work.segments_in_sequence;
  work.begin = work.segment_in_sequence * plan.segment_steps;
  work.end = work.begin + plan.segment_steps < work.length ? work.begin + plan.segment_steps : work.length;
  return work;
}

template <typename Traits>
__device__ __forceinline__ WorkTile work_tile(const wmk_selective_scan& p, const ScanPlan& plan) {
  const int64_t block = blockIdx.x;
  WorkTile work = locate_segment(p, plan, block / plan.tiles);
  work.tile = block % plan.tiles;
  const int64_t channels_per_group = p.channels / p.groups;
  work.group = work.tile / plan.tiles_per_group;
  const int64_t first = work.tile % plan.tiles_per_group * Traits::kChannels;
  work.channel = work.group * channels_per_group + first;
  const int64_t left = channels_per_group - first;
  work.channels = static_cast<int>(left < Traits::kChannels ? left : Traits::kChannels);
  const int64_t chunk = p.chunk < 1 ? 1 : p.chunk;
  work.chunk_base = p.cu_seqlens.data != nullptr ? work.offset / chunk + work.sequence
                                                 : work.sequence * ((p.time + chunk - 1) / chunk);
  work.first_chunk = work.begin / chunk;
  work.last_chunk = work.end > 0 ? (work.end - 1) / chunk : 0;
  return work;
}

template <typename Traits>
struct ThreadCoord {
  int state_lane, row;
  bool exists;
  int64_t channel;

  __device__ __forceinline__ explicit ThreadCoord(const WorkTile& work) {
    const int thread = static_cast<int>(threadIdx.x);
    state_lane = thread % 32 / Traits::kWarpChannels;
    row = thread / 32 * Traits::kWarpChannels + thread % Traits::kWarpChannels;
    exists = row < work.channels;
    channel = work.channel + row;
  }
  // The thread's state i.
  __device__ __forceinline__ int state(int i) const { return i / 4 * (4 * Traits::kLanes) + 4 * state_lane + i % 4; }
};

template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void load_states(T* states, const ThreadCoord<Traits>& coord, int64_t count,
                                            const void* data, int64_t offset, int64_t stride, T padding = T(0)) {
#pragma unroll
  for (int i = 0; i < Traits::kStates; ++i) {
    const int n = coord.state(i);
    states[i] = coord.exists && n < count ? static_cast<const T*>(data)[offset + n * stride] : padding;
  }
}
// Times log2(e).
template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void load_decay_rates(T* rates, const ThreadCoord<Traits>& coord,
                                                 const wmk_selective_scan& p) {
  // An infinite step times a padding of zero would be NaN.
  load_states(rates, coord, p.state, p.A.data, coord.channel * p.A.stride[0], p.A.stride[1], -least_step(T(0)));
#pragma unroll
  for (int i = 0; i < Traits::kStates; ++i) rates[i] = decay_rate(rates[i]);
}
template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void store_states(const T* states, const ThreadCoord<Traits>& coord, int64_t count,
                                             void* data, int64_t offset) {
  if (!coord.exists) return;
  T* to = static_cast<T*>(data) + offset;
#pragma unroll
  for (int j = 0; j < Traits::kStates / 4; ++j) {
    const int n = coord.state(4 * j);
    if (count % 4 == 0) {
      if (n < count) {
        Vec4<T> vec;
#pragma unroll
        for (int i = 0; i < 4; ++i) vec.value[i] = states[4 * j + i];
        store_vec4(to + n, vec);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i < count) to[n + i] = states[4 * j + i];
      }
    }
  }
}

// For loops that are not unrolled.
template <typename T>
__device__ __forceinline__ T select(const T (&values)[4], int index) {
  T value = values[0];
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    if (index == k) value = values[k];
  }
  return value;
}
template <typename T>
__device__ __forceinline__ void insert(T (&values)[4], int index, T value) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (index == k) values[k] = value;
  }
}

// Sums four values over a channel's threads; thread `state_lane` returns sum state_lane % 4.
template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(const T (&values)[4], int state_lane) {
  static_assert(LANES >= 4, "four steps for four threads");
  constexpr int kLaneStride = 32 / LANES;
  T halves[2];
  const bool odd = state_lane & 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T keep = odd ? values[2 * i + 1] : values[2 * i], send = odd ? values[2 * i] : values[2 * i + 1];
    halves[i] = keep + __shfl_xor_sync(0xffffffffu, send, kLaneStride);
  }
  const bool upper = state_lane & 2;
  const T keep = upper ? halves[1] : halves[0], send = upper ? halves[0] : halves[1];
  T total = keep + __shfl_xor_sync(0xffffffffu, send, 2 * kLaneStride);
#pragma unroll
  for (int lane = 4; lane < LANES; lane *= 2) total += __shfl_xor_sync(0xffffffffu, total, lane * kLaneStride);
  return total;
}

// Called by all threads, between two barriers.
template <typename Traits>
__device__ __forceinline__ void load_resets(uint32_t* mask, const wmk_selective_scan& p, const WorkTile& work,
                                            int64_t begin, int steps) {
  static_assert(Traits::kSteps <= 32, "a tile's resets are one word");
  if (threadIdx.x < 32) {
    const int step = static_cast<int>(threadIdx.x);
    bool reset = false;
    if (p.reset.data != nullptr && step < steps) {
      const int64_t time = work.offset + begin + step;
      reset = static_cast<const uint8_t*>(p.reset.data)[work.batch * p.reset.stride[0] + time * p.reset.stride[1]] != 0;
    }
    const uint32_t bits = __ballot_sync(0xffffffffu, reset);
    if (step == 0) *mask = bits;
  }
}

// [channels, padded states].
template <typename Traits>
__device__ __forceinline__ void load_constant(typename Traits::T* tile, const wmk_view& view,
                                              const wmk_selective_scan& p, const WorkTile& work) {
  using T = typename Traits::T;
  for (int i = threadIdx.x; i < Traits::kChannels * Traits::kPaddedStates; i += Traits::kThreads) {
    const int row = i / Traits::kPaddedStates, n = i % Traits::kPaddedStates;
    T value = T(0);
    if (row < work.channels && n < p.state) {
      value = static_cast<const T*>(view.data)[(work.channel + row) * view.stride[0] + n * view.stride[1]];
    }
    tile[row * Traits::kStatePitch + n] = value;
  }
}

// Zeros if absent.
template <typename Traits>
__device__ __forceinline__ void load_parameter(typename Traits::T* row, const wmk_view& view, const WorkTile& work) {
  using T = typename Traits::T;
  for (int i = threadIdx.x; i < Traits::kChannels; i += Traits::kThreads) {
    const bool exists = view.data != nullptr && i < work.channels;
    row[i] = exists ? static_cast<const T*>(view.data)[(work.channel + i) * view.stride[0]] : T(0);
  }
}

__device__ __forceinline__ char* state_origin(const wmk_view& view, const wmk_selective_scan& p, const WorkTile& work) {
  const int64_t offset = work.batch * view.stride[0] + work.group * view.stride[1] + work.offset * view.stride[3];
  return static_cast<char*>(view.data) + offset * element_size(p.dtype);
}
__device__ __forceinline__ char* channel_origin(const wmk_view& view, const wmk_selective_scan& p,
                                                const WorkTile& work) {
  const int64_t offset = work.batch * view.stride[0] + work.channel * view.stride[1] + work.offset * view.stride[2];
  return static_cast<char*>(view.data) + offset * element_size(p.dtype);
}
__device__ __forceinline__ StridedRows state_rows(char* origin, const wmk_view& view) {
  return {origin, view.stride[2], view.stride[3]};
}
__device__ __forceinline__ StridedRows channel_rows(char* origin, const wmk_view& view) {
  return {origin, view.stride[1], view.stride[2]};
}

}  // namespace wmk
