// What the tensor cores and a grid that waits for itself add to primitives.cuh, each with a plain twin likewise.
#pragma once

#include "cuda/common/primitives.cuh"

#ifdef WMK_EMULATE
// Launches a kernel whose blocks wait for each other.
#define WMK_LAUNCH_TOGETHER(kernel, grid, block, shared, stream, argument) \
  WMK_LAUNCH(kernel, grid, block, shared, stream, argument)
#else
#define WMK_LAUNCH_TOGETHER(kernel, grid, block, shared, stream, argument) \
  wmk::launch_together((kernel), (grid), (block), (shared), (stream), (argument))
#endif

namespace wmk {

#ifndef WMK_EMULATE

// A cooperative launch: the runtime refuses a grid that is not on the chip all at once, instead of letting it hang.
template <typename Argument>
int launch_together(void (*kernel)(const Argument), int64_t grid, int block, int64_t shared, int64_t stream,
                    const Argument& argument) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return WMK_CUDA_ERROR + static_cast<int>(error);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid)),
                                      dim3(static_cast<unsigned>(block)), arguments, static_cast<size_t>(shared),
                                      reinterpret_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? WMK_OK : WMK_CUDA_ERROR + static_cast<int>(error);
}

// Adds a 16 x 16 matrix by a 16 x 8 one, of 16-bit elements, to a 16 x 8 one of fp32, by a warp together. Thread
// (4 g + t) holds of the left one rows g and g + 8 at columns 2 t and 2 t + 1 (`left` 0 and 1), then at 8 further
// columns (2 and 3); of the right one column g at rows 2 t, 2 t + 1 (`upper`) and 8 further (`lower`); of the sums row
// g at columns 2 t and 2 t + 1, then row g + 8.
template <int DTYPE>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], uint32_t upper,
                                                  uint32_t lower) {
  if constexpr (DTYPE == WMK_BFLOAT16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(upper), "r"(lower));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(upper), "r"(lower));
  }
}

// Two elements that another block has written: from the level-2 cache, since the level-1 caches do not know of it.
__device__ __forceinline__ uint32_t load_fresh(const uint16_t* pair) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(pair) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

#else

template <int DTYPE>
inline void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], uint32_t upper, uint32_t lower) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const auto half = [](uint32_t pair, int which) {
    const uint32_t bits = which ? pair >> 16 : pair & 0xffffu;
    return DTYPE == WMK_BFLOAT16 ? float_of(bits << 16) : float16_value(bits);
  };
  const uint32_t mine[6] = {left[0], left[1], left[2], left[3], upper, lower};
  uint32_t all[6][32];  // what every thread holds, in three exchanges
  for (int i = 0; i < 6; i += 2) {
    const uint64_t word = mine[i] | static_cast<uint64_t>(mine[i + 1]) << 32;
    const uint64_t* words =
        cuda_emulator::warp_collective("multiply_matrices", 0xffffffffu, word, {__FILE__, __LINE__});
    for (int thread = 0; thread < 32; ++thread) {
      all[i][thread] = static_cast<uint32_t>(words[thread]);
      all[i + 1][thread] = static_cast<uint32_t>(words[thread] >> 32);
    }
  }
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      for (int k = 0; k < 16; ++k) {
        const int from = k % 8 / 2, far = k / 8;
        const float value = half(all[2 * far + row][4 * g + from], k % 2);
        sums[2 * row + column] += value * half(all[4 + far][4 * (2 * t + column) + from], k % 2);
      }
    }
  }
}

inline uint32_t load_fresh(const uint16_t* pair) { return *reinterpret_cast<const uint32_t*>(pair); }
inline uint32_t load_acquire(const uint32_t* address) { return *address; }

#endif

// Waits until `expected` blocks in all have come here, counted since the launch. What a block wrote before is seen
// after by every block that reads it with load_fresh.
__device__ __forceinline__ void grid_barrier(uint32_t* arrived, uint32_t expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (load_acquire(arrived) < expected) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace wmk
