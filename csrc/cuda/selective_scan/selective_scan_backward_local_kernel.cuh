// Selective scan, backward, local pass: each segment's decay, and its dh at the start from dh = 0 at its end (last
// segment: grad_last_state). No states: dh_{t-1} = exp(step_t A) (C_t dy_t + dh_t).
#pragma once

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

// dout -> dy, z -> factor of y in dz.
template <typename Traits>
__device__ __forceinline__ void gate_backward(typename Traits::T* grad, typename Traits::T* gate, bool precise) {
  using T = typename Traits::T;
  constexpr int kPitch = Traits::kPitch;
  for (int i = threadIdx.x; i < Traits::kChannels * Traits::kSteps; i += Traits::kThreads) {
    const int at = i / Traits::kSteps * kPitch + i % Traits::kSteps;
    const T z = gate[at], g = grad[at], sigma = sigmoid(z, precise);
    grad[at] = g * (z * sigma);
    gate[at] = g * (sigma * (T(1) + z * (T(1) - sigma)));
  }
}

template <typename Traits>
struct BackwardLocalShared {
  using T = typename Traits::T;
  using C = Traits;
  alignas(16) T step[C::kChannels * C::kPitch];
  alignas(16) T grad[C::kChannels * C::kPitch];  // dout, then dy
  alignas(16) T gate[C::kChannels * C::kPitch];
  alignas(16) T C_tile[C::kStateRows * C::kStatePitch];
  T bias[C::kChannels];
  char *origin_delta, *origin_grad_out, *origin_z, *origin_C;
  WorkTile work;
  alignas(16) uint32_t resets;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBackwardBlocks)
    selective_scan_backward_local_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p,
                                         const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Traits::T;
  using ChannelTile = typename Traits::ChannelTile;
  using StateTile = typename Traits::StateTile;
  constexpr int kStates = Traits::kStates, kLanes = Traits::kLanes;
  constexpr int kPitch = Traits::kPitch, kStatePitch = Traits::kStatePitch;
  constexpr int kSteps = Traits::kSteps;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<BackwardLocalShared<Traits>*>(memory);
  const StageBuffers<Traits> stages(memory + sizeof(BackwardLocalShared<Traits>), Traits::dtype(p));

  if (threadIdx.x == 0) {
    const WorkTile work = work_tile<Traits>(p, plan);
    shared.work = work;
    shared.origin_delta = channel_origin(p.delta, p, work);
    shared.origin_grad_out = channel_origin(p.grad_out, p, work);
    shared.origin_z = channel_origin(p.z, p, work);
    shared.origin_C = state_origin(p.C, p, work);
  }
  __syncthreads();
  const WorkTile& work = shared.work;
  if (!work.exists || work.segment_in_sequence == 0) return;
  const ThreadCoord<Traits> coord(work);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Traits::dtype(p);
  const bool precise = Traits::precise(p);
  const bool has_gate = p.z.data != nullptr;

  T A[kStates], dh[kStates];
  load_decay_rates(A, coord, p);
#pragma unroll
  for (int i = 0; i < kStates; ++i) dh[i] = T(0);
  if (work.segment_in_sequence + 1 == work.segments_in_sequence && p.grad_last_state.data != nullptr) {
    load_states(dh, coord, states, p.grad_last_state.data,
                work.sequence * p.grad_last_state.stride[0] + coord.channel * p.grad_last_state.stride[1],
                p.grad_last_state.stride[2]);
  }
  load_parameter<Traits>(shared.bias, p.delta_bias, work);
  if (!p.C_varies) load_constant<Traits>(shared.C_tile, p.C, p, work);
  const T* C = shared.C_tile + (p.C_varies ? 0 : coord.row * kStatePitch) + 4 * coord.state_lane;
  const int C_pitch = p.C_varies ? kStatePitch : 0;

  const auto fetch = [&](int64_t begin, int steps) {
    ChannelTile::fetch(stages.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, work.channels, steps);
    ChannelTile::fetch(stages.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, work.channels,
                       steps);
    if (has_gate) {
      ChannelTile::fetch(stages.z, channel_rows(shared.origin_z, p.z), begin, dtype, work.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(stages.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto identity = [](T value, int) { return value; };
  const auto step_size = [precise, bias = shared.bias, softplus_on = p.delta_softplus != 0](T value, int row) {
    value += bias[row];
    return softplus_on ? softplus(value, precise) : value;
  };

  T total_step = T(0);
  bool reset = false;
  int64_t begin = work.begin + (work.end - work.begin - 1) / kSteps * kSteps;
  fetch(begin, static_cast<int>(work.end - begin));
  __syncthreads();
  for (; begin >= work.begin; begin -= kSteps) {
    const int64_t end = begin + kSteps < work.end ? begin + kSteps : work.end;
    const int steps = static_cast<int>(end - begin);
    copy_async_wait();
    ChannelTile::template store<false>(shared.step, kPitch, stages.delta,
                                       channel_rows(shared.origin_delta, p.delta).along_time(), dtype, work.channels,
                                       steps, step_size);
    ChannelTile::template store<false>(shared.grad, kPitch, stages.grad,
                                       channel_rows(shared.origin_grad_out, p.grad_out).along_time(), dtype,
                                       work.channels, steps, identity);
    if (has_gate) {
      ChannelTile::template store<false>(shared.gate, kPitch, stages.z, channel_rows(shared.origin_z, p.z).along_time(),
                                         dtype, work.channels, steps, identity);
    }
    if (p.C_varies) {
      StateTile::template store<true>(shared.C_tile, kStatePitch, stages.C,
                                      state_rows(shared.origin_C, p.C).along_time(), dtype, states, steps, identity);
    }
    load_resets<Traits>(&shared.resets, p, work, begin, steps);
    __syncthreads();
    if (begin > work.begin) fetch(begin - kSteps, kSteps);
    if (has_gate) {
      gate_backward<Traits>(shared.grad, shared.gate, precise);
      __syncthreads();
    }
    const uint32_t resets = shared.resets;
    if (resets != 0) reset = true;
    for (int first = (steps - 1) / 4 * 4; first >= 0; first -= 4) {
      const Vec4<T> step = load_vec4(shared.step + coord.row * kPitch + first);
      const Vec4<T> grad = load_vec4(shared.grad + coord.row * kPitch + first);
#pragma unroll Traits::kUnroll
      for (int t = 3; t >= 0; --t) {
        const T this_step = select(step.value, t), this_grad = select(grad.value, t);
#pragma unroll
        for (int j = 0; j < kStates / 4; ++j) {
          const Vec4<T> c = load_vec4(C + (first + t) * C_pitch + j * 4 * kLanes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T& dh_i = dh[4 * j + i];
            dh_i = exp2_fast(this_step * A[4 * j + i]) * (c.value[i] * this_grad + dh_i);
          }
        }
        if (resets >> (first + t) & 1u) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) dh[i] = T(0);
        }
        total_step += this_step;
      }
    }
    __syncthreads();
  }
  const int64_t offset = (work.segment * p.channels + coord.channel) * p.state;
  store_states(dh, coord, states, plan.boundary, offset);
#pragma unroll
  for (int i = 0; i < kStates; ++i) dh[i] = exp2_fast(total_step * A[i]);
  store_states(dh, coord, states, plan.decay, offset);
  if (threadIdx.x == 0) plan.reset[work.segment * plan.tiles + work.tile] = reset;
}

}  // namespace wmk
