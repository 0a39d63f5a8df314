// What the kernels of the selective scan share: how a call is cut into blocks, and where a block finds its part.
//
// Threads: LANES threads of a warp share a channel and hold STATES states each, in registers, for as long as the
// block lives. Thread `quarter` of a channel holds the states 4 * quarter + 4 * LANES * j + (0..3), so that B and C are
// read from shared memory as whole 16-byte words. States beyond the call's own have A = B = C = 0 and stay zero.
//
// Blocks: a block takes a tile of channels, which reads B and C once, and a segment of one sequence's time. Where there
// are enough channels and sequences to fill the chip, a segment is the whole sequence. Otherwise the segments are first
// run from a zero state, a small kernel chains their end states (combine_kernel.cuh), and the real pass starts each
// segment from the right state: twice the exponentials for as many times the parallelism as it takes.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

// Warps of the backward pass on a multiprocessor: what shared memory holds.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBackwardWarps = 8;
#else
constexpr int kBackwardWarps = 12;
#endif

// Which threads do what, for one type of arithmetic, states a thread, and threads a channel; and for one dtype, or for
// any that goes with the arithmetic (-1) where a kernel is not worth one for each.
template <typename T_, int STATES_, int LANES_, int DTYPE_ = -1>
struct KernelTraits {
  using T = T_;
  static constexpr int kDtype = DTYPE_;
  static constexpr int kStates = STATES_;
  static constexpr int kLanes = LANES_;
  static constexpr int kPaddedStates = STATES_ * LANES_;
  static constexpr int kWarps = LANES_ < 4 ? LANES_ : 4;
  static constexpr int kThreads = 32 * kWarps;
  // Warps a multiprocessor should hold, for the compiler to share out the registers.
  static constexpr int kForwardBlocks = (kStates == 4 && sizeof(T) == 4 ? 12 : 8) / kWarps;
  static constexpr int kBackwardBlocks = (kStates == 4 && sizeof(T) == 4 ? kBackwardWarps : 8) / kWarps;
  static constexpr int kChannels = kThreads / LANES_;  // channels a block
  static constexpr int kWarpChannels = 32 / LANES_;
  // In a tile of time: what leaves a block of the backward pass below 99 KB of shared memory, all that sm_120 has.
  static constexpr int kSteps = sizeof(T) == 4 ? (kPaddedStates > 64 ? 8 : 32) : (kPaddedStates > 64 ? 4 : 8);
  // Steps whose decays may be in the making at a time, of four: eight states in double precision leave room for one.
  static constexpr int kUnroll = kStates == 4 || sizeof(T) == 4 ? 4 : 1;
  static constexpr int kPitch = kSteps + 4;                                   // a row of a channel tile
  static constexpr int kStatePitch = kPaddedStates + 4;                       // a step of a tile of B or C
  static constexpr int kStateRows = kChannels > kSteps ? kChannels : kSteps;  // of either form of B or C

  static __device__ __forceinline__ int64_t dtype(const wmk_selective_scan& p) {
    return DTYPE_ >= 0 ? DTYPE_ : sizeof(T) == 8 ? static_cast<int64_t>(WMK_FLOAT64) : p.dtype;
  }
  // What exp and log may round: nothing that an fp32 result would show.
  static __device__ __forceinline__ bool precise(const wmk_selective_scan& p) { return dtype(p) == WMK_FLOAT32; }

  using ChannelTile = Tile<T, kChannels, kSteps, kThreads, false>;
  using StateTile = Tile<T, kPaddedStates, kSteps, kThreads, true>;
};

// Where the tiles under way lie, behind everything else in shared memory: sized by the call's dtype, so that more
// blocks of 16-bit data fit on a multiprocessor.
template <typename Traits>
struct StageBuffers {
  static constexpr int kChannelElements = Traits::kChannels * Traits::kSteps;
  static constexpr int kStateElements = Traits::kPaddedStates * Traits::kSteps;
  unsigned char *B, *C, *u, *delta, *z, *grad;

  // The first `channel_tiles` of u, delta, z, grad are there.
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

// How a call is cut, and its scratch.
struct ScanPlan {
  int64_t segment_steps;          // a multiple of kSteps and, where states are saved, of the chunk
  int64_t segments_per_sequence;  // not packed
  int64_t segment_count;          // of all sequences; packed: an upper bound
  int64_t tiles;                  // tiles of channels in all
  int64_t tiles_per_group;
  bool split;  // some sequence may have more than one segment

