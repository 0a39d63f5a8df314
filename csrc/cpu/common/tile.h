// Tiles: a few time steps of one vector of rows, converted to contiguous [time][row]: one inner loop serves every dtype
// and stride. Channel-first, whole cache lines are transposed in registers; channel-last, vectors are copied;
// otherwise, per element.
#pragma once

#include "cpu/common/load_store.h"
#include "cpu/simd/shuffle.h"

namespace wmk::WMK_ISA {

// Rows (channels or states) x time.
struct Plane {
  char* data;
  int64_t row_stride, time_stride;
};

// Transposes by unpacking within 128 bits, then by even and odd 128-bit blocks: cheaper than free permutations.
template <class T>
WMK_INLINE void transpose(Vector<T>* v) {
  constexpr int lanes = kLanes<T>, block = 16 / int(sizeof(T)), blocks = lanes / block;
  Vector<T> u[lanes];  // u[block * q + j]: block b has column block * b + j of rows block * q on
  for (int q = 0; q < lanes; q += block) {
    if constexpr (block == 4) {
      Vector<T> low = unpack<1, false>(v[q], v[q + 1]), high = unpack<1, true>(v[q], v[q + 1]);
      Vector<T> next_low = unpack<1, false>(v[q + 2], v[q + 3]), next_high = unpack<1, true>(v[q + 2], v[q + 3]);
      u[q] = unpack<2, false>(low, next_low);
      u[q + 1] = unpack<2, true>(low, next_low);
      u[q + 2] = unpack<2, false>(high, next_high);
      u[q + 3] = unpack<2, true>(high, next_high);
    } else {
      u[q] = unpack<1, false>(v[q], v[q + 1]);
      u[q + 1] = unpack<1, true>(v[q], v[q + 1]);
    }
  }
  for (int j = 0; j < block; ++j) {
    if constexpr (blocks == 4) {
      Vector<T> even = alternate_blocks<false>(u[j], u[block + j]), odd = alternate_blocks<true>(u[j], u[block + j]);
      Vector<T> next_even = alternate_blocks<false>(u[2 * block + j], u[3 * block + j]);
      Vector<T> next_odd = alternate_blocks<true>(u[2 * block + j], u[3 * block + j]);
      v[j] = alternate_blocks<false>(even, next_even);
      v[block + j] = alternate_blocks<false>(odd, next_odd);
      v[2 * block + j] = alternate_blocks<true>(even, next_even);
      v[3 * block + j] = alternate_blocks<true>(odd, next_odd);
    } else if constexpr (blocks == 2) {
      v[j] = alternate_blocks<false>(u[j], u[block + j]);
      v[block + j] = alternate_blocks<true>(u[j], u[block + j]);
    } else {
      v[j] = u[j];
    }
  }
}

// Rows [0, rows) at times [0, steps) to tile[time * pitch + row]; other lanes are zero.
template <class T, class S>
static void load_tile(T* tile, int64_t pitch, const S* from, int64_t row_stride, int64_t time_stride, int rows,
                      int64_t steps) {
  constexpr int lanes = kLanes<T>;
  int64_t done = 0;
  if (row_stride == 1 && rows == lanes) {
    for (; done < steps; ++done) store(tile + done * pitch, load_as(from + done * time_stride, T(0)));
  } else if (time_stride == 1) {
    for (; done + lanes <= steps; done += lanes) {
      Vector<T> square[lanes];
      if (rows == lanes) {
        for (int row = 0; row < lanes; ++row) square[row] = load_as(from + row * row_stride + done, T(0));
      } else {
        for (int row = 0; row < lanes; ++row)
          square[row] = row < rows ? load_as(from + row * row_stride + done, T(0)) : Vector<T>{};
      }
      transpose<T>(square);
      for (int step = 0; step < lanes; ++step) store(tile + (done + step) * pitch, square[step]);
    }
  }
  for (; done < steps; ++done) {
    S gathered[lanes] = {};
    for (int row = 0; row < rows; ++row) gathered[row] = from[row * row_stride + done * time_stride];
    store(tile + done * pitch, load_as(gathered, T(0)));
  }
}

template <class T, class S>
static void store_tile(const T* tile, int64_t pitch, S* to, int64_t row_stride, int64_t time_stride, int rows,
                       int64_t steps) {
  constexpr int lanes = kLanes<T>;
  int64_t done = 0;
  if (row_stride == 1 && rows == lanes) {
    for (; done < steps; ++done) store_as(to + done * time_stride, load(tile + done * pitch));
  } else if (time_stride == 1) {
    for (; done + lanes <= steps; done += lanes) {
      Vector<T> square[lanes];
      for (int step = 0; step < lanes; ++step) square[step] = load(tile + (done + step) * pitch);
      transpose<T>(square);
      if (rows == lanes) {
        for (int row = 0; row < lanes; ++row) store_as(to + row * row_stride + done, square[row]);
      } else {
        for (int row = 0; row < rows; ++row) store_as(to + row * row_stride + done, square[row]);
      }
    }
  }
  for (; done < steps; ++done) {
    S scattered[lanes];
    store_as(scattered, load(tile + done * pitch));
    for (int row = 0; row < rows; ++row) to[row * row_stride + done * time_stride] = scattered[row];
  }
}

// Cache lines of the next tiles, prefetched a few per step: a tile has more streams than the hardware prefetcher
// follows, and most of a burst of software prefetches would be dropped.
struct PrefetchList {
  const char** lines;
  int64_t count = 0, most;

