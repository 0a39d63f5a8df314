// Passes states between a selective scan's segments, and reduces partials.
//
// The local pass leaves an affine map per segment (boundary, decay, reset); the combine kernel replaces boundary by the
// initial state (backward: the final dh). A block takes 32 elements of [channels, state]; each warp combines a range of
// segments, then applies the earlier ranges in order.
#pragma once

#include "cuda/common/affine_scan.cuh"
#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

constexpr int kCombineWarps = 8;

// resets: [segments, tiles].
template <typename T, bool REVERSE>
__global__ void __launch_bounds__(32 * kCombineWarps)
    selective_scan_combine_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p, const WMK_GRID_CONSTANT ScanPlan plan,
                                  const int tile_channels) {
  WMK_SHARED_ARRAY(T, range_decay, [kCombineWarps][32]);
  WMK_SHARED_ARRAY(T, range_value, [kCombineWarps][32]);
  WMK_SHARED_ARRAY(int, range_reset, [kCombineWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t elements = p.channels * p.state, blocks = (elements + 31) / 32;
  const int64_t sequence = blockIdx.x / blocks;
  const int64_t element = blockIdx.x % blocks * 32 + lane;
  const bool exists = element < elements;
  const int64_t channel = exists ? element / p.state : 0;

  int64_t first = sequence * plan.segments_per_sequence, length = p.time;
  if (p.cu_seqlens.data != nullptr) {
    const int64_t offset = packed_bound(p, sequence);
    first = offset / plan.segment_steps + sequence;
    length = packed_bound(p, sequence + 1) - offset;
  }
  const int64_t count = length <= 0 ? 1 : (length + plan.segment_steps - 1) / plan.segment_steps;

  // Segment 0 starts from the initial state; the last has no local pass. Backward: mirrored.
  const int64_t per_warp = (count + kCombineWarps - 1) / kCombineWarps;
  const int64_t begin = warp * per_warp < count ? warp * per_warp : count;
  const int64_t end = begin + per_warp < count ? begin + per_warp : count;
  T* boundary = static_cast<T*>(plan.boundary);
  const T* decay = static_cast<const T*>(plan.decay);
  const int64_t channels_per_group = p.channels / p.groups;
  const int64_t tile =
      channel / channels_per_group * plan.tiles_per_group + channel % channels_per_group / tile_channels;
  const auto segment_at = [&](int64_t k) { return first + (REVERSE ? count - 1 - k : k); };
  const auto map_of = [&](int64_t segment) {
    const int64_t offset = segment * elements + element;
    return AffineMap<T>{decay[offset], boundary[offset], plan.reset[segment * plan.tiles + tile] != 0};
  };

  AffineMap<T> range = {T(1), T(0), false};
  if (exists) {
#pragma unroll 4
    for (int64_t k = begin; k < end && k + 1 < count; ++k) range = combine<true>(range, map_of(segment_at(k)));
  }
  range_value[warp][lane] = range.value;
  range_decay[warp][lane] = range.decay;
  range_reset[warp][lane] = range.reset;
  __syncthreads();
  T state = T(0);
  for (int i = 0; i < warp; ++i) {
    state = pass_state(AffineMap<T>{range_decay[i][lane], range_value[i][lane], range_reset[i][lane] != 0}, state);
  }
  if (!exists) return;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) {
    const int64_t segment = segment_at(k);
    AffineMap<T> map = {T(0), T(0), false};
    if (k + 1 < count) map = map_of(segment);
    boundary[segment * elements + element] = state;
    state = pass_state(map, state);
  }
}

// out[i] = sum_s partial[s][i].
struct SegmentSum {
  const void* partial;
  void* out;
  int64_t count;
};
struct SegmentSums {
  SegmentSum sum[5];
  int64_t segment_count;
  int64_t first_block[6];
};

template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps) sum_segments_kernel(const WMK_GRID_CONSTANT SegmentSums sums) {
  WMK_SHARED_ARRAY(T, warp_sum, [kCombineWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int which = 0;
  while (static_cast<int64_t>(blockIdx.x) >= sums.first_block[which + 1]) ++which;
  const SegmentSum& sum = sums.sum[which];
  const int64_t element = (static_cast<int64_t>(blockIdx.x) - sums.first_block[which]) * 32 + lane;
  T total = T(0);
  if (element < sum.count) {
    const T* partial = static_cast<const T*>(sum.partial);
#pragma unroll 4
    for (int64_t segment = warp; segment < sums.segment_count; segment += kCombineWarps)
      total += partial[segment * sum.count + element];
  }
  warp_sum[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || element >= sum.count) return;
  for (int i = 1; i < kCombineWarps; ++i) total += warp_sum[i][lane];
  static_cast<T*>(sum.out)[element] = total;
}

// Partial gradients of B or C: [batch, groups, tiles per group, state, time] -> [batch, groups, state, time].
template <typename T>
__global__ void __launch_bounds__(256)
    sum_tiles_kernel(const T* partial, const WMK_GRID_CONSTANT wmk_view out, const int64_t dtype, const int64_t groups,
                     const int64_t tiles, const int64_t states, const int64_t time) {
  const int64_t blocks = (time + 255) / 256;
  const int64_t step = blockIdx.x % blocks * 256 + threadIdx.x;
  if (step >= time) return;
  const int64_t row = blockIdx.x / blocks;  // [batch, groups, states]
  const int64_t state = row % states, group = row / states % groups, batch = row / states / groups;
  const T* source = partial + ((batch * groups + group) * tiles * states + state) * time + step;
  T total = T(0);
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) total += source[tile * states * time];
  store_element<T>(out.data, dtype,
                   batch * out.stride[0] + group * out.stride[1] + state * out.stride[2] + step * out.stride[3], total);
}

}  // namespace wmk
