#include "common/checks.h"
#include "cuda/place_memory/place_memory_backward_kernel.cuh"
#include "cuda/place_memory/place_memory_forward_kernel.cuh"

namespace wmk {
namespace {

bool is_empty(const wmk_place_memory& p) { return p.sequences == 0 || p.channels == 0; }

// Sizes depend on no address: the backward pass has room for gradients of phases and gates, wanted or not.
template <typename T>
PlacePlan make_plan(const wmk_place_memory& p, bool backward, int64_t& bytes) {
  PlacePlan plan = {};
  bytes = 0;
  if (is_empty(p)) return plan;
  const int64_t channels = p.channels / p.groups;
  plan.vectors = channels > 8 ? 4 : channels > 4 ? 2 : 1;
  plan.width = 4 * plan.vectors;
  plan.tiles = ceil_div(channels, plan.width);
  plan.rows = 2 * p.frequencies;
  plan.places = ceil_div(p.places, 4) * 4;
  plan.pitch = plan.places / 4 % 2 == 1 ? plan.places : plan.places + 4;
  plan.slots = p.batch * (p.time / kPlaceSteps) + p.sequences;
  const int64_t blocks = p.sequences * p.groups * plan.tiles, state = plan.rows * plan.width;
  const int64_t matrices = 2 * plan.rows * plan.pitch;
  plan.arena = 2 * state + (2 + kPlaceWarps) * plan.places * plan.width;
  plan.shared = static_cast<int64_t>(sizeof(T)) * (matrices + plan.arena) <= kPlaceShared;

  char* base = static_cast<char*>(p.workspace);
  const auto take = [&](int64_t elements) {
    void* at = base + bytes;
    bytes += ceil_div(elements * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return at;
  };
  plan.matrices = take(matrices);
  if (!plan.shared) plan.arenas = take(blocks * plan.arena);
  if (!backward) return plan;
  plan.states = take(plan.slots * p.groups * plan.tiles * state);
  plan.work = take(blocks * (2 * kPlaceSteps + 1) * state);
  plan.key_sums = take((blocks + 1) * 2 * plan.rows * plan.places);
  if (!p.grad_keys.data && !p.grad_inverse.data) plan.key_sums = nullptr;
  if (!p.grad_phase.data && !p.grad_initial_phase.data && !plan.key_sums) plan.states = nullptr;
  const auto partial = [&](const wmk_view& gradient, int64_t elements) {
    void* at = plan.tiles > 1 ? take(plan.tiles * elements) : gradient.data;
    return gradient.data ? at : nullptr;
  };
  plan.grad_phase = partial(p.grad_phase, p.batch * p.time * p.groups * plan.rows);
  plan.grad_gate = partial(p.grad_gate, p.batch * p.time * p.places * p.groups);
  plan.grad_initial_phase = partial(p.grad_initial_phase, p.sequences * p.groups * plan.rows);
  return plan;
}

int64_t workspace_bytes(const wmk_place_memory& p, bool backward) {
  int64_t bytes = 0;
  if (p.dtype == WMK_FLOAT64) {
    make_plan<double>(p, backward, bytes);
  } else {
    make_plan<float>(p, backward, bytes);
  }
  return bytes;
}

int check(const wmk_place_memory& p, bool backward) {
  if (!is_dtype(p.dtype) || p.places < 1 || p.frequencies < 1 || !has_groups(p.channels, p.groups))
    return WMK_UNSUPPORTED;
  if (is_empty(p)) return WMK_OK;
  if (p.cu_seqlens.data == nullptr ? p.sequences != p.batch : p.batch != 1) return WMK_UNSUPPORTED;
  if (p.keys.data == nullptr || p.workspace == nullptr) return WMK_NULL_POINTER;
  if (!backward && p.last_state.data == nullptr) return WMK_NULL_POINTER;
  if (p.batch * p.time == 0) return WMK_OK;
  if (any_missing({&p.values, &p.phase})) return WMK_NULL_POINTER;
  if (!backward && p.out.data == nullptr) return WMK_NULL_POINTER;
  if (backward && (p.grad_values.data == nullptr || (p.inverse.data != nullptr && p.residual.data == nullptr)))
    return WMK_NULL_POINTER;
  return WMK_OK;
}

template <typename T>
int sum_tiles([[maybe_unused]] const wmk_place_memory& p, const PlacePlan& plan, const void* partial,
              const wmk_view& gradient, int64_t elements) {
  if (plan.tiles == 1 || gradient.data == nullptr) return WMK_OK;
  return WMK_LAUNCH(place_memory_sum_kernel<T>, ceil_div(elements, kPlaceThreads), kPlaceThreads, 0, p.stream,
                    static_cast<const T*>(partial), static_cast<T*>(gradient.data), elements, plan.tiles);
}

template <typename T>
int finish_keys(const wmk_place_memory& p, const PlacePlan& plan) {
  if (plan.key_sums == nullptr) return WMK_OK;
  const int64_t blocks = p.sequences * p.groups * plan.tiles, elements = 2 * plan.rows * plan.places;
  const T* partial = static_cast<const T*>(plan.key_sums);
  T* sums = static_cast<T*>(plan.key_sums) + blocks * elements;
  const int status = WMK_LAUNCH(place_memory_sum_kernel<T>, ceil_div(elements, kPlaceThreads), kPlaceThreads, 0,
                                p.stream, partial, sums, elements, blocks);
  if (status != WMK_OK) return status;
  const int64_t results = p.places * (plan.rows + p.places);
  return WMK_LAUNCH(place_memory_keys_kernel<T>, ceil_div(results, kPlaceThreads), kPlaceThreads, 0, p.stream, p, plan,
                    static_cast<const T*>(sums));
}

template <typename T, bool BACKWARD, bool SHARED>
int launch_block(const wmk_place_memory& p, const PlacePlan& plan) {
  const int64_t blocks = p.sequences * p.groups * plan.tiles;
  const int64_t elements = 2 * plan.rows * plan.pitch + plan.arena;
  const int64_t shared = SHARED ? elements * static_cast<int64_t>(sizeof(T)) : 0;
  if constexpr (BACKWARD) {
    return WMK_LAUNCH((place_memory_backward_kernel<T, SHARED>), blocks, kPlaceThreads, shared, p.stream, p, plan);
  } else {
    return WMK_LAUNCH((place_memory_forward_kernel<T, SHARED>), blocks, kPlaceThreads, shared, p.stream, p, plan);
  }
}

template <typename T, bool BACKWARD>
int launch(const wmk_place_memory& p) {
  int64_t bytes = 0;
  const PlacePlan plan = make_plan<T>(p, BACKWARD, bytes);
  int status = WMK_LAUNCH(place_memory_matrices_kernel<T>, ceil_div(plan.rows * plan.pitch, kPlaceThreads),
                          kPlaceThreads, 0, p.stream, p, plan);
  if (status != WMK_OK) return status;
  status = plan.shared ? launch_block<T, BACKWARD, true>(p, plan) : launch_block<T, BACKWARD, false>(p, plan);
  if (status != WMK_OK || !BACKWARD) return status;
  const int64_t rows = p.groups * plan.rows;
  status = sum_tiles<T>(p, plan, plan.grad_phase, p.grad_phase, p.batch * p.time * rows);
  if (status == WMK_OK)
    status = sum_tiles<T>(p, plan, plan.grad_gate, p.grad_gate, p.batch * p.time * p.places * p.groups);
  if (status == WMK_OK)
    status = sum_tiles<T>(p, plan, plan.grad_initial_phase, p.grad_initial_phase, p.sequences * rows);
  return status == WMK_OK ? finish_keys<T>(p, plan) : status;
}

template <bool BACKWARD>
int run(const wmk_place_memory& p) {
  const int status = check(p, BACKWARD);
  if (status != WMK_OK || is_empty(p)) return status;
  DeviceGuard guard(p.device);
  if (guard.status() != WMK_OK) return guard.status();
  return p.dtype == WMK_FLOAT64 ? launch<double, BACKWARD>(p) : launch<float, BACKWARD>(p);
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_place_memory_forward_workspace(const wmk_place_memory* p) {
  return wmk::workspace_bytes(*p, false);
}
extern "C" int64_t wmk_cuda_place_memory_backward_workspace(const wmk_place_memory* p) {
  return wmk::workspace_bytes(*p, true);
}
extern "C" int wmk_cuda_place_memory_forward(const wmk_place_memory* p) { return wmk::run<false>(*p); }
extern "C" int wmk_cuda_place_memory_backward(const wmk_place_memory* p) { return wmk::run<true>(*p); }
