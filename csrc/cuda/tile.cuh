// Tiles: a rectangle of rows (channels, or states) and a few steps of a strided tensor, on its way between global
// memory in any dtype and shared memory in the arithmetic's type.
//
// A tile travels in groups of four elements that are neighbours in memory, along time or across rows, whichever the
// tensor's strides say; so both layouts are read and written in whole sectors, 8 or 16 bytes a thread. A group is
// fetched asynchronously into a slot of shared memory that only the fetching thread reads back, in the tensor's own
// dtype: the next tile is on its way while this one is computed, and holds no registers. Groups that are not aligned, or
// that stick out of the tensor, go element by element.
#pragma once

#include "primitives.cuh"

namespace wmk {

// Four elements in the arithmetic's type.
template <typename T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Quad {
  T value[4];
};

struct alignas(8) Pair {
  uint32_t word[2];
};

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* shared) {
  return *reinterpret_cast<const Quad<T>*>(shared);
}
template <typename T>
__device__ __forceinline__ void store_quad(T* shared, const Quad<T>& quad) {
  *reinterpret_cast<Quad<T>*>(shared) = quad;
}

// Four elements of any dtype, as they lie in memory, in the arithmetic's type.
__device__ __forceinline__ Quad<float> unpack(const unsigned char* group, int64_t dtype, float) {
  if (dtype == WMK_FLOAT32) return *reinterpret_cast<const Quad<float>*>(group);
  const Pair pair = *reinterpret_cast<const Pair*>(group);
  Quad<float> quad;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = pair.word[i];
    const bool brain = dtype == WMK_BFLOAT16;
    quad.value[2 * i] = brain ? float_of(word << 16) : float16_low(word);
    quad.value[2 * i + 1] = brain ? float_of(word & 0xffff0000u) : float16_high(word);
  }
  return quad;
}
__device__ __forceinline__ Quad<double> unpack(const unsigned char* group, int64_t, double) {
  return *reinterpret_cast<const Quad<double>*>(group);
}

// Where a block's rows of a tensor begin, in shared memory: so that it holds no registers between tiles.
struct TileOrigin {
  char* data;  // of the first row, at time 0
  int64_t row_stride, time_stride;  // in elements
};

__device__ __forceinline__ TileOrigin tile_origin(void* data, int64_t dtype, int64_t offset, int64_t row_stride,
                                                  int64_t time_stride) {
  return {static_cast<char*>(data) + offset * element_size(dtype), row_stride, time_stride};
}

// Where a tile lies in its tensor.
struct TileAccess {
  char* origin;        // its first row's first step
  int64_t row_stride;  // in elements
  int64_t time_stride;
  bool along_time;  // the direction that groups run in
  bool aligned;     // whole groups may be moved at once
};

__device__ __forceinline__ bool runs_along_time(const TileOrigin& origin) {
  return origin.time_stride == 1 || origin.row_stride != 1;
}

__device__ __forceinline__ TileAccess tile_at(const TileOrigin& origin, int64_t dtype, int64_t time) {
  const int64_t size = element_size(dtype);
  TileAccess access;
  access.row_stride = origin.row_stride;
  access.time_stride = origin.time_stride;
  access.origin = origin.data + time * access.time_stride * size;
  access.along_time = runs_along_time(origin);
  const int64_t fast = access.along_time ? access.time_stride : access.row_stride;
  const int64_t slow = access.along_time ? access.row_stride : access.time_stride;
  access.aligned = fast == 1 && slow % 4 == 0 && reinterpret_cast<uintptr_t>(access.origin) % (4 * size) == 0;
  return access;
}

// ROWS x STEPS elements, in the hands of THREADS threads. ROWS_FIRST: neighbouring threads hold neighbouring rows
// rather than neighbouring groups of one row; right for tiles that are stored transposed.
//
// Whole, aligned tiles (all but the last, as a rule) take a short path each, along time or across rows; everything else
// goes through one function that is slow and knows all cases.
template <typename T, int ROWS, int STEPS, int THREADS, bool ROWS_FIRST>
struct Tile {
  static constexpr int kGroups = ROWS * STEPS / 4;
  static constexpr int kPerThread = (kGroups + THREADS - 1) / THREADS;
  static constexpr int kRowGroups = ROWS / 4;
  // across rows: a few neighbouring groups of rows, then steps: whole sectors, and few bank conflicts where tiles turn
  static constexpr int kNear = ROWS_FIRST || kRowGroups < 4 ? kRowGroups : 4;

