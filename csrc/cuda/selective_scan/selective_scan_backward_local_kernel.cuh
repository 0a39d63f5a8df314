// Selective scan, backward, the first of three passes where time is split: what each segment sends back from nothing
// (or, the last one, from the gradient of the last state), and by how much it multiplies what comes back to it. It
// needs no states: x_t = exp(step_t A) (C_t dy_t + x_{t+1}).
#pragma once

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

// From z and the gradient of out: the gradient of y, and by what to multiply y for the gradient of z.
template <typename Configuration>
__device__ __forceinline__ void gate_backward(typename Configuration::T* grad, typename Configuration::T* gate,
                                              bool precise) {
  using T = typename Configuration::T;
  constexpr int kPitch = Configuration::kPitch;
  for (int i = threadIdx.x; i < Configuration::kChannels * Configuration::kSteps; i += Configuration::kThreads) {
    const int at = i / Configuration::kSteps * kPitch + i % Configuration::kSteps;
    const T z = gate[at], g = grad[at], open = sigmoid(z, precise);
    grad[at] = g * (z * open);
    gate[at] = g * (open * (T(1) + z * (T(1) - open)));
  }
}

template <typename Configuration>
struct BackwardLocalShared {
  using T = typename Configuration::T;
  using C = Configuration;
  alignas(16) T step[C::kChannels * C::kPitch];
  alignas(16) T grad[C::kChannels * C::kPitch];  // of out, then of y
  alignas(16) T gate[C::kChannels * C::kPitch];
  alignas(16) T C_tile[C::kStateRows * C::kStatePitch];
  T bias[C::kChannels];
  char *origin_delta, *origin_grad_out, *origin_z, *origin_C;
  BlockPart part;
  alignas(16) uint32_t resets;
};

template <typename Configuration>
__global__ void __launch_bounds__(Configuration::kThreads, Configuration::kBackwardBlocks)
    selective_scan_backward_local_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p,
                                         const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Configuration::T;
  using ChannelTile = typename Configuration::ChannelTile;
  using StateTile = typename Configuration::StateTile;
  constexpr int kStates = Configuration::kStates, kLanes = Configuration::kLanes;
  constexpr int kPitch = Configuration::kPitch, kStatePitch = Configuration::kStatePitch;
  constexpr int kSteps = Configuration::kSteps;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<BackwardLocalShared<Configuration>*>(memory);
  const Slots<Configuration> slots(memory + sizeof(BackwardLocalShared<Configuration>), Configuration::dtype(p));

  if (threadIdx.x == 0) {
    const BlockPart part = block_part<Configuration>(p, plan);
    shared.part = part;
    shared.origin_delta = channel_origin(p.delta, p, part);
    shared.origin_grad_out = channel_origin(p.grad_out, p, part);
    shared.origin_z = channel_origin(p.z, p, part);
    shared.origin_C = state_origin(p.C, p, part);
  }
  __syncthreads();
  const BlockPart& part = shared.part;
  if (!part.exists || part.index == 0) return;
  const ThreadPlace<Configuration> place(part);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Configuration::dtype(p);
  const bool precise = Configuration::precise(p);
  const bool has_gate = p.z.data != nullptr;

  T A[kStates], x[kStates];
  load_states(A, place, states, p.A.data, place.channel * p.A.stride[0], p.A.stride[1]);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    A[i] *= log2_e(T(0));
    x[i] = T(0);
  }
  if (part.index + 1 == part.count && p.grad_last_state.data != nullptr) {
    load_states(x, place, states, p.grad_last_state.data,
                part.sequence * p.grad_last_state.stride[0] + place.channel * p.grad_last_state.stride[1],
                p.grad_last_state.stride[2]);
  }
  place_parameter<Configuration>(shared.bias, p.delta_bias, part);
  if (!p.C_varies) place_constant<Configuration>(shared.C_tile, p.C, p, part);
  const T* C = shared.C_tile + (p.C_varies ? 0 : place.row * kStatePitch) + 4 * place.quarter;
  const int C_pitch = p.C_varies ? kStatePitch : 0;

  const auto fetch = [&](int64_t begin, int steps) {
    ChannelTile::fetch(slots.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, part.channels, steps);
    ChannelTile::fetch(slots.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, part.channels,
                       steps);
    if (has_gate) {
      ChannelTile::fetch(slots.z, channel_rows(shared.origin_z, p.z), begin, dtype, part.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(slots.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto same = [](T value, int) { return value; };
  // By value, so that what is constant stays so.
  const auto step_size = [precise, bias = shared.bias, soft = p.delta_softplus != 0](T value, int row) {
    value += bias[row];
    return soft ? softplus(value, precise) : value;
  };

  T total_step = T(0);
  bool forgets = false;
  int64_t begin = part.begin + (part.end - part.begin - 1) / kSteps * kSteps;
  fetch(begin, static_cast<int>(part.end - begin));
  __syncthreads();
  for (; begin >= part.begin; begin -= kSteps) {
    const int64_t end = begin + kSteps < part.end ? begin + kSteps : part.end;
    const int steps = static_cast<int>(end - begin);
    copy_async_wait();
    ChannelTile::template place<false>(shared.step, kPitch, slots.delta,
                                       channel_rows(shared.origin_delta, p.delta).along_time(), dtype, part.channels,
                                       steps, step_size);
    ChannelTile::template place<false>(shared.grad, kPitch, slots.grad,
                                       channel_rows(shared.origin_grad_out, p.grad_out).along_time(), dtype,
                                       part.channels, steps, same);
    if (has_gate) {
      ChannelTile::template place<false>(shared.gate, kPitch, slots.z, channel_rows(shared.origin_z, p.z).along_time(),
                                         dtype, part.channels, steps, same);
    }
    if (p.C_varies) {
      StateTile::template place<true>(shared.C_tile, kStatePitch, slots.C,
                                      state_rows(shared.origin_C, p.C).along_time(), dtype, states, steps, same);
    }
    place_resets<Configuration>(&shared.resets, p, part, begin, steps);
    __syncthreads();
    if (begin > part.begin) fetch(begin - kSteps, kSteps);
    if (has_gate) {
      gate_backward<Configuration>(shared.grad, shared.gate, precise);
      __syncthreads();
    }
    const uint32_t resets = shared.resets;
    if (resets != 0) forgets = true;
    for (int first = (steps - 1) / 4 * 4; first >= 0; first -= 4) {
      const Quad<T> step = load_quad(shared.step + place.row * kPitch + first);
      const Quad<T> grad = load_quad(shared.grad + place.row * kPitch + first);
#pragma unroll Configuration::kUnroll
      for (int t = 3; t >= 0; --t) {
        const T this_step = pick(step.value, t), this_grad = pick(grad.value, t);
#pragma unroll
        for (int j = 0; j < kStates / 4; ++j) {
          const Quad<T> c = load_quad(C + (first + t) * C_pitch + j * 4 * kLanes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T& back = x[4 * j + i];
            back = exp2_fast(this_step * A[4 * j + i]) * (c.value[i] * this_grad + back);
          }
        }
        if (resets >> (first + t) & 1u) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) x[i] = T(0);
        }
        total_step += this_step;
      }
    }
    __syncthreads();
  }
  const int64_t offset = (part.slot * p.channels + place.channel) * p.state;
  store_states(x, place, states, plan.boundary, offset);
#pragma unroll
  for (int i = 0; i < kStates; ++i) x[i] = exp2_fast(total_step * A[i]);
  store_states(x, place, states, plan.decay, offset);
  if (threadIdx.x == 0) plan.forgets[part.slot * plan.tiles + part.tile] = forgets;
}

}  // namespace wmk
