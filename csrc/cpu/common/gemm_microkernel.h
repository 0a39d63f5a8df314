// Register-blocked matrix products.
//
// M x N vectors of sums stay in registers: a broadcast left element serves N vectors, a right vector M elements. MR and
// NR hide the multiply-add latency with few loads.
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/simd/vector.h"

namespace wmk::WMK_ISA {

constexpr int NR = 4;  // in vectors

// The largest M for which M * N sums, N vectors and a broadcast fit the registers; for N = 1, enough to hide the
// latency.
constexpr int MR(int vectors) {
#if defined(WMK_AVX512)
  constexpr int rows[] = {14, 14, 9, 6};
#else
  constexpr int rows[] = {12, 6, 4, 2};
#endif
  return rows[vectors - 1];
}

// `length` left elements (rows `stride` apart) and right rows of N vectors.
template <class T>
struct GemmTerm {
  const T* left;
  int64_t stride;
  const T* right;
  int64_t length;
};

// sums[m][n] += left[m * row + k * step] * right[k * pitch + n vectors], over k.
template <class T, int M, int N>
WMK_INLINE void multiply_accumulate(Vector<T> (&sums)[M][N], const T* left, int64_t row, int64_t step, const T* right,
                                    int64_t pitch, int64_t length) {
  for (int64_t k = 0; k < length; ++k) {
    Vector<T> vectors[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) vectors[n] = load(right + n * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vector<T> element = broadcast(left[m * row]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += element * vectors[n];
    }
    left += step;
    right += pitch;
  }
}

// to[m][n] = start[n] (0 if null) + the terms, for M rows from `first`.
template <class T, int M, int N>
static void gemm_accumulate(T* to, int64_t pitch, const T* start, const GemmTerm<T>* terms, int64_t count,
                            int64_t first) {
  Vector<T> sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sums[m][n] = start ? load(start + n * kLanes<T>) : Vector<T>{};
  for (int64_t i = 0; i < count; ++i) {
    const GemmTerm<T>& term = terms[i];
    multiply_accumulate<T, M, N>(sums, term.left + first * term.stride, term.stride, 1, term.right, N * kLanes<T>,
                                 term.length);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(to + m * pitch + n * kLanes<T>, sums[m][n]);
}

template <class T>
struct GemmOperand {
  const T* data;
  int64_t row, column;  // strides
};

// to[m][n] += sum over positions of left[position + m] * right[position][n].
template <class T, int M, int N>
static void gemm_accumulate_outer(T* to, int64_t pitch, GemmOperand<T> left, GemmOperand<T> right, int64_t rows,
                                  int64_t columns) {
  Vector<T> sums[M][N] = {};
  for (int64_t y = 0; y < rows; ++y) {
    multiply_accumulate<T, M, N>(sums, left.data + y * left.row, 1, left.column, right.data + y * right.row,
                                 right.column, columns);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      T* target = to + m * pitch + n * kLanes<T>;
      store(target, load(target) + sums[m][n]);
    }
}

template <int element>
struct Constant {
  static constexpr int value = element;
};

// Calls work with 1 .. most as a constant.
template <int most, class Work>
WMK_INLINE void with_constant(int element, const Work& work) {
  if constexpr (most > 1) {
    if (element < most) return with_constant<most - 1>(element, work);
  }
  work(Constant<most>());
}

template <class T, int N>
static void gemm_accumulate(T* to, int64_t pitch, const T* start, const GemmTerm<T>* terms, int64_t count,
                            int64_t first, int64_t rows) {
  const int64_t tiles = ceil_div(rows, MR(N));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
    with_constant<MR(N)>(int(end - begin), [&](auto M) {
      gemm_accumulate<T, decltype(M)::value, N>(to + begin * pitch, pitch, start, terms, count, first + begin);
    });
  }
}
template <class T>
static void gemm_accumulate(int vectors, T* to, int64_t pitch, const T* start, const GemmTerm<T>* terms, int64_t count,
                            int64_t first, int64_t rows) {
  with_constant<NR>(
      vectors, [&](auto N) { gemm_accumulate<T, decltype(N)::value>(to, pitch, start, terms, count, first, rows); });
}

// to[channel][4 vectors] += sum over positions.
template <class T>
static void gemm_accumulate_outer(T* to, GemmOperand<T> left, GemmOperand<T> right, int64_t channels, int64_t rows,
                                  int64_t columns) {
  constexpr int N = NR;
  constexpr int64_t pitch = N * kLanes<T>;
  const int64_t tiles = ceil_div(channels, MR(N));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = channels * tile / tiles, end = channels * (tile + 1) / tiles;
    with_constant<MR(N)>(int(end - begin), [&](auto M) {
      GemmOperand<T> operand = {left.data + begin, left.row, left.column};
      gemm_accumulate_outer<T, decltype(M)::value, N>(to + begin * pitch, pitch, operand, right, rows, columns);
    });
  }
}

}  // namespace wmk::WMK_ISA
