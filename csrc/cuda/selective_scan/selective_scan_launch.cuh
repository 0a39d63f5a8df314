// The launches of the selective scan for one configuration; the .cu files beside this instantiate a few each, so that
// they compile side by side.
#pragma once

#include "cuda/selective_scan/combine_kernel.cuh"
#include "cuda/selective_scan/selective_scan_backward_kernel.cuh"
#include "cuda/selective_scan/selective_scan_forward_kernel.cuh"

namespace wmk {

// Every configuration: state sizes up to 16, 64 and 256 in fp32, the first in a form for each dtype; up to 16 and 256
// in fp64.
template <int DTYPE>
using Scan16 = ScanConfiguration<float, 4, 4, DTYPE>;
using Scan64 = ScanConfiguration<float, 4, 16>;
using Scan256 = ScanConfiguration<float, 8, 32>;
using Scan16Double = ScanConfiguration<double, 4, 4>;
using Scan256Double = ScanConfiguration<double, 8, 32>;

constexpr int kSharedMemory = 99 * 1024;  // that a block can have on every architecture; the least, on sm_120

template <typename T>
int launch_combine(const wmk_selective_scan& p, const ScanPlan& plan, int tile_channels, bool reverse);

template <typename Configuration>
int launch_forward(const wmk_selective_scan& p, const ScanPlan& plan) {
  constexpr int kThreads = Configuration::kThreads;
  const int64_t blocks = plan.slots * plan.tiles;
  if (plan.split) {
    const int64_t shared = sizeof(ForwardShared<Configuration, true>) + Slots<Configuration>::bytes(p.dtype, 2);
    int status =
        WMK_LAUNCH((selective_scan_forward_kernel<Configuration, true>), blocks, kThreads, shared, p.stream, p, plan);
    if (status != WMK_OK) return status;
    status = launch_combine<typename Configuration::T>(p, plan, Configuration::kChannels, false);
    if (status != WMK_OK) return status;
  }
  const int64_t shared = sizeof(ForwardShared<Configuration, false>) + Slots<Configuration>::bytes(p.dtype, 3);
  return WMK_LAUNCH((selective_scan_forward_kernel<Configuration, false>), blocks, kThreads, shared, p.stream, p, plan);
}

template <typename Configuration>
int launch_backward(const wmk_selective_scan& p, const ScanPlan& plan) {
  constexpr int kThreads = Configuration::kThreads;
  using AllSlots = Slots<Configuration>;
  static_assert(
      sizeof(BackwardShared<Configuration>) +
              sizeof(typename Configuration::T) * (2 * AllSlots::kStateElements + 4 * AllSlots::kChannelElements) <=
          kSharedMemory,
      "a block fits on the smallest multiprocessor");
  const int64_t blocks = plan.slots * plan.tiles;
  const int64_t slot_bytes = Slots<Configuration>::bytes(p.dtype, 4);
  if (plan.split) {
    int status =
        WMK_LAUNCH((selective_scan_backward_local_kernel<Configuration>), blocks, kThreads,
                   static_cast<int64_t>(sizeof(BackwardLocalShared<Configuration>)) + slot_bytes, p.stream, p, plan);
    if (status != WMK_OK) return status;
    status = launch_combine<typename Configuration::T>(p, plan, Configuration::kChannels, true);
    if (status != WMK_OK) return status;
  }
  return WMK_LAUNCH((selective_scan_backward_kernel<Configuration>), blocks, kThreads,
                    static_cast<int64_t>(sizeof(BackwardShared<Configuration>)) + slot_bytes, p.stream, p, plan);
}

}  // namespace wmk

// What one .cu file instantiates, and the others need not: `keyword` is template or extern template.
#define WMK_SCAN_INSTANCE(keyword, direction, configuration) \
  keyword int wmk::launch_##direction<wmk::configuration>(const wmk_selective_scan&, const wmk::ScanPlan&)
