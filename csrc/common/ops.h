// The list of ops.
//
// Define macros before including this file: as declarations (wmkernels.h), function tables (cpu/dispatch), layouts or
// kernels by name (arg_layout.h, prepared_call.h). The others expand to nothing. No include guard: every use
// includes it again.
#ifndef WMK_STRUCT  // also WMK_INT, WMK_POINTER, WMK_VIEW, WMK_STRUCT_END
#define WMK_STRUCT(name)
#define WMK_INT(name)
#define WMK_POINTER(name)
#define WMK_VIEW(name)
#define WMK_STRUCT_END(name)
#endif
#ifndef WMK_CPU_KERNEL
#define WMK_CPU_KERNEL(arguments, name)
#define WMK_CPU_KERNEL_WITH_WORKSPACE(arguments, name)
#endif
#ifndef WMK_CPU_STEP_FAST_PATH
#define WMK_CPU_STEP_FAST_PATH(arguments, name)
#endif
#ifndef WMK_CUDA_KERNEL
#define WMK_CUDA_KERNEL(arguments, name)
#define WMK_CUDA_KERNEL_WITH_WORKSPACE(arguments, name)
#endif

#include "include/causal_conv1d.inc"
#include "include/conv_lstm.inc"
#include "include/gated_delta_rule.inc"
#include "include/linear_scan.inc"
#include "include/place_memory.inc"
#include "include/selective_scan.inc"
#include "include/selective_step.inc"
#include "include/ssd_scan.inc"

#undef WMK_STRUCT
#undef WMK_INT
#undef WMK_POINTER
#undef WMK_VIEW
#undef WMK_STRUCT_END
#undef WMK_CPU_KERNEL
#undef WMK_CPU_KERNEL_WITH_WORKSPACE
#undef WMK_CPU_STEP_FAST_PATH
#undef WMK_CUDA_KERNEL
#undef WMK_CUDA_KERNEL_WITH_WORKSPACE
