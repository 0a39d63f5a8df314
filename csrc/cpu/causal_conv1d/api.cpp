// Checks arguments, then calls the current level.
#include "common/checks.h"
#include "common/step_fast_path.h"
#include "cpu/dispatch/isa.h"

namespace {

int check(const wmk_causal_conv1d& op) {
  if (!wmk::is_dtype(op.dtype) || op.width < 1 || op.threads < 1) return WMK_UNSUPPORTED;
  if (!op.weight.data && op.channels > 0) return WMK_NULL_POINTER;
  return wmk::check_sequences(op);
}

bool has_states(const wmk_causal_conv1d& op) { return op.sequences * op.channels > 0 && op.width > 1; }

}  // namespace

int64_t wmk_cpu_causal_conv1d_forward_workspace(const wmk_causal_conv1d* op) {
  return check(*op) == WMK_OK ? wmk::level().causal_conv1d_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_causal_conv1d_backward_workspace(const wmk_causal_conv1d* op) {
  return check(*op) == WMK_OK ? wmk::level().causal_conv1d_backward_workspace(*op) : 0;
}

int wmk_cpu_causal_conv1d_forward(const wmk_causal_conv1d* op) {
  if (int status = check(*op)) return status;
  if (op->batch == 0 || op->channels == 0) return WMK_OK;
  if (!op->workspace || (has_states(*op) && !op->last_state.data)) return WMK_NULL_POINTER;
  if (op->time > 0 && wmk::any_missing({&op->x, &op->out})) return WMK_NULL_POINTER;
  return wmk::level().causal_conv1d_forward(*op);
}

int wmk_cpu_causal_conv1d_backward(const wmk_causal_conv1d* op) {
  if (int status = check(*op)) return status;
  if (op->channels == 0) return WMK_OK;
  if (!op->workspace || !op->grad_weight.data) return WMK_NULL_POINTER;
  if (op->batch * op->time > 0 && wmk::any_missing({&op->x, &op->grad_out, &op->grad_x})) return WMK_NULL_POINTER;
  return wmk::level().causal_conv1d_backward(*op);
}

int wmk_cpu_causal_conv1d_step(const wmk_causal_conv1d* op) {
  if (int status = check(*op)) return status;
  if (op->time != 1 || op->cu_seqlens.data) return WMK_UNSUPPORTED;
  if (op->batch == 0 || op->channels == 0) return WMK_OK;
  if (wmk::any_missing({&op->x, &op->out}) || (has_states(*op) && !op->last_state.data)) return WMK_NULL_POINTER;
  return wmk::level().causal_conv1d_step(*op);
}

namespace wmk {
namespace {

using namespace dlpack;

constexpr int64_t kSilu = 1, kChannelLast = 2;

// `tensors`: state_in, state_out, out, x, weight; optional bias, reset. All float32 or all float64.
bool read_causal_conv1d_step(const Exchange& exchange, void* const* tensors, const StepOptions& options,
                             wmk_causal_conv1d* step) {
  Tensor x, weight;
  if (!read_tensor(exchange, tensors[3], &x) || !read_tensor(exchange, tensors[4], &weight)) return false;
  const DataType dtype = x.dtype;
  if (x.dimensions != 2 || weight.dimensions != 2 || dtype.code != kFloat || (dtype.bits != 32 && dtype.bits != 64))
    return false;
  const int64_t batch = x.shape[0], channels = x.shape[1], width = weight.shape[1], past = width - 1;
  if (batch * channels == 0 || past < 1) return false;
  step->batch = step->sequences = batch, step->channels = channels, step->width = width, step->time = 1;
  step->dtype = dtype.bits == 32 ? WMK_FLOAT32 : WMK_FLOAT64;
  step->silu = options.flags & kSilu ? 1 : 0, step->threads = options.threads;
  const bool channel_last = options.flags & kChannelLast;
  const auto window = [&](int index, wmk_view* view) {
    if (!channel_last) return read_view(exchange, tensors[index], dtype, {batch, channels, past}, view);
    if (!read_view(exchange, tensors[index], dtype, {batch, past, channels}, view)) return false;
    std::swap(view->stride[1], view->stride[2]);
    return true;
  };
  return window(0, &step->initial_state) && window(1, &step->last_state) &&
         read_view(exchange, tensors[2], dtype, {batch, channels}, &step->out) &&
         read_view(exchange, tensors[3], dtype, {batch, channels}, &step->x) &&
         read_view(exchange, tensors[4], dtype, {channels, width}, &step->weight) &&
         (!tensors[5] || read_view(exchange, tensors[5], dtype, {channels}, &step->bias)) &&
         (!tensors[6] || read_view(exchange, tensors[6], kMask, {batch}, &step->reset));
}

}  // namespace

int causal_conv1d_step_fast_path(const dlpack::Exchange& exchange, void* const* tensors, size_t count,
                                 const StepOptions& options, Unlocked unlocked) {
  wmk_causal_conv1d step = {};
  if (count != 7 || !read_causal_conv1d_step(exchange, tensors, options, &step)) return kNotApplicable;
  const auto run = [](const void* arguments) {
    return wmk_cpu_causal_conv1d_step(static_cast<const wmk_causal_conv1d*>(arguments));
  };
  return unlocked(run, &step);
}

}  // namespace wmk
