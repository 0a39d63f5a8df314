// One call of a kernel: its structure, filled once, from which the size of the workspace is asked and the kernel runs.
#pragma once

#include <cstring>
#include <memory>

#include "common/arg_layout.h"

namespace wmk {

// An entry point of the C API without the type of its structure.
struct Kernel {
  const char* name;  // with its device: cpu_selective_step
  const Layout* layout;
  int64_t (*workspace)(const void* arguments);  // null: needs none
  int (*run)(const void* arguments);            // null: this build does not have it
};

class PreparedCall {
 public:
  explicit PreparedCall(const Kernel& kernel) : kernel_(&kernel), words_(new int64_t[count()]()) {}

  const Kernel& kernel() const { return *kernel_; }
  size_t count() const { return kernel_->layout->size / kWord; }
  int64_t* words() const { return words_.get(); }

  int64_t workspace_bytes() const { return kernel_->workspace ? kernel_->workspace(words()) : 0; }

  // `workspace` is the address of that many bytes. Returns a wmk_status.
  int run(int64_t workspace) const {
    const Layout& layout = *kernel_->layout;
    if (layout.workspace != layout.size) words_[layout.workspace / kWord] = workspace;
    return kernel_->run(words());
  }

 private:
  const Kernel* kernel_;
  std::unique_ptr<int64_t[]> words_;
};

}  // namespace wmk
