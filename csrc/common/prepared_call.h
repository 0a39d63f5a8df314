#pragma once

#include <memory>

#include "common/arg_layout.h"

namespace wmk {

struct Kernel {
  const char* name;  // with its device: cpu_selective_step
  const Layout* layout;
  int64_t (*workspace)(const void* arguments);  // null: needs none
  int (*run)(const void* arguments);            // null: not in this build
};

template <class Arguments, int (*run)(const Arguments*), int64_t (*workspace)(const Arguments*)>
constexpr Kernel make_kernel(const char* name) {
  Kernel kernel = {name, &LayoutOf<Arguments>::layout, nullptr, nullptr};
  if constexpr (workspace != nullptr) {
    kernel.workspace = [](const void* words) { return workspace(static_cast<const Arguments*>(words)); };
  }
  if constexpr (run != nullptr) {
    kernel.run = [](const void* words) { return run(static_cast<const Arguments*>(words)); };
  }
  return kernel;
}

constexpr Kernel kKernels[] = {
#define WMK_CPU_KERNEL(arguments, name) make_kernel<wmk_##arguments, wmk_cpu_##name, nullptr>("cpu_" #name),
#define WMK_CPU_KERNEL_WITH_WORKSPACE(arguments, name) \
  make_kernel<wmk_##arguments, wmk_cpu_##name, wmk_cpu_##name##_workspace>("cpu_" #name),
#ifdef WMK_WITH_CUDA
#define WMK_CUDA_KERNEL(arguments, name) make_kernel<wmk_##arguments, wmk_cuda_##name, nullptr>("cuda_" #name),
#define WMK_CUDA_KERNEL_WITH_WORKSPACE(arguments, name) \
  make_kernel<wmk_##arguments, wmk_cuda_##name, wmk_cuda_##name##_workspace>("cuda_" #name),
#else
#define WMK_CUDA_KERNEL(arguments, name) make_kernel<wmk_##arguments, nullptr, nullptr>("cuda_" #name),
#define WMK_CUDA_KERNEL_WITH_WORKSPACE(arguments, name) WMK_CUDA_KERNEL(arguments, name)
#endif
#include "common/ops.h"
};

// A kernel with its argument structure, zero at first (absent tensors); owns no tensor.
class PreparedCall {
 public:
  explicit PreparedCall(const Kernel& kernel) : kernel_(&kernel), words_(new int64_t[count()]()) {}

  const Kernel& kernel() const { return *kernel_; }
  const Layout& layout() const { return *kernel_->layout; }
  size_t count() const { return layout().size / kWord; }
  int64_t* words() const { return words_.get(); }

  int64_t workspace_bytes() const { return kernel_->workspace ? kernel_->workspace(words()) : 0; }

  // `workspace`: an address. Returns a wmk_status.
  int run(int64_t workspace) const {
    if (kernel_->run == nullptr) return WMK_UNSUPPORTED;
    if (layout().workspace != layout().size) words_[layout().workspace / kWord] = workspace;
    return kernel_->run(words());
  }

 private:
  const Kernel* kernel_;
  std::unique_ptr<int64_t[]> words_;
};

}  // namespace wmk
