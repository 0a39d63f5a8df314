#pragma once

#include "cpu/common/parallel.h"
#include "cpu/common/tile.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

constexpr int64_t kStreamBytes = int64_t(16)
                                 << 20;  // larger outputs bypass the cache: no line is read to be overwritten

// Non-temporal where possible; `to` is aligned to the bytes written.
template <class S, class V>
WMK_INLINE void stream_as(S* to, V value) {
#if defined(WMK_AVX512)
  if constexpr (sizeof(S) >= 4) {
    _mm512_stream_si512((__m512i*)to, (__m512i)value);
  } else {
    alignas(32) S halves[kLanes<float>];
    store_as(halves, value);
    _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)halves));
  }
#elif defined(WMK_AVX2)
  if constexpr (sizeof(S) >= 4) {
    _mm256_stream_si256((__m256i*)to, (__m256i)value);
  } else {
    store_as(to, value);
  }
#else
  store_as(to, value);
#endif
}
WMK_INLINE void flush_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// `count` lanes, the rest zero.
template <class T, class S>
WMK_INLINE Vector<T> load_lanes(const S* from, int count) {
  if (count == kLanes<T>) return load_as(from, T(0));
  S padded[kLanes<T>] = {};
  for (int lane = 0; lane < count; ++lane) padded[lane] = from[lane];
  return load_as(padded, T(0));
}
template <class T, class S>
WMK_INLINE void store_lanes(S* to, Vector<T> value, int count) {
  if (count == kLanes<T>) return store_as(to, value);
  S padded[kLanes<T>];
  store_as(padded, value);
  for (int lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

// Positions count in scan order: in reverse, 0 is the last time step.
template <class T>
struct Scan {
  static constexpr int lanes = kLanes<T>;
  typedef typename VectorOf<T>::integers Mask;

  const wmk_linear_scan& op;
  bool backward;

  int64_t time_at(int64_t position) const { return op.reverse ? op.time - 1 - position : position; }

  // In reverse, a reset at t cuts between t and t - 1.
  bool is_reset(int64_t batch, int64_t position) const {
    if (!op.reset.data) return false;
    int64_t time = time_at(position);
    if (op.reverse) {
      if (position == 0) return false;
      ++time;
    }
    return flag(batch, time);
  }
  bool flag(int64_t batch, int64_t time) const {
    return ((const char*)op.reset.data)[batch * op.reset.stride[0] + time * op.reset.stride[1]] != 0;
  }
  bool drops_last_state(int64_t batch) const { return op.reverse && op.reset.data && op.time > 0 && flag(batch, 0); }

  T initial(int64_t batch, int64_t channel) const { return element(op.initial_state, batch, channel); }
  static T element(const wmk_view& view, int64_t batch, int64_t channel) {
    return view.data ? ((const T*)view.data)[batch * view.stride[0] + channel * view.stride[1]] : T(0);
  }
  void store_state(const wmk_view& view, int64_t batch, int64_t channel, T value) const {
    if (view.data) ((T*)view.data)[batch * op.channels + channel] = value;
  }
  // The state before the first position and after the last; backward, dh after the last and before the first.
  T incoming(int64_t batch, int64_t channel) const {
    if (!backward) return initial(batch, channel);
    return drops_last_state(batch) ? T(0) : element(op.grad_last_state, batch, channel);
  }
  void store_outgoing(int64_t batch, int64_t channel, T value) const {
    if (backward) {
      store_state(op.grad_initial_state, batch, channel, value);
    } else {
      store_state(op.last_state, batch, channel, drops_last_state(batch) ? T(0) : value);
    }
  }
  bool streams() const { return op.batch * op.channels * op.time * bytes_of(op.dtype) >= kStreamBytes; }
};

}  // namespace wmk::WMK_ISA
