// Checks arguments, then calls the current level.
#include "common/checks.h"
#include "cpu/dispatch/isa.h"

namespace {

bool is_empty(const wmk_gated_delta_rule& op) { return op.sequences == 0 || op.heads == 0 || op.d_v == 0; }

int check(const wmk_gated_delta_rule& op) {
  if (!wmk::is_dtype(op.dtype) || op.d_k < 1 || op.chunk < 1 || op.threads < 1) return WMK_UNSUPPORTED;
  if (is_empty(op)) return WMK_OK;
  if (op.batch * op.time > 0 && wmk::any_missing({&op.q, &op.k, &op.gate, &op.beta})) return WMK_NULL_POINTER;
  return wmk::check_sequences(op);
}

}  // namespace

int64_t wmk_cpu_gated_delta_rule_forward_workspace(const wmk_gated_delta_rule* op) {
  return check(*op) == WMK_OK ? wmk::level().gated_delta_rule_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_gated_delta_rule_backward_workspace(const wmk_gated_delta_rule* op) {
  return check(*op) == WMK_OK ? wmk::level().gated_delta_rule_backward_workspace(*op) : 0;
}

int wmk_cpu_gated_delta_rule_forward(const wmk_gated_delta_rule* op) {
  if (int status = check(*op)) return status;
  if (is_empty(*op)) return WMK_OK;
  if (!op->workspace || !op->last_state.data) return WMK_NULL_POINTER;
  if (op->time > 0 && wmk::any_missing({&op->v, &op->out})) return WMK_NULL_POINTER;
  return wmk::level().gated_delta_rule_forward(*op);
}

int wmk_cpu_gated_delta_rule_backward(const wmk_gated_delta_rule* op) {
  if (int status = check(*op)) return status;
  if (is_empty(*op)) return WMK_OK;
  if (!op->workspace) return WMK_NULL_POINTER;
  if (op->time > 0 && wmk::any_missing({&op->grad_out, &op->residuals, &op->chunk_states, &op->grad_q, &op->grad_k,
                                        &op->grad_v, &op->grad_gate, &op->grad_beta}))
    return WMK_NULL_POINTER;
  return wmk::level().gated_delta_rule_backward(*op);
}
