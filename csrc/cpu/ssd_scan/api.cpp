// Checks arguments, then calls the current level.
#include <string.h>

#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

bool is_empty(const wmk_ssd_scan& op) { return op.sequences == 0 || op.d == 0; }

int check(const wmk_ssd_scan& op) {
  if (!wmk::is_dtype(op.dtype) || op.n < 1 || op.chunk < 1 || op.threads < 1 || op.kept_interval < op.chunk ||
      op.kept_interval % op.chunk || op.heads < 1 || !wmk::has_groups(op.heads, op.groups))
    return WMK_UNSUPPORTED;
  if (is_empty(op)) return WMK_OK;
  if (op.batch * op.time > 0 && wmk::any_missing({&op.x, &op.gate, &op.weight, &op.B, &op.C})) return WMK_NULL_POINTER;
  return wmk::check_sequences(op);
}

}  // namespace

int64_t wmk_cpu_ssd_scan_forward_workspace(const wmk_ssd_scan* op) {
  return check(*op) == WMK_OK ? wmk::level().ssd_scan_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_ssd_scan_backward_workspace(const wmk_ssd_scan* op) {
  return check(*op) == WMK_OK ? wmk::level().ssd_scan_backward_workspace(*op) : 0;
}

int wmk_cpu_ssd_scan_forward(const wmk_ssd_scan* op) {
  if (int status = check(*op)) return status;
  if (is_empty(*op)) return WMK_OK;
  if (!op->workspace || !op->last_state.data || (op->time > 0 && !op->out.data)) return WMK_NULL_POINTER;
  return wmk::level().ssd_scan_forward(*op);
}

int wmk_cpu_ssd_scan_backward(const wmk_ssd_scan* op) {
  if (int status = check(*op)) return status;
  if (is_empty(*op)) {
    if (op->grad_D.data) memset((void*)op->grad_D.data, 0, op->heads * op->d * (op->dtype == WMK_FLOAT64 ? 8 : 4));
    return WMK_OK;
  }
  if (!op->workspace) return WMK_NULL_POINTER;
  if (op->time > 0 && wmk::any_missing({&op->grad_out, &op->chunk_states, &op->grad_x, &op->grad_gate, &op->grad_weight,
                                        &op->grad_B, &op->grad_C}))
    return WMK_NULL_POINTER;
  if ((op->own_weight.data && !op->grad_own_weight.data) || (op->D.data && !op->grad_D.data) ||
      (op->z.data && !op->grad_z.data))
    return WMK_NULL_POINTER;
  return wmk::level().ssd_scan_backward(*op);
}
