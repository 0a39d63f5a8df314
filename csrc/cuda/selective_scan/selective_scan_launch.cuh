// Launches for one KernelTraits, instantiated in several .cu files to compile in parallel.
#pragma once

#include "cuda/selective_scan/combine_kernel.cuh"
#include "cuda/selective_scan/selective_scan_backward_kernel.cuh"
#include "cuda/selective_scan/selective_scan_forward_kernel.cuh"

namespace wmk {

// fp32: up to 16 (per dtype), 64, 256 states; fp64: up to 16, 256.
template <int DTYPE>
using Scan16 = KernelTraits<float, 4, 4, DTYPE>;
using Scan64 = KernelTraits<float, 4, 16>;
using Scan256 = KernelTraits<float, 8, 32>;
using Scan16Double = KernelTraits<double, 4, 4>;
using Scan256Double = KernelTraits<double, 8, 32>;

constexpr int kSharedMemory = 99 * 1024;  // sm_120's limit

template <typename T>
int launch_combine(const wmk_selective_scan& p, const ScanPlan& plan, int tile_channels, bool reverse);

template <typename Traits>
int launch_forward(const wmk_selective_scan& p, const ScanPlan& plan) {
  constexpr int kThreads = Traits::kThreads;
  const int64_t blocks = plan.segment_count * plan.tiles;
  if (plan.split) {
    const int64_t shared = sizeof(ForwardShared<Traits, true>) + StageBuffers<Traits>::bytes(p.dtype, 2);
    int status = WMK_LAUNCH((selective_scan_forward_kernel<Traits, true>), blocks, kThreads, shared, p.stream, p, plan);
    if (status != WMK_OK) return status;
    status = launch_combine<typename Traits::T>(p, plan, Traits::kChannels, false);
    if (status != WMK_OK) return status;
  }
  const int64_t shared = sizeof(ForwardShared<Traits, false>) + StageBuffers<Traits>::bytes(p.dtype, 3);
  return WMK_LAUNCH((selective_scan_forward_kernel<Traits, false>), blocks, kThreads, shared, p.stream, p, plan);
}

template <typename Traits>
int launch_backward(const wmk_selective_scan& p, const ScanPlan& plan) {
  constexpr int kThreads = Traits::kThreads;
  using Stages = StageBuffers<Traits>;
  static_assert(sizeof(BackwardShared<Traits>) +
                        sizeof(typename Traits::T) * (2 * Stages::kStateElements + 4 * Stages::kChannelElements) <=
                    kSharedMemory,
                "a block fits on the smallest multiprocessor");
  const int64_t blocks = plan.segment_count * plan.tiles;
  const int64_t stage_bytes = StageBuffers<Traits>::bytes(p.dtype, 4);
  if (plan.split) {
    int status = WMK_LAUNCH((selective_scan_backward_local_kernel<Traits>), blocks, kThreads,
                            static_cast<int64_t>(sizeof(BackwardLocalShared<Traits>)) + stage_bytes, p.stream, p, plan);
    if (status != WMK_OK) return status;
    status = launch_combine<typename Traits::T>(p, plan, Traits::kChannels, true);
    if (status != WMK_OK) return status;
  }
  return WMK_LAUNCH((selective_scan_backward_kernel<Traits>), blocks, kThreads,
                    static_cast<int64_t>(sizeof(BackwardShared<Traits>)) + stage_bytes, p.stream, p, plan);
}

}  // namespace wmk

// keyword `extern template` only declares.
#define WMK_SCAN_INSTANCE(keyword, direction, traits) \
  keyword int wmk::launch_##direction<wmk::traits>(const wmk_selective_scan&, const wmk::ScanPlan&)
