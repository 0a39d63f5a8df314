// The C API of the CPU kernels: refuses what would crash, then calls the level in use.

#include "cpu/dispatch/isa.h"

namespace {

bool is_dtype(int64_t dtype) { return dtype >= WMK_FLOAT32 && dtype <= WMK_FLOAT16; }

bool any_missing(const wmk_view* const* views, int count) {
  for (int i = 0; i < count; ++i)
    if (!views[i]->data) return true;
  return false;
}

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
  if (!is_dtype(scan.dtype) || scan.state < 1 || scan.chunk < 1 || scan.threads < 1 || scan.groups < 1 ||
      scan.channels % scan.groups != 0)
    return WMK_UNSUPPORTED;
  if (is_empty(scan)) return WMK_OK;
  if (!scan.A.data) return WMK_NULL_POINTER;
  const wmk_view* along_time[] = {&scan.u, &scan.delta, &scan.B, &scan.C};
  if (scan.batch * scan.time > 0 && any_missing(along_time, 4)) return WMK_NULL_POINTER;
  return check_sequences(scan);
}

int check(const wmk_linear_scan& scan) {
  if (!is_dtype(scan.dtype) || scan.threads < 1) return WMK_UNSUPPORTED;
  return WMK_OK;
}

bool is_empty(const wmk_linear_scan& scan) { return scan.batch == 0 || scan.channels == 0; }

int check(const wmk_conv_lstm& op) {
  const int64_t at_least_one[] = {
      op.time,          op.batch,        op.input,     op.hidden,          op.x_height,      op.x_width,
      op.height,        op.width,        op.ih_height, op.ih_width,        op.hh_height,     op.hh_width,
      op.stride_height, op.stride_width, op.threads,   op.dilation_height, op.dilation_width};
  for (int64_t size : at_least_one)
    if (size < 1) return WMK_UNSUPPORTED;
  if (!is_dtype(op.dtype) || op.hh_height % 2 == 0 || op.hh_width % 2 == 0 || op.pad_top < 0 || op.pad_left < 0)
    return WMK_UNSUPPORTED;
  const wmk_view* required[] = {&op.x, &op.weight_ih, &op.weight_hh};
  return any_missing(required, 3) ? WMK_NULL_POINTER : WMK_OK;
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

int wmk_cpu_selective_step(const wmk_selective_step* step) {
  if (!is_dtype(step->dtype) || !is_dtype(step->state_dtype) || step->threads < 1 || step->state < 1 ||
      step->groups < 1 || step->channels % step->groups != 0)
    return WMK_UNSUPPORTED;
  if (step->batch == 0 || step->channels == 0) return WMK_OK;
  const wmk_view* required[] = {&step->state_in, &step->state_out, &step->u, &step->delta,
                                &step->A,        &step->B,         &step->C, &step->out};
  if (any_missing(required, 8)) return WMK_NULL_POINTER;
  if (step->indices.data) {
    for (int64_t i = 0; i < step->batch; ++i)
      if (((const int64_t*)step->indices.data)[i * step->indices.stride[0]] >= step->states) return WMK_BAD_INDEX;
  } else if (step->states != step->batch) {
    return WMK_BAD_INDEX;
  }
  return wmk::level().selective_step(*step);
}

int64_t wmk_cpu_linear_scan_forward_workspace(const wmk_linear_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().linear_scan_forward_workspace(*scan) : 0;
}

int64_t wmk_cpu_linear_scan_backward_workspace(const wmk_linear_scan* scan) {
  return check(*scan) == WMK_OK ? wmk::level().linear_scan_backward_workspace(*scan) : 0;
}

int wmk_cpu_linear_scan_forward(const wmk_linear_scan* scan) {
  if (int status = check(*scan)) return status;
  if (is_empty(*scan)) return WMK_OK;
  const wmk_view* along_time[] = {&scan->gates, &scan->tokens, &scan->out};
  if ((scan->time > 0 && any_missing(along_time, 3)) || !scan->last_state.data) return WMK_NULL_POINTER;
  return wmk::level().linear_scan_forward(*scan);
}

int wmk_cpu_linear_scan_backward(const wmk_linear_scan* scan) {
  if (int status = check(*scan)) return status;
  if (is_empty(*scan)) return WMK_OK;
  const wmk_view* along_time[] = {&scan->gates, &scan->out, &scan->grad_out};
  if (scan->time > 0 && any_missing(along_time, 3)) return WMK_NULL_POINTER;
  return wmk::level().linear_scan_backward(*scan);
}

int64_t wmk_cpu_conv_lstm_forward_workspace(const wmk_conv_lstm* op) {
  return check(*op) == WMK_OK ? wmk::level().conv_lstm_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_conv_lstm_backward_workspace(const wmk_conv_lstm* op) {
  return check(*op) == WMK_OK ? wmk::level().conv_lstm_backward_workspace(*op) : 0;
}

int wmk_cpu_conv_lstm_forward(const wmk_conv_lstm* op) {
  if (int status = check(*op)) return status;
  const wmk_view* required[] = {&op->out, &op->cn};
  if (!op->workspace || any_missing(required, 2)) return WMK_NULL_POINTER;
  return wmk::level().conv_lstm_forward(*op);
}

int wmk_cpu_conv_lstm_backward(const wmk_conv_lstm* op) {
  if (int status = check(*op)) return status;
  const wmk_view* required[] = {&op->out, &op->cells, &op->grad_x, &op->grad_weight_ih, &op->grad_weight_hh};
  if (!op->workspace || any_missing(required, 5)) return WMK_NULL_POINTER;
  return wmk::level().conv_lstm_backward(*op);
}
