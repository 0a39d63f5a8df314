// The part of DLPack's C exchange interface (torch.Tensor.__dlpack_c_exchange_api__) that reads a tensor in one call: a
// few nanoseconds, where a Python attribute takes a hundred. Layouts: https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <stdint.h>

namespace wmk::dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4, kBool = 6;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  void* previous;
  void* functions_of_managed_tensors[3];
  int (*read)(void* object, Tensor* tensor);  // 0, or -1 with a Python exception; may be null
  void* current_stream;
};

}  // namespace wmk::dlpack
