// The scans' combine operator: h_t = decay_t h_{t-1} + value_t over a time range is an affine map (decay, value,
// reset). A reset drops the incoming state by selection: a product with zero would pass NaN and infinity.
#pragma once

#include "cuda/common/primitives.cuh"

namespace wmk {

template <typename T>
struct AffineMap {
  T decay, value;
  bool reset;
};

// Zero stays zero by selection: a range's decay may overflow where no step's does.
template <typename T>
__device__ __forceinline__ T pass_state(const AffineMap<T>& map, T state) {
  return map.reset || state == T(0) ? map.value : map.decay * state + map.value;
}

// RANGE: `later` has several steps. One step has no selection: an infinite decay turns zero into NaN, as in a loop.
template <bool RANGE, typename T>
__device__ __forceinline__ AffineMap<T> combine(const AffineMap<T>& earlier, const AffineMap<T>& later) {
  if (later.reset) return later;
  return {earlier.decay * later.decay,
          RANGE ? pass_state(later, earlier.value) : later.decay * earlier.value + later.value, earlier.reset};
}

template <typename T>
__device__ __forceinline__ AffineMap<T> shuffle_map(const AffineMap<T>& map, int lane) {
  AffineMap<T> other;
  other.decay = __shfl_sync(0xffffffffu, map.decay, lane);
  other.value = __shfl_sync(0xffffffffu, map.value, lane);
  other.reset = __shfl_sync(0xffffffffu, static_cast<int>(map.reset), lane) != 0;
  return other;
}

}  // namespace wmk
