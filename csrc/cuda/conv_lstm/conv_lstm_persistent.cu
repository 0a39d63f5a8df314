#include "common/checks.h"
#include "cuda/conv_lstm/conv_lstm_persistent_kernel.cuh"

namespace wmk {
namespace {

int check(const wmk_conv_lstm_persistent& p) {
  if ((p.dtype != WMK_BFLOAT16 && p.dtype != WMK_FLOAT16) || p.hidden < 1 || p.hidden % kPersistentChannels != 0) {
    return WMK_UNSUPPORTED;
  }
  if (p.tiles != 1 && p.tiles != 2) return WMK_UNSUPPORTED;
  if (p.hh_height % 2 == 0 || p.hh_width % 2 == 0) return WMK_UNSUPPORTED;
  if (any_missing({&p.gates_x, &p.weights, &p.barrier_counter, &p.out, &p.cn})) return WMK_NULL_POINTER;
  return is_aligned(p.h0, 4) && is_aligned(p.out, 4) && is_aligned(p.weights, 16) ? WMK_OK : WMK_UNSUPPORTED;
}

template <int DTYPE>
int launch_persistent(const wmk_conv_lstm_persistent& p) {
  const int64_t rows = p.batch * p.height * p.width, positions = 16 * p.tiles,
                channel_tiles = p.hidden / kPersistentChannels;
  const int64_t blocks = (rows + positions - 1) / positions * channel_tiles;
  const int64_t shared = p.hh_height * p.hh_width * channel_tiles * kPersistentTapBytes;
  if (blocks > multiprocessors(p.device) || blocks * p.time > 0x7fffffff) return WMK_UNSUPPORTED;
  if (p.tiles == 1) {
    return WMK_LAUNCH_COOPERATIVE((conv_lstm_persistent_kernel<DTYPE, 1>), blocks, kPersistentThreads, shared, p.stream,
                                  p);
  }
  return WMK_LAUNCH_COOPERATIVE((conv_lstm_persistent_kernel<DTYPE, 2>), blocks, kPersistentThreads, shared, p.stream,
                                p);
}

}  // namespace
}  // namespace wmk

extern "C" int wmk_cuda_conv_lstm_persistent(const wmk_conv_lstm_persistent* p) {
  if (p->time == 0 || p->batch == 0) return WMK_OK;
  const int status = wmk::check(*p);
  if (status != WMK_OK) return status;
  wmk::DeviceGuard guard(p->device);
  if (guard.status() != WMK_OK) return guard.status();
  return p->dtype == WMK_BFLOAT16 ? wmk::launch_persistent<WMK_BFLOAT16>(*p) : wmk::launch_persistent<WMK_FLOAT16>(*p);
}
