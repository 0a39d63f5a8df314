#include <new>

#include "common/checks.h"
#include "common/step_fast_path.h"
#include "cpu/dispatch/isa.h"

namespace {

int check(const wmk_conv_lstm& op) {
  const int64_t positive[] = {
      op.time,          op.batch,        op.input,     op.hidden,          op.x_height,      op.x_width,
      op.height,        op.width,        op.ih_height, op.ih_width,        op.hh_height,     op.hh_width,
      op.stride_height, op.stride_width, op.threads,   op.dilation_height, op.dilation_width};
  for (int64_t size : positive)
    if (size < 1) return WMK_UNSUPPORTED;
  if (!wmk::is_dtype(op.dtype) || op.hh_height % 2 == 0 || op.hh_width % 2 == 0 || op.pad_top < 0 || op.pad_left < 0)
    return WMK_UNSUPPORTED;
  return wmk::any_missing({&op.x, &op.weight_ih, &op.weight_hh}) ? WMK_NULL_POINTER : WMK_OK;
}

}  // namespace

int64_t wmk_cpu_conv_lstm_forward_workspace(const wmk_conv_lstm* op) {
  return check(*op) == WMK_OK ? wmk::level().conv_lstm_forward_workspace(*op) : 0;
}

int64_t wmk_cpu_conv_lstm_backward_workspace(const wmk_conv_lstm* op) {
  return check(*op) == WMK_OK ? wmk::level().conv_lstm_backward_workspace(*op) : 0;
}

int wmk_cpu_conv_lstm_forward(const wmk_conv_lstm* op) {
  if (int status = check(*op)) return status;
  if (!op->workspace || wmk::any_missing({&op->out, &op->cn})) return WMK_NULL_POINTER;
  return wmk::level().conv_lstm_forward(*op);
}

int wmk_cpu_conv_lstm_backward(const wmk_conv_lstm* op) {
  if (int status = check(*op)) return status;
  if (!op->workspace) return WMK_NULL_POINTER;
  if (wmk::any_missing({&op->out, &op->cells, &op->grad_x, &op->grad_weight_ih, &op->grad_weight_hh}))
    return WMK_NULL_POINTER;
  return wmk::level().conv_lstm_backward(*op);
}

