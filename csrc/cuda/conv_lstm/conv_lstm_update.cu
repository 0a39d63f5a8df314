#include <initializer_list>

#include "common/checks.h"
#include "cuda/conv_lstm/conv_lstm_update_kernel.cuh"

namespace wmk {
namespace {

int check(const wmk_conv_lstm_update& p, bool backward) {
  if (!is_dtype(p.dtype) || p.hidden < 1 || p.positions < 1) return WMK_UNSUPPORTED;
  if (p.batch == 0) return WMK_OK;
  if (p.c.data == nullptr) return WMK_NULL_POINTER;
  if (p.gates_x.data == nullptr && (!backward || p.gates.data == nullptr)) return WMK_NULL_POINTER;
  if (!backward && p.h.data == nullptr) return WMK_NULL_POINTER;
  if (backward && (p.grad_c.data == nullptr || p.grad_gates.data == nullptr)) return WMK_NULL_POINTER;
  return WMK_OK;
}

// Whether four channels are aligned in every tensor.
bool can_vectorize(const wmk_conv_lstm_update& p) {
  if (p.hidden % 4 != 0) return false;
  const int64_t size = element_size(p.dtype), state_size = p.dtype == WMK_FLOAT64 ? 8 : 4;
  const auto aligned = [](const wmk_view* view, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(view->data) % (bytes > 16 ? 16 : bytes) == 0;
  };
  for (const wmk_view* view : {&p.gates_x, &p.gates_h, &p.h, &p.grad_out, &p.grad_h, &p.grad_gates}) {
    if (!aligned(view, 4 * size)) return false;
  }
  for (const wmk_view* view : {&p.bias, &p.peephole, &p.c_prev, &p.c, &p.gates, &p.grad_c, &p.grad_peephole}) {
    if (!aligned(view, 4 * state_size)) return false;
  }
  return true;
}

template <typename T, int DTYPE, int COUNT, bool BACKWARD>
int launch_update(const wmk_conv_lstm_update& p) {
  const int64_t threads = p.batch * p.positions * (p.hidden / COUNT);
  const int64_t blocks = (threads + kUpdateThreads - 1) / kUpdateThreads;
  if constexpr (BACKWARD) {
    return WMK_LAUNCH((conv_lstm_update_backward_kernel<T, DTYPE, COUNT>), blocks, kUpdateThreads, 0, p.stream, p);
  } else {
    return WMK_LAUNCH((conv_lstm_update_kernel<T, DTYPE, COUNT>), blocks, kUpdateThreads, 0, p.stream, p);
  }
}

template <typename T, int DTYPE, bool BACKWARD>
int launch_dtype(const wmk_conv_lstm_update& p) {
  return can_vectorize(p) ? launch_update<T, DTYPE, 4, BACKWARD>(p) : launch_update<T, DTYPE, 1, BACKWARD>(p);
}

template <bool BACKWARD>
int run(const wmk_conv_lstm_update& p) {
  const int status = check(p, BACKWARD);
  if (status != WMK_OK || p.batch == 0) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  switch (p.dtype) {
    case WMK_FLOAT64:
      return launch_dtype<double, WMK_FLOAT64, BACKWARD>(p);
    case WMK_FLOAT32:
      return launch_dtype<float, WMK_FLOAT32, BACKWARD>(p);
    case WMK_BFLOAT16:
      return launch_dtype<float, WMK_BFLOAT16, BACKWARD>(p);
    default:
      return launch_dtype<float, WMK_FLOAT16, BACKWARD>(p);
  }
}

}  // namespace
}  // namespace wmk

extern "C" int wmk_cuda_conv_lstm_update_forward(const wmk_conv_lstm_update* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_conv_lstm_update_backward(const wmk_conv_lstm_update* p) { return wmk::run<true>(*p); }
