// Device primitives with C++ twins for the emulator (WMK_EMULATE).
#pragma once

#include <stdint.h>

#include "include/wmkernels.h"

#ifdef WMK_EMULATE
#include <math.h>
#include <string.h>

#include "cuda_emulator.h"

#define WMK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((grid) == 0 ? static_cast<int>(WMK_OK)                    \
               : CUDA_EMULATOR_LAUNCH(kernel, static_cast<unsigned>(grid), block, shared, __VA_ARGS__))
#define WMK_SHARED_MEMORY(name) CUDA_EMULATOR_SHARED(name)
#define WMK_SHARED_ARRAY(type, name, dimensions) CUDA_EMULATOR_SHARED_ARRAY(type, name, dimensions)
#define WMK_GRID_CONSTANT
#else
#include <cuda_runtime.h>

// Raises the shared-memory limit; returns a wmk_status. Parenthesise kernels whose template arguments hold a comma.
#define WMK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  wmk::launch((kernel), (grid), (block), (shared), (stream), __VA_ARGS__)
#define WMK_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define WMK_SHARED_ARRAY(type, name, dimensions) __shared__ type name dimensions
#define WMK_GRID_CONSTANT __grid_constant__
#endif

namespace wmk {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLog2EDouble = 1.44269504088896340736;

#ifndef WMK_EMULATE

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t grid, int block, int64_t shared, int64_t stream,
           const Arguments&... arguments) {
  if (grid == 0) return WMK_OK;
  if (grid > 0x7fffffff) return WMK_UNSUPPORTED;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return WMK_CUDA_ERROR + static_cast<int>(error);
  }
  kernel<<<static_cast<unsigned>(grid), block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? WMK_OK : WMK_CUDA_ERROR + static_cast<int>(error);
}

// fp32: special-function unit, within two ulp; 2^0 is 1, results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float float16_low(uint32_t pair) {
  float y;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(y) : "r"(pair));
  return y;
}
__device__ __forceinline__ float float16_high(uint32_t pair) {
  float y;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(y) : "r"(pair));
  return y;
}
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Sums over every four adjacent lanes on tensor cores, in TF32 (ten bits), added to `sums` of lane `which`. The
// right-hand matrix is one in rows 0 to 3 of column 2 * which and rows 4 to 7 of column 2 * which + 1.
__device__ __forceinline__ void warp_sum4_tf32(float (&sums)[4], const float (&values)[4], int which) {
  const int column = static_cast<int>(threadIdx.x) % 32 / 4;
  const float even = column == 2 * which ? 1.0f : 0.0f, odd = column == 2 * which + 1 ? 1.0f : 0.0f;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(bits_of(values[0])), "r"(bits_of(values[2])), "r"(bits_of(values[1])), "r"(bits_of(values[3])),
        "r"(bits_of(even)), "r"(bits_of(odd)));
}

// The same value, unknown to the compiler: what is computed from it is computed anew, instead of kept in registers.
template <typename T>
__device__ __forceinline__ T* hidden(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// 8 or 16 bytes; visible to this thread after copy_async_wait.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 8 || BYTES == 16, "what the hardware copies");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

class DeviceGuard {
 public:
  explicit DeviceGuard(int64_t device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(static_cast<int>(device));
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return status_ == cudaSuccess ? WMK_OK : WMK_CUDA_ERROR + static_cast<int>(status_); }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_ = cudaSuccess;
};

// Without a GPU a guess: workspaces need a size there too.
inline int64_t multiprocessors(int64_t device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, static_cast<int>(device)) != cudaSuccess) {
    cudaGetLastError();  // clears the error
    return 128;
  }
  return count;
}

#else

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float float16_value(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * ldexpf(static_cast<float>(mantissa), -24);
  return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}
inline float float16_low(uint32_t pair) { return float16_value(pair & 0xffffu); }
inline float float16_high(uint32_t pair) { return float16_value(pair >> 16); }
inline uint32_t float16_bits(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const float magnitude = fabsf(x);
  if (!(magnitude == magnitude)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 6.103515625e-05f) return sign | static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 24)));
  const uint32_t bits = bits_of(magnitude) - (112u << 23);
  return sign | ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}
inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_float16(float low, float high) { return float16_bits(low) | (float16_bits(high) << 16); }
inline uint32_t pack_bfloat16(float low, float high) { return bfloat16_bits(low) | (bfloat16_bits(high) << 16); }

