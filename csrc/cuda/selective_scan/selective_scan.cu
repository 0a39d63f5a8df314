#include "common/checks.h"
#include "cuda/selective_scan/selective_scan_launch.cuh"

WMK_SCAN_INSTANCE(extern template, forward, Scan16<WMK_FLOAT32>);
WMK_SCAN_INSTANCE(extern template, forward, Scan16<WMK_BFLOAT16>);
WMK_SCAN_INSTANCE(extern template, forward, Scan16<WMK_FLOAT16>);
WMK_SCAN_INSTANCE(extern template, forward, Scan64);
WMK_SCAN_INSTANCE(extern template, forward, Scan256);
WMK_SCAN_INSTANCE(extern template, forward, Scan16Double);
WMK_SCAN_INSTANCE(extern template, forward, Scan256Double);
WMK_SCAN_INSTANCE(extern template, backward, Scan16<WMK_FLOAT32>);
WMK_SCAN_INSTANCE(extern template, backward, Scan16<WMK_BFLOAT16>);
WMK_SCAN_INSTANCE(extern template, backward, Scan16<WMK_FLOAT16>);
WMK_SCAN_INSTANCE(extern template, backward, Scan64);
WMK_SCAN_INSTANCE(extern template, backward, Scan256);
WMK_SCAN_INSTANCE(extern template, backward, Scan16Double);
WMK_SCAN_INSTANCE(extern template, backward, Scan256Double);

namespace wmk {

template <typename T>
int launch_combine(const wmk_selective_scan& p, const ScanPlan& plan, int tile_channels, bool reverse) {
  const int64_t blocks = p.sequences * ((p.channels * p.state + 31) / 32);
  if (reverse) {
    return WMK_LAUNCH((selective_scan_combine_kernel<T, true>), blocks, 32 * kCombineWarps, 0, p.stream, p, plan,
                      tile_channels);
  }
  return WMK_LAUNCH((selective_scan_combine_kernel<T, false>), blocks, 32 * kCombineWarps, 0, p.stream, p, plan,
                    tile_channels);
}
template int launch_combine<float>(const wmk_selective_scan&, const ScanPlan&, int, bool);
template int launch_combine<double>(const wmk_selective_scan&, const ScanPlan&, int, bool);

namespace {

// The smallest traits that hold the states.
template <typename Use>
auto with_traits(const wmk_selective_scan& p, Use use) {
  if (p.dtype == WMK_FLOAT64) return p.state <= 16 ? use(Scan16Double()) : use(Scan256Double());
  if (p.state <= 16) {
    if (p.dtype == WMK_FLOAT32) return use(Scan16<WMK_FLOAT32>());
    return p.dtype == WMK_BFLOAT16 ? use(Scan16<WMK_BFLOAT16>()) : use(Scan16<WMK_FLOAT16>());
  }
  return p.state <= 64 ? use(Scan64()) : use(Scan256());
}

struct WorkspaceLayout {
  char* base;
  int64_t used = 0;
  void* allocate(int64_t bytes) {
    void* block = base + used;
    used += ceil_div(bytes, 256) * 256;
    return block;
  }
};

// Below the minimum of blocks per multiprocessor, scanning segments twice pays.
constexpr double kMinBlocksPerProcessor = 1.6;
constexpr int64_t kTargetBlocksPerProcessor = 3;

int64_t choose_segment_steps(const wmk_selective_scan& p, int64_t tiles, int64_t tile_steps, bool packed) {
  const int64_t chunk = p.chunk_states.data == nullptr || p.chunk < 1 ? tile_steps : p.chunk;
  const int64_t granularity = tile_steps % chunk == 0 ? tile_steps : chunk;
  const int64_t time = p.time < 1 ? 1 : p.time;
  const int64_t processors = multiprocessors(p.device);
  const int64_t target_blocks = kTargetBlocksPerProcessor * processors;
  int64_t steps = time;
  if (packed) {
    // Only sequences longer than twice a block's even share are split.
    steps = ceil_div(2 * time * tiles, target_blocks);
  } else if (static_cast<double>(tiles * p.batch) < kMinBlocksPerProcessor * static_cast<double>(processors)) {
    steps = ceil_div(time, target_blocks / (tiles * p.batch < 1 ? 1 : tiles * p.batch));
  }
  const int64_t min_steps = 2 * tile_steps;
  if (steps < min_steps) steps = min_steps;
  return ceil_div(steps, granularity) * granularity;
}

template <typename Traits>
ScanPlan make_plan(const wmk_selective_scan& p, bool packed, bool backward, WorkspaceLayout& layout) {
  using T = typename Traits::T;
  ScanPlan plan = {};
  plan.tiles_per_group = ceil_div(p.channels / p.groups, Traits::kChannels);
  plan.tiles = p.groups * plan.tiles_per_group;
  plan.segment_steps = choose_segment_steps(p, plan.tiles, Traits::kSteps, packed);
  plan.segments_per_sequence = p.time == 0 ? 1 : ceil_div(p.time, plan.segment_steps);
  plan.segment_count = packed ? p.time / plan.segment_steps + p.sequences : p.batch * plan.segments_per_sequence;
  plan.split = plan.segments_per_sequence > 1;

  const int64_t size = sizeof(T), states = plan.segment_count * p.channels * p.state * size;
  if (plan.split) {
    plan.boundary = layout.allocate(states);
    plan.decay = layout.allocate(states);
    plan.reset =
        static_cast<int32_t*>(layout.allocate(plan.segment_count * plan.tiles * static_cast<int64_t>(sizeof(int32_t))));
  }
  if (backward) {
    const int64_t partials = p.batch * plan.tiles * p.state * p.time * size;
    plan.partial_A = layout.allocate(states);
    plan.partial_D = layout.allocate(plan.segment_count * p.channels * size);
    plan.partial_bias = layout.allocate(plan.segment_count * p.channels * size);
    (p.B_varies ? plan.tile_partial_B : plan.partial_B) = layout.allocate(p.B_varies ? partials : states);
    (p.C_varies ? plan.tile_partial_C : plan.partial_C) = layout.allocate(p.C_varies ? partials : states);
  }
  return plan;
}

int64_t workspace_bytes(const wmk_selective_scan& p, bool backward) {
  if (p.groups < 1) return 0;
  return with_traits(p, [&](auto traits) {
    // packing shows only in a pointer, on which the size must not depend
    WorkspaceLayout unpacked{nullptr}, packed{nullptr};
    make_plan<decltype(traits)>(p, false, backward, unpacked);
    if (p.batch == 1) make_plan<decltype(traits)>(p, true, backward, packed);
    return unpacked.used > packed.used ? unpacked.used : packed.used;
  });
}

int check(const wmk_selective_scan& p, bool backward) {
  if (!is_dtype(p.dtype) || p.state < 1 || p.state > 256 || !has_groups(p.channels, p.groups)) return WMK_UNSUPPORTED;
  if ((backward || p.chunk_states.data != nullptr) && p.chunk < 1) return WMK_UNSUPPORTED;
  if (p.channels == 0) return WMK_OK;
  const bool any_states = p.sequences > 0, any_steps = p.batch > 0 && p.time > 0;
  if (any_states && any_missing({&p.A})) return WMK_NULL_POINTER;
  if (any_steps && any_missing({&p.u, &p.delta, &p.B, &p.C})) return WMK_NULL_POINTER;
  if (!backward && any_states && any_missing({&p.last_state})) return WMK_NULL_POINTER;
  if (!backward && any_steps && any_missing({&p.out})) return WMK_NULL_POINTER;
  if (backward && any_steps && any_missing({&p.grad_out, &p.chunk_states})) return WMK_NULL_POINTER;
  if (p.workspace == nullptr && workspace_bytes(p, backward) > 0) return WMK_NULL_POINTER;
  return WMK_OK;
}

template <typename T>
int launch_sums(const wmk_selective_scan& p, const ScanPlan& plan) {
  SegmentSums sums = {};
  sums.segment_count = plan.segment_count;
  int count = 0;
  const auto add = [&](const void* partial, const wmk_view& out, int64_t elements) {
    if (out.data == nullptr) return;
    sums.sum[count] = {partial, out.data, elements};
    sums.first_block[count + 1] = sums.first_block[count] + ceil_div(elements, 32);
    ++count;
  };
  add(plan.partial_A, p.grad_A, p.channels * p.state);
  add(plan.partial_D, p.grad_D, p.channels);
  add(plan.partial_bias, p.grad_delta_bias, p.channels);
  if (!p.B_varies) add(plan.partial_B, p.grad_B, p.channels * p.state);
  if (!p.C_varies) add(plan.partial_C, p.grad_C, p.channels * p.state);
  int status = WMK_LAUNCH(sum_segments_kernel<T>, sums.first_block[count], 32 * kCombineWarps, 0, p.stream, sums);
  if (status != WMK_OK) return status;

  const int64_t blocks = p.batch * p.groups * p.state * ceil_div(p.time, 256);
  for (int which = 0; which < 2; ++which) {
    const wmk_view& out = which == 0 ? p.grad_B : p.grad_C;
    if (!(which == 0 ? p.B_varies : p.C_varies) || out.data == nullptr) continue;
    const T* partials = static_cast<const T*>(which == 0 ? plan.tile_partial_B : plan.tile_partial_C);
    status = WMK_LAUNCH(sum_tiles_kernel<T>, blocks, 256, 0, p.stream, partials, out, p.dtype, p.groups,
                        plan.tiles_per_group, p.state, p.time);
    if (status != WMK_OK) return status;
  }
  return WMK_OK;
}

}  // namespace
}  // namespace wmk