  void* boundary;  // [slots, channels, state]: what a segment adds; after combining, what enters it
  void* decay;     // [slots, channels, state]: by how much a segment multiplies what enters it
  int32_t* reset;  // [slots, tiles]: 1 where a reset lies in the segment

  void* partial_A;  // [slots, channels, state]
  void* partial_B;  // [slots, channels, state], where B does not vary
  void* partial_C;
  void* partial_D;       // [slots, channels]
  void* partial_bias;    // [slots, channels]
  void* tile_partial_B;  // [batch, tiles, state, time], where B varies
  void* tile_partial_C;
};

// One block's part of the work. It lies in shared memory, found out by one thread.
struct WorkTile {
  bool exists;
  int64_t segment, tile;
  int64_t sequence, batch;
  int64_t segment_in_sequence, segments_in_sequence;
  int64_t offset;      // where in its batch element the sequence begins
  int64_t length;      // of the sequence
  int64_t begin, end;  // of the segment, counted from the start of the sequence
  int64_t group, channel;
  int channels;         // how many of the tile exist
  int64_t chunk_base;   // in chunk_states, of the sequence's first chunk
  int64_t first_chunk;  // in which the segment begins
  int64_t last_chunk;   // in which it ends
};

__device__ __forceinline__ int64_t packed_bound(const wmk_selective_scan& p, int64_t sequence) {
  const int64_t bound = static_cast<const int64_t*>(p.cu_seqlens.data)[sequence];
  return bound < 0 ? 0 : bound > p.time ? p.time : bound;
}

// The sequence, segment and steps of a slot.
__device__ __forceinline__ WorkTile locate_segment(const wmk_selective_scan& p, const ScanPlan& plan, int64_t segment) {
  WorkTile work;
  work.segment = segment;
  if (p.cu_seqlens.data != nullptr) {
    int64_t low = 0, high = p.sequences - 1;  // the last sequence whose first slot is not beyond this one
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

// A thread's place.
template <typename Traits>
struct ThreadCoord {
  int state_lane, row;  // which of the channel's threads; which channel of the tile
  bool exists;
  int64_t channel;

  __device__ __forceinline__ explicit ThreadCoord(const WorkTile& work) {
    const int thread = static_cast<int>(threadIdx.x);
    state_lane = thread % 32 / Traits::kWarpChannels;
    row = thread / 32 * Traits::kWarpChannels + thread % Traits::kWarpChannels;
    exists = row < work.channels;
    channel = work.channel + row;
  }
  // The number of the thread's state i.
  __device__ __forceinline__ int state(int i) const { return i / 4 * (4 * Traits::kLanes) + 4 * state_lane + i % 4; }
};

// Moves a thread's states from and to memory; those that do not exist read as zero.
template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void load_states(T* states, const ThreadCoord<Traits>& coord, int64_t count,
                                            const void* data, int64_t offset, int64_t stride) {
#pragma unroll
  for (int i = 0; i < Traits::kStates; ++i) {
    const int n = coord.state(i);
    states[i] = coord.exists && n < count ? static_cast<const T*>(data)[offset + n * stride] : T(0);
  }
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

// One of four numbers in registers, and a change of one: by selection, where the loop over them is not unrolled.
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

// Sums each of four steps' values over the threads of a channel: thread `quarter` answers step quarter % 4.
template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(const T (&values)[4], int state_lane) {
  static_assert(LANES >= 4, "four steps for four threads");
  constexpr int kLaneStride = 32 / LANES;  // from a channel's thread to its next
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

// Resets of a tile's steps, one bit each; all threads of the block call this, between two barriers.
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

// Constant B or C of the block's channels, as [channels, padded states].
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

// A per-channel parameter, or zeros.
template <typename Traits>
__device__ __forceinline__ void load_parameter(typename Traits::T* row, const wmk_view& view, const WorkTile& work) {
  using T = typename Traits::T;
  for (int i = threadIdx.x; i < Traits::kChannels; i += Traits::kThreads) {
    const bool exists = view.data != nullptr && i < work.channels;
    row[i] = exists ? static_cast<const T*>(view.data)[(work.channel + i) * view.stride[0]] : T(0);
  }
}

// Where a block finds its part of a tensor: of B or C, its group's; of the others, its channels.
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
