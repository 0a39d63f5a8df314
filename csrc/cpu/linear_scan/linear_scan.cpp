// Linear scan, forward and backward, on the CPU.
//
// A multiply-add an element: the kernel is bound by memory, which it touches once, forward 2 reads and 1 write,
// backward 3 and 2. Where the channels are contiguous (channel-last) a time step is a row of vectors, and the states of
// up to 4 KB of a row stay in the first-level cache while time goes by. Otherwise one vector holds a channel a lane, of
// any batch element; squares of lanes x lanes elements are flipped round in registers, and the lines of later squares
// are asked for in time, since as many streams as there are lanes are more than the hardware foresees. Large outputs
// are written past the cache, which saves reading the lines that are about to be overwritten. With fewer rows than keep
// the threads busy, time is cut into segments: their ends are found from a zero state first, chained, and the real pass
// starts each segment from the right state.
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
