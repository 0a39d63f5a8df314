// Shuffles of lanes, and sums across them, many at a time.
#pragma once

#include "cpu/simd/vector.h"

namespace wmk::WMK_ISA {

// Of every 128 bits, the first (or second) half of `a` and of `b`, interleaved in pieces of `Piece` elements. The
// pattern is the one of the unpack instructions, which is cheaper than a free permutation.
template <int Piece, bool Second, class V>
WMK_INLINE V unpack(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]), block = 16 / sizeof(a[0]);
  typedef decltype(a > b) Mask;
  Mask pick{};
  for (int lane = 0; lane < lanes; ++lane) {
    int within = lane % block, piece = within / Piece;
    int source = lane - within + (Second ? block / 2 : 0) + piece / 2 * Piece + within % Piece;
    pick[lane] = source + (piece & 1 ? lanes : 0);
  }
  return __builtin_shuffle(a, b, pick);
}
// The even (or odd) 128-bit blocks of `a`, then those of `b`.
template <bool Odd, class V>
WMK_INLINE V alternate_blocks(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]), block = 16 / sizeof(a[0]);
  typedef decltype(a > b) Mask;
  Mask pick{};
  for (int lane = 0; lane < lanes; ++lane)
    pick[lane] = lane / block * 2 * block + (Odd ? block : 0) + lane % block;  // counts on through b
  return __builtin_shuffle(a, b, pick);
}

// The vector whose lane i is the sum of all lanes of vectors(first + i), for as many vectors as there are lanes: a tree
// that halves the number of vectors at every level, about three instructions a vector where a sum of its own would take
// three a level. Depth first, so that few vectors are alive at a time.
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
