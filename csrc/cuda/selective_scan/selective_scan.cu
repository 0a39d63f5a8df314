// The selective scan's entry points: checks a call, cuts it into blocks, lays out the workspace, launches.
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

// Calls `use(configuration)` with the smallest configuration that holds the call's states.
template <typename Use>
auto with_configuration(const wmk_selective_scan& p, Use use) {
  if (p.dtype == WMK_FLOAT64) return p.state <= 16 ? use(Scan16Double()) : use(Scan256Double());
  if (p.state <= 16) {
    if (p.dtype == WMK_FLOAT32) return use(Scan16<WMK_FLOAT32>());
    return p.dtype == WMK_BFLOAT16 ? use(Scan16<WMK_BFLOAT16>()) : use(Scan16<WMK_FLOAT16>());
  }
  return p.state <= 64 ? use(Scan64()) : use(Scan256());
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Takes pieces of the workspace one after the other.
struct Layout {
  char* base;
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* piece = base + used;
    used += ceil_divide(bytes, 256) * 256;
    return piece;
  }
};

// Time is split where the blocks of whole sequences leave too many multiprocessors idle: below kEnough blocks each it
// pays to run every segment twice. Then as many segments as give each multiprocessor at most kWanted, which is what it
// holds at a time.
constexpr double kEnough = 1.6;
constexpr int64_t kWanted = 3;

int64_t choose_segment(const wmk_selective_scan& p, int64_t tiles, int64_t tile_steps, bool packed) {
  const int64_t chunk = p.chunk_states.data == nullptr || p.chunk < 1 ? tile_steps : p.chunk;
  const int64_t unit = tile_steps % chunk == 0 ? tile_steps : chunk;
  const int64_t time = p.time < 1 ? 1 : p.time;
  const int64_t processors = multiprocessors(p.device);
  const int64_t wanted = kWanted * processors;
  int64_t segment = time;
  if (packed) {
    // Sequences shorter than a segment stay whole, so only one far above the mean is cut.
    segment = ceil_divide(2 * time * tiles, wanted);
  } else if (static_cast<double>(tiles * p.batch) < kEnough * static_cast<double>(processors)) {
    segment = ceil_divide(time, wanted / (tiles * p.batch < 1 ? 1 : tiles * p.batch));
  }
  const int64_t least = 2 * tile_steps;
  if (segment < least) segment = least;
  return ceil_divide(segment, unit) * unit;
}

template <typename Configuration>
ScanPlan make_plan(const wmk_selective_scan& p, bool packed, bool backward, Layout& layout) {
  using T = typename Configuration::T;
  ScanPlan plan = {};
  plan.tiles_per_group = ceil_divide(p.channels / p.groups, Configuration::kChannels);
  plan.tiles = p.groups * plan.tiles_per_group;
  plan.segment = choose_segment(p, plan.tiles, Configuration::kSteps, packed);
  plan.segments = p.time == 0 ? 1 : ceil_divide(p.time, plan.segment);
  plan.slots = packed ? p.time / plan.segment + p.sequences : p.batch * plan.segments;
  plan.split = plan.segments > 1;

  const int64_t size = sizeof(T), states = plan.slots * p.channels * p.state * size;
  if (plan.split) {
    plan.boundary = layout.take(states);
    plan.decay = layout.take(states);
    plan.forgets = static_cast<int32_t*>(layout.take(plan.slots * plan.tiles * static_cast<int64_t>(sizeof(int32_t))));
  }
  if (backward) {
    const int64_t shares = p.batch * plan.tiles * p.state * p.time * size;
    plan.partial_A = layout.take(states);
    plan.partial_D = layout.take(plan.slots * p.channels * size);
    plan.partial_bias = layout.take(plan.slots * p.channels * size);
    (p.B_varies ? plan.tile_B : plan.partial_B) = layout.take(p.B_varies ? shares : states);
    (p.C_varies ? plan.tile_C : plan.partial_C) = layout.take(p.C_varies ? shares : states);
  }
  return plan;
}

int64_t workspace_bytes(const wmk_selective_scan& p, bool backward) {
  if (p.groups < 1) return 0;
  return with_configuration(p, [&](auto configuration) {
    // whether a batch of one is packed shows only in a pointer, which this answer must not need
    Layout whole{nullptr}, packed{nullptr};
    make_plan<decltype(configuration)>(p, false, backward, whole);
    if (p.batch == 1) make_plan<decltype(configuration)>(p, true, backward, packed);
    return whole.used > packed.used ? whole.used : packed.used;
  });
}

