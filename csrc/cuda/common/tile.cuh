// Tiles: ROWS (channels or states) x STEPS of a strided tensor, converted in shared memory to the arithmetic type.
//
// Tiles move in contiguous groups of four elements, along time or across rows: 8 or 16 bytes per thread, whole sectors.
// Asynchronous copies prefetch the next tile to a stage buffer, without registers; a thread reads back only its own
// groups.
#pragma once

#include "cuda/common/primitives.cuh"

namespace wmk {

template <typename T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Vec4 {
  T value[4];
};

struct alignas(8) Packed4x16 {
  uint32_t word[2];
};

template <typename T>
__device__ __forceinline__ Vec4<T> load_vec4(const T* shared) {
  return *reinterpret_cast<const Vec4<T>*>(shared);
}
template <typename T>
__device__ __forceinline__ void store_vec4(T* shared, const Vec4<T>& vec) {
  *reinterpret_cast<Vec4<T>*>(shared) = vec;
}

__device__ __forceinline__ Vec4<float> unpack(const unsigned char* staged, int64_t dtype, float) {
  if (dtype == WMK_FLOAT32) return *reinterpret_cast<const Vec4<float>*>(staged);
  const Packed4x16 pair = *reinterpret_cast<const Packed4x16*>(staged);
  Vec4<float> vec;
  if (dtype == WMK_BFLOAT16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      vec.value[2 * i] = float_of(pair.word[i] << 16);
      vec.value[2 * i + 1] = float_of(pair.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      vec.value[2 * i] = float16_low(pair.word[i]);
      vec.value[2 * i + 1] = float16_high(pair.word[i]);
    }
  }
  return vec;
}
__device__ __forceinline__ Vec4<double> unpack(const unsigned char* staged, int64_t, double) {
  return *reinterpret_cast<const Vec4<double>*>(staged);
}

// A block's rows from time 0; strides in elements.
struct StridedRows {
  char* data;
  int64_t row_stride, time_stride;

  // Whether groups run along time or across rows.
  __device__ __forceinline__ bool along_time() const { return time_stride == 1 || row_stride != 1; }
  __device__ __forceinline__ bool aligned(const char* begin, int64_t size) const {
    const int64_t fast = along_time() ? time_stride : row_stride, slow = along_time() ? row_stride : time_stride;
    return fast == 1 && slow % 4 == 0 && reinterpret_cast<uintptr_t>(begin) % (4 * size) == 0;
  }
};

// ROWS_FIRST: adjacent threads hold adjacent rows, for transposed tiles. Full, aligned tiles take *_full.
template <typename T, int ROWS, int STEPS, int THREADS, bool ROWS_FIRST>
struct Tile {
  static constexpr int kGroups = ROWS * STEPS / 4;
  static constexpr int kPerThread = (kGroups + THREADS - 1) / THREADS;
  static constexpr int kRowGroups = ROWS / 4;
  // row groups per band: whole sectors, few bank conflicts
  static constexpr int kBandRowGroups = ROWS_FIRST || kRowGroups < 4 ? kRowGroups : 4;

  // First row and step of group `i`, written to differ from group 0's by constants.
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void position(int i, int& row, int& step) {
    const int thread = static_cast<int>(threadIdx.x);
    if (ALONG_TIME && ROWS_FIRST) {
      if (THREADS % ROWS == 0) {
        row = thread % ROWS;
        step = 4 * (thread / ROWS) + i * (4 * (THREADS / ROWS));
      } else {
        row = (thread + i * THREADS) % ROWS;
        step = 4 * ((thread + i * THREADS) / ROWS);
      }
    } else if (ALONG_TIME) {
      constexpr int kStepGroups = STEPS / 4;
      static_assert(THREADS % kStepGroups == 0, "a thread's groups lie below each other");
      row = thread / kStepGroups + i * (THREADS / kStepGroups);
      step = 4 * (thread % kStepGroups);
    } else {
      constexpr int kBandGroups = kBandRowGroups * STEPS;
      if (THREADS % kBandGroups == 0) {
        row = 4 * (thread % kBandRowGroups + kBandRowGroups * (thread / kBandGroups)) +
              i * (4 * kBandRowGroups * (THREADS / kBandGroups));
        step = thread / kBandRowGroups % STEPS;
      } else {
        row = 4 * ((thread + i * THREADS) % kBandRowGroups + kBandRowGroups * ((thread + i * THREADS) / kBandGroups));
        step = (thread + i * THREADS) / kBandRowGroups % STEPS;
      }
    }
  }
  static __device__ __forceinline__ void position(bool along_time, int i, int& row, int& step) {
    if (along_time) {
      position<true>(i, row, step);
    } else {
      position<false>(i, row, step);
    }
  }
  static __device__ __forceinline__ bool in_tile(int i) {
    return kGroups % THREADS == 0 || i * THREADS + static_cast<int>(threadIdx.x) < kGroups;
  }
  static __device__ __forceinline__ int stage_offset(int i, int64_t dtype) {
    return (i * THREADS + static_cast<int>(threadIdx.x)) * 4 * static_cast<int>(element_size(dtype));
  }
  static __device__ __forceinline__ int valid_elements(bool along_time, int row, int step, int rows, int steps) {
    if (row >= rows || step >= steps) return 0;
    const int remaining = along_time ? steps - step : rows - row;
    return remaining < 4 ? remaining : 4;
  }

