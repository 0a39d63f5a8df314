#include "common/checks.h"
#include "cuda/selective_step/selective_step_kernel.cuh"

namespace wmk {
namespace {

template <typename T>
int launch_step(const wmk_selective_step& p) {
  if (p.state <= 16) {
    constexpr int64_t kChannels = kStepThreads / 4;
    const int64_t blocks = p.batch * ((p.channels + kChannels - 1) / kChannels);
    return WMK_LAUNCH((selective_step_kernel<T, 4>), blocks, kStepThreads, 0, p.stream, p);
  }
  constexpr int64_t kChannels = kStepThreads / 32;
  const int64_t blocks = p.batch * ((p.channels + kChannels - 1) / kChannels);
  return WMK_LAUNCH((selective_step_kernel<T, 32>), blocks, kStepThreads, 0, p.stream, p);
}

int check(const wmk_selective_step& p) {
  if (!is_dtype(p.dtype) || !is_dtype(p.state_dtype) || p.state < 1 || p.state > 256) return WMK_UNSUPPORTED;
  if (!has_groups(p.channels, p.groups)) return WMK_UNSUPPORTED;
  if (p.batch == 0 || p.channels == 0) return WMK_OK;
  if (any_missing({&p.u, &p.delta, &p.A, &p.B, &p.C, &p.out})) return WMK_NULL_POINTER;
  if (p.states > 0 && any_missing({&p.state_in, &p.state_out})) return WMK_NULL_POINTER;
  return WMK_OK;
}

}  // namespace
}  // namespace wmk

extern "C" int wmk_cuda_selective_step(const wmk_selective_step* p) {
  const int status = wmk::check(*p);
  if (status != WMK_OK) return status;
  wmk::DeviceGuard guard(p->device);
  if (guard.status() != WMK_OK) return guard.status();
  const bool wide = p->dtype == WMK_FLOAT64 || p->state_dtype == WMK_FLOAT64;
  return wide ? wmk::launch_step<double>(*p) : wmk::launch_step<float>(*p);
}
