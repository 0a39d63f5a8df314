#include "common/checks.h"
#include "common/step_fast_path.h"
#include "cpu/dispatch/isa.h"

int wmk_cpu_selective_step(const wmk_selective_step* step) {
  if (!wmk::is_dtype(step->dtype) || !wmk::is_dtype(step->state_dtype) || step->threads < 1 || step->state < 1 ||
      !wmk::has_groups(step->channels, step->groups))
    return WMK_UNSUPPORTED;
  if (step->batch == 0 || step->channels == 0) return WMK_OK;
  if (wmk::any_missing(
          {&step->state_in, &step->state_out, &step->u, &step->delta, &step->A, &step->B, &step->C, &step->out}))
    return WMK_NULL_POINTER;
  if (step->indices.data) {
    for (int64_t i = 0; i < step->batch; ++i)
      if (((const int64_t*)step->indices.data)[i * step->indices.stride[0]] >= step->states) return WMK_BAD_INDEX;
  } else if (step->states != step->batch) {
    return WMK_BAD_INDEX;
  }
  return wmk::level().selective_step(*step);
}

namespace wmk {
namespace {

using namespace dlpack;

// `tensors`: state_in, state_out, out, u, delta, A, B, C; optional D, z, delta_bias, reset. B and C are [batch, state];
// all float32 or all float64.
bool read_selective_step(const Exchange& exchange, void* const* tensors, const StepOptions& options,
                         wmk_selective_step* step) {
  Tensor state;
  if (!read_tensor(exchange, tensors[0], &state)) return false;
  const DataType dtype = state.dtype;
  if (state.dimensions != 3 || dtype.code != kFloat || (dtype.bits != 32 && dtype.bits != 64)) return false;
  const int64_t batch = state.shape[0], channels = state.shape[1], states = state.shape[2];
  if (batch * channels * states == 0) return false;
  step->batch = step->states = batch, step->channels = channels, step->state = states, step->groups = 1;
  step->dtype = step->state_dtype = dtype.bits == 32 ? WMK_FLOAT32 : WMK_FLOAT64;
  step->delta_softplus = options.flags, step->threads = options.threads;
  const auto required = [&](int index, std::initializer_list<int64_t> shape, wmk_view* view) {
    return read_view(exchange, tensors[index], dtype, shape, view);
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
                    (!tensors[11] || read_view(exchange, tensors[11], kMask, {batch}, &step->reset));
  if (!fits) return false;
  // The state is written while the others are read.
  const int64_t bytes = dtype.bits / 8;
  const ByteRange written = byte_range(step->state_out, {batch, channels, states}, bytes);
  const auto shares = [&](const wmk_view& view, std::initializer_list<int64_t> shape) {
    return view.data && intersects(byte_range(view, shape, bytes), written);
  };
  if (overlaps_itself(step->state_out, {batch, channels, states}) || shares(step->u, {batch, channels}) ||
      shares(step->delta, {batch, channels}) || shares(step->A, {channels, states}) ||
      shares(step->B, {batch, states}) || shares(step->C, {batch, states}) || shares(step->D, {channels}) ||
      shares(step->z, {batch, channels}) || shares(step->delta_bias, {channels}))
    return false;
  // [batch, groups = 1, state].
  for (wmk_view* view : {&step->B, &step->C}) view->stride[2] = view->stride[1], view->stride[1] = 0;
  return true;
}

}  // namespace

int selective_step_fast_path(const dlpack::Exchange& exchange, void* const* tensors, size_t count,
                             const StepOptions& options, Unlocked unlocked) {
  wmk_selective_step step = {};
  if (count != 12 || !read_selective_step(exchange, tensors, options, &step)) return kNotApplicable;
  const auto run = [](const void* arguments) {
    return wmk_cpu_selective_step(static_cast<const wmk_selective_step*>(arguments));
  };
  return unlocked(run, &step);
}

}  // namespace wmk