  static __device__ __forceinline__ void fetch(unsigned char* stage, const StridedRows& tensor, int64_t time,
                                               int64_t dtype, int rows, int steps) {
    const char* begin = tensor.data + time * tensor.time_stride * element_size(dtype);
    if (rows < ROWS || steps < STEPS || !tensor.aligned(begin, element_size(dtype))) {
      fetch_general(stage, begin, tensor, dtype, rows, steps);
    } else if (tensor.along_time()) {
      fetch_full<true>(stage, begin, tensor, dtype);
    } else {
      fetch_full<false>(stage, begin, tensor, dtype);
    }
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void fetch_full(unsigned char* stage, const char* begin, const StridedRows& tensor,
                                                    int64_t dtype) {
    if (sizeof(T) == 8) {
      fetch_sized<ALONG_TIME, 8>(stage, begin, tensor);
    } else if (dtype == WMK_FLOAT32) {
      fetch_sized<ALONG_TIME, 4>(stage, begin, tensor);
    } else {
      fetch_sized<ALONG_TIME, 2>(stage, begin, tensor);
    }
  }
  template <bool ALONG_TIME, int SIZE>
  static __device__ __forceinline__ void fetch_sized(unsigned char* stage, const char* begin,
                                                     const StridedRows& tensor) {
    int row, step;
    position<ALONG_TIME>(0, row, step);
    const int64_t row_bytes = ALONG_TIME ? tensor.row_stride * SIZE : SIZE;
    const int64_t step_bytes = ALONG_TIME ? SIZE : tensor.time_stride * SIZE;
    const char* first = begin + row * row_bytes + step * step_bytes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (!in_tile(i)) break;
      int row_i, step_i;
      position<ALONG_TIME>(i, row_i, step_i);
      const char* source = first + (row_i - row) * row_bytes + (step_i - step) * step_bytes;
      unsigned char* target = stage + (i * THREADS + static_cast<int>(threadIdx.x)) * (4 * SIZE);
      copy_async<SIZE == 2 ? 8 : 16>(target, source);
      if (SIZE == 8) copy_async<16>(target + 16, source + 16);
    }
  }
  static __device__ __noinline__ void fetch_general(unsigned char* stage, const char* begin, StridedRows tensor,
                                                    int64_t dtype, int rows, int steps) {
    const int size = static_cast<int>(element_size(dtype));
    const bool along_time = tensor.along_time();
    const int64_t stride = along_time ? tensor.time_stride : tensor.row_stride;
#pragma unroll 1
    for (int i = 0; i < kPerThread && in_tile(i); ++i) {
      int row, step;
      position(along_time, i, row, step);
      const int valid = valid_elements(along_time, row, step, rows, steps);
      const char* source = begin + (row * tensor.row_stride + step * tensor.time_stride) * size;
      unsigned char* target = stage + stage_offset(i, dtype);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const char* element = source + j * stride * size;
        if (sizeof(T) == 8) {
          reinterpret_cast<double*>(target)[j] = j < valid ? *reinterpret_cast<const double*>(element) : 0.0;
        } else if (dtype == WMK_FLOAT32) {
          reinterpret_cast<float*>(target)[j] = j < valid ? *reinterpret_cast<const float*>(element) : 0.0f;
        } else {
          reinterpret_cast<uint16_t*>(target)[j] =
              j < valid ? *reinterpret_cast<const uint16_t*>(element) : uint16_t(0);
        }
      }
    }
  }

