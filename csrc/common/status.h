#pragma once

#include <string>

#include "include/wmkernels.h"
#ifdef WMK_WITH_CUDA
#include "cuda/common/device_check.h"
#endif

namespace wmk {

enum class Failure { value, memory, runtime };

struct Explanation {
  Failure kind;
  std::string text;
};

inline Explanation explain(const std::string& op, int status) {
  switch (status) {
    case WMK_NULL_POINTER:
      return {Failure::value, op + ": a tensor that the kernel needs has no memory"};
    case WMK_BAD_SEQUENCES:
      return {Failure::value, op + ": cu_seqlens must start at 0, never fall, and end at the number of time steps"};
    case WMK_BAD_INDEX:
      return {Failure::value, op + ": state_batch_indices names a row that the state does not have"};
    case WMK_UNSUPPORTED:
      return {Failure::value, op + ": the kernel was not built for this dtype or size"};
    case WMK_NO_MEMORY:
      return {Failure::memory, ""};
    default:
      break;
  }
#ifdef WMK_WITH_CUDA
  if (status >= WMK_CUDA_ERROR) return {Failure::runtime, op + ": " + wmk_cuda_error_name(status - WMK_CUDA_ERROR)};
#endif
  return {Failure::runtime, op + ": the kernel returned the unknown status " + std::to_string(status)};
}

}  // namespace wmk
