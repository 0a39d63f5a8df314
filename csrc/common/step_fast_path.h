// One step of an op, straight from its tensors: reading them through Python takes half of a small step's time.
//
// Tensors are opaque objects for `Exchange::read`, null if absent. For an unexpected number, type, shape or device, a
// fast path returns kNotApplicable, without effect; the ordinary path then runs and reports errors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "common/dlpack.h"
#include "include/wmkernels.h"

namespace wmk {

struct StepOptions {
  int64_t threads;
  int64_t flags;  // the op's options, a bit each
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

// The lowest address of this process's memory: freed storage has the address 0, and a view of it its offset.
inline uintptr_t lowest_address() {
  static const uintptr_t lowest = [] {
    unsigned long long address = 1 << 16;  // no system maps less
    if (std::FILE* maps = std::fopen("/proc/self/maps", "r")) {
      if (std::fscanf(maps, "%llx", &address) != 1) address = 1 << 16;
      std::fclose(maps);
    }
    return static_cast<uintptr_t>(address);
  }();
  return lowest;
}

// False if freed or misaligned.
inline bool set_data(const Tensor& tensor, wmk_view* view) {
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  const auto address = reinterpret_cast<uintptr_t>(view->data);
  return address >= lowest_address() && address % (tensor.dtype.bits / 8) == 0;
}

inline bool read_view(const Exchange& exchange, void* object, DataType dtype, std::initializer_list<int64_t> shape,
                      wmk_view* view) {
  Tensor tensor;
  if (!read_tensor(exchange, object, &tensor) || !matches(tensor, dtype, shape)) return false;
  std::copy(tensor.strides, tensor.strides + tensor.dimensions, view->stride);
  return set_data(tensor, view);
}

struct ByteRange {
  const char *begin, *end;
};

// Memory between a view's first and last element; strides of PyTorch's tensors are not negative.
inline ByteRange byte_range(const wmk_view& view, std::initializer_list<int64_t> shape, int64_t item_size) {
  int64_t last = 0, dimension = 0;
  for (const int64_t size : shape) last += (size - 1) * view.stride[dimension++];
  const char* begin = static_cast<const char*>(view.data);
  return {begin, begin + (last + 1) * item_size};
}

inline bool intersects(const ByteRange& a, const ByteRange& b) { return a.begin < b.end && b.begin < a.end; }

// Whether elements may share memory; as wmkernels.checks.overlaps_itself.
inline bool overlaps_itself(const wmk_view& view, std::initializer_list<int64_t> shape) {
  struct Dimension {
    int64_t stride, size;
  } dimensions[4];
  int count = 0, index = 0;
  for (const int64_t size : shape) {
    if (size > 1) dimensions[count++] = {view.stride[index], size};
    ++index;
  }
  int64_t reach = 0;
  for (int done = 0; done < count; ++done) {
    int smallest = done;
    for (int i = done; i < count; ++i)
      if (dimensions[i].stride < dimensions[smallest].stride) smallest = i;
    const Dimension next = dimensions[smallest];
    dimensions[smallest] = dimensions[done];
    if (next.stride <= reach) return true;
    reach += (next.size - 1) * next.stride;
  }
  return false;
}

}  // namespace dlpack
}  // namespace wmk
