// One step of an op, straight from its tensors: reading them through Python takes half of a small step's time.
//
// Tensors are opaque objects for `Exchange::read`, null if absent. For an unexpected number, type, shape or device, a
// fast path returns kNotApplicable, without effect; the ordinary path then runs and reports errors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "common/dlpack.h"
#include "include/wmkernels.h"

namespace wmk {

struct StepOptions {
  int64_t threads;
  bool delta_softplus;
};

// Runs a kernel with Python's GIL released.
using Unlocked = int (*)(int (*run)(const void* arguments), const void* arguments);

constexpr int kNotApplicable = -1;

using StepFastPath = int (*)(const dlpack::Exchange&, void* const* tensors, size_t count, const StepOptions&, Unlocked);

#define WMK_CPU_STEP_FAST_PATH(arguments, name) \
  int name##_fast_path(const dlpack::Exchange&, void* const* tensors, size_t count, const StepOptions&, Unlocked);
#include "common/ops.h"

struct NamedStepFastPath {
  const char *name, *op;
  StepFastPath run;
};

constexpr NamedStepFastPath kStepFastPaths[] = {
#define WMK_CPU_STEP_FAST_PATH(arguments, name) {"cpu_" #name "_fast_path", #arguments, name##_fast_path},
#include "common/ops.h"
};

namespace dlpack {

constexpr DataType kMask = {kBool, 8, 1};

// False if absent or outside the CPU's memory.
inline bool read_tensor(const Exchange& exchange, void* object, Tensor* tensor) {
  return object && exchange.read(object, tensor) == 0 && tensor->device_type == kCpu && tensor->dtype.lanes == 1;
}

inline bool matches(const Tensor& tensor, DataType dtype, std::initializer_list<int64_t> shape) {
  return tensor.dtype.code == dtype.code && tensor.dtype.bits == dtype.bits &&
         tensor.dimensions == int32_t(shape.size()) && std::equal(shape.begin(), shape.end(), tensor.shape);
}

// False if misaligned.
inline bool set_data(const Tensor& tensor, wmk_view* view) {
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return reinterpret_cast<uintptr_t>(view->data) % (tensor.dtype.bits / 8) == 0;
}

inline bool read_view(const Exchange& exchange, void* object, DataType dtype, std::initializer_list<int64_t> shape,
                      wmk_view* view) {
  Tensor tensor;
  if (!read_tensor(exchange, object, &tensor) || !matches(tensor, dtype, shape)) return false;
  std::copy(tensor.strides, tensor.strides + tensor.dimensions, view->stride);
  return set_data(tensor, view);
}

}  // namespace dlpack
}  // namespace wmk
