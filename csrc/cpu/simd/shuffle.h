#pragma once

#include <utility>

#include "cpu/simd/vector.h"

namespace wmk::WMK_ISA {

// Lane i is lane Pattern::source(i) of `a` then `b`. GCC 12 has __builtin_shufflevector, but inlines differently with
// it.
#if defined(__clang__)
template <class Pattern, class V, int... lanes>
WMK_INLINE V shuffle(V a, V b, std::integer_sequence<int, lanes...>) {
  return __builtin_shufflevector(a, b, Pattern::source(lanes)...);
}
template <class Pattern, class V>
WMK_INLINE V shuffle(V a, V b) {
  return shuffle<Pattern>(a, b, std::make_integer_sequence<int, int(sizeof(V) / sizeof(a[0]))>());
}
#else
template <class Pattern, class V>
WMK_INLINE V shuffle(V a, V b) {
  typedef decltype(a > b) Mask;
  Mask sources{};
  for (int lane = 0; lane < int(sizeof(V) / sizeof(a[0])); ++lane) sources[lane] = Pattern::source(lane);
  return __builtin_shuffle(a, b, sources);
}
#endif

// Per 128 bits, interleaves the first (or second) halves of `a` and `b` by `Group` elements: the unpack instructions.
template <int Group, bool Second, class V>
WMK_INLINE V unpack(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  struct Pattern {
    static constexpr int source(int lane) {
      constexpr int block = 16 / sizeof(V{}[0]);
      const int within = lane % block, group = within / Group;
      return lane - within + (Second ? block / 2 : 0) + group / 2 * Group + within % Group + (group & 1 ? lanes : 0);
    }
  };
  return shuffle<Pattern>(a, b);
}
// The even (or odd) 128-bit blocks of `a`, then of `b`.
template <bool Odd, class V>
WMK_INLINE V alternate_blocks(V a, V b) {
  struct Pattern {
    static constexpr int source(int lane) {
      constexpr int block = 16 / sizeof(V{}[0]);
      return lane / block * 2 * block + (Odd ? block : 0) + lane % block;
    }
  };
  return shuffle<Pattern>(a, b);
}

// Lane i is the sum of all lanes of vectors(first + i). A tree takes about three instructions per vector, where
// separate sums take three per level; depth first keeps few vectors live.
template <class T, int Count = kLanes<T>, class Vectors>
WMK_INLINE Vector<T> sum_lanes(const Vectors& vectors, int first = 0) {
  if constexpr (Count == 1) {
    return vectors(first);
  } else {
    constexpr int half = Count / 2;
    Vector<T> a = sum_lanes<T, half>(vectors, first), b = sum_lanes<T, half>(vectors, first + half);
    if constexpr (half * int(sizeof(T)) < 16) {
      return unpack<half, false>(a, b) + unpack<half, true>(a, b);
    } else {
      return alternate_blocks<false>(a, b) + alternate_blocks<true>(a, b);
    }
  }
}

}  // namespace wmk::WMK_ISA
