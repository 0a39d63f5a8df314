// The C API, without torch.
//
// A kernel takes one plain structure of eight-byte members (a view: five times eight), described in <op>.inc:
//
//   WMK_INT(time)      int64_t time;
//   WMK_POINTER(p)     void* p;
//   WMK_VIEW(u)        wmk_view u;
//   WMK_CPU_KERNEL(selective_step, selective_step)            int wmk_cpu_selective_step(const wmk_selective_step*);
//   WMK_CPU_KERNEL_WITH_WORKSPACE(linear_scan, linear_scan_forward)
//                      int64_t wmk_cpu_linear_scan_forward_workspace(const wmk_linear_scan*);   in bytes
//                      int wmk_cpu_linear_scan_forward(const wmk_linear_scan*);
// WMK_CUDA_KERNEL...: the same with wmk_cuda_, absent in a build without CUDA. WMK_CPU_STEP_FAST_PATH is of the Python
// extension (common/step_fast_path.h).
//
// A kernel returns a wmk_status. For every op:
//   - A null pointer is an absent tensor; its strides are ignored.
//   - Strides count elements and may be zero or negative; offsets are 64-bit.
//   - The caller allocates the outputs. They are not expanded and do not alias inputs or each other unless stated.
//     All elements are written unless stated.
//   - `reset` holds bytes 0 or 1.
//   - "state dtype", of parameters and states, is float64 where `dtype` is float64, else float32.
//   - `workspace` has at least the size from _workspace, aligned to 64 bytes (CPU) or 256 (GPU).
//   - `threads` is at least 1; `stream` is a cudaStream_t of `device`. GPU kernels do not allocate or synchronise.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wmk_dtype { WMK_FLOAT32 = 0, WMK_FLOAT64 = 1, WMK_BFLOAT16 = 2, WMK_FLOAT16 = 3 };

enum wmk_status {
  WMK_OK = 0,
  WMK_NULL_POINTER = 1,   // of a required tensor with elements
  WMK_BAD_SEQUENCES = 2,  // cu_seqlens does not rise from 0 to time (CPU check)
  WMK_BAD_INDEX = 3,      // `indices` or `states` out of range (CPU check)
  WMK_UNSUPPORTED = 4,    // dtype or size not built
  WMK_NO_MEMORY = 5,
  WMK_CUDA_ERROR = 1000,  // plus the cudaError_t
};

// Up to four dimensions; unused strides are 0.
typedef struct wmk_view {
  void* data;
  int64_t stride[4];
} wmk_view;

#define WMK_STRUCT(name) typedef struct wmk_##name {
#define WMK_INT(name) int64_t name;
#define WMK_POINTER(name) void* name;
#define WMK_VIEW(name) wmk_view name;
#define WMK_STRUCT_END(name) \
  }                          \
  wmk_##name;
#include "common/ops.h"

#define WMK_CPU_KERNEL(arguments, name) int wmk_cpu_##name(const wmk_##arguments*);
#define WMK_CPU_KERNEL_WITH_WORKSPACE(arguments, name)        \
  int64_t wmk_cpu_##name##_workspace(const wmk_##arguments*); \
  int wmk_cpu_##name(const wmk_##arguments*);
#define WMK_CUDA_KERNEL(arguments, name) int wmk_cuda_##name(const wmk_##arguments*);
#define WMK_CUDA_KERNEL_WITH_WORKSPACE(arguments, name)        \
  int64_t wmk_cuda_##name##_workspace(const wmk_##arguments*); \
  int wmk_cuda_##name(const wmk_##arguments*);
#include "common/ops.h"

// Levels of this build and machine, best first, comma-separated; the current level; its override (returns 0 or
// WMK_UNSUPPORTED).
const char* wmk_cpu_isa_available(void);
const char* wmk_cpu_isa(void);
int wmk_cpu_set_isa(const char* name);

// Runs fp32 multiply-adds in registers; returns their number.
int64_t wmk_cpu_multiply_adds(int64_t iterations);

// "" if driver and GPU can run this build's kernels, else the reason. Absent in a build without CUDA.
const char* wmk_cuda_unavailable_reason(int64_t device);

#ifdef __cplusplus
}
#endif
