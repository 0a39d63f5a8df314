// The instruction-set levels of the CPU kernels and the functions each of them has.
//
// The build compiles every file of an op's folder once per level, with -DWMK_ISA=<level> and that level's flags, except
// api.cpp. Each copy lives in its own namespace wmk::<level>. isa.cpp picks one of them at run time.
#pragma once

#include "include/wmkernels.h"

#ifdef WMK_ISA
namespace wmk::WMK_ISA {
#include "cpu/dispatch/level_functions.inc"
}
#endif

namespace wmk {

struct Level {
  const char* name;
  bool (*runs_here)();
  int64_t (*multiply_adds)(int64_t);
#define WMK_CPU_KERNEL(arguments, name) int (*name)(const wmk_##arguments&);
#define WMK_CPU_KERNEL_WITH_WORKSPACE(arguments, name) \
  int64_t (*name##_workspace)(const wmk_##arguments&); \
  int (*name)(const wmk_##arguments&);
#include "common/ops.h"
};

// The level in use.
const Level& level();

}  // namespace wmk