namespace wmk {
namespace {

using namespace dlpack;

constexpr std::align_val_t kAlignment{256};

struct Scratch {
  explicit Scratch(int64_t bytes) : memory(::operator new(size_t(bytes), kAlignment, std::nothrow)) {}
  ~Scratch() { ::operator delete(memory, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* memory;
};

// Merges the rows of [batch, channels, height, width]; false if that needs a copy.
bool read_maps(const Tensor& maps, wmk_view* view) {
  const int64_t height = maps.shape[2], width = maps.shape[3], *stride = maps.strides;
  if (height > 1 && width > 1 && stride[2] != width * stride[3]) return false;
  view->stride[0] = stride[0], view->stride[1] = stride[1], view->stride[2] = width > 1 ? stride[3] : stride[2];
  return set_data(maps, view);
}

// `tensors`: previous h and c (both or neither), new h and c (contiguous, channels last), x, weight_ih, weight_hh;
// optional bias, peephole, reset. Same padding, stride and dilation 1.
bool read_conv_lstm_step(const Exchange& exchange, void* const* tensors, const StepOptions& options,
                         wmk_conv_lstm* step) {
  Tensor x, weight_ih, weight_hh, maps;
  if (!read_tensor(exchange, tensors[4], &x) || !read_tensor(exchange, tensors[5], &weight_ih) ||
      !read_tensor(exchange, tensors[6], &weight_hh) || x.dimensions != 4 || weight_ih.dimensions != 4 ||
      weight_hh.dimensions != 4)
    return false;
  const DataType dtype = x.dtype, state = {kFloat, uint8_t(dtype.bits == 64 ? 64 : 32), 1};
  if (dtype.code == kFloat && (dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64)) {
    step->dtype = dtype.bits == 16 ? WMK_FLOAT16 : dtype.bits == 32 ? WMK_FLOAT32 : WMK_FLOAT64;
  } else if (dtype.code == kBfloat && dtype.bits == 16) {
    step->dtype = WMK_BFLOAT16;
  } else {
    return false;
  }
  const int64_t batch = x.shape[0], input = x.shape[1], height = x.shape[2], width = x.shape[3];
  const int64_t hidden = weight_hh.shape[1];
  step->time = 1, step->batch = batch, step->input = input, step->hidden = hidden;
  step->x_height = step->height = height, step->x_width = step->width = width;
  step->ih_height = weight_ih.shape[2], step->ih_width = weight_ih.shape[3];
  step->hh_height = weight_hh.shape[2], step->hh_width = weight_hh.shape[3];
  step->stride_height = step->stride_width = step->dilation_height = step->dilation_width = 1;
  step->pad_top = (step->ih_height - 1) / 2, step->pad_left = (step->ih_width - 1) / 2;
  step->threads = options.threads;
  if (batch * input * hidden * height * width * step->ih_height * step->ih_width * step->hh_height * step->hh_width ==
      0)
    return false;
  if (step->hh_height % 2 == 0 || step->hh_width % 2 == 0) return false;

  const auto weight = [&](const Tensor& tensor, int64_t channels, wmk_view* view) {
    std::copy(tensor.strides, tensor.strides + 4, view->stride);
    return matches(tensor, dtype, {4 * hidden, channels, tensor.shape[2], tensor.shape[3]}) && set_data(tensor, view);
  };
  if (!weight(weight_ih, input, &step->weight_ih) || !weight(weight_hh, hidden, &step->weight_hh)) return false;
  if (!read_maps(x, &step->x)) return false;
  std::copy_backward(step->x.stride, step->x.stride + 3, step->x.stride + 4);  // time = 1
  const auto state_of = [&](int index, DataType type, wmk_view* view) {
    return read_tensor(exchange, tensors[index], &maps) && matches(maps, type, {batch, hidden, height, width}) &&
           read_maps(maps, view);
  };
  const auto is_dense = [&](const wmk_view& view) {
    return (hidden == 1 || view.stride[1] == 1) && (height * width == 1 || view.stride[2] == hidden) &&
           (batch == 1 || view.stride[0] == hidden * height * width);
  };
  if ((tensors[0] || tensors[1]) && (!state_of(0, dtype, &step->h0) || !state_of(1, state, &step->c0))) return false;
  if (!state_of(2, dtype, &step->out) || !state_of(3, state, &step->cn)) return false;
  if (!is_dense(step->out) || !is_dense(step->cn)) return false;
  if (tensors[7] && !read_view(exchange, tensors[7], state, {4 * hidden}, &step->bias)) return false;
  if (tensors[8] && !read_view(exchange, tensors[8], state, {3, hidden}, &step->peephole)) {
    if (!read_tensor(exchange, tensors[8], &maps) || !matches(maps, state, {3, hidden, height, width}) ||
        !read_maps(maps, &step->peephole))
      return false;
    step->peephole_varies = 1;
  }
  if (!tensors[9]) return true;
  if (!read_view(exchange, tensors[9], kMask, {batch}, &step->reset)) return false;
  step->reset.stride[1] = step->reset.stride[0], step->reset.stride[0] = 0;  // time = 1
  return true;
}

}  // namespace

int conv_lstm_step_fast_path(const dlpack::Exchange& exchange, void* const* tensors, size_t count,
                             const StepOptions& options, Unlocked unlocked) {
  wmk_conv_lstm step = {};
  if (count != 10 || !read_conv_lstm_step(exchange, tensors, options, &step)) return kNotApplicable;
  const Scratch scratch(wmk_cpu_conv_lstm_forward_workspace(&step));
  step.workspace = scratch.memory;
  const auto run = [](const void* arguments) {
    return wmk_cpu_conv_lstm_forward(static_cast<const wmk_conv_lstm*>(arguments));
  };
  return scratch.memory ? unlocked(run, &step) : WMK_NO_MEMORY;
}

}  // namespace wmk
