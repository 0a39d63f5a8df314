#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

int check(const wmk_linear_scan& scan) {
  return wmk::is_dtype(scan.dtype) && scan.threads >= 1 ? WMK_OK : WMK_UNSUPPORTED;
}

bool is_empty(const wmk_linear_scan& scan) { return scan.batch == 0 || scan.channels == 0; }

}  // namespace

int64_t wmk_cpu_linear_scan_forward_workspace(const wmk_linear_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().linear_scan_forward_workspace(*scan) : 0;
}

int64_t wmk_cpu_linear_scan_backward_workspace(const wmk_linear_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().linear_scan_backward_workspace(*scan) : 0;
}

int wmk_cpu_linear_scan_forward(const wmk_linear_scan* scan) {
  if (int status = check(*scan)) return status;
  if (is_empty(*scan)) return WMK_OK;
  if (scan->time > 0 && wmk::any_missing({&scan->gates, &scan->tokens, &scan->out})) return WMK_NULL_POINTER;
  if (!scan->last_state.data) return WMK_NULL_POINTER;
  return wmk::level().linear_scan_forward(*scan);
}

int wmk_cpu_linear_scan_backward(const wmk_linear_scan* scan) {
  if (int status = check(*scan)) return status;
  if (is_empty(*scan)) return WMK_OK;
  if (scan->time > 0 && wmk::any_missing({&scan->gates, &scan->out, &scan->grad_out})) return WMK_NULL_POINTER;
  return wmk::level().linear_scan_backward(*scan);
}
