// Instruction-set levels.
//
// The build compiles an op's files, except api.cpp, once per level with -DWMK_ISA=<level>, in namespace wmk::<level>;
// isa.cpp picks one at run time.
#pragma once

#include "cpu/layers/layers.h"
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
  int (*run_layers)(const LayerChain&);
};

const Level& level();

}  // namespace wmk