  PrefetchList(const char** memory, int64_t capacity) : lines(memory), most(capacity) {}

  void add_tile(Plane plane, int64_t bytes, int64_t row, int rows, int64_t time, int64_t steps) {
    const char* first = plane.data + (row * plane.row_stride + time * plane.time_stride) * bytes;
    if (plane.time_stride == 1) {
      for (int i = 0; i < rows; ++i)
        for (int64_t byte = 0; byte < steps * bytes; byte += 64) add(first + i * plane.row_stride * bytes + byte);
    } else {
      for (int64_t i = 0; i < steps; ++i) add(first + i * plane.time_stride * bytes);
    }
  }
  void add(const char* line) {
    if (count < most) lines[count++] = line;
  }
  // Repeats the last line up to steps * per_step lines; returns per_step.
  int64_t pad(int64_t steps) {
    int64_t per_step = (count + steps - 1) / steps;
    for (const char* last = count ? lines[count - 1] : nullptr; count < per_step * steps; ++count) lines[count] = last;
    return per_step;
  }
};

template <class T>
static void load_plane(T* tile, int64_t pitch, Plane plane, int64_t dtype, int64_t row, int rows, int64_t time,
                       int64_t steps) {
  int64_t offset = row * plane.row_stride + time * plane.time_stride;
  auto load_from = [&](auto* from) {
    load_tile(tile, pitch, from + offset, plane.row_stride, plane.time_stride, rows, steps);
  };
  if constexpr (sizeof(T) == 8) {
    load_from((const double*)plane.data);
  } else {
    if (dtype == WMK_FLOAT32) load_from((const float*)plane.data);
    if (dtype == WMK_BFLOAT16) load_from((const BFloat16*)plane.data);
    if (dtype == WMK_FLOAT16) load_from((const Float16*)plane.data);
  }
}
template <class T>
static void store_plane(const T* tile, int64_t pitch, Plane plane, int64_t dtype, int64_t row, int rows, int64_t time,
                        int64_t steps) {
  int64_t offset = row * plane.row_stride + time * plane.time_stride;
  auto store_to = [&](auto* to) {
    store_tile(tile, pitch, to + offset, plane.row_stride, plane.time_stride, rows, steps);
  };
  if constexpr (sizeof(T) == 8) {
    store_to((double*)plane.data);
  } else {
    if (dtype == WMK_FLOAT32) store_to((float*)plane.data);
    if (dtype == WMK_BFLOAT16) store_to((BFloat16*)plane.data);
    if (dtype == WMK_FLOAT16) store_to((Float16*)plane.data);
  }
}

}  // namespace wmk::WMK_ISA
