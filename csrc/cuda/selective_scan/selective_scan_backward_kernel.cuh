// Selective scan, backward, on a GPU.
//
// A block takes its segment's tiles in reverse: it recomputes states from the saved one, checkpoints one per subtile of
// four steps, and sweeps each subtile in registers, forward and back:
//
//   g_t      = C_t dy_t + dh_t            gradient of h_t
//   dh_{t-1} = a_t g_t                    with a_t = exp(step_t A)
//   dB_t    += step_t u_t g_t             dC_t += dy_t h_t                       summed over channels
//   du_t     = step_t sum_n g_t B_t       dstep_t = u_t sum_n g_t B_t + sum_n A dh_{t-1} h_{t-1}
//   dA      += step_t dh_{t-1} h_{t-1}
//
// dB and dC are summed over channels on tensor cores for 16-bit data (TF32 rounds less than the result), else in shared
// memory; sum_tiles_kernel adds the blocks' partials in fixed order.
//
// Per state and step: 1.9 exponentials, about 30 instructions. Bytes per element, bf16 with gate: 16, 2 for states, 8
// for partials. Bound by instruction issue.
#pragma once

#include "cuda/selective_scan/selective_scan_backward_local_kernel.cuh"
#include "cuda/selective_scan/selective_scan_backward_steps.cuh"
#include "cuda/selective_scan/selective_scan_forward_kernel.cuh"

namespace wmk {

// Blocks per multiprocessor; for fp32, two fit in shared memory.
template <typename Traits>
constexpr int kBackwardKernelBlocks = Traits::kDtype == WMK_FLOAT32 ? 2 : Traits::kBackwardBlocks;

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, kBackwardKernelBlocks<Traits>)
    selective_scan_backward_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p,
                                   const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Traits::T;
  using ChannelTile = typename Traits::ChannelTile;
  using StateTile = typename Traits::StateTile;
  constexpr int kStates = Traits::kStates;
  constexpr int kPitch = Traits::kPitch, kStatePitch = Traits::kStatePitch;
  constexpr int kSteps = Traits::kSteps;
  WMK_SHARED_MEMORY(memory);
  using Shared = BackwardShared<Traits>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const StageBuffers<Traits> stages(memory + sizeof(Shared), Traits::dtype(p));

  if (threadIdx.x == 0) {
    const WorkTile work = work_tile<Traits>(p, plan);
    shared.work = work;
    shared.origin_delta = channel_origin(p.delta, p, work);
    shared.origin_grad_out = channel_origin(p.grad_out, p, work);
    shared.origin_z = channel_origin(p.z, p, work);
    shared.origin_C = state_origin(p.C, p, work);
    shared.origin_u = channel_origin(p.u, p, work);
    shared.origin_B = state_origin(p.B, p, work);
    shared.origin_grad_u = channel_origin(p.grad_u, p, work);
    shared.origin_grad_delta = channel_origin(p.grad_delta, p, work);
    shared.origin_grad_z = channel_origin(p.grad_z, p, work);
    shared.partial_origin = (work.batch * plan.tiles + work.tile) * p.state * p.time + work.offset;
  }
  __syncthreads();
  const WorkTile& work = shared.work;
  const ThreadCoord<Traits> coord(work);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Traits::dtype(p);
  const bool precise = Traits::precise(p);
  const bool has_gate = p.z.data != nullptr;

  BackwardThread<Traits> thread;
  load_decay_rates(thread.A, coord, p);