int check(const wmk_selective_scan& p, bool backward) {
  const bool known = p.dtype >= WMK_FLOAT32 && p.dtype <= WMK_FLOAT16;
  if (!known || p.state < 1 || p.state > 256 || p.groups < 1 || p.channels % p.groups != 0) return WMK_UNSUPPORTED;
  if ((backward || p.chunk_states.data != nullptr) && p.chunk < 1) return WMK_UNSUPPORTED;
  if (p.channels == 0) return WMK_OK;
  const bool any_states = p.sequences > 0, any_steps = p.batch > 0 && p.time > 0;
  const auto missing = [](const wmk_view& view) { return view.data == nullptr; };
  if (any_states && missing(p.A)) return WMK_NULL_POINTER;
  if (any_steps && (missing(p.u) || missing(p.delta) || missing(p.B) || missing(p.C))) return WMK_NULL_POINTER;
  if (!backward && ((any_states && missing(p.last_state)) || (any_steps && missing(p.out)))) return WMK_NULL_POINTER;
  if (backward && any_steps && (missing(p.grad_out) || missing(p.chunk_states))) return WMK_NULL_POINTER;
  if (p.workspace == nullptr && workspace_bytes(p, backward) > 0) return WMK_NULL_POINTER;
  return WMK_OK;
}

template <typename T>
int launch_sums(const wmk_selective_scan& p, const ScanPlan& plan) {
  SlotSums sums = {};
  sums.slots = plan.slots;
  int count = 0;
  const auto add = [&](const void* partial, const wmk_view& out, int64_t numbers) {
    if (out.data == nullptr) return;
    sums.sum[count] = {partial, out.data, numbers};
    sums.first_block[count + 1] = sums.first_block[count] + ceil_divide(numbers, 32);
    ++count;
  };
  add(plan.partial_A, p.grad_A, p.channels * p.state);
  add(plan.partial_D, p.grad_D, p.channels);
  add(plan.partial_bias, p.grad_delta_bias, p.channels);
  if (!p.B_varies) add(plan.partial_B, p.grad_B, p.channels * p.state);
  if (!p.C_varies) add(plan.partial_C, p.grad_C, p.channels * p.state);
  int status = WMK_LAUNCH(sum_slots_kernel<T>, sums.first_block[count], 32 * kCombineWarps, 0, p.stream, sums);
  if (status != WMK_OK) return status;

  const int64_t blocks = p.batch * p.groups * p.state * ceil_divide(p.time, 256);
  for (int which = 0; which < 2; ++which) {
    const wmk_view& out = which == 0 ? p.grad_B : p.grad_C;
    if (!(which == 0 ? p.B_varies : p.C_varies) || out.data == nullptr) continue;
    const T* shares = static_cast<const T*>(which == 0 ? plan.tile_B : plan.tile_C);
    status = WMK_LAUNCH(sum_tiles_kernel<T>, blocks, 256, 0, p.stream, shares, out, p.dtype, p.groups,
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
  return wmk::with_configuration(*p, [&](auto configuration) {
    using Configuration = decltype(configuration);
    wmk::Layout layout{static_cast<char*>(p->workspace)};
    const bool packed = p->cu_seqlens.data != nullptr;
    return wmk::launch_forward<Configuration>(*p, wmk::make_plan<Configuration>(*p, packed, false, layout));
  });
}

extern "C" int wmk_cuda_selective_scan_backward(const wmk_selective_scan* p) {
  const int status = wmk::check(*p, true);
  if (status != WMK_OK) return status;
  wmk::DeviceGuard guard(p->device);
  if (guard.status() != WMK_OK) return guard.status();
  return wmk::with_configuration(*p, [&](auto configuration) {
    using Configuration = decltype(configuration);
    wmk::Layout layout{static_cast<char*>(p->workspace)};
    const bool packed = p->cu_seqlens.data != nullptr;
    const wmk::ScanPlan plan = wmk::make_plan<Configuration>(*p, packed, true, layout);
    const int launched = wmk::launch_backward<Configuration>(*p, plan);
    return launched == WMK_OK ? wmk::launch_sums<typename Configuration::T>(*p, plan) : launched;
  });
}
