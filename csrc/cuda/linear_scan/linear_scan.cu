#include "common/checks.h"
#include "cuda/linear_scan/linear_scan_kernel.cuh"

namespace wmk {
namespace {

// Below the minimum, time is split for the target.
constexpr int64_t kMinBlocksPerProcessor = 2;
constexpr int64_t kTargetBlocksPerProcessor = 4;

template <typename T>
LinearPlan make_plan(const wmk_linear_scan& p, int64_t& bytes) {
  using C = LinearKernelTraits<T>;
  LinearPlan plan = {};
  const int64_t rows = p.batch * p.channels, time = p.time < 1 ? 1 : p.time;
  const int64_t blocks = p.batch * ceil_div(p.channels, C::kRows), processors = multiprocessors(p.device);
  int64_t steps = time;
  if (blocks < kMinBlocksPerProcessor * processors && blocks > 0) {
    steps = ceil_div(time, ceil_div(kTargetBlocksPerProcessor * processors, blocks));
    if (steps < 4 * C::kSteps) steps = 4 * C::kSteps;
  }
  plan.segment_steps = ceil_div(steps, C::kSteps) * C::kSteps;
  plan.segments = ceil_div(time, plan.segment_steps);
  bytes = 0;
  if (plan.segments > 1) {
    char* base = static_cast<char*>(p.workspace);
    const int64_t array_bytes = ceil_div(plan.segments * rows * static_cast<int64_t>(sizeof(T)), 256) * 256;
    plan.boundary = base;
    plan.decay = base + array_bytes;
    plan.reset = reinterpret_cast<int32_t*>(base + 2 * array_bytes);
    bytes = 3 * array_bytes;
  }
  return plan;
}

int64_t workspace_bytes(const wmk_linear_scan& p) {
  int64_t bytes = 0;
  if (p.dtype == WMK_FLOAT64) {
    make_plan<double>(p, bytes);
  } else {
    make_plan<float>(p, bytes);
  }
  return bytes;
}

int check(const wmk_linear_scan& p, bool backward) {
  if (!is_dtype(p.dtype)) return WMK_UNSUPPORTED;
  const int64_t rows = p.batch * p.channels;
  if (rows == 0) return WMK_OK;
  if (!backward && p.last_state.data == nullptr) return WMK_NULL_POINTER;
  if (p.time > 0 && p.gates.data == nullptr) return WMK_NULL_POINTER;
  if (p.time > 0 && !backward && any_missing({&p.tokens, &p.out})) return WMK_NULL_POINTER;
  if (p.time > 0 && backward && p.grad_out.data == nullptr) return WMK_NULL_POINTER;
  if (p.time > 0 && backward && p.grad_gates.data != nullptr && p.out.data == nullptr) return WMK_NULL_POINTER;
  if (p.workspace == nullptr && workspace_bytes(p) > 0) return WMK_NULL_POINTER;
  return WMK_OK;
}

template <typename T, int DTYPE, bool BACKWARD>
int launch_scan(const wmk_linear_scan& p) {
  using C = LinearKernelTraits<T>;
  int64_t bytes = 0;
  const LinearPlan plan = make_plan<T>(p, bytes);
  const int64_t rows = p.batch * p.channels;
  const int64_t blocks = plan.segments * p.batch * ceil_div(p.channels, C::kRows);
  const int64_t shared =
      sizeof(LinearShared<T, BACKWARD>) + (BACKWARD ? 3 : 2) * C::kRows * C::kSteps * element_size(p.dtype);
  if (plan.segments > 1) {
    int status =
        WMK_LAUNCH((linear_scan_kernel<T, DTYPE, BACKWARD, true>), blocks, C::kThreads, shared, p.stream, p, plan);
    if (status != WMK_OK) return status;
    status = WMK_LAUNCH(linear_scan_combine_kernel<T>, ceil_div(rows, 128), 128, 0, p.stream, plan, rows);
    if (status != WMK_OK) return status;
  }
  return WMK_LAUNCH((linear_scan_kernel<T, DTYPE, BACKWARD, false>), blocks, C::kThreads, shared, p.stream, p, plan);
}

template <bool BACKWARD>
int run(const wmk_linear_scan& p) {
  const int status = check(p, BACKWARD);
  if (status != WMK_OK) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  switch (p.dtype) {
    case WMK_FLOAT64:
      return launch_scan<double, WMK_FLOAT64, BACKWARD>(p);
    case WMK_FLOAT32:
      return launch_scan<float, WMK_FLOAT32, BACKWARD>(p);
    case WMK_BFLOAT16:
      return launch_scan<float, WMK_BFLOAT16, BACKWARD>(p);
    default:
      return launch_scan<float, WMK_FLOAT16, BACKWARD>(p);
  }
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_linear_scan_forward_workspace(const wmk_linear_scan* p) { return wmk::workspace_bytes(*p); }
extern "C" int64_t wmk_cuda_linear_scan_backward_workspace(const wmk_linear_scan* p) {
  return wmk::workspace_bytes(*p);
}
extern "C" int wmk_cuda_linear_scan_forward(const wmk_linear_scan* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_linear_scan_backward(const wmk_linear_scan* p) { return wmk::run<true>(*p); }
