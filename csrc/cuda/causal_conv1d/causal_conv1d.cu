#include "common/checks.h"
#include "cuda/causal_conv1d/causal_conv1d_backward_kernel.cuh"
#include "cuda/causal_conv1d/causal_conv1d_forward_kernel.cuh"
#include "cuda/causal_conv1d/causal_conv1d_wide_kernel.cuh"

namespace wmk {
namespace {

bool is_wide(const wmk_causal_conv1d& p) { return p.width > kConvTaps; }
int64_t state_size(const wmk_causal_conv1d& p) { return p.dtype == WMK_FLOAT64 ? 8 : 4; }
int64_t windows(const wmk_causal_conv1d& p) { return p.sequences * p.channels * (p.width - 1); }
int64_t blocks_of(int64_t elements) { return ceil_div(elements, kConvThreads); }
int64_t partials(const wmk_causal_conv1d& p) { return p.batch * ceil_div(p.time, kConvChunk); }

ConvWidePlan wide_plan(const wmk_causal_conv1d& p, bool backward, int64_t& bytes) {
  ConvWidePlan plan = {};
  char* base = static_cast<char*>(p.workspace);
  plan.reach = reinterpret_cast<int32_t*>(base);
  bytes = ceil_div(p.batch * p.time * 4, 256) * 256;
  if (!backward) return plan;
  plan.grad_sum = base + bytes;
  bytes += p.batch * p.channels * p.time * state_size(p);
  return plan;
}

int64_t workspace_bytes(const wmk_causal_conv1d& p, bool backward) {
  int64_t bytes = 0;
  if (is_wide(p)) {
    wide_plan(p, backward, bytes);
  } else if (backward) {
    bytes = partials(p) * (p.width + 1) * p.channels * state_size(p);
  }
  return bytes;
}

int check(const wmk_causal_conv1d& p, bool backward) {
  if (!is_dtype(p.dtype) || p.width < 1 || p.width > INT32_MAX) return WMK_UNSUPPORTED;
  if (p.cu_seqlens.data == nullptr ? p.sequences != p.batch : p.batch != 1) return WMK_UNSUPPORTED;
  if (p.channels == 0) return WMK_OK;
  if (p.weight.data == nullptr) return WMK_NULL_POINTER;
  if (backward && p.grad_weight.data == nullptr) return WMK_NULL_POINTER;
  if (!backward && windows(p) > 0 && p.last_state.data == nullptr) return WMK_NULL_POINTER;
  if (p.workspace == nullptr && workspace_bytes(p, backward) > 0) return WMK_NULL_POINTER;
  if (p.batch * p.time == 0) return WMK_OK;
  if (p.x.data == nullptr) return WMK_NULL_POINTER;
  return backward ? (any_missing({&p.grad_out, &p.grad_x}) ? WMK_NULL_POINTER : WMK_OK)
                  : (p.out.data == nullptr ? WMK_NULL_POINTER : WMK_OK);
}

template <typename T, bool BACKWARD, bool ONLY_EMPTY>
int launch_windows(const wmk_causal_conv1d& p, const ConvWidePlan& plan) {
  if (BACKWARD && p.grad_initial_state.data == nullptr) return WMK_OK;
  return WMK_LAUNCH((causal_conv1d_window_kernel<T, BACKWARD, ONLY_EMPTY>), blocks_of(windows(p)), kConvThreads, 0,
                    p.stream, p, plan);
}

// Tiles write the windows of sequences that have steps.
template <typename T, bool BACKWARD>
int launch_empty_windows(const wmk_causal_conv1d& p) {
  if (p.cu_seqlens.data == nullptr && p.time > 0) return WMK_OK;
  return launch_windows<T, BACKWARD, true>(p, {});
}

int launch_reach(const wmk_causal_conv1d& p, const ConvWidePlan& plan) {
  return WMK_LAUNCH(causal_conv1d_reach_kernel, blocks_of(p.batch * p.time), kConvThreads, 0, p.stream, p, plan.reach);
}

template <typename T>
int launch_wide_forward(const wmk_causal_conv1d& p) {
  int64_t bytes = 0;
  const ConvWidePlan plan = wide_plan(p, false, bytes);
  int status = launch_reach(p, plan);
  if (status != WMK_OK) return status;
  status = WMK_LAUNCH((causal_conv1d_wide_kernel<T, false>), blocks_of(p.batch * p.channels * p.time), kConvThreads, 0,
                      p.stream, p, plan);
  return status == WMK_OK ? launch_windows<T, false, false>(p, plan) : status;
}

template <typename T, int DTYPE>
int launch_forward(const wmk_causal_conv1d& p) {
  if (p.time == 1 && p.cu_seqlens.data == nullptr) {
    return WMK_LAUNCH(causal_conv1d_step_kernel<T>, blocks_of(p.batch * p.channels), kConvThreads, 0, p.stream, p);
  }
  if (is_wide(p)) return launch_wide_forward<T>(p);
  constexpr int64_t kSteps = ConvForwardShared<T>::kSteps, shared = sizeof(ConvForwardShared<T>);
  const int64_t blocks = p.batch * ceil_div(p.channels, kConvChannels) * ceil_div(p.time, kSteps);
  const int status =
      p.silu ? WMK_LAUNCH((causal_conv1d_forward_kernel<T, DTYPE, true>), blocks, kConvThreads, shared, p.stream, p)
             : WMK_LAUNCH((causal_conv1d_forward_kernel<T, DTYPE, false>), blocks, kConvThreads, shared, p.stream, p);
  return status == WMK_OK ? launch_empty_windows<T, false>(p) : status;
}

template <typename T>
int launch_wide_backward(const wmk_causal_conv1d& p) {
  int64_t bytes = 0;
  const ConvWidePlan plan = wide_plan(p, true, bytes);
  const int64_t blocks = blocks_of(p.batch * p.channels * p.time);
  int status = launch_reach(p, plan);
  if (status != WMK_OK) return status;
  status = WMK_LAUNCH((causal_conv1d_wide_kernel<T, true>), blocks, kConvThreads, 0, p.stream, p, plan);
  if (status != WMK_OK) return status;
  status = WMK_LAUNCH(causal_conv1d_wide_input_kernel<T>, blocks, kConvThreads, 0, p.stream, p, plan);
  if (status != WMK_OK) return status;
  status =
      WMK_LAUNCH(causal_conv1d_wide_weight_kernel<T>, p.channels * (p.width + 1), kConvThreads, 0, p.stream, p, plan);
  return status == WMK_OK ? launch_windows<T, true, false>(p, plan) : status;
}

template <typename T, int DTYPE>
int launch_backward(const wmk_causal_conv1d& p) {
  if (is_wide(p)) return launch_wide_backward<T>(p);
  T* sums = static_cast<T*>(p.workspace);
  const int64_t blocks = partials(p) * ceil_div(p.channels, kConvChannels);
  const int64_t shared = sizeof(ConvBackwardShared<T>);
  int status = p.silu ? WMK_LAUNCH((causal_conv1d_backward_kernel<T, DTYPE, true>), blocks, kConvThreads, shared,
                                   p.stream, p, sums)
                      : WMK_LAUNCH((causal_conv1d_backward_kernel<T, DTYPE, false>), blocks, kConvThreads, shared,
                                   p.stream, p, sums);
  if (status != WMK_OK) return status;
  status = WMK_LAUNCH(causal_conv1d_sum_kernel<T>, ceil_div((p.width + 1) * p.channels, 32), kConvThreads, 0, p.stream,
                      p, static_cast<const T*>(sums), partials(p));
  return status == WMK_OK ? launch_empty_windows<T, true>(p) : status;
}

template <bool BACKWARD, typename T, int DTYPE>
int launch(const wmk_causal_conv1d& p) {
  if constexpr (BACKWARD) {
    return launch_backward<T, DTYPE>(p);
  } else {
    return launch_forward<T, DTYPE>(p);
  }
}

template <bool BACKWARD>
int run(const wmk_causal_conv1d& p) {
  const int status = check(p, BACKWARD);
  if (status != WMK_OK || p.channels == 0) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  switch (p.dtype) {
    case WMK_FLOAT64:
      return launch<BACKWARD, double, WMK_FLOAT64>(p);
    case WMK_FLOAT32:
      return launch<BACKWARD, float, WMK_FLOAT32>(p);
    case WMK_BFLOAT16:
      return launch<BACKWARD, float, WMK_BFLOAT16>(p);
    default:
      return launch<BACKWARD, float, WMK_FLOAT16>(p);
  }
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_causal_conv1d_forward_workspace(const wmk_causal_conv1d* p) {
  return wmk::workspace_bytes(*p, false);
}
extern "C" int64_t wmk_cuda_causal_conv1d_backward_workspace(const wmk_causal_conv1d* p) {
  return wmk::workspace_bytes(*p, true);
}
extern "C" int wmk_cuda_causal_conv1d_forward(const wmk_causal_conv1d* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_causal_conv1d_backward(const wmk_causal_conv1d* p) { return wmk::run<true>(*p); }
