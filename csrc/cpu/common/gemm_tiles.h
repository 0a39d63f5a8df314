// Products of the small matrices of a chunk of steps, tile by tile in registers, of whole and of triangular matrices.
#pragma once

#include "cpu/common/gemm_microkernel.h"
#include "include/wmkernels.h"

namespace wmk::WMK_ISA {

// Rows of a tile of N vectors: as many sums as fit the registers with the vectors and a broadcast element.
#if defined(WMK_AVX512)
template <int N>
constexpr int kTileRows = N == 4 ? 6 : 8;
constexpr int kTileVectors = 4;
#else
template <int N>
constexpr int kTileRows = N == 2 ? 6 : 8;
constexpr int kTileVectors = 2;
#endif

template <int rows, class Work>
WMK_INLINE void for_row_tiles(int64_t begin, int64_t end, const Work& work) {
  for (; end - begin >= rows; begin += rows) work(Constant<rows>(), begin);
  if constexpr (rows > 1) for_row_tiles<(rows > 4 ? 4 : rows / 2)>(begin, end, work);
}
template <int rows, class Work>
WMK_INLINE void for_row_tiles_reversed(int64_t end, const Work& work) {
  for (; end >= rows; end -= rows) work(Constant<rows>(), end - rows);
  if constexpr (rows > 1) for_row_tiles_reversed<(rows > 4 ? 4 : rows / 2)>(end, work);
}
// Calls work(M, N, row, column), rows in order within each panel of N vectors.
template <class T, bool reversed = false, class Work>
WMK_INLINE void for_tiles(int64_t rows, int64_t columns, const Work& work) {
  int64_t column = 0;
  auto panels = [&](auto N) {
    constexpr int n = decltype(N)::value, width = n * kLanes<T>;
    for (; column + width <= columns; column += width) {
      auto tile = [&](auto M, int64_t row) { work(M, N, row, column); };
      if constexpr (reversed) {
        for_row_tiles_reversed<kTileRows<n>>(rows, tile);
      } else {
        for_row_tiles<kTileRows<n>>(0, rows, tile);
      }
    }
  };
  if constexpr (kTileVectors == 4) panels(Constant<4>());
  panels(Constant<2>());
  panels(Constant<1>());
}

// sums[m] += left[m * row + k * step] * right[k * pitch], over k < m or k > m of a square on the diagonal (also k = m
// if `diagonal`).
template <class T, bool lower, bool diagonal, int M, int N>
WMK_INLINE void accumulate_triangle(Vector<T> (&sums)[M][N], const T* left, int64_t row, int64_t step, const T* right,
                                    int64_t pitch) {
#pragma GCC unroll 16
  for (int k = 0; k < M; ++k) {
    Vector<T> vectors[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) vectors[n] = load(right + k * pitch + n * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      if (!(lower ? k < m : k > m) && !(diagonal && k == m)) continue;
      Vector<T> element = broadcast(left[m * row + k * step]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += element * vectors[n];
    }
  }
}

template <class T>
WMK_INLINE typename VectorOf<T>::integers lane_numbers() {
  typename VectorOf<T>::integers numbers;
  for (int lane = 0; lane < kLanes<T>; ++lane) numbers[lane] = lane;
  return numbers;
}

template <class Work>
auto with_arithmetic(int64_t dtype, const Work& work) {
  return dtype == WMK_FLOAT64 ? work(double()) : work(float());
}

}  // namespace wmk::WMK_ISA