  // The first row and step of a group.
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void position(int group, int& row, int& step) {
    if (ALONG_TIME && ROWS_FIRST) {
      row = group % ROWS;
      step = 4 * (group / ROWS);
    } else if (ALONG_TIME) {
      row = group / (STEPS / 4);
      step = 4 * (group % (STEPS / 4));
    } else {
      row = 4 * (group % kNear + kNear * (group / (kNear * STEPS)));
      step = group / kNear % STEPS;
    }
  }
  static __device__ __forceinline__ void position(bool along_time, int group, int& row, int& step) {
    if (along_time) {
      position<true>(group, row, step);
    } else {
      position<false>(group, row, step);
    }
  }

  static __device__ __forceinline__ int valid_elements(bool along_time, int row, int step, int rows, int steps) {
    if (row >= rows || step >= steps) return 0;
    const int left = along_time ? steps - step : rows - row;
    return left < 4 ? left : 4;
  }

  // Starts fetching into slots.
  static __device__ __forceinline__ void fetch(unsigned char* slots, const TileAccess& access, int64_t dtype, int rows,
                                               int steps) {
    if (!access.aligned || rows < ROWS || steps < STEPS) {
      fetch_any(slots, access, dtype, rows, steps);
    } else if (access.along_time) {
      fetch_whole<true>(slots, access, dtype);
    } else {
      fetch_whole<false>(slots, access, dtype);
    }
  }

