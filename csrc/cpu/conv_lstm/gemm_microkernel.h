// Register-blocked products, of which convolutions are made.
//
// A tile is M x N vectors of sums that stay in registers: each number of the left operand is broadcast once and meets
// N vectors of the right one, each vector of the right operand meets M numbers. With M and N as below there are enough
// independent sums to hide the latency of a multiply-add, and fewer loads than multiply-adds.
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/simd/vector.h"

namespace wmk::WMK_ISA {

constexpr int kMostVectors = 4;  // N

// The largest M for N vectors: M * N sums, N vectors and one broadcast number fit the registers.
constexpr int most_rows(int vectors) {
#if defined(WMK_AVX512)
  constexpr int rows[] = {14, 14, 9, 6};
#else
  constexpr int rows[] = {12, 6, 4, 2};
#endif
  return rows[vectors - 1];
}

// `length` numbers in a row of the left operand, whose rows are `stride` apart, and as many rows of N vectors each.
template <class T>
struct Term {
  const T* left;
  int64_t stride;
  const T* right;
  int64_t length;
};

// sums[m][n] += left[m * row + k * step] * right[k * pitch + n vectors], over k.
template <class T, int M, int N>
WMK_INLINE void multiply(Vector<T> (&sums)[M][N], const T* left, int64_t row, int64_t step, const T* right,
                         int64_t pitch, int64_t length) {
  for (int64_t k = 0; k < length; ++k) {
    Vector<T> vectors[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) vectors[n] = load(right + n * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vector<T> number = broadcast(left[m * row]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += number * vectors[n];
    }
    left += step;
    right += pitch;
  }
}

// to[m][n] = start[n] + the terms, for M rows from `first` on. start may be null.
template <class T, int M, int N>
static void sum_terms(T* to, int64_t pitch, const T* start, const Term<T>* terms, int64_t count, int64_t first) {
  Vector<T> sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sums[m][n] = start ? load(start + n * kLanes<T>) : Vector<T>{};
  for (int64_t i = 0; i < count; ++i) {
    const Term<T>& term = terms[i];
    multiply<T, M, N>(sums, term.left + first * term.stride, term.stride, 1, term.right, N * kLanes<T>, term.length);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(to + m * pitch + n * kLanes<T>, sums[m][n]);
}

// A block of memory in rows of equal length.
template <class T>
struct Grid {
  const T* data;
  int64_t row, column;  // elements from one row to the next, from one column to the next
};

// to[m][n] += sum over the grids' places of left[place + m] * right[place][n].
template <class T, int M, int N>
static void sum_places(T* to, int64_t pitch, Grid<T> left, Grid<T> right, int64_t rows, int64_t columns) {
  Vector<T> sums[M][N] = {};
  for (int64_t y = 0; y < rows; ++y) {
    multiply<T, M, N>(sums, left.data + y * left.row, 1, left.column, right.data + y * right.row, right.column,
                      columns);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      T* place = to + m * pitch + n * kLanes<T>;
      store(place, load(place) + sums[m][n]);
    }
}

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls work with the number as a constant, 1 .. most.
template <int most, class Work>
WMK_INLINE void with_constant(int number, const Work& work) {
  if constexpr (most > 1) {
    if (number < most) return with_constant<most - 1>(number, work);
  }
  work(Constant<most>());
}

// Rows [0, rows) of the terms' sum, in tiles of about equal height.
template <class T, int N>
static void sum_terms(T* to, int64_t pitch, const T* start, const Term<T>* terms, int64_t count, int64_t first,
                      int64_t rows) {
  const int64_t tiles = divide_up(rows, most_rows(N));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
    with_constant<most_rows(N)>(int(end - begin), [&](auto M) {
      sum_terms<T, decltype(M)::value, N>(to + begin * pitch, pitch, start, terms, count, first + begin);
    });
  }
}
template <class T>
static void sum_terms(int vectors, T* to, int64_t pitch, const T* start, const Term<T>* terms, int64_t count,
                      int64_t first, int64_t rows) {
  with_constant<kMostVectors>(
      vectors, [&](auto N) { sum_terms<T, decltype(N)::value>(to, pitch, start, terms, count, first, rows); });
}

// to[channel][4 vectors] += sum over places, for `channels` numbers at each place of the left operand.
template <class T>
static void sum_places(T* to, Grid<T> left, Grid<T> right, int64_t channels, int64_t rows, int64_t columns) {
  constexpr int N = kMostVectors;
  constexpr int64_t pitch = N * kLanes<T>;
  const int64_t tiles = divide_up(channels, most_rows(N));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = channels * tile / tiles, end = channels * (tile + 1) / tiles;
    with_constant<most_rows(N)>(int(end - begin), [&](auto M) {
      Grid<T> piece = {left.data + begin, left.row, left.column};
      sum_places<T, decltype(M)::value, N>(to + begin * pitch, pitch, piece, right, rows, columns);
    });
  }
}

}  // namespace wmk::WMK_ISA
