// The combine operator of every scan: what some steps of h_t = decay_t h_{t-1} + value_t do to the state before them.
//
// A stretch of time, whatever its length, is one affine map (decay, value, reset). Maps of adjacent stretches combine
// to the map of both, associatively, so a scan over time can be a scan over threads, warps or segments. A reset ignores
// the state by selection: a product with zero would let NaN and infinity through.
#pragma once

#include "cuda/common/primitives.cuh"

namespace wmk {

template <typename T>
struct AffineMap {
  T decay, value;
  bool reset;  // the state before does not matter
};

// The state after the map. Zero stays zero by selection: the decay of a long stretch may overflow where no step's does.
template <typename T>
__device__ __forceinline__ T pass_state(const AffineMap<T>& map, T state) {
  return map.reset || state == T(0) ? map.value : map.decay * state + map.value;
}

// `earlier`, then `later`. LONG: the decay of `later` may have overflowed; costs a comparison and a selection.
template <bool LONG, typename T>
__device__ __forceinline__ AffineMap<T> combine(const AffineMap<T>& earlier, const AffineMap<T>& later) {
  if (later.reset) return later;
  const T value = LONG ? pass_state(later, earlier.value) : later.decay * earlier.value + later.value;
  return {earlier.decay * later.decay, value, earlier.reset};
}

// The map that lane `lane` of the warp holds; all lanes call this.
template <typename T>
__device__ __forceinline__ AffineMap<T> shuffle_map(const AffineMap<T>& map, int lane) {
  AffineMap<T> other;
  other.decay = __shfl_sync(0xffffffffu, map.decay, lane);
  other.value = __shfl_sync(0xffffffffu, map.value, lane);
  other.reset = __shfl_sync(0xffffffffu, static_cast<int>(map.reset), lane) != 0;
  return other;
}

}  // namespace wmk
