// Checks arguments, then calls the current level.
#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

bool is_empty(const wmk_selective_scan& scan) { return scan.sequences == 0 || scan.channels == 0; }

int check(const wmk_selective_scan& scan) {
  if (!wmk::is_dtype(scan.dtype) || scan.state < 1 || scan.chunk < 1 || scan.threads < 1 ||
      !wmk::has_groups(scan.channels, scan.groups))
    return WMK_UNSUPPORTED;
  if (is_empty(scan)) return WMK_OK;
  if (!scan.A.data) return WMK_NULL_POINTER;
  if (scan.batch * scan.time > 0 && wmk::any_missing({&scan.u, &scan.delta, &scan.B, &scan.C})) return WMK_NULL_POINTER;
  return wmk::check_sequences(scan);
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
