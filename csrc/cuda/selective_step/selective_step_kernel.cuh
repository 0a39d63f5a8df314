// One step of the selective scan, on a GPU.
//
// LANES threads share a channel, four states each at a time. Per state: one read, one write, one exponential, three
// multiply-adds. Bound by memory (8 bytes per fp32 state) at large batches, by latency at small ones.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

// As one vector if contiguous and aligned.
template <typename T>
__device__ __forceinline__ Vec4<T> load_global_vec4(const void* data, int64_t dtype, int64_t offset, int64_t stride,
                                                    int valid) {
  const int64_t size = element_size(dtype);
  const char* source = static_cast<const char*>(data) + offset * size;
  const bool narrow = dtype != WMK_FLOAT64 && sizeof(T) == 4;
  if (narrow && stride == 1 && valid == 4 && reinterpret_cast<uintptr_t>(source) % (4 * size) == 0) {
    return unpack(reinterpret_cast<const unsigned char*>(source), dtype, T(0));
  }
  Vec4<T> vec;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    vec.value[i] = i < valid ? load_element<T>(data, dtype, offset + i * stride) : T(0);
  }
  return vec;
}
template <typename T>
__device__ __forceinline__ void store_global_vec4(void* data, int64_t dtype, int64_t offset, int64_t stride, int valid,
                                                  const Vec4<T>& vec) {
  char* target = static_cast<char*>(data) + offset * element_size(dtype);
  if (sizeof(T) == 4 && dtype == WMK_FLOAT32 && stride == 1 && valid == 4 &&
      reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    *reinterpret_cast<Vec4<T>*>(target) = vec;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) store_element<T>(data, dtype, offset + i * stride, vec.value[i]);
  }
}

constexpr int kStepThreads = 128;

template <typename T, int LANES>
__global__ void __launch_bounds__(kStepThreads) selective_step_kernel(const WMK_GRID_CONSTANT wmk_selective_step p) {
  constexpr int kChannels = kStepThreads / LANES;
  const int64_t tiles = (p.channels + kChannels - 1) / kChannels;
  const int64_t batch = blockIdx.x / tiles;
  const int64_t channel = blockIdx.x % tiles * kChannels + threadIdx.x / LANES;
  const int lane = static_cast<int>(threadIdx.x) % LANES;
  const bool exists = channel < p.channels;
  const bool precise = p.dtype == WMK_FLOAT32;
  const auto parameter = [&](const wmk_view& view) {
    return view.data == nullptr || !exists ? T(0) : static_cast<const T*>(view.data)[channel * view.stride[0]];
  };
  const auto input = [&](const wmk_view& view) {
    if (view.data == nullptr || !exists) return T(0);
    return load_element<T>(view.data, p.dtype, batch * view.stride[0] + channel * view.stride[1]);
  };

  const int64_t row =
      p.indices.data == nullptr ? batch : static_cast<const int64_t*>(p.indices.data)[batch * p.indices.stride[0]];
  const bool reset =
      p.reset.data != nullptr && static_cast<const uint8_t*>(p.reset.data)[batch * p.reset.stride[0]] != 0;
  const bool active = exists && row >= 0 && row < p.states;
  const T u = input(p.u), D = parameter(p.D), z = input(p.z);
  T step = input(p.delta) + parameter(p.delta_bias);
  if (p.delta_softplus) step = softplus(step, precise);
  const T delta_u = step * u;
  const int64_t group = exists ? channel / (p.channels / p.groups) : 0;
  const int64_t B = batch * p.B.stride[0] + group * p.B.stride[1], C = batch * p.C.stride[0] + group * p.C.stride[1];
  const int64_t state_in = row * p.state_in.stride[0] + channel * p.state_in.stride[1];
  const int64_t state_out = row * p.state_out.stride[0] + channel * p.state_out.stride[1];

  T y = T(0);
  if (active) {
    for (int64_t n = 4 * lane; n < p.state; n += 4 * LANES) {
      const int valid = static_cast<int>(p.state - n < 4 ? p.state - n : 4);
      Vec4<T> h = load_global_vec4<T>(p.state_in.data, p.state_dtype, state_in + n * p.state_in.stride[2],
                                      p.state_in.stride[2], valid);
      const Vec4<T> a = load_global_vec4<T>(p.A.data, sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32,
                                            channel * p.A.stride[0] + n * p.A.stride[1], p.A.stride[1], valid);
      const Vec4<T> b = load_global_vec4<T>(p.B.data, p.dtype, B + n * p.B.stride[2], p.B.stride[2], valid);
      const Vec4<T> c = load_global_vec4<T>(p.C.data, p.dtype, C + n * p.C.stride[2], p.C.stride[2], valid);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T decayed = exp2_fast(step * (a.value[i] * log2_e(T(0)))) * h.value[i];
        h.value[i] = (reset ? T(0) : decayed) + delta_u * b.value[i];
        y += c.value[i] * h.value[i];
      }
      store_global_vec4(p.state_out.data, p.state_dtype, state_out + n * p.state_out.stride[2], p.state_out.stride[2],
                        valid, h);
    }
  }
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) y += __shfl_xor_sync(0xffffffffu, y, distance);
  if (!exists || lane != 0) return;
  T out = y + D * u;
  if (p.z.data != nullptr) out *= z * sigmoid(z, precise);
  store_element<T>(p.out.data, p.dtype, batch * p.out.stride[0] + channel * p.out.stride[1], active ? out : T(0));
}

}  // namespace wmk
