// Winograd's minimal filtering F(2x2, 3x3): 16 products for four sums of nine (Lavin & Gray 2016, section 4.1).
//
// A tile is two by two results of a 3 x 3 convolution with stride 1. The 4 x 4 numbers under it and the 3 x 3 weights
// are each turned into 16 numbers, between which the convolution is a product a number: 2.25 times fewer
// multiply-adds, for some 60 additions a channel and tile. Errors are about twice those of the sum itself. The channels
// are contiguous and fill the vectors.
#pragma once

#include "cpu/common/load_store.h"
#include "cpu/conv_lstm/gemm_microkernel.h"

namespace wmk::WMK_ISA {

constexpr int kTileNumbers = 16;

// Weights [9][channels][pitch] as [16][channels][pitch]; pitch is a multiple of a vector.
template <class T>
static void turn_weight_for_tiles(T* to, const T* from, int64_t channels, int64_t pitch) {
  const int64_t size = channels * pitch;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    Vector<T> half[4][3];
    for (int x = 0; x < 3; ++x) {
      const Vector<T> a = load(from + x * size + i), b = load(from + (3 + x) * size + i),
                      c = load(from + (6 + x) * size + i);
      half[0][x] = a, half[3][x] = c;
      half[1][x] = (a + b + c) * T(0.5), half[2][x] = (a - b + c) * T(0.5);
    }
    for (int y = 0; y < 4; ++y) {
      const Vector<T> a = half[y][0], b = half[y][1], c = half[y][2];
      T* row = to + y * 4 * size + i;
      store(row, a), store(row + 3 * size, c);
      store(row + size, (a + b + c) * T(0.5)), store(row + 2 * size, (a - b + c) * T(0.5));
    }
  }
}

// The 4 x 4 positions from `from` on, `row` and `column` apart, as 16 numbers a channel, `distance` apart.
template <class T>
static void turn_input_for_tile(T* to, int64_t distance, const T* from, int64_t row, int64_t column, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    const int64_t some = channels - c;
    const auto part = [&](int y, int x) {
      const T* place = from + y * row + x * column + c;
      if (some >= kLanes<T>) return load(place);
      T padded[kLanes<T>] = {};
      for (int64_t lane = 0; lane < some; ++lane) padded[lane] = place[lane];
      return load(padded);
    };
    Vector<T> half[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Vector<T> d0 = part(0, x), d1 = part(1, x), d2 = part(2, x), d3 = part(3, x);
      half[0][x] = d0 - d2, half[1][x] = d1 + d2, half[2][x] = d2 - d1, half[3][x] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const Vector<T> results[4] = {half[y][0] - half[y][2], half[y][1] + half[y][2], half[y][2] - half[y][1],
                                    half[y][1] - half[y][3]};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        T* place = to + (y * 4 + x) * distance + c;
        if (some >= kLanes<T>) {
          store(place, results[x]);
        } else {
          for (int64_t lane = 0; lane < some; ++lane) place[lane] = results[x][lane];
        }
      }
    }
  }
}

// 16 numbers a channel, `distance` apart, as two by two results, added to `start`; `row` and `column` apart.
template <class T>
static void turn_output_of_tile(T* to, int64_t row, int64_t column, const T* from, int64_t distance, const T* start,
                                int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vector<T> half[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Vector<T> m0 = load(from + x * distance + c), m1 = load(from + (4 + x) * distance + c),
                      m2 = load(from + (8 + x) * distance + c), m3 = load(from + (12 + x) * distance + c);
      half[0][x] = m0 + m1 + m2, half[1][x] = m1 - m2 - m3;
    }
    const Vector<T> first = load(start + c);
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      store(to + y * row + c, first + (half[y][0] + half[y][1] + half[y][2]));
      store(to + y * row + column + c, first + (half[y][1] - half[y][2] - half[y][3]));
    }
  }
}

// The other way round, F(3x3, 2x2): a weight's gradient is the convolution of a 4 x 4 tile of the input by the 2 x 2
// gradients of its results. The tile turns as above; the gradients turn into 16 numbers here, and the 16 sums of
// products over all tiles into nine below.
template <class T>
static void turn_gradient_of_tile(T* to, int64_t distance, const T* from, int64_t row, int64_t column,
                                  int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vector<T> half[4][2];
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      const Vector<T> a = load(from + x * column + c), b = load(from + row + x * column + c);
      half[0][x] = a, half[1][x] = (a + b) * T(0.5), half[2][x] = (a - b) * T(0.5), half[3][x] = b;
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const Vector<T> a = half[y][0], b = half[y][1];
      T* place = to + y * 4 * distance + c;
      store(place, a), store(place + distance, (a + b) * T(0.5));
      store(place + 2 * distance, (a - b) * T(0.5)), store(place + 3 * distance, b);
    }
  }
}
template <class T>
static void turn_sums_to_weight(T (&weight)[9], const T (&sums)[kTileNumbers]) {
  T half[3][4];
  for (int x = 0; x < 4; ++x) {
    const T m0 = sums[x], m1 = sums[4 + x], m2 = sums[8 + x], m3 = sums[12 + x];
    half[0][x] = m0 + m1 + m2, half[1][x] = m1 - m2, half[2][x] = m1 + m2 - m3;
  }
  for (int y = 0; y < 3; ++y) {
    const T m0 = half[y][0], m1 = half[y][1], m2 = half[y][2], m3 = half[y][3];
    weight[y * 3] = m0 + m1 + m2, weight[y * 3 + 1] = m1 - m2, weight[y * 3 + 2] = m1 + m2 - m3;
  }
}

}  // namespace wmk::WMK_ISA
