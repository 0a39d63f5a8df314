#include "common/checks.h"
#include "cuda/ssd_scan/ssd_scan_backward_kernel.cuh"
#include "cuda/ssd_scan/ssd_scan_forward_kernel.cuh"
#include "cuda/ssd_scan/ssd_scan_step_kernel.cuh"

namespace wmk {
namespace {

bool is_empty(const wmk_ssd_scan& p) { return p.sequences == 0 || p.d == 0; }

bool is_supported(const wmk_ssd_scan& p) {
  return is_dtype(p.dtype) && p.n >= 1 && p.chunk >= 1 && p.kept_interval >= p.chunk &&
         p.kept_interval % p.chunk == 0 && p.heads >= 1 && has_groups(p.heads, p.groups);
}

// One step of each sequence that nothing is saved of.
bool is_step(const wmk_ssd_scan& p) {
  return p.time == 1 && p.cu_seqlens.data == nullptr && p.chunk_states.data == nullptr;
}

// Sizes depend on no address.
template <typename T>
SSDPlan make_plan(const wmk_ssd_scan& p, bool backward, int64_t& bytes) {
  SSDPlan plan = {};
  bytes = 0;
  if (!is_supported(p) || is_empty(p)) return plan;
  static_cast<PanelSizes&>(plan) = panel_sizes(
      p.n, p.d, sizeof(T), [&](int64_t rows, int64_t width) { return SSDBlock<T>::arena(rows, width, backward); });
  plan.group_heads = p.heads / p.groups;
  plan.block_heads = 1;
  if (backward) {  // two blocks per multiprocessor are enough
    const int64_t heads = p.sequences * p.heads * plan.panels / (2 * multiprocessors(p.device));
    plan.block_heads = heads < 1 ? 1 : heads < plan.group_heads ? heads : plan.group_heads;
  }
  plan.head_blocks = ceil_div(plan.group_heads, plan.block_heads);
  const int64_t blocks = p.sequences * p.groups * plan.parts();
  WorkspaceLayout workspace(p.workspace);
  const auto take = [&](int64_t elements) {
    void* at = workspace.take(elements, sizeof(T));
    bytes = workspace.bytes;
    return at;
  };
  if (!plan.shared) plan.arenas = take(blocks * plan.arena);
  if (!backward) return plan;
  const int64_t segment = p.time < p.kept_interval ? p.time : p.kept_interval;
  const int64_t chunk = segment < p.chunk ? segment : p.chunk;
  plan.slots = chunk == 0 ? 0 : ceil_div(segment, p.chunk) * ceil_div(chunk, kTileSteps);
  plan.states = take(blocks * plan.slots * plan.rows * plan.width);
  plan.grad_D = take(p.sequences * p.heads * p.d);
  plan.dtype = p.dtype;
  plan.grad_B = vectors_by_head(p.grad_B), plan.grad_C = vectors_by_head(p.grad_C);
  if (plan.parts() > 1 || plan.block_heads > 1) {
    plan.dtype = SSDBlock<T>::state_dtype();
    plan.vector_elements = p.batch * p.time * p.groups * p.n;
    for (wmk_view* view : {&plan.grad_B, &plan.grad_C})
      *view = {take(plan.parts() * plan.vector_elements), {p.time * p.groups * p.n, p.n, 1, p.groups * p.n}};
  }
  plan.grad_gate = scalars_by_head(p.grad_gate), plan.grad_weight = scalars_by_head(p.grad_weight);
  plan.grad_own_weight = scalars_by_head(p.grad_own_weight);
  if (plan.panels > 1) {
    plan.scalar_elements = p.batch * p.time * p.heads;
    for (wmk_view* view : {&plan.grad_gate, &plan.grad_weight, &plan.grad_own_weight})
      *view = {take(plan.panels * plan.scalar_elements), {p.time * p.heads, 1, p.heads, 0}};
  }
  return plan;
}

int64_t workspace_bytes(const wmk_ssd_scan& p, bool backward) {
  int64_t bytes = 0;
  if (p.dtype == WMK_FLOAT64) {
    make_plan<double>(p, backward, bytes);
  } else {
    make_plan<float>(p, backward, bytes);
  }
  return bytes;
}

int check(const wmk_ssd_scan& p, bool backward, int64_t workspace) {
  if (!is_supported(p)) return WMK_UNSUPPORTED;
  if (is_empty(p)) return WMK_OK;
  if (p.cu_seqlens.data == nullptr ? p.sequences != p.batch : p.batch != 1) return WMK_UNSUPPORTED;
  if (workspace > 0 && p.workspace == nullptr) return WMK_NULL_POINTER;
  if (!backward && p.last_state.data == nullptr) return WMK_NULL_POINTER;
  if (backward && p.D.data != nullptr && p.grad_D.data == nullptr) return WMK_NULL_POINTER;
  if (p.batch * p.time == 0) return WMK_OK;
  if (any_missing({&p.x, &p.gate, &p.weight, &p.B, &p.C})) return WMK_NULL_POINTER;
  if (!backward) return p.out.data == nullptr ? WMK_NULL_POINTER : WMK_OK;
  if (any_missing({&p.grad_out, &p.chunk_states, &p.grad_x, &p.grad_gate, &p.grad_weight, &p.grad_B, &p.grad_C}))
    return WMK_NULL_POINTER;
  const bool lacks_own = p.own_weight.data != nullptr && p.grad_own_weight.data == nullptr;
  return lacks_own || (p.z.data != nullptr && p.grad_z.data == nullptr) ? WMK_NULL_POINTER : WMK_OK;
}

template <typename T>
int sum_gradients(const wmk_ssd_scan& p, const SSDPlan& plan) {
  const int64_t state_dtype = SSDBlock<T>::state_dtype();
  const auto sum_vectors = [&](const wmk_view& partial, const wmk_view& to) {
    return sum_partials<T>(p.stream, partial.data, to, p.dtype, plan.parts(), p.batch, p.time, p.groups, p.n);
  };
  const auto sum_scalars = [&](const wmk_view& partial, const wmk_view& gradient) {
    const wmk_view to = {gradient.data, {0, gradient.stride[0], gradient.stride[1], gradient.stride[2]}};
    return sum_partials<T>(p.stream, partial.data, to, state_dtype, plan.panels, 1, p.batch, p.time, p.heads);
  };
  int status = WMK_OK;
  if (plan.vector_elements > 0) {
    status = sum_vectors(plan.grad_B, p.grad_B);
    if (status == WMK_OK) status = sum_vectors(plan.grad_C, p.grad_C);
  }
  if (status != WMK_OK || plan.scalar_elements == 0) return status;
  status = sum_scalars(plan.grad_gate, p.grad_gate);
  if (status == WMK_OK) status = sum_scalars(plan.grad_weight, p.grad_weight);
  if (status == WMK_OK && p.own_weight.data != nullptr) status = sum_scalars(plan.grad_own_weight, p.grad_own_weight);
  return status;
}

template <typename T>
int sum_grad_D(const wmk_ssd_scan& p, const SSDPlan& plan) {
  if (p.D.data == nullptr) return WMK_OK;
  const wmk_view to = {p.grad_D.data, {0, 0, p.d, 1}};
  return sum_partials<T>(p.stream, plan.grad_D, to, SSDBlock<T>::state_dtype(), p.sequences, 1, 1, p.heads, p.d);
}

template <typename T, bool BACKWARD, bool SHARED>
int launch_block(const wmk_ssd_scan& p, const SSDPlan& plan) {
  const int64_t blocks = p.sequences * p.groups * plan.parts();
  const int64_t shared = SHARED ? plan.arena * static_cast<int64_t>(sizeof(T)) : 0;
  if constexpr (BACKWARD) {
    return WMK_LAUNCH((ssd_scan_backward_kernel<T, SHARED>), blocks, kPanelThreads, shared, p.stream, p, plan);
  } else {
    return WMK_LAUNCH((ssd_scan_forward_kernel<T, SHARED>), blocks, kPanelThreads, shared, p.stream, p, plan);
  }
}

template <typename T, bool BACKWARD>
int launch(const wmk_ssd_scan& p) {
  int64_t bytes = 0;
  const SSDPlan plan = make_plan<T>(p, BACKWARD, bytes);
  int status = check(p, BACKWARD, bytes);
  if (status != WMK_OK || (is_empty(p) && !BACKWARD)) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  if constexpr (BACKWARD) {
    if (!is_empty(p)) {
      status = plan.shared ? launch_block<T, true, true>(p, plan) : launch_block<T, true, false>(p, plan);
      if (status == WMK_OK) status = sum_gradients<T>(p, plan);
    }
    return status == WMK_OK ? sum_grad_D<T>(p, plan) : status;
  } else {
    if (is_step(p)) {
      const int64_t warps = p.batch * p.heads * ceil_div(p.d, kStepChannels);
      return WMK_LAUNCH(ssd_scan_step_kernel<T>, ceil_div(warps, kStepWarps), kStepThreads, 0, p.stream, p);
    }
    return plan.shared ? launch_block<T, false, true>(p, plan) : launch_block<T, false, false>(p, plan);
  }
}

template <bool BACKWARD>
int run(const wmk_ssd_scan& p) {
  return p.dtype == WMK_FLOAT64 ? launch<double, BACKWARD>(p) : launch<float, BACKWARD>(p);
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_ssd_scan_forward_workspace(const wmk_ssd_scan* p) {
  return wmk::workspace_bytes(*p, false);
}
extern "C" int64_t wmk_cuda_ssd_scan_backward_workspace(const wmk_ssd_scan* p) {
  return wmk::workspace_bytes(*p, true);
}
extern "C" int wmk_cuda_ssd_scan_forward(const wmk_ssd_scan* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_ssd_scan_backward(const wmk_ssd_scan* p) { return wmk::run<true>(*p); }
