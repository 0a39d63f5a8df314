// The instruction-set levels of the CPU kernels and the functions each of them offers.
//
// The build compiles every file of kernels/ once a level, with -DWMK_ISA=<level> and that level's flags; each copy
// lives in its own namespace wmk::<level>. isa.cpp picks one of them at run time.
#pragma once

#include "include/wmkernels.h"

// Declares the entry points of one level. The scratch a kernel asks for depends on the level's vector width.
#define WMK_DECLARE_LEVEL(level)                                             \
  namespace wmk::level {                                                     \
  int64_t selective_scan_forward_workspace(const wmk_selective_scan& scan);  \
  int64_t selective_scan_backward_workspace(const wmk_selective_scan& scan); \
  int selective_scan_forward(const wmk_selective_scan& scan);                \
  int selective_scan_backward(const wmk_selective_scan& scan);               \
  int selective_step(const wmk_selective_step& step);                        \
  int64_t linear_scan_forward_workspace(const wmk_linear_scan& scan);        \
  int64_t linear_scan_backward_workspace(const wmk_linear_scan& scan);       \
  int linear_scan_forward(const wmk_linear_scan& scan);                      \
  int linear_scan_backward(const wmk_linear_scan& scan);                     \
  int64_t conv_lstm_forward_workspace(const wmk_conv_lstm& op);              \
  int64_t conv_lstm_backward_workspace(const wmk_conv_lstm& op);             \
  int conv_lstm_forward(const wmk_conv_lstm& op);                            \
  int conv_lstm_backward(const wmk_conv_lstm& op);                           \
  int64_t multiply_adds(int64_t rounds);                                     \
  }

#ifdef WMK_ISA
WMK_DECLARE_LEVEL(WMK_ISA)
#endif

namespace wmk {

struct Level {
  const char* name;
  bool (*runs_here)();
  int64_t (*selective_scan_forward_workspace)(const wmk_selective_scan&);
  int64_t (*selective_scan_backward_workspace)(const wmk_selective_scan&);
  int (*selective_scan_forward)(const wmk_selective_scan&);
  int (*selective_scan_backward)(const wmk_selective_scan&);
  int (*selective_step)(const wmk_selective_step&);
  int64_t (*linear_scan_forward_workspace)(const wmk_linear_scan&);
  int64_t (*linear_scan_backward_workspace)(const wmk_linear_scan&);
  int (*linear_scan_forward)(const wmk_linear_scan&);
  int (*linear_scan_backward)(const wmk_linear_scan&);
  int64_t (*conv_lstm_forward_workspace)(const wmk_conv_lstm&);
  int64_t (*conv_lstm_backward_workspace)(const wmk_conv_lstm&);
  int (*conv_lstm_forward)(const wmk_conv_lstm&);
  int (*conv_lstm_backward)(const wmk_conv_lstm&);
  int64_t (*multiply_adds)(int64_t);
};

// The level in use.
const Level& level();

}  // namespace wmk
