// The C API of wmkernels, without torch.
//
// Each kernel takes one plain structure, whose members are all of eight bytes (a view: five times eight). The
// structures and their kernels are described op by op in <op>.inc, in this folder:
//
//   WMK_INT(time)      int64_t time;
//   WMK_POINTER(p)     void* p;
//   WMK_VIEW(u)        wmk_view u;
//   WMK_CPU_KERNEL(selective_step, selective_step)            int wmk_cpu_selective_step(const wmk_selective_step*);
//   WMK_CPU_KERNEL_WITH_WORKSPACE(linear_scan, linear_scan_forward)
//                      int64_t wmk_cpu_linear_scan_forward_workspace(const wmk_linear_scan*);   in bytes
//                      int wmk_cpu_linear_scan_forward(const wmk_linear_scan*);
//   WMK_CUDA_KERNEL... the same with wmk_cuda_; a build without CUDA has none of them
//
// A kernel returns a wmk_status. For every op:
//   - A pointer is null where the tensor is absent; its strides are then ignored.
//   - Strides count elements, may be zero (an expanded tensor) or negative; all offsets are 64-bit.
//   - Outputs are allocated by the caller, are never expanded, and may not alias each other or an input, except where
//     a member says so. An output that is present is written whole, whatever it held before.
//   - "state dtype" is float64 where `dtype` is float64, else float32. Parameters and states are in the state dtype.
//   - `workspace` is scratch of at least the size that the kernel's _workspace function returns. It is aligned to 64
//     bytes on a CPU and to 256 on a GPU; its contents are undefined before and after.
//   - `threads` counts CPU threads, at least 1; `device` is a GPU's index, `stream` its cudaStream_t. On a GPU nothing
//     is allocated and nothing synchronises; everything is enqueued on `stream`.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wmk_dtype { WMK_FLOAT32 = 0, WMK_FLOAT64 = 1, WMK_BFLOAT16 = 2, WMK_FLOAT16 = 3 };

enum wmk_status {
  WMK_OK = 0,
  WMK_NULL_POINTER = 1,   // a required pointer is null although the tensor has elements
  WMK_BAD_SEQUENCES = 2,  // cu_seqlens does not rise from 0 to time (checked on the CPU only)
  WMK_BAD_INDEX = 3,      // state_batch_indices names a state that does not exist (checked on the CPU only)
  WMK_UNSUPPORTED = 4,    // a dtype or size that this kernel was not built for
  WMK_NO_MEMORY = 5,
  WMK_CUDA_ERROR = 1000,  // plus the cudaError_t
};

// A tensor of up to four dimensions; unused strides are 0.
typedef struct wmk_view {
  void* data;
  int64_t stride[4];
} wmk_view;

// The structures.
#define WMK_STRUCT(name) typedef struct wmk_##name {
#define WMK_INT(name) int64_t name;
#define WMK_POINTER(name) void* name;
#define WMK_VIEW(name) wmk_view name;
#define WMK_STRUCT_END(name) \
  }                          \
  wmk_##name;
#include "common/ops.h"

// The kernels.
#define WMK_CPU_KERNEL(arguments, name) int wmk_cpu_##name(const wmk_##arguments*);
#define WMK_CPU_KERNEL_WITH_WORKSPACE(arguments, name)        \
  int64_t wmk_cpu_##name##_workspace(const wmk_##arguments*); \
  int wmk_cpu_##name(const wmk_##arguments*);
#define WMK_CUDA_KERNEL(arguments, name) int wmk_cuda_##name(const wmk_##arguments*);
#define WMK_CUDA_KERNEL_WITH_WORKSPACE(arguments, name)        \
  int64_t wmk_cuda_##name##_workspace(const wmk_##arguments*); \
  int wmk_cuda_##name(const wmk_##arguments*);
#include "common/ops.h"

// The instruction-set levels that this build holds and this machine runs, best first, comma-separated; the one in use;
// and a way to force one (returns 0, or WMK_UNSUPPORTED).
const char* wmk_cpu_isa_available(void);
const char* wmk_cpu_isa(void);
int wmk_cpu_set_isa(const char* name);

// Performs fp32 multiply-adds on registers, on the calling thread, and returns their number: for measuring the machine.
int64_t wmk_cpu_multiply_adds(int64_t iterations);

// "" when the driver and the GPU can run this build's kernels, else the reason why not. Never throws.
const char* wmk_cuda_unavailable_reason(int64_t device);

#ifdef __cplusplus
}
#endif