inline void warp_sum4_tf32(float (&sums)[4], const float (&values)[4], int which) {
  for (int i = 0; i < 4; ++i) {
    float total = float_of(bits_of(values[i]) & 0xffffe000u);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (static_cast<int>(threadIdx.x) % 4 == which) sums[i] += total;
  }
}

template <typename T>
inline T* hidden(T* pointer) {
  return pointer;
}

template <int BYTES>
inline void copy_async(void* shared, const void* global) {
  cuda_emulator::copy_async(shared, global, BYTES);
}
inline void copy_async_wait() { cuda_emulator::copy_async_wait_all(); }

class DeviceGuard {
 public:
  explicit DeviceGuard(int64_t) {}
  int status() const { return WMK_OK; }
};

inline int64_t multiprocessors(int64_t) { return cuda_emulator::settings.multiprocessors; }

#endif

__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

__device__ __forceinline__ float log2_e(float) { return kLog2E; }
__device__ __forceinline__ double log2_e(double) { return kLog2EDouble; }

__device__ __forceinline__ float largest(float) { return 3.402823466e+38f; }
__device__ __forceinline__ double largest(double) { return 1.7976931348623157e+308; }
// A log2(e), made finite: infinity times a padding step or a zero gradient would be NaN. From a step of 2^-118 (fp64:
// 2^-1013) on, the decay is exact; softplus returns no smaller step. Keeps NaN.
template <typename T>
__device__ __forceinline__ T decay_rate(T A) {
  const T rate = A * log2_e(T(0));
  return rate < -largest(T(0)) ? -largest(T(0)) : rate > largest(T(0)) ? largest(T(0)) : rate;
}
__device__ __forceinline__ float least_step(float step) { return step < 0x1p-118f ? 0x1p-118f : step; }
__device__ __forceinline__ double least_step(double step) { return step < 0x1p-1013 ? 0x1p-1013 : step; }

// `precise`: for fp32 data; else branch-free, so that elements overlap.
__device__ __forceinline__ float softplus(float x, bool precise) {
  if (precise) return x > 20.0f ? x : least_step(log1pf(expf(x)));
  const float e = exp2_fast(x * kLog2E);
  const float series = e * (1.0f + e * (-0.5f + e * (1.0f / 3.0f - 0.25f * e)));
  const float logarithm = log2_fast(1.0f + e) * (1.0f / kLog2E);
  const float value = e < 0.03125f ? series : logarithm;
  return x > 20.0f ? x : least_step(value);
}
__device__ __forceinline__ double softplus(double x, bool) { return x > 20.0 ? x : least_step(log1p(exp(x))); }

__device__ __forceinline__ float sigmoid(float x, bool precise) {
  if (precise) return 1.0f / (1.0f + expf(-x));
  return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x));
}
__device__ __forceinline__ double sigmoid(double x, bool) { return 1.0 / (1.0 + exp(-x)); }

__device__ __forceinline__ float tanh_accurate(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_accurate(double x) { return tanh(x); }

// Absent weights are zeros; zero times an infinite state or gradient would be NaN.
template <typename T>
__device__ __forceinline__ T peephole_term(T weight, T value) {
  return weight == T(0) ? T(0) : weight * value;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ __forceinline__ int64_t element_size(int64_t dtype) {
  return dtype == WMK_FLOAT64 ? 8 : dtype == WMK_FLOAT32 ? 4 : 2;
}

// Converts to T.
template <typename T>
__device__ __forceinline__ T load_element(const void* data, int64_t dtype, int64_t offset) {
  switch (dtype) {
    case WMK_FLOAT32:
      return static_cast<T>(static_cast<const float*>(data)[offset]);
    case WMK_FLOAT64:
      return static_cast<T>(static_cast<const double*>(data)[offset]);
    case WMK_BFLOAT16:
      return static_cast<T>(float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[offset]) << 16));
    default:
      return static_cast<T>(float16_low(static_cast<const uint16_t*>(data)[offset]));
  }
}
template <typename T>
__device__ __forceinline__ void store_element(void* data, int64_t dtype, int64_t offset, T value) {
  switch (dtype) {
    case WMK_FLOAT32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case WMK_FLOAT64:
      static_cast<double*>(data)[offset] = static_cast<double>(value);
      break;
    case WMK_BFLOAT16:
      static_cast<uint16_t*>(data)[offset] = static_cast<uint16_t>(pack_bfloat16(static_cast<float>(value), 0.0f));
      break;
    default:
      static_cast<uint16_t*>(data)[offset] = static_cast<uint16_t>(pack_float16(static_cast<float>(value), 0.0f));
  }
}

}  // namespace wmk
