// Winograd's F(2x2, 3x3) (Lavin & Gray 2016, section 4.1), stride 1.
//
// The 4 x 4 inputs of a 2 x 2 output tile and the 3 x 3 weights become 16 elements each, multiplied elementwise: 2.25
// times fewer multiply-adds, for some 60 additions per channel and tile and about twice the error. Channels are
// contiguous, whole vectors except in the input transform.
#pragma once

#include "cpu/common/gemm_microkernel.h"
#include "cpu/common/load_store.h"

namespace wmk::WMK_ISA {

constexpr int kTileElements = 16;

// [9][channels][pitch] to [16][channels][pitch].
template <class T>
static void winograd_weight_transform(T* to, const T* from, int64_t channels, int64_t pitch) {
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

// 4 x 4 positions, `row` and `column` apart, to 16 elements, `distance` apart.
template <class T>
static void winograd_input_transform(T* to, int64_t distance, const T* from, int64_t row, int64_t column,
                                     int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    const int64_t valid = channels - c;
    const auto worker = [&](int y, int x) {
      const T* target = from + y * row + x * column + c;
      if (valid >= kLanes<T>) return load(target);
      T padded[kLanes<T>] = {};
      for (int64_t lane = 0; lane < valid; ++lane) padded[lane] = target[lane];
      return load(padded);
    };
    Vector<T> half[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Vector<T> d0 = worker(0, x), d1 = worker(1, x), d2 = worker(2, x), d3 = worker(3, x);
      half[0][x] = d0 - d2, half[1][x] = d1 + d2, half[2][x] = d2 - d1, half[3][x] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const Vector<T> results[4] = {half[y][0] - half[y][2], half[y][1] + half[y][2], half[y][2] - half[y][1],
                                    half[y][1] - half[y][3]};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        T* target = to + (y * 4 + x) * distance + c;
        if (valid >= kLanes<T>) {
          store(target, results[x]);
        } else {
          for (int64_t lane = 0; lane < valid; ++lane) target[lane] = results[x][lane];
        }
      }
    }
  }
}

// 16 elements, `distance` apart, to `start` + 2 x 2 outputs, `row` and `column` apart.
template <class T>
static void winograd_output_transform(T* to, int64_t row, int64_t column, const T* from, int64_t distance,
                                      const T* start, int64_t channels) {
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

// F(3x3, 2x2), for weight gradients: a 4 x 4 input tile convolved by 2 x 2 output gradients, which become 16 elements;
// the 16 sums over tiles become nine below.
template <class T>
static void winograd_gradient_transform(T* to, int64_t distance, const T* from, int64_t row, int64_t column,
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
      T* target = to + y * 4 * distance + c;
      store(target, a), store(target + distance, (a + b) * T(0.5));
      store(target + 2 * distance, (a - b) * T(0.5)), store(target + 3 * distance, b);
    }
  }
}
template <class T>
static void winograd_weight_gradient_transform(T (&weight)[9], const T (&sums)[kTileElements]) {
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
