// Checks arguments, then calls the current level.
#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

bool is_empty(const wmk_place_memory& op) { return op.sequences == 0 || op.channels == 0; }

int check(const wmk_place_memory& op) {
  if (!wmk::is_dtype(op.dtype) || op.places < 1 || op.frequencies < 1 || op.threads < 1 ||
      !wmk::has_groups(op.channels, op.groups))
    return WMK_UNSUPPORTED;
  if (is_empty(op)) return WMK_OK;
  if (!op.keys.data) return WMK_NULL_POINTER;
  if (op.batch * op.time > 0 && wmk::any_missing({&op.values, &op.phase})) return WMK_NULL_POINTER;
  return wmk::check_sequences(op);
}

}  // namespace

int64_t wmk_cpu_place_memory_forward_workspace(const wmk_place_memory* op) {
  return check(*op) == WMK_OK ? wmk::level().place_memory_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_place_memory_backward_workspace(const wmk_place_memory* op) {
  return check(*op) == WMK_OK ? wmk::level().place_memory_backward_workspace(*op) : 0;
}

int wmk_cpu_place_memory_forward(const wmk_place_memory* op) {
  if (int status = check(*op)) return status;
  if (is_empty(*op)) return WMK_OK;
  if (!op->workspace || !op->last_state.data) return WMK_NULL_POINTER;
  if (op->time > 0 && !op->out.data) return WMK_NULL_POINTER;
  return wmk::level().place_memory_forward(*op);
}

int wmk_cpu_place_memory_backward(const wmk_place_memory* op) {
  if (int status = check(*op)) return status;
  if (!op->workspace || !op->keys.data) return WMK_NULL_POINTER;
  if (!is_empty(*op) && op->time > 0 && (!op->grad_values.data || (op->inverse.data && !op->residual.data)))
    return WMK_NULL_POINTER;
  return wmk::level().place_memory_backward(*op);
}