extern "C" int64_t wmk_cuda_selective_scan_forward_workspace(const wmk_selective_scan* p) {
  return wmk::workspace_bytes(*p, false);
}

extern "C" int64_t wmk_cuda_selective_scan_backward_workspace(const wmk_selective_scan* p) {
  return wmk::workspace_bytes(*p, true);
}

extern "C" int wmk_cuda_selective_scan_forward(const wmk_selective_scan* p) {
  const int status = wmk::check(*p, false);
  if (status != WMK_OK) return status;
  wmk::DeviceGuard guard(p->device);
  if (guard.status() != WMK_OK) return guard.status();
  return wmk::with_traits(*p, [&](auto traits) {
    using Traits = decltype(traits);
    wmk::WorkspaceLayout layout{static_cast<char*>(p->workspace)};
    const bool packed = p->cu_seqlens.data != nullptr;
    return wmk::launch_forward<Traits>(*p, wmk::make_plan<Traits>(*p, packed, false, layout));
  });
}

extern "C" int wmk_cuda_selective_scan_backward(const wmk_selective_scan* p) {
  const int status = wmk::check(*p, true);
  if (status != WMK_OK) return status;
  wmk::DeviceGuard guard(p->device);
  if (guard.status() != WMK_OK) return guard.status();
  return wmk::with_traits(*p, [&](auto traits) {
    using Traits = decltype(traits);
    wmk::WorkspaceLayout layout{static_cast<char*>(p->workspace)};
    const bool packed = p->cu_seqlens.data != nullptr;
    const wmk::ScanPlan plan = wmk::make_plan<Traits>(*p, packed, true, layout);
    const int launched = wmk::launch_backward<Traits>(*p, plan);
    return launched == WMK_OK ? wmk::launch_sums<typename Traits::T>(*p, plan) : launched;
  });
}
