// Causal convolution of more than four taps, and windows of sequences without steps, on a GPU.
//
// An element per thread; inputs come from the caches, where neighbours have read them. `reach` tells per step how many
// inputs up to it no reset has cut off. Backward, the sum's gradient is written first and read `width` times; a block
// per weight sums its gradient over batch and time. Two loads per tap and element, from the caches.
#pragma once

#include "cuda/causal_conv1d/causal_conv1d_common.cuh"

namespace wmk {

struct ConvWidePlan {
  int32_t* reach;  // [batch, time], at most width
  void* grad_sum;  // [batch, channels, time], of the state dtype; backward
};

__device__ __forceinline__ int64_t conv_element() {
  return static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
}

// An element of x; adjacent threads take adjacent numbers of it.
struct ConvElement {
  int64_t batch, channel, time;

  __device__ __forceinline__ ConvElement(const wmk_causal_conv1d& p, int64_t index) {
    const bool by_channel = p.x.stride[1] == 1 && p.x.stride[2] != 1;
    batch = index / (p.channels * p.time);
    channel = by_channel ? index % p.channels : index / p.time % p.channels;
    time = by_channel ? index / p.channels % p.time : index % p.time;
  }
};

__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_reach_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, int32_t* reach) {
  const int64_t index = conv_element();
  if (index >= p.batch * p.time) return;
  const int64_t batch = index / p.time, time = index % p.time, begin = sequence_at(p, batch, time).begin;
  int64_t count = p.width;
  for (int64_t k = 0; k < p.width && time - k >= begin; ++k) {
    if (is_reset(p, batch, time - k)) {
      count = k + 1;
      break;
    }
  }
  reach[index] = static_cast<int32_t>(count);
}

// The input at a step of a sequence, or of its window before it.
template <typename T>
__device__ __forceinline__ T wide_input(const wmk_causal_conv1d& p, int64_t batch, const ConvSequence& sequence,
                                        int64_t channel, int64_t time) {
  if (time >= sequence.begin) return load_activation<T>(p, p.x, batch, channel, time);
  if (p.initial_state.data == nullptr) return T(0);
  return state_at<T>(p.initial_state, sequence.index, channel, p.width - 1 + time - sequence.begin);
}

// GRADIENT: of the sum, instead of the output.
template <typename T, bool GRADIENT>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, const ConvWidePlan plan) {
  const int64_t index = conv_element();
  if (index >= p.batch * p.channels * p.time) return;
  const ConvElement at(p, index);
  const bool precise = p.dtype == WMK_FLOAT32;
  const T grad = GRADIENT ? load_activation<T>(p, p.grad_out, at.batch, at.channel, at.time) : T(0);
  T sum = T(0);
  if (!GRADIENT || p.silu) {
    const ConvSequence sequence = sequence_at(p, at.batch, at.time);
    const int64_t reach = plan.reach[at.batch * p.time + at.time];
    if (p.bias.data != nullptr) sum = state_at<T>(p.bias, at.channel);
    for (int64_t k = 0; k < p.width; ++k) {
      const T value = k < reach ? wide_input<T>(p, at.batch, sequence, at.channel, at.time - k) : T(0);
      sum += state_at<T>(p.weight, at.channel, p.width - 1 - k) * value;
    }
  }
  if (GRADIENT) {
    static_cast<T*>(plan.grad_sum)[(at.batch * p.channels + at.channel) * p.time + at.time] =
        p.silu ? grad * silu_slope(sum, precise) : grad;
  } else {
    if (p.silu) sum *= sigmoid(sum, precise);
    store_element<T>(p.out.data, p.dtype,
                     at.batch * p.out.stride[0] + at.channel * p.out.stride[1] + at.time * p.out.stride[2], sum);
  }
}

// What a sequence's last window adds to the gradient of the input at `time`, which may be of its first window.
template <typename T>
__device__ __forceinline__ T last_state_gradient(const wmk_causal_conv1d& p, const ConvWidePlan& plan, int64_t batch,
                                                 const ConvSequence& sequence, int64_t channel, int64_t time) {
  const int64_t position = p.width - 1 - (sequence.end - time);
  if (p.grad_last_state.data == nullptr || position < 0) return T(0);
  const bool empty = sequence.begin == sequence.end;
  if (!empty && sequence.end - 1 - time >= plan.reach[batch * p.time + sequence.end - 1]) return T(0);
  return state_at<T>(p.grad_last_state, sequence.index, channel, position);
}

