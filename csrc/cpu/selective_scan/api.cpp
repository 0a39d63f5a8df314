// Checks arguments, then calls the current level.
#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

int check_sequences(const wmk_selective_scan& scan) {
  const int64_t* bounds = (const int64_t*)scan.cu_seqlens.data;
  if (!bounds) return scan.sequences == scan.batch ? WMK_OK : WMK_UNSUPPORTED;
  if (scan.batch != 1) return WMK_UNSUPPORTED;
  if (bounds[0] != 0 || bounds[scan.sequences] != scan.time) return WMK_BAD_SEQUENCES;
  for (int64_t i = 0; i < scan.sequences; ++i)
    if (bounds[i + 1] < bounds[i]) return WMK_BAD_SEQUENCES;
  return WMK_OK;
}

bool is_empty(const wmk_selective_scan& scan) { return scan.sequences == 0 || scan.channels == 0; }

int check(const wmk_selective_scan& scan) {
  if (!wmk::is_dtype(scan.dtype) || scan.state < 1 || scan.chunk < 1 || scan.threads < 1 ||
      !wmk::has_groups(scan.channels, scan.groups))
    return WMK_UNSUPPORTED;
  if (is_empty(scan)) return WMK_OK;
  if (!scan.A.data) return WMK_NULL_POINTER;
  if (scan.batch * scan.time > 0 && wmk::any_missing({&scan.u, &scan.delta, &scan.B, &scan.C})) return WMK_NULL_POINTER;
  return check_sequences(scan);
}

}  // namespace

int64_t wmk_cpu_selective_scan_forward_workspace(const wmk_selective_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().selective_scan_forward_workspace(*scan) : 0;
}

int64_t wmk_cpu_selective_scan_backward_workspace(const wmk_selective_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().selective_scan_backward_workspace(*scan) : 0;
}

int wmk_cpu_selective_scan_forward(const wmk_selective_scan* scan) {
  if (int status = check(*scan)) return status;
  if (is_empty(*scan)) return WMK_OK;
  if (!scan->workspace || !scan->last_state.data) return WMK_NULL_POINTER;
  if (scan->time > 0 && !scan->out.data) return WMK_NULL_POINTER;
  return wmk::level().selective_scan_forward(*scan);
}

int wmk_cpu_selective_scan_backward(const wmk_selective_scan* scan) {
  if (int status = check(*scan)) return status;
  if (scan->channels == 0) return WMK_OK;
  if (!scan->workspace) return WMK_NULL_POINTER;
  if (!is_empty(*scan) && scan->time > 0 && (!scan->grad_out.data || !scan->chunk_states.data)) return WMK_NULL_POINTER;
  return wmk::level().selective_scan_backward(*scan);
}
