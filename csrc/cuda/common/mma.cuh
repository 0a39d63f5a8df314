// 16-bit matrix products on tensor cores and a grid barrier, with C++ twins for the emulator.
#pragma once

#include "cuda/common/primitives.cuh"

#ifdef WMK_EMULATE
#define WMK_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, argument) \
  WMK_LAUNCH(kernel, grid, block, shared, stream, argument)
#else
#define WMK_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, argument) \
  wmk::launch_cooperative((kernel), (grid), (block), (shared), (stream), (argument))
#endif

namespace wmk {

#ifndef WMK_EMULATE

// The runtime refuses a grid that is not fully resident, which would deadlock.
template <typename Argument>
int launch_cooperative(void (*kernel)(const Argument), int64_t grid, int block, int64_t shared, int64_t stream,
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

// c += a b per warp: a 16 x 16 and b 16 x 8 in 16 bits, c 16 x 8 in fp32. Thread 4 g + t holds, of a, rows g and g + 8
// at columns 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2], a[3]); of b, column g at rows 2 t, 2 t + 1 (b0) and
// 2 t + 8, 2 t + 9 (b1); of c, row g at columns 2 t, 2 t + 1, then row g + 8.
template <int DTYPE>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (DTYPE == WMK_BFLOAT16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Another block's elements, by ld.cg: level-1 caches are not coherent.
__device__ __forceinline__ uint32_t load_cg(const uint16_t* pair) {
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
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const auto element = [](uint32_t pair, int which) {
    const uint32_t bits = which ? pair >> 16 : pair & 0xffffu;
    return DTYPE == WMK_BFLOAT16 ? float_of(bits << 16) : float16_value(bits);
  };
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint32_t all[6][32];
  for (int i = 0; i < 6; i += 2) {
    const uint64_t word = own[i] | static_cast<uint64_t>(own[i + 1]) << 32;
    const uint64_t* words = cuda_emulator::warp_collective("mma_m16n8k16", 0xffffffffu, word, {__FILE__, __LINE__});
    for (int thread = 0; thread < 32; ++thread) {
      all[i][thread] = static_cast<uint32_t>(words[thread]);
      all[i + 1][thread] = static_cast<uint32_t>(words[thread] >> 32);
    }
  }
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      for (int k = 0; k < 16; ++k) {
        const int source = k % 8 / 2, block = k / 8;
        const float value = element(all[2 * block + row][4 * g + source], k % 2);
        c[2 * row + column] += value * element(all[4 + block][4 * (2 * t + column) + source], k % 2);
      }
    }
  }
}

inline uint32_t load_cg(const uint16_t* pair) { return *reinterpret_cast<const uint32_t*>(pair); }
inline uint32_t load_acquire(const uint32_t* address) { return *address; }

#endif

// Waits for `expected` arrivals at the counter, zero at launch; blocks arrive once per barrier, and the counter only
// rises. The first __syncthreads and fence put a block's writes before its arrival: other blocks' load_cg then sees
// them.
__device__ __forceinline__ void grid_barrier(uint32_t* barrier_counter, uint32_t expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(barrier_counter, 1u);
    while (load_acquire(barrier_counter) < expected) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace wmk