// The gradient of the input at `time`: of the steps that it reaches, and of the last window.
template <typename T>
__device__ __forceinline__ T wide_input_gradient(const wmk_causal_conv1d& p, const ConvWidePlan& plan, int64_t batch,
                                                 const ConvSequence& sequence, int64_t channel, int64_t time) {
  const T* grad_sum = static_cast<const T*>(plan.grad_sum) + (batch * p.channels + channel) * p.time;
  T sum = last_state_gradient<T>(p, plan, batch, sequence, channel, time);
  for (int64_t k = time < sequence.begin ? sequence.begin - time : 0; k < p.width && time + k < sequence.end; ++k) {
    if (k >= plan.reach[batch * p.time + time + k]) break;  // a reset cuts off all later steps
    sum += state_at<T>(p.weight, channel, p.width - 1 - k) * grad_sum[time + k];
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_input_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, const ConvWidePlan plan) {
  const int64_t index = conv_element();
  if (index >= p.batch * p.channels * p.time) return;
  const ConvElement at(p, index);
  const ConvSequence sequence = sequence_at(p, at.batch, at.time);
  store_element<T>(p.grad_x.data, p.dtype,
                   at.batch * p.grad_x.stride[0] + at.channel * p.grad_x.stride[1] + at.time * p.grad_x.stride[2],
                   wide_input_gradient<T>(p, plan, at.batch, sequence, at.channel, at.time));
}

// A block per channel and tap; the bias follows the taps, which are newest first.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_weight_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, const ConvWidePlan plan) {
  WMK_SHARED_ARRAY(T, sums, [kConvThreads]);
  const int64_t channel = blockIdx.x / (p.width + 1), tap = blockIdx.x % (p.width + 1);
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < p.batch * p.time; i += kConvThreads) {
    const int64_t batch = i / p.time, time = i % p.time;
    T value = T(1);
    if (tap < p.width) {
      value = T(0);
      if (tap < plan.reach[i]) value = wide_input<T>(p, batch, sequence_at(p, batch, time), channel, time - tap);
    }
    sum += static_cast<const T*>(plan.grad_sum)[(batch * p.channels + channel) * p.time + time] * value;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();  // the threads' sums are there
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kConvThreads; ++i) sum += sums[i];
  if (tap < p.width) {
    static_cast<T*>(p.grad_weight.data)[channel * p.width + p.width - 1 - tap] = sum;
  } else if (p.grad_bias.data != nullptr) {
    static_cast<T*>(p.grad_bias.data)[channel] = sum;
  }
}

// Windows of sequences, an input per thread: the last ones, or BACKWARD the gradient of the first ones. ONLY_EMPTY: of
// sequences without steps, whose windows are equal; then without a plan.
template <typename T, bool BACKWARD, bool ONLY_EMPTY>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_window_kernel(const WMK_GRID_CONSTANT wmk_causal_conv1d p, const ConvWidePlan plan) {
  const int64_t past = p.width - 1, index = conv_element();
  if (index >= p.sequences * p.channels * past) return;
  const int64_t position = index % past, channel = index / past % p.channels;
  const ConvSequence sequence = sequence_of(p, index / past / p.channels);
  const int64_t batch = p.cu_seqlens.data == nullptr ? sequence.index : 0;
  const bool empty = sequence.begin == sequence.end;
  if (ONLY_EMPTY && !empty) return;
  if constexpr (BACKWARD) {
    const int64_t time = sequence.begin - past + position;
    T gradient;
    if constexpr (ONLY_EMPTY) {
      gradient = last_state_gradient<T>(p, plan, batch, sequence, channel, time);
    } else {
      gradient = wide_input_gradient<T>(p, plan, batch, sequence, channel, time);
    }
    state_at<T>(p.grad_initial_state, sequence.index, channel, position) = gradient;
  } else {
    const int64_t time = sequence.end - past + position;
    const bool held = empty || sequence.end - 1 - time < plan.reach[batch * p.time + sequence.end - 1];
    state_at<T>(p.last_state, sequence.index, channel, position) =
        held ? wide_input<T>(p, batch, sequence, channel, time) : T(0);
  }
}

}  // namespace wmk
