#include <string.h>

#include "common/checks.h"
#include "cuda/gated_delta_rule/gated_delta_rule_backward_kernel.cuh"
#include "cuda/gated_delta_rule/gated_delta_rule_forward_kernel.cuh"

namespace wmk {
namespace {

bool is_empty(const wmk_gated_delta_rule& p) { return p.sequences == 0 || p.heads == 0 || p.d_v == 0; }

template <typename T>
DeltaPlan make_plan(const wmk_gated_delta_rule& p, bool backward, int64_t& bytes) {
  DeltaPlan plan = {};
  bytes = 0;
  if (is_empty(p)) return plan;
  static_cast<PanelSizes&>(plan) = panel_sizes(p.d_k, p.d_v, sizeof(T), [&](int64_t rows, int64_t width) {
    return DeltaBlock<T>::arena(rows, width, backward);
  });
  memcpy(&plan.scale, &p.scale, sizeof(plan.scale));
  WorkspaceLayout workspace(p.workspace);
  const auto take = [&](int64_t elements) {
    void* at = workspace.take(elements, sizeof(T));
    bytes = workspace.bytes;
    return at;
  };
  if (!plan.shared) plan.arenas = take(p.sequences * p.heads * plan.panels * plan.arena);
  if (!backward) return plan;
  plan.grad_q = p.grad_q, plan.grad_k = p.grad_k, plan.grad_gate = p.grad_gate, plan.grad_beta = p.grad_beta;
  plan.dtype = p.dtype;
  if (plan.panels == 1) return plan;
  plan.dtype = DeltaBlock<T>::state_dtype();
  plan.scalar_elements = p.batch * p.heads * p.time;
  plan.vector_elements = plan.scalar_elements * p.d_k;
  for (wmk_view* view : {&plan.grad_q, &plan.grad_k})
    *view = {take(plan.panels * plan.vector_elements), {p.heads * p.time * p.d_k, p.time * p.d_k, 1, p.d_k}};
  for (wmk_view* view : {&plan.grad_gate, &plan.grad_beta})
    *view = {take(plan.panels * plan.scalar_elements), {p.heads * p.time, p.time, 1, 0}};
  return plan;
}

int64_t workspace_bytes(const wmk_gated_delta_rule& p, bool backward) {
  int64_t bytes = 0;
  if (p.dtype == WMK_FLOAT64) {
    make_plan<double>(p, backward, bytes);
  } else {
    make_plan<float>(p, backward, bytes);
  }
  return bytes;
}

int check(const wmk_gated_delta_rule& p, bool backward, int64_t workspace) {
  if (!is_dtype(p.dtype) || p.d_k < 1 || p.chunk < 1) return WMK_UNSUPPORTED;
  if (is_empty(p)) return WMK_OK;
  if (p.cu_seqlens.data == nullptr ? p.sequences != p.batch : p.batch != 1) return WMK_UNSUPPORTED;
  if (workspace > 0 && p.workspace == nullptr) return WMK_NULL_POINTER;
  if (!backward && p.last_state.data == nullptr) return WMK_NULL_POINTER;
  if (p.batch * p.time == 0) return WMK_OK;
  if (any_missing({&p.q, &p.k, &p.gate, &p.beta})) return WMK_NULL_POINTER;
  if (!backward && any_missing({&p.v, &p.out})) return WMK_NULL_POINTER;
  if (backward && any_missing({&p.grad_out, &p.residuals, &p.chunk_states, &p.grad_q, &p.grad_k, &p.grad_v,
                               &p.grad_gate, &p.grad_beta}))
    return WMK_NULL_POINTER;
  return WMK_OK;
}

template <typename T>
int sum_gradients(const wmk_gated_delta_rule& p, const DeltaPlan& plan) {
  const auto sum = [&](const wmk_view& partial, const wmk_view& to, int64_t dtype, int64_t size) {
    return sum_partials<T>(p.stream, partial.data, to, dtype, plan.panels, p.batch, p.heads, p.time, size);
  };
  const auto of_vectors = [](const wmk_view& view) {
    return wmk_view{view.data, {view.stride[0], view.stride[1], view.stride[3], view.stride[2]}};
  };
  const int64_t state_dtype = DeltaBlock<T>::state_dtype();
  int status = sum(plan.grad_q, of_vectors(p.grad_q), p.dtype, p.d_k);
  if (status == WMK_OK) status = sum(plan.grad_k, of_vectors(p.grad_k), p.dtype, p.d_k);
  if (status == WMK_OK) status = sum(plan.grad_gate, p.grad_gate, state_dtype, 1);
  if (status == WMK_OK) status = sum(plan.grad_beta, p.grad_beta, state_dtype, 1);
  return status;
}

template <typename T, bool BACKWARD, bool SHARED>
int launch_block(const wmk_gated_delta_rule& p, const DeltaPlan& plan) {
  const int64_t blocks = p.sequences * p.heads * plan.panels;
  const int64_t shared = SHARED ? plan.arena * static_cast<int64_t>(sizeof(T)) : 0;
  if constexpr (BACKWARD) {
    return WMK_LAUNCH((gated_delta_rule_backward_kernel<T, SHARED>), blocks, kPanelThreads, shared, p.stream, p, plan);
  } else {
    return WMK_LAUNCH((gated_delta_rule_forward_kernel<T, SHARED>), blocks, kPanelThreads, shared, p.stream, p, plan);
  }
}

template <typename T, bool BACKWARD>
int launch(const wmk_gated_delta_rule& p) {
  int64_t bytes = 0;
  const DeltaPlan plan = make_plan<T>(p, BACKWARD, bytes);
  int status = check(p, BACKWARD, bytes);
  if (status != WMK_OK || is_empty(p)) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  status = plan.shared ? launch_block<T, BACKWARD, true>(p, plan) : launch_block<T, BACKWARD, false>(p, plan);
  if constexpr (BACKWARD) {
    if (status == WMK_OK && plan.panels > 1) status = sum_gradients<T>(p, plan);
  }
  return status;
}

template <bool BACKWARD>
int run(const wmk_gated_delta_rule& p) {
  return p.dtype == WMK_FLOAT64 ? launch<double, BACKWARD>(p) : launch<float, BACKWARD>(p);
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_gated_delta_rule_forward_workspace(const wmk_gated_delta_rule* p) {
  return wmk::workspace_bytes(*p, false);
}
extern "C" int64_t wmk_cuda_gated_delta_rule_backward_workspace(const wmk_gated_delta_rule* p) {
  return wmk::workspace_bytes(*p, true);
}
extern "C" int wmk_cuda_gated_delta_rule_forward(const wmk_gated_delta_rule* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_gated_delta_rule_backward(const wmk_gated_delta_rule* p) { return wmk::run<true>(*p); }