#pragma unroll
  for (int i = 0; i < kStates; ++i) thread.dh[i] = thread.grad_A[i] = T(0);
  if constexpr (Shared::kStateVectors > 1) {
    store_checkpoint<Traits>(thread.A, shared.A);
    store_checkpoint<Traits>(thread.grad_A, shared.grad_A);
  }
  T grad_D[ChannelTile::kPerThread], grad_bias[ChannelTile::kPerThread];
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) grad_D[i] = grad_bias[i] = T(0);
  const int64_t channel_offset = work.segment * p.channels + coord.channel;
  thread.partial_offset = channel_offset * p.state;
  // dh is still zero.
  if (!p.B_varies) store_states(thread.dh, coord, states, plan.partial_B, thread.partial_offset);
  if (!p.C_varies) store_states(thread.dh, coord, states, plan.partial_C, thread.partial_offset);
  if (work.segment_in_sequence + 1 < work.segments_in_sequence) {
    load_states(thread.dh, coord, states, plan.boundary, (work.segment * p.channels + coord.channel) * p.state, 1);
  } else if (p.grad_last_state.data != nullptr && work.exists) {
    load_states(thread.dh, coord, states, p.grad_last_state.data,
                work.sequence * p.grad_last_state.stride[0] + coord.channel * p.grad_last_state.stride[1],
                p.grad_last_state.stride[2]);
  }
  load_parameter<Traits>(shared.D, p.D, work);
  load_parameter<Traits>(shared.bias, p.delta_bias, work);
  if (!p.B_varies) load_constant<Traits>(shared.B_tile, p.B, p, work);
  if (!p.C_varies) load_constant<Traits>(shared.C_tile, p.C, p, work);
  thread.B = shared.B_tile + (p.B_varies ? 0 : coord.row * kStatePitch) + 4 * coord.state_lane;
  thread.C = shared.C_tile + (p.C_varies ? 0 : coord.row * kStatePitch) + 4 * coord.state_lane;
  thread.B_pitch = p.B_varies ? kStatePitch : 0;
  thread.C_pitch = p.C_varies ? kStatePitch : 0;

  const auto identity = [](T value, int) { return value; };
  const auto step_size = [precise, bias = shared.bias, softplus_on = p.delta_softplus != 0](T value, int row) {
    value += bias[row];
    return softplus_on ? softplus(value, precise) : value;
  };
  const auto fetch_inputs = [&](int64_t begin, int steps) {
    ChannelTile::fetch(stages.u, channel_rows(shared.origin_u, p.u), begin, dtype, work.channels, steps);
    ChannelTile::fetch(stages.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, work.channels, steps);
    if (p.B_varies) StateTile::fetch(stages.B, state_rows(shared.origin_B, p.B), begin, dtype, states, steps);
  };
  const auto fetch_rest = [&](int64_t begin, int steps) {
    ChannelTile::fetch(stages.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, work.channels,
                       steps);
    if (has_gate) {
      ChannelTile::fetch(stages.z, channel_rows(shared.origin_z, p.z), begin, dtype, work.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(stages.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto convert_inputs = [&](int64_t begin, int steps) {
    copy_async_wait();
    ChannelTile::template store<false>(shared.u, kPitch, stages.u, channel_rows(shared.origin_u, p.u).along_time(),
                                       dtype, work.channels, steps, identity);
    ChannelTile::template store<false>(shared.step, kPitch, stages.delta,
                                       channel_rows(shared.origin_delta, p.delta).along_time(), dtype, work.channels,
                                       steps, step_size);
    if (p.B_varies) {
      StateTile::template store<true>(shared.B_tile, kStatePitch, stages.B,
                                      state_rows(shared.origin_B, p.B).along_time(), dtype, states, steps, identity);
    }
    load_resets<Traits>(&shared.resets, p, work, begin, steps);
  };
  T h[kStates];
  // Checkpoints the start states of [0, subtiles); h becomes the last state.
  const auto recompute_states = [&](int subtiles) {
    const uint32_t resets = shared.resets;
    T A[kStates];
#pragma unroll
    for (int j = 0; j < Shared::kStateVectors; ++j) {
      const Vec4<T> vec = load_A<Traits>(thread, shared, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) A[4 * j + k] = vec.value[k];
    }
    const T* row_step = shared.step + coord.row * kPitch;
    const T* row_u = shared.u + coord.row * kPitch;
    for (int subtile = 0; subtile < subtiles; ++subtile) {
      store_checkpoint<Traits>(h, shared.checkpoint[subtile]);
      const int at = subtile * kSubtileSteps;
      T unused[4];
      const uint32_t subtile_resets = resets >> at & 15u;
      const Vec4<T> step = load_vec4(row_step + at), u = load_vec4(row_u + at);
      if (subtile_resets == 0) {
        advance<Traits, true, false>(h, A, unused, step, u, thread.B + at * thread.B_pitch, thread.B_pitch, thread.C, 0,
                                     0);
      } else {
        advance<Traits, true, true>(h, A, unused, step, u, thread.B + at * thread.B_pitch, thread.B_pitch, thread.C, 0,
                                    subtile_resets);
      }
    }
  };

  int64_t end = work.exists ? work.end : work.begin;
  int64_t chunk = work.last_chunk, chunk_begin = chunk * p.chunk;
  bool fetched = false;
  __syncthreads();
  while (end > work.begin) {
    const int64_t begin = chunk_begin + (end - 1 - chunk_begin) / kSteps * kSteps;
    const int steps = static_cast<int>(end - begin);
    load_states(h, coord, states, p.chunk_states.data,
                ((work.chunk_base + chunk) * p.channels + coord.channel) * p.state, 1);
    for (int64_t recompute = chunk_begin; recompute < begin; recompute += kSteps) {
      fetch_inputs(recompute, kSteps);
      convert_inputs(recompute, kSteps);
      __syncthreads();
      recompute_states(kSteps / kSubtileSteps);
      __syncthreads();
    }
    if (!fetched) {
      fetch_inputs(begin, steps);
      fetch_rest(begin, steps);
    }
    convert_inputs(begin, steps);
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
    __syncthreads();
    // Prefetches unless recomputing states needs the stage buffers.
    fetched = begin > work.begin && p.chunk <= kSteps;
    if (begin == chunk_begin) {
      --chunk;
      chunk_begin -= p.chunk;
    }
    if (fetched) {
      fetch_inputs(chunk_begin, static_cast<int>(begin - chunk_begin));
      fetch_rest(chunk_begin, static_cast<int>(begin - chunk_begin));
    }
    if (has_gate) {
      gate_backward<Traits>(shared.grad, shared.gate, precise);
      __syncthreads();
    }

    const int subtiles = (steps + kSubtileSteps - 1) / kSubtileSteps;
    recompute_states(subtiles - 1);
    store_checkpoint<Traits>(h, shared.checkpoint[subtiles - 1]);
    const uint32_t resets = shared.resets;
    constexpr int kBlockSteps = Shared::kBlockSteps;
    for (int block_begin = (steps - 1) / kBlockSteps * kBlockSteps; block_begin >= 0; block_begin -= kBlockSteps) {
#pragma unroll 1
      for (int first = block_begin + kBlockSteps - kSubtileSteps; first >= block_begin; first -= kSubtileSteps) {
        if (first >= steps) continue;
        const uint32_t subtile_resets = resets >> first & ((1u << kSubtileSteps) - 1u);
        const uint32_t padding = first + kSubtileSteps <= steps ? 0u : 0xFFu << (kSubtileSteps + steps - first);
        if ((subtile_resets | padding) == 0 && p.B_varies && p.C_varies) {
          reverse_sweep<Traits, true>(thread, shared, coord, p, plan, {begin, first, steps}, 0, has_gate);
        } else {
          reverse_sweep<Traits, false>(thread, shared, coord, p, plan, {begin, first, steps}, subtile_resets | padding,
                                       has_gate);
        }
      }
      __syncthreads();
      if constexpr (Shared::kStateVectors == 1) {
        reduce_partials<Traits>(shared, p, plan, 0, {begin, block_begin, steps});
        __syncthreads();
      }
    }
    backward_epilogue<Traits>(shared, grad_D, grad_bias, steps, p.delta_softplus != 0, has_gate, precise);
    __syncthreads();
    const auto write = [&](const wmk_view& view, char* origin, const T* tile) {
      if (view.data == nullptr) return;
      ChannelTile::write(tile, kPitch, channel_rows(origin, view), begin, dtype, work.channels, steps);
    };
    write(p.grad_u, shared.origin_grad_u, shared.u);
    write(p.grad_delta, shared.origin_grad_delta, shared.step);
    write(p.grad_z, shared.origin_grad_z, shared.gate);
    __syncthreads();
    end = begin;
  }

  T grad_A[kStates];
#pragma unroll
  for (int j = 0; j < Shared::kStateVectors; ++j) {
    const Vec4<T> vec = load_grad_A<Traits>(thread, shared, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) grad_A[4 * j + k] = vec.value[k];
  }
  store_states(grad_A, coord, states, plan.partial_A, partial_offset(thread, work, coord, p));
  // Adjacent threads hold a channel's partial sums.
  constexpr int kStepGroups = kSteps / 4;
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) {
#pragma unroll
    for (int distance = 1; distance < kStepGroups; distance *= 2) {
      grad_D[i] += __shfl_xor_sync(0xffffffffu, grad_D[i], distance);
      grad_bias[i] += __shfl_xor_sync(0xffffffffu, grad_bias[i], distance);
    }
    int row, first;
    ChannelTile::template position<true>(i, row, first);
    if (ChannelTile::in_tile(i) && first == 0 && row < work.channels) {
      const int64_t at = work.segment * p.channels + work.channel + row;
      static_cast<T*>(plan.partial_D)[at] = grad_D[i];
      static_cast<T*>(plan.partial_bias)[at] = grad_bias[i];
    }
  }
  if (work.exists && work.segment_in_sequence == 0 && p.grad_initial_state.data != nullptr) {
    store_states(thread.dh, coord, states, p.grad_initial_state.data,
                 (work.sequence * p.channels + coord.channel) * p.state);
  }
}

}  // namespace wmk
