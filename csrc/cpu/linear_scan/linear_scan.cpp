// Linear scan, forward and backward, on the CPU.
//
// Bound by memory, which is touched once (forward 2 reads and 1 write, backward 3 and 2). Channel-last, a time step is
// a row of vectors, with up to 4 KB of states in L1. Otherwise, a lane holds a channel; lanes x lanes blocks are
// transposed in registers and prefetched, since one stream per lane is too many for the hardware. With too few rows,
// time is cut into segments: a first pass computes each one's affine map, a second the outputs.
#include "cpu/linear_scan/linear_scan_channels_last.h"
#include "cpu/linear_scan/linear_scan_strided.h"

namespace wmk::WMK_ISA {

namespace {

int run(const wmk_linear_scan& op, bool backward) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    typedef decltype(arithmetic) T;
    typedef decltype(storage) S;
    if (ChannelsLastScan<T, S>::applies(op, backward)) {
      ChannelsLastScan<T, S>(op, backward).run();
    } else {
      StridedScan<T, S>(op, backward).run();
    }
    return int(WMK_OK);
  });
}

int64_t workspace(const wmk_linear_scan& op, bool backward) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    return StridedScan<decltype(arithmetic), decltype(storage)>(op, backward).workspace();
  });
}

}  // namespace

int64_t linear_scan_forward_workspace(const wmk_linear_scan& op) { return workspace(op, false); }
int64_t linear_scan_backward_workspace(const wmk_linear_scan& op) { return workspace(op, true); }
int linear_scan_forward(const wmk_linear_scan& op) { return run(op, false); }
int linear_scan_backward(const wmk_linear_scan& op) { return run(op, true); }

}  // namespace wmk::WMK_ISA
