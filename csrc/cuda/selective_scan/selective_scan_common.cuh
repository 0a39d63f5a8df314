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
struct ScanConfiguration {
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
    return DTYPE_ >= 0 ? DTYPE_ : sizeof(T) == 8 ? WMK_FLOAT64 : p.dtype;
  }
  // What exp and log may round: nothing that an fp32 result would show.
  static __device__ __forceinline__ bool precise(const wmk_selective_scan& p) { return dtype(p) == WMK_FLOAT32; }

  using ChannelTile = Tile<T, kChannels, kSteps, kThreads, false>;
  using StateTile = Tile<T, kPaddedStates, kSteps, kThreads, true>;
};

// Where the tiles under way lie, behind everything else in shared memory: sized by the call's dtype, so that more
// blocks of 16-bit data fit on a multiprocessor.
template <typename Configuration>
struct Slots {
  static constexpr int kChannelElements = Configuration::kChannels * Configuration::kSteps;
  static constexpr int kStateElements = Configuration::kPaddedStates * Configuration::kSteps;
  unsigned char *B, *C, *u, *delta, *z, *grad;

  // The first `channel_tiles` of u, delta, z, grad are there.
  static int64_t bytes(int64_t dtype, int channel_tiles) {
    return element_size(dtype) * (2 * kStateElements + channel_tiles * kChannelElements);
  }
  __device__ __forceinline__ Slots(unsigned char* memory, int64_t dtype) {
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
  int64_t segment;   // steps, a multiple of a tile's and, where states are saved, of the chunk
  int64_t segments;  // of each sequence, where they are not packed
  int64_t slots;     // segments in all (packed: at most)
  int64_t tiles;     // tiles of channels in all
  int64_t tiles_per_group;
  bool split;  // some sequence may have more than one segment

  void* boundary;    // [slots, channels, state]: what a segment adds; after combining, what enters it
  void* decay;       // [slots, channels, state]: by how much a segment multiplies what enters it
  int32_t* forgets;  // [slots, tiles]: 1 where a reset lies in the segment

  void* partial_A;  // [slots, channels, state]
  void* partial_B;  // [slots, channels, state], where B does not vary
  void* partial_C;
  void* partial_D;     // [slots, channels]
  void* partial_bias;  // [slots, channels]
  void* tile_B;        // [batch, tiles, state, time], where B varies
  void* tile_C;
};

// One block's part of the work. It lies in shared memory, found out by one thread.
struct BlockPart {
  bool exists;
  int64_t slot, tile;
  int64_t sequence, batch;
  int64_t index, count;  // of the segment in its sequence
  int64_t offset;        // where in its batch element the sequence begins
  int64_t length;        // of the sequence
  int64_t begin, end;    // of the segment, counted from the start of the sequence
  int64_t group, channel;
  int channels;         // how many of the tile exist
  int64_t chunk_slot;   // in chunk_states, of the sequence's first chunk
  int64_t first_chunk;  // in which the segment begins
  int64_t last_chunk;   // in which it ends
};

__device__ __forceinline__ int64_t packed_bound(const wmk_selective_scan& p, int64_t sequence) {
  const int64_t bound = static_cast<const int64_t*>(p.cu_seqlens.data)[sequence];
  return bound < 0 ? 0 : bound > p.time ? p.time : bound;
}

// The sequence, segment and steps of a slot.
__device__ __forceinline__ BlockPart segment_of_slot(const wmk_selective_scan& p, const ScanPlan& plan, int64_t slot) {
  BlockPart part;
  part.slot = slot;
  if (p.cu_seqlens.data != nullptr) {
    int64_t low = 0, high = p.sequences - 1;  // the last sequence whose first slot is not beyond this one
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (packed_bound(p, middle) / plan.segment + middle <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    part.sequence = low;
    part.batch = 0;
    part.offset = packed_bound(p, low);
    part.length = packed_bound(p, low + 1) - part.offset;
    if (part.length < 0) part.length = 0;
    part.index = slot - (part.offset / plan.segment + low);
  } else {
    part.sequence = part.batch = slot / plan.segments;
    part.index = slot % plan.segments;
    part.offset = 0;
    part.length = p.time;
  }
  part.count = part.length == 0 ? 1 : (part.length + plan.segment - 1) / plan.segment;
  part.exists = part.index < part.count;
  part.begin = part.index * plan.segment;
  part.end = part.begin + plan.segment < part.length ? part.begin + plan.segment : part.length;
  return part;
}

template <typename Configuration>
__device__ __forceinline__ BlockPart block_part(const wmk_selective_scan& p, const ScanPlan& plan) {
  const int64_t block = blockIdx.x;
  BlockPart part = segment_of_slot(p, plan, block / plan.tiles);
  part.tile = block % plan.tiles;
  const int64_t channels_per_group = p.channels / p.groups;
  part.group = part.tile / plan.tiles_per_group;
  const int64_t first = part.tile % plan.tiles_per_group * Configuration::kChannels;
  part.channel = part.group * channels_per_group + first;
  const int64_t left = channels_per_group - first;
  part.channels = static_cast<int>(left < Configuration::kChannels ? left : Configuration::kChannels);
  const int64_t chunk = p.chunk < 1 ? 1 : p.chunk;
  part.chunk_slot = p.cu_seqlens.data != nullptr ? part.offset / chunk + part.sequence
                                                 : part.sequence * ((p.time + chunk - 1) / chunk);
  part.first_chunk = part.begin / chunk;
  part.last_chunk = part.end > 0 ? (part.end - 1) / chunk : 0;
  return part;
}

// A thread's place.
template <typename Configuration>
struct ThreadPlace {
  int quarter, row;  // which of the channel's threads; which channel of the tile
  bool exists;
  int64_t channel;

  __device__ __forceinline__ explicit ThreadPlace(const BlockPart& part) {
    const int thread = static_cast<int>(threadIdx.x);
    quarter = thread % 32 / Configuration::kWarpChannels;
    row = thread / 32 * Configuration::kWarpChannels + thread % Configuration::kWarpChannels;
    exists = row < part.channels;
    channel = part.channel + row;
  }
  // The number of the thread's state i.
  __device__ __forceinline__ int state(int i) const {
    return i / 4 * (4 * Configuration::kLanes) + 4 * quarter + i % 4;
  }
};

// Moves a thread's states from and to memory; those that do not exist read as zero.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void load_states(T* states, const ThreadPlace<Configuration>& place, int64_t count,
                                            const void* data, int64_t offset, int64_t stride) {
#pragma unroll
  for (int i = 0; i < Configuration::kStates; ++i) {
    const int n = place.state(i);
    states[i] = place.exists && n < count ? static_cast<const T*>(data)[offset + n * stride] : T(0);
  }
}
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void store_states(const T* states, const ThreadPlace<Configuration>& place, int64_t count,
                                             void* data, int64_t offset) {
  if (!place.exists) return;
  T* to = static_cast<T*>(data) + offset;
#pragma unroll
  for (int j = 0; j < Configuration::kStates / 4; ++j) {
    const int n = place.state(4 * j);
    if (count % 4 == 0) {
      if (n < count) {
        Quad<T> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.value[i] = states[4 * j + i];
        store_quad(to + n, quad);
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
__device__ __forceinline__ T pick(const T (&values)[4], int at) {
  T value = values[0];
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    if (at == k) value = values[k];
  }
  return value;
}
template <typename T>
__device__ __forceinline__ void put(T (&values)[4], int at, T value) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (at == k) values[k] = value;
  }
}

// Sums each of four steps' values over the threads of a channel: thread `quarter` answers step quarter % 4.
template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(const T (&values)[4], int quarter) {
  static_assert(LANES >= 4, "four steps for four threads");
  constexpr int kNext = 32 / LANES;  // from a channel's thread to its next
  T halves[2];
  const bool odd = quarter & 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T keep = odd ? values[2 * i + 1] : values[2 * i], send = odd ? values[2 * i] : values[2 * i + 1];
    halves[i] = keep + __shfl_xor_sync(0xffffffffu, send, kNext);
  }
  const bool upper = quarter & 2;
  const T keep = upper ? halves[1] : halves[0], send = upper ? halves[0] : halves[1];
  T total = keep + __shfl_xor_sync(0xffffffffu, send, 2 * kNext);
#pragma unroll
  for (int lane = 4; lane < LANES; lane *= 2) total += __shfl_xor_sync(0xffffffffu, total, lane * kNext);
  return total;
}

// Resets of a tile's steps, one bit each; all threads of the block call this, between two barriers.
template <typename Configuration>
__device__ __forceinline__ void place_resets(uint32_t* mask, const wmk_selective_scan& p, const BlockPart& part,
                                             int64_t begin, int steps) {
  static_assert(Configuration::kSteps <= 32, "a tile's resets are one word");
  if (threadIdx.x < 32) {
    const int step = static_cast<int>(threadIdx.x);
    bool reset = false;
    if (p.reset.data != nullptr && step < steps) {
      const int64_t time = part.offset + begin + step;
      reset = static_cast<const uint8_t*>(p.reset.data)[part.batch * p.reset.stride[0] + time * p.reset.stride[1]] != 0;
    }
    const uint32_t bits = __ballot_sync(0xffffffffu, reset);
    if (step == 0) *mask = bits;
  }
}

// Constant B or C of the block's channels, as [channels, padded states].
template <typename Configuration>
__device__ __forceinline__ void place_constant(typename Configuration::T* tile, const wmk_view& view,
                                               const wmk_selective_scan& p, const BlockPart& part) {
  using T = typename Configuration::T;
  for (int i = threadIdx.x; i < Configuration::kChannels * Configuration::kPaddedStates; i += Configuration::kThreads) {
    const int row = i / Configuration::kPaddedStates, n = i % Configuration::kPaddedStates;
    T value = T(0);
    if (row < part.channels && n < p.state) {
      value = static_cast<const T*>(view.data)[(part.channel + row) * view.stride[0] + n * view.stride[1]];
    }
    tile[row * Configuration::kStatePitch + n] = value;
  }
}

// A per-channel parameter, or zeros.
template <typename Configuration>
__device__ __forceinline__ void place_parameter(typename Configuration::T* row, const wmk_view& view,
                                                const BlockPart& part) {
  using T = typename Configuration::T;
  for (int i = threadIdx.x; i < Configuration::kChannels; i += Configuration::kThreads) {
    const bool exists = view.data != nullptr && i < part.channels;
    row[i] = exists ? static_cast<const T*>(view.data)[(part.channel + i) * view.stride[0]] : T(0);
  }
}

// Where a block finds its part of a tensor: of B or C, its group's; of the others, its channels.
__device__ __forceinline__ char* state_origin(const wmk_view& view, const wmk_selective_scan& p,
                                              const BlockPart& part) {
  const int64_t offset = part.batch * view.stride[0] + part.group * view.stride[1] + part.offset * view.stride[3];
  return static_cast<char*>(view.data) + offset * element_size(p.dtype);
}
__device__ __forceinline__ char* channel_origin(const wmk_view& view, const wmk_selective_scan& p,
                                                const BlockPart& part) {
  const int64_t offset = part.batch * view.stride[0] + part.channel * view.stride[1] + part.offset * view.stride[2];
  return static_cast<char*>(view.data) + offset * element_size(p.dtype);
}
__device__ __forceinline__ StridedRows state_rows(char* origin, const wmk_view& view) {
  return {origin, view.stride[2], view.stride[3]};
}
__device__ __forceinline__ StridedRows channel_rows(char* origin, const wmk_view& view) {
  return {origin, view.stride[1], view.stride[2]};
}

}  // namespace wmk
