// From the tensors of a single step to its structure in one call: half a small step's time otherwise goes into taking
// its tensors apart. A tensor is an opaque object that `Exchange::read` reads; absent ones are null. Every function
// answers false where the tensors are not as it expects them: in number, type, shape or place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>

#include "include/wmkernels.h"
#include "python/dlpack.h"

namespace wmk::at_once {

struct Options {
  int64_t threads;
  bool delta_softplus;
};

constexpr std::align_val_t kAlignment{256};
constexpr dlpack::DataType kMask = {dlpack::kBool, 8, 1};

// Memory for one call, null where there is none.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(::operator new(size_t(bytes), kAlignment, std::nothrow)) {}
  ~Scratch() { ::operator delete(memory, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* memory;
};

// A tensor in the CPU's memory; false for any other.
inline bool read(const dlpack::Exchange& exchange, void* object, dlpack::Tensor* tensor) {
  return object && exchange.read(object, tensor) == 0 && tensor->device_type == dlpack::kCpu &&
         tensor->dtype.lanes == 1;
}

inline bool is(const dlpack::Tensor& tensor, dlpack::DataType dtype, std::initializer_list<int64_t> shape) {
  return tensor.dtype.code == dtype.code && tensor.dtype.bits == dtype.bits &&
         tensor.dimensions == int32_t(shape.size()) && std::equal(shape.begin(), shape.end(), tensor.shape);
}

inline bool place(const dlpack::Tensor& tensor, wmk_view* view) {
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return reinterpret_cast<uintptr_t>(view->data) % (tensor.dtype.bits / 8) == 0;
}

inline bool view_of(const dlpack::Exchange& exchange, void* object, dlpack::DataType dtype,
                    std::initializer_list<int64_t> shape, wmk_view* view) {
  dlpack::Tensor tensor;
  if (!read(exchange, object, &tensor) || !is(tensor, dtype, shape)) return false;
  std::copy(tensor.strides, tensor.strides + tensor.dimensions, view->stride);
  return place(tensor, view);
}

// `tensors` are state_in, state_out, out, u, delta, A, B, C, D, z, delta_bias, reset; the last four may be absent, B
// and C are [batch, state]. All float32 or all float64.
inline bool read_selective_step(const dlpack::Exchange& exchange, void* const (&tensors)[12], const Options& options,
                                wmk_selective_step* step) {
  dlpack::Tensor state;
  if (!read(exchange, tensors[0], &state)) return false;
  const dlpack::DataType dtype = state.dtype;
  if (state.dimensions != 3 || dtype.code != dlpack::kFloat || (dtype.bits != 32 && dtype.bits != 64)) return false;
  const int64_t batch = state.shape[0], channels = state.shape[1], states = state.shape[2];
  if (batch * channels * states == 0) return false;
  step->batch = step->states = batch, step->channels = channels, step->state = states, step->groups = 1;
  step->dtype = step->state_dtype = dtype.bits == 32 ? WMK_FLOAT32 : WMK_FLOAT64;
  step->delta_softplus = options.delta_softplus, step->threads = options.threads;
  const auto required = [&](int index, std::initializer_list<int64_t> shape, wmk_view* view) {
    return view_of(exchange, tensors[index], dtype, shape, view);
  };
  const auto optional = [&](int index, std::initializer_list<int64_t> shape, wmk_view* view) {
    return !tensors[index] || required(index, shape, view);
  };
  const bool fits = required(0, {batch, channels, states}, &step->state_in) &&
                    required(1, {batch, channels, states}, &step->state_out) &&
                    required(2, {batch, channels}, &step->out) && required(3, {batch, channels}, &step->u) &&
                    required(4, {batch, channels}, &step->delta) && required(5, {channels, states}, &step->A) &&
                    required(6, {batch, states}, &step->B) && required(7, {batch, states}, &step->C) &&
                    optional(8, {channels}, &step->D) && optional(9, {batch, channels}, &step->z) &&
                    optional(10, {channels}, &step->delta_bias) &&
                    (!tensors[11] || view_of(exchange, tensors[11], kMask, {batch}, &step->reset));
  // [batch, state] stands for [batch, groups, state] with one group.
  for (wmk_view* view : {&step->B, &step->C}) view->stride[2] = view->stride[1], view->stride[1] = 0;
  return fits;
}

// Maps [batch, channels, height, width] with their rows merged. False where a copy would be needed for that.
inline bool view_of_maps(const dlpack::Tensor& maps, wmk_view* view) {
  const int64_t height = maps.shape[2], width = maps.shape[3], *stride = maps.strides;
  if (height > 1 && width > 1 && stride[2] != width * stride[3]) return false;
  view->stride[0] = stride[0], view->stride[1] = stride[1], view->stride[2] = width > 1 ? stride[3] : stride[2];
  return place(maps, view);
}

// `tensors` are h and c of the step before, both or neither, the new h and c, x, weight_ih, weight_hh, bias, peephole,
// reset; the last three may be absent. The input convolution keeps the map's size, with stride and dilation 1. The new
// maps are contiguous, channels last.
inline bool read_conv_lstm_step(const dlpack::Exchange& exchange, void* const (&tensors)[10], const Options& options,
                                wmk_conv_lstm* step) {
  dlpack::Tensor x, weight_ih, weight_hh, maps;
  if (!read(exchange, tensors[4], &x) || !read(exchange, tensors[5], &weight_ih) ||
      !read(exchange, tensors[6], &weight_hh) || x.dimensions != 4 || weight_ih.dimensions != 4 ||
      weight_hh.dimensions != 4)
    return false;
  const dlpack::DataType dtype = x.dtype, state = {dlpack::kFloat, uint8_t(dtype.bits == 64 ? 64 : 32), 1};
  if (dtype.code == dlpack::kFloat && (dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64)) {
    step->dtype = dtype.bits == 16 ? WMK_FLOAT16 : dtype.bits == 32 ? WMK_FLOAT32 : WMK_FLOAT64;
  } else if (dtype.code == dlpack::kBfloat && dtype.bits == 16) {
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

  const auto weight = [&](const dlpack::Tensor& tensor, int64_t channels, wmk_view* view) {
    std::copy(tensor.strides, tensor.strides + 4, view->stride);
    return is(tensor, dtype, {4 * hidden, channels, tensor.shape[2], tensor.shape[3]}) && place(tensor, view);
  };
  if (!weight(weight_ih, input, &step->weight_ih) || !weight(weight_hh, hidden, &step->weight_hh)) return false;
  if (!view_of_maps(x, &step->x)) return false;
  std::copy_backward(step->x.stride, step->x.stride + 3, step->x.stride + 4);  // one step of time
  const auto state_of = [&](int index, dlpack::DataType type, wmk_view* view) {
    return read(exchange, tensors[index], &maps) && is(maps, type, {batch, hidden, height, width}) &&
           view_of_maps(maps, view);
  };
  const auto is_dense = [&](const wmk_view& view) {
    return (hidden == 1 || view.stride[1] == 1) && (height * width == 1 || view.stride[2] == hidden) &&
           (batch == 1 || view.stride[0] == hidden * height * width);
  };
  if ((tensors[0] || tensors[1]) && (!state_of(0, dtype, &step->h0) || !state_of(1, state, &step->c0))) return false;
  if (!state_of(2, dtype, &step->out) || !state_of(3, state, &step->cn)) return false;
  if (!is_dense(step->out) || !is_dense(step->cn)) return false;
  if (tensors[7] && !view_of(exchange, tensors[7], state, {4 * hidden}, &step->bias)) return false;
  if (tensors[8] && !view_of(exchange, tensors[8], state, {3, hidden}, &step->peephole)) {
    if (!read(exchange, tensors[8], &maps) || !is(maps, state, {3, hidden, height, width}) ||
        !view_of_maps(maps, &step->peephole))
      return false;
    step->peephole_varies = 1;
  }
  if (!tensors[9]) return true;
  if (!view_of(exchange, tensors[9], kMask, {batch}, &step->reset)) return false;
  step->reset.stride[1] = step->reset.stride[0], step->reset.stride[0] = 0;  // one step of time
  return true;
}

}  // namespace wmk::at_once
