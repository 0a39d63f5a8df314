// Chains the segments of a selective scan that ran side by side.
//
// The local pass left, for each segment, where it leads from zero (boundary) and by how much it multiplies what enters
// it (decay); one with a reset forgets what enters. This kernel walks over a sequence's segments and puts what enters
// each in the place of where it led. Forward in time for states, backward for their gradients. A block takes 32 numbers
// of [channels, state]; its warps first compose a range of segments each, then start from what the ranges before lead
// to. The order of every sum is fixed.
#pragma once

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

constexpr int kCombineWarps = 8;

// A decay over a whole segment may overflow where no step's does, so zero stays zero by selection.
template <typename T>
__device__ __forceinline__ T chain(bool forgets, T factor, T state, T added) {
  return forgets || state == T(0) ? added : factor * state + added;
}

// tile_channels: channels of the local pass's tiles, as its forgets are [slots, tiles].
template <typename T, bool REVERSE>
__global__ void __launch_bounds__(32 * kCombineWarps)
    selective_scan_combine_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p, const WMK_GRID_CONSTANT ScanPlan plan,
                                  const int tile_channels) {
  WMK_SHARED_ARRAY(T, range_decay, [kCombineWarps][32]);
  WMK_SHARED_ARRAY(T, range_end, [kCombineWarps][32]);
  WMK_SHARED_ARRAY(int, range_forgets, [kCombineWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t numbers = p.channels * p.state, blocks = (numbers + 31) / 32;
  const int64_t sequence = blockIdx.x / blocks;
  const int64_t number = blockIdx.x % blocks * 32 + lane;
  const bool exists = number < numbers;
  const int64_t channel = exists ? number / p.state : 0;

  int64_t first = sequence * plan.segments, length = p.time;  // first: the sequence's first slot
  if (p.cu_seqlens.data != nullptr) {
    const int64_t offset = packed_bound(p, sequence);
    first = offset / plan.segment + sequence;
    length = packed_bound(p, sequence + 1) - offset;
  }
  const int64_t count = length <= 0 ? 1 : (length + plan.segment - 1) / plan.segment;

  // Segment 0 needs nothing forward: its own pass starts from the initial state, and so did its local pass. The last
  // one's local pass never ran. Backward the same, from the other end.
  const int64_t per_warp = (count + kCombineWarps - 1) / kCombineWarps;
  const int64_t begin = warp * per_warp < count ? warp * per_warp : count;
  const int64_t end = begin + per_warp < count ? begin + per_warp : count;
  T* boundary = static_cast<T*>(plan.boundary);
  const T* decay = static_cast<const T*>(plan.decay);
  const int64_t channels_per_group = p.channels / p.groups;
  const int64_t tile =
      channel / channels_per_group * plan.tiles_per_group + channel % channels_per_group / tile_channels;
  const auto slot_of = [&](int64_t k) { return first + (REVERSE ? count - 1 - k : k); };

  T state = T(0), product = T(1);
  int forgot = 0;
  if (exists) {
#pragma unroll 4
    for (int64_t k = begin; k < end && k + 1 < count; ++k) {
      const int64_t slot = slot_of(k);
      const T added = boundary[slot * numbers + number], factor = decay[slot * numbers + number];
      const bool forgets = plan.forgets[slot * plan.tiles + tile] != 0;
      state = chain(forgets, factor, state, added);
      product *= factor;
      forgot |= forgets;
    }
  }
  range_end[warp][lane] = state;
  range_decay[warp][lane] = product;
  range_forgets[warp][lane] = forgot;
  __syncthreads();
  state = T(0);
  for (int i = 0; i < warp; ++i) {
    state = chain(range_forgets[i][lane] != 0, range_decay[i][lane], state, range_end[i][lane]);
  }
  if (!exists) return;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = slot_of(k) * numbers + number;
    T added = T(0), factor = T(0);
    bool forgets = false;
    if (k + 1 < count) {
      added = boundary[at];
      factor = decay[at];
      forgets = plan.forgets[slot_of(k) * plan.tiles + tile] != 0;
    }
    boundary[at] = state;
    state = chain(forgets, factor, state, added);
  }
}

// Adds up partial sums: out[i] = sum over slots of partial[slot][i], as many as are given.
struct SlotSum {
  const void* partial;
  void* out;
  int64_t count;
};
struct SlotSums {
  SlotSum sum[5];
  int64_t slots;
  int64_t first_block[6];  // which block begins which sum
};

template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps) sum_slots_kernel(const WMK_GRID_CONSTANT SlotSums sums) {
  WMK_SHARED_ARRAY(T, part, [kCombineWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int which = 0;
  while (static_cast<int64_t>(blockIdx.x) >= sums.first_block[which + 1]) ++which;
  const SlotSum& sum = sums.sum[which];
  const int64_t number = (static_cast<int64_t>(blockIdx.x) - sums.first_block[which]) * 32 + lane;
  T total = T(0);
  if (number < sum.count) {
    const T* partial = static_cast<const T*>(sum.partial);
#pragma unroll 4
    for (int64_t slot = warp; slot < sums.slots; slot += kCombineWarps) total += partial[slot * sum.count + number];
  }
  part[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || number >= sum.count) return;
  for (int i = 1; i < kCombineWarps; ++i) total += part[i][lane];
  static_cast<T*>(sum.out)[number] = total;
}

// Adds up the tiles' shares of a gradient of B or C that varies: partial [batch, groups, tiles a group, state, time] to
// a [batch, groups, state, time] view.
template <typename T>
__global__ void __launch_bounds__(256)
    sum_tiles_kernel(const T* partial, const WMK_GRID_CONSTANT wmk_view out, const int64_t dtype, const int64_t groups,
                     const int64_t tiles, const int64_t states, const int64_t time) {
  const int64_t blocks = (time + 255) / 256;
  const int64_t step = blockIdx.x % blocks * 256 + threadIdx.x;
  if (step >= time) return;
  const int64_t row = blockIdx.x / blocks;  // of [batch, groups, states]
  const int64_t state = row % states, group = row / states % groups, batch = row / states / groups;
  const T* from = partial + ((batch * groups + group) * tiles * states + state) * time + step;
  T total = T(0);
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) total += from[tile * states * time];
  store_element<T>(out.data, dtype,
                   batch * out.stride[0] + group * out.stride[1] + state * out.stride[2] + step * out.stride[3], total);
}

}  // namespace wmk