  // Stores the staged tile through `transform(value, row)`, zero outside the tensor, as [ROWS][pitch] or
  // [STEPS][pitch]. ptxas allocates callers' registers in the order of the mangled names: unless they sort as fetch,
  // store, write, the linear scan spills on sm_120.
  template <bool TRANSPOSED, typename Transform>
  static __device__ __forceinline__ void store(T* tile, int pitch, const unsigned char* stage, bool along_time,
                                               int64_t dtype, int rows, int steps, Transform transform) {
    if (rows < ROWS || steps < STEPS) {
      store_general<TRANSPOSED>(tile, pitch, stage, along_time, dtype, rows, steps, transform);
    } else if (along_time) {
      store_full<TRANSPOSED, true>(tile, pitch, stage, dtype, transform);
    } else {
      store_full<TRANSPOSED, false>(tile, pitch, stage, dtype, transform);
    }
  }
  template <bool TRANSPOSED, bool ALONG_TIME, typename Transform>
  static __device__ __forceinline__ void store_full(T* tile, int pitch, const unsigned char* stage, int64_t dtype,
                                                    Transform transform) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (!in_tile(i)) break;
      int row, step;
      position<ALONG_TIME>(i, row, step);
      Vec4<T> vec = unpack(stage + stage_offset(i, dtype), dtype, T(0));
#pragma unroll
      for (int j = 0; j < 4; ++j) vec.value[j] = transform(vec.value[j], ALONG_TIME ? row : row + j);
      if (TRANSPOSED != ALONG_TIME) {
        store_vec4(tile + (TRANSPOSED ? step * pitch + row : row * pitch + step), vec);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          tile[TRANSPOSED ? (step + j) * pitch + row : (row + j) * pitch + step] = vec.value[j];
        }
      }
    }
  }
  template <bool TRANSPOSED, typename Transform>
  static __device__ __noinline__ void store_general(T* tile, int pitch, const unsigned char* stage, bool along_time,
                                                    int64_t dtype, int rows, int steps, Transform transform) {
#pragma unroll 1
    for (int i = 0; i < kPerThread && in_tile(i); ++i) {
      int row, step;
      position(along_time, i, row, step);
      const int valid = valid_elements(along_time, row, step, rows, steps);
      const Vec4<T> vec = unpack(stage + stage_offset(i, dtype), dtype, T(0));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row_j = along_time ? row : row + j, step_j = along_time ? step + j : step;
        tile[TRANSPOSED ? step_j * pitch + row_j : row_j * pitch + step_j] =
            j < valid ? transform(vec.value[j], row_j) : T(0);
      }
    }
  }

  static __device__ __forceinline__ void write(const T* tile, int pitch, const StridedRows& tensor, int64_t time,
                                               int64_t dtype, int rows, int steps) {
    char* begin = tensor.data + time * tensor.time_stride * element_size(dtype);
    if (rows < ROWS || steps < STEPS || !tensor.aligned(begin, element_size(dtype))) {
      write_general(tile, pitch, begin, tensor, dtype, rows, steps);
    } else if (tensor.along_time()) {
      write_full<true>(tile, pitch, begin, tensor, dtype);
    } else {
      write_full<false>(tile, pitch, begin, tensor, dtype);
    }
  }
  template <bool ALONG_TIME>
  static __device__ __forceinline__ void write_full(const T* tile, int pitch, char* begin, const StridedRows& tensor,
                                                    int64_t dtype) {
    const int64_t size = element_size(dtype);
    int row, step;
    position<ALONG_TIME>(0, row, step);
    const int64_t row_bytes = ALONG_TIME ? tensor.row_stride * size : size;
    const int64_t step_bytes = ALONG_TIME ? size : tensor.time_stride * size;
    char* first = begin + row * row_bytes + step * step_bytes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (!in_tile(i)) break;
      int row_i, step_i;
      position<ALONG_TIME>(i, row_i, step_i);
      Vec4<T> vec;
      if (ALONG_TIME) {
        vec = load_vec4(tile + row_i * pitch + step_i);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) vec.value[j] = tile[(row_i + j) * pitch + step_i];
      }
      write_group(vec, first + (row_i - row) * row_bytes + (step_i - step) * step_bytes, dtype);
    }
  }
  static __device__ __noinline__ void write_general(const T* tile, int pitch, char* begin, StridedRows tensor,
                                                    int64_t dtype, int rows, int steps) {
    const bool along_time = tensor.along_time();
#pragma unroll 1
    for (int element = threadIdx.x; element < ROWS * STEPS; element += THREADS) {
      const int row = along_time ? element / STEPS : element % ROWS;
      const int step = along_time ? element % STEPS : element / ROWS;
      if (row >= rows || step >= steps) continue;
      store_element<T>(begin, dtype, row * tensor.row_stride + step * tensor.time_stride, tile[row * pitch + step]);
    }
  }
  static __device__ __forceinline__ void write_group(const Vec4<float>& vec, char* target, int64_t dtype) {
    const float* v = vec.value;
    if (dtype == WMK_FLOAT32) {
      *reinterpret_cast<Vec4<float>*>(target) = vec;
    } else if (dtype == WMK_BFLOAT16) {
      *reinterpret_cast<Packed4x16*>(target) = {{pack_bfloat16(v[0], v[1]), pack_bfloat16(v[2], v[3])}};
    } else {
      *reinterpret_cast<Packed4x16*>(target) = {{pack_float16(v[0], v[1]), pack_float16(v[2], v[3])}};
    }
  }
  static __device__ __forceinline__ void write_group(const Vec4<double>& vec, char* target, int64_t) {
    *reinterpret_cast<Vec4<double>*>(target) = vec;
  }
};

}  // namespace wmk