  template <bool ALONG_TIME>
  static __device__ __forceinline__ void fetch_whole(unsigned char* slots, const TileAccess& access, int64_t dtype) {
    if (sizeof(T) == 8) {
      fetch_whole_sized<ALONG_TIME, 8>(slots, access);
    } else if (dtype == WMK_FLOAT32) {
      fetch_whole_sized<ALONG_TIME, 4>(slots, access);
    } else {
      fetch_whole_sized<ALONG_TIME, 2>(slots, access);
    }
  }
  template <bool ALONG_TIME, int SIZE>
  static __device__ __forceinline__ void fetch_whole_sized(unsigned char* slots, const TileAccess& access) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int group = i * THREADS + static_cast<int>(threadIdx.x);
      if (kGroups % THREADS != 0 && group >= kGroups) break;
      int row, step;
      position<ALONG_TIME>(group, row, step);
      const char* source = access.origin + (row * access.row_stride + step * access.time_stride) * SIZE;
      unsigned char* slot = slots + group * (4 * SIZE);
      copy_async<SIZE == 2 ? 8 : 16>(slot, source);
      if (SIZE == 8) copy_async<16>(slot + 16, source + 16);
    }
  }

  static __device__ __noinline__ void fetch_any(unsigned char* slots, TileAccess access, int64_t dtype, int rows,
                                                int steps) {
    const int size = static_cast<int>(element_size(dtype));
    const int64_t stride = access.along_time ? access.time_stride : access.row_stride;
#pragma unroll 1
    for (int group = threadIdx.x; group < kGroups; group += THREADS) {
      int row, step;
      position(access.along_time, group, row, step);
      const int valid = valid_elements(access.along_time, row, step, rows, steps);
      const char* source = access.origin + (row * access.row_stride + step * access.time_stride) * size;
      unsigned char* slot = slots + group * 4 * size;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const char* from = source + j * stride * size;
        if (sizeof(T) == 8) {
          reinterpret_cast<double*>(slot)[j] = j < valid ? *reinterpret_cast<const double*>(from) : 0.0;
        } else if (dtype == WMK_FLOAT32) {
          reinterpret_cast<float*>(slot)[j] = j < valid ? *reinterpret_cast<const float*>(from) : 0.0f;
        } else {
          reinterpret_cast<uint16_t*>(slot)[j] = j < valid ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(0);
        }
      }
    }
  }

  // Turns what was fetched into the arithmetic's type, through `transform(value, row)`, and zero outside the tensor.
  // The tile is [ROWS][pitch], or [STEPS][pitch] where transposed.
  template <bool TRANSPOSED, typename Transform>
  static __device__ __forceinline__ void place(T* tile, int pitch, const unsigned char* slots, bool along_time,
                                               int64_t dtype, int rows, int steps, Transform transform) {
    if (along_time) {
      place_along<TRANSPOSED, true>(tile, pitch, slots, dtype, rows, steps, transform);
    } else {
      place_along<TRANSPOSED, false>(tile, pitch, slots, dtype, rows, steps, transform);
    }
  }
  template <bool TRANSPOSED, bool ALONG_TIME, typename Transform>
  static __device__ __forceinline__ void place_along(T* tile, int pitch, const unsigned char* slots, int64_t dtype,
                                                     int rows, int steps, Transform transform) {
    const int group_bytes = 4 * static_cast<int>(element_size(dtype));
    const bool whole = rows == ROWS && steps == STEPS;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int group = i * THREADS + static_cast<int>(threadIdx.x);
      if (kGroups % THREADS != 0 && group >= kGroups) break;
      int row, step;
      position<ALONG_TIME>(group, row, step);
      Quad<T> quad = unpack(slots + group * group_bytes, dtype, T(0));
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.value[j] = transform(quad.value[j], ALONG_TIME ? row : row + j);
      if (!whole) {
        const int valid = valid_elements(ALONG_TIME, row, step, rows, steps);
#pragma unroll
        for (int j = 0; j < 4; ++j) quad.value[j] = j < valid ? quad.value[j] : T(0);
      }
      if (TRANSPOSED != ALONG_TIME) {  // the group's direction is the tile's
        store_quad(tile + (TRANSPOSED ? step * pitch + row : row * pitch + step), quad);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          tile[TRANSPOSED ? (step + j) * pitch + row : (row + j) * pitch + step] = quad.value[j];
        }
      }
    }
  }

  // Writes a tile [ROWS][pitch] to global memory.
  static __device__ __forceinline__ void write(const T* tile, int pitch, const TileAccess& access, int64_t dtype,
                                               int rows, int steps) {
    if (!access.aligned || rows < ROWS || steps < STEPS) {
      write_any(tile, pitch, access, dtype, rows, steps);
    } else if (access.along_time) {
      write_whole<true>(tile, pitch, access, dtype);
    } else {
      write_whole<false>(tile, pitch, access, dtype);
    }
  }

  template <bool ALONG_TIME>
  static __device__ __forceinline__ void write_whole(const T* tile, int pitch, const TileAccess& access,
                                                     int64_t dtype) {
    const int64_t size = element_size(dtype);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int group = i * THREADS + static_cast<int>(threadIdx.x);
      if (kGroups % THREADS != 0 && group >= kGroups) break;
      int row, step;
      position<ALONG_TIME>(group, row, step);
      Quad<T> quad;
      if (ALONG_TIME) {
        quad = load_quad(tile + row * pitch + step);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) quad.value[j] = tile[(row + j) * pitch + step];
      }
      write_group(quad, access.origin + (row * access.row_stride + step * access.time_stride) * size, dtype);
    }
  }

  static __device__ __noinline__ void write_any(const T* tile, int pitch, TileAccess access, int64_t dtype, int rows,
                                                int steps) {
#pragma unroll 1
    for (int element = threadIdx.x; element < ROWS * STEPS; element += THREADS) {
      const int row = access.along_time ? element / STEPS : element % ROWS;
      const int step = access.along_time ? element % STEPS : element / ROWS;
      if (row >= rows || step >= steps) continue;
      store_element<T>(access.origin, dtype, row * access.row_stride + step * access.time_stride,
                       tile[row * pitch + step]);
    }
  }

  static __device__ __forceinline__ void write_group(const Quad<float>& quad, char* to, int64_t dtype) {
    if (dtype == WMK_FLOAT32) {
      *reinterpret_cast<Quad<float>*>(to) = quad;
      return;
    }
    const float* v = quad.value;
    const Pair brain = {{pack_bfloat16(v[0], v[1]), pack_bfloat16(v[2], v[3])}};
    const Pair half = {{pack_float16(v[0], v[1]), pack_float16(v[2], v[3])}};
    *reinterpret_cast<Pair*>(to) = dtype == WMK_BFLOAT16 ? brain : half;
  }
  static __device__ __forceinline__ void write_group(const Quad<double>& quad, char* to, int64_t) {
    *reinterpret_cast<Quad<double>*>(to) = quad;
  }
};

}  // namespace wmk
