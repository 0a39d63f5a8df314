// Selective scan, backward, on a GPU.
//
// Blocks and threads as forward. A block walks over its segment from the end in tiles of 32 steps. In a tile it first
// runs forward from the saved state and keeps the state at every four steps in shared memory; then, last part first, it
// runs four steps forward with every decay and state in registers, and four steps backward:
//
//   g_t = C_t dy_t + x_{t+1}        gradient of h_t; x: what the later steps send back
//   x_t = a_t g_t                   gradient of h_{t-1}, with a_t = exp(step_t A)
//   dB_t += step_t u_t g_t          dC_t += dy_t h_t                       summed over channels
//   du_t  = step_t sum_n g_t B_t    dstep_t = u_t sum_n g_t B_t + sum_n A x_t h_{t-1}
//   dA   += step_t x_t h_{t-1}
//
// Sums over states are three shuffles for four steps. Sums over channels: those of a warp every four steps, on the
// tensor cores for 16-bit data (whose gradients are rounded far more than the ten bits that those keep of each product)
// and through shared memory otherwise; those of a block's warps every four steps (eight, where there are the tensor
// cores' sums; four states a thread at a time, where a thread has more); and each block writes its share, which
// sum_tiles_kernel adds to the others in a fixed order. So no atomics, and the same bits every time.
//
// Where time is split, selective_scan_backward_local_kernel first finds what each segment sends back from nothing and
// combine_kernel.cuh chains the segments, as forward.
#pragma once

#include "cuda/selective_scan/selective_scan_backward_local_kernel.cuh"
#include "cuda/selective_scan/selective_scan_backward_steps.cuh"
#include "cuda/selective_scan/selective_scan_forward_kernel.cuh"

namespace wmk {

// Blocks that a multiprocessor should hold, for the compiler to share out the registers: no more than two of fp32 data,
// which is what shared memory has room for.
template <typename Configuration>
constexpr int kBackwardKernelBlocks = Configuration::kDtype == WMK_FLOAT32 ? 2 : Configuration::kBackwardBlocks;

template <typename Configuration>
__global__ void __launch_bounds__(Configuration::kThreads, kBackwardKernelBlocks<Configuration>)
    selective_scan_backward_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p,
                                   const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Configuration::T;
  using ChannelTile = typename Configuration::ChannelTile;
  using StateTile = typename Configuration::StateTile;
  constexpr int kStates = Configuration::kStates;
  constexpr int kPitch = Configuration::kPitch, kStatePitch = Configuration::kStatePitch;
  constexpr int kSteps = Configuration::kSteps;
  WMK_SHARED_MEMORY(memory);
  using Shared = BackwardShared<Configuration>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Slots<Configuration> slots(memory + sizeof(Shared), Configuration::dtype(p));

  if (threadIdx.x == 0) {
    const BlockPart part = block_part<Configuration>(p, plan);
    shared.part = part;
    shared.origin_delta = channel_origin(p.delta, p, part);
    shared.origin_grad_out = channel_origin(p.grad_out, p, part);
    shared.origin_z = channel_origin(p.z, p, part);
    shared.origin_C = state_origin(p.C, p, part);
    shared.origin_u = channel_origin(p.u, p, part);
    shared.origin_B = state_origin(p.B, p, part);
    shared.origin_grad_u = channel_origin(p.grad_u, p, part);
    shared.origin_grad_delta = channel_origin(p.grad_delta, p, part);
    shared.origin_grad_z = channel_origin(p.grad_z, p, part);
    shared.share_origin = (part.batch * plan.tiles + part.tile) * p.state * p.time + part.offset;
  }
  __syncthreads();
  const BlockPart& part = shared.part;
  const ThreadPlace<Configuration> place(part);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Configuration::dtype(p);
  const bool precise = Configuration::precise(p);
  const bool has_gate = p.z.data != nullptr;

  BackwardThread<Configuration> thread;
  load_states(thread.A, place, states, p.A.data, place.channel * p.A.stride[0], p.A.stride[1]);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    thread.A[i] *= log2_e(T(0));
    thread.x[i] = thread.grad_A[i] = T(0);
  }
  if constexpr (Shared::kFours > 1) {
    store_checkpoint<Configuration>(thread.A, shared.A);
    store_checkpoint<Configuration>(thread.grad_A, shared.grad_A);
  }
  T grad_D[ChannelTile::kPerThread], grad_bias[ChannelTile::kPerThread];
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) grad_D[i] = grad_bias[i] = T(0);
  const int64_t channel_offset = part.slot * p.channels + place.channel;
  thread.partial_offset = channel_offset * p.state;
  if (!p.B_varies) store_states(thread.x, place, states, plan.partial_B, thread.partial_offset);  // zeros
  if (!p.C_varies) store_states(thread.x, place, states, plan.partial_C, thread.partial_offset);
  if (part.index + 1 < part.count) {
    load_states(thread.x, place, states, plan.boundary, (part.slot * p.channels + place.channel) * p.state, 1);
  } else if (p.grad_last_state.data != nullptr && part.exists) {
    load_states(thread.x, place, states, p.grad_last_state.data,
                part.sequence * p.grad_last_state.stride[0] + place.channel * p.grad_last_state.stride[1],
                p.grad_last_state.stride[2]);
  }
  place_parameter<Configuration>(shared.D, p.D, part);
  place_parameter<Configuration>(shared.bias, p.delta_bias, part);
  if (!p.B_varies) place_constant<Configuration>(shared.B_tile, p.B, p, part);
  if (!p.C_varies) place_constant<Configuration>(shared.C_tile, p.C, p, part);
  thread.B = shared.B_tile + (p.B_varies ? 0 : place.row * kStatePitch) + 4 * place.quarter;
  thread.C = shared.C_tile + (p.C_varies ? 0 : place.row * kStatePitch) + 4 * place.quarter;
  thread.B_pitch = p.B_varies ? kStatePitch : 0;
  thread.C_pitch = p.C_varies ? kStatePitch : 0;

  const auto same = [](T value, int) { return value; };
  // By value, so that what is constant stays so.
  const auto step_size = [precise, bias = shared.bias, soft = p.delta_softplus != 0](T value, int row) {
    value += bias[row];
    return soft ? softplus(value, precise) : value;
  };
  const auto fetch_inputs = [&](int64_t begin, int steps) {
    ChannelTile::fetch(slots.u, channel_rows(shared.origin_u, p.u), begin, dtype, part.channels, steps);
    ChannelTile::fetch(slots.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, part.channels, steps);
    if (p.B_varies) StateTile::fetch(slots.B, state_rows(shared.origin_B, p.B), begin, dtype, states, steps);
  };
  const auto fetch_rest = [&](int64_t begin, int steps) {
    ChannelTile::fetch(slots.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, part.channels,
                       steps);
    if (has_gate) {
      ChannelTile::fetch(slots.z, channel_rows(shared.origin_z, p.z), begin, dtype, part.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(slots.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto place_inputs = [&](int64_t begin, int steps) {
    copy_async_wait();
    ChannelTile::template place<false>(shared.u, kPitch, slots.u, channel_rows(shared.origin_u, p.u).along_time(),
                                       dtype, part.channels, steps, same);
    ChannelTile::template place<false>(shared.step, kPitch, slots.delta,
                                       channel_rows(shared.origin_delta, p.delta).along_time(), dtype, part.channels,
                                       steps, step_size);
    if (p.B_varies) {
      StateTile::template place<true>(shared.B_tile, kStatePitch, slots.B,
                                      state_rows(shared.origin_B, p.B).along_time(), dtype, states, steps, same);
    }
    place_resets<Configuration>(&shared.resets, p, part, begin, steps);
  };
  T h[kStates];
  // Runs forward over parts [0, parts) of a tile, leaving their start states in checkpoint, and what follows in h.
  const auto run_forward = [&](int parts) {
    const uint32_t resets = shared.resets;
    T A[kStates];
#pragma unroll
    for (int j = 0; j < Shared::kFours; ++j) {
      const Quad<T> four = load_A<Configuration>(thread, shared, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) A[4 * j + k] = four.value[k];
    }
    const T* row_step = shared.step + place.row * kPitch;
    const T* row_u = shared.u + place.row * kPitch;
    for (int sub = 0; sub < parts; ++sub) {
      store_checkpoint<Configuration>(h, shared.checkpoint[sub]);
      const int at = sub * kSub;
      T unused[4];
      const uint32_t here = resets >> at & 15u;
      const Quad<T> step = load_quad(row_step + at), u = load_quad(row_u + at);
      if (here == 0) {
        advance<Configuration, true, false>(h, A, unused, step, u, thread.B + at * thread.B_pitch, thread.B_pitch,
                                            thread.C, 0, 0);
      } else {
        advance<Configuration, true, true>(h, A, unused, step, u, thread.B + at * thread.B_pitch, thread.B_pitch,
                                           thread.C, 0, here);
      }
    }
  };

  int64_t end = part.exists ? part.end : part.begin;
  int64_t chunk = part.last_chunk, chunk_begin = chunk * p.chunk;
  bool fetched = false;
  __syncthreads();
  while (end > part.begin) {
    const int64_t begin = chunk_begin + (end - 1 - chunk_begin) / kSteps * kSteps;
    const int steps = static_cast<int>(end - begin);
    load_states(h, place, states, p.chunk_states.data,
                ((part.chunk_slot + chunk) * p.channels + place.channel) * p.state, 1);
    for (int64_t replay = chunk_begin; replay < begin; replay += kSteps) {
      fetch_inputs(replay, kSteps);
      place_inputs(replay, kSteps);
      __syncthreads();
      run_forward(kSteps / kSub);
      __syncthreads();
    }
    if (!fetched) {
      fetch_inputs(begin, steps);
      fetch_rest(begin, steps);
    }
    place_inputs(begin, steps);
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
    __syncthreads();
    // The next tile can be on its way unless states before it must be computed first, through the same memory.
    fetched = begin > part.begin && p.chunk <= kSteps;
    if (begin == chunk_begin) {
      --chunk;
      chunk_begin -= p.chunk;
    }
    if (fetched) {
      fetch_inputs(chunk_begin, static_cast<int>(begin - chunk_begin));
      fetch_rest(chunk_begin, static_cast<int>(begin - chunk_begin));
    }
    if (has_gate) {
      gate_backward<Configuration>(shared.grad, shared.gate, precise);
      __syncthreads();
    }

    const int parts = (steps + kSub - 1) / kSub;
    run_forward(parts - 1);
    store_checkpoint<Configuration>(h, shared.checkpoint[parts - 1]);
    const uint32_t resets = shared.resets;
    constexpr int kBlockSteps = Shared::kBlockSteps;
    for (int block_begin = (steps - 1) / kBlockSteps * kBlockSteps; block_begin >= 0; block_begin -= kBlockSteps) {
#pragma unroll 1
      for (int first = block_begin + kBlockSteps - kSub; first >= block_begin; first -= kSub) {
        if (first >= steps) continue;
        const uint32_t here = resets >> first & ((1u << kSub) - 1u);
        if (here == 0 && p.B_varies && p.C_varies) {
          backward_steps<Configuration, true>(thread, shared, place, p, plan, {begin, first, steps}, 0, has_gate);
        } else {
          backward_steps<Configuration, false>(thread, shared, place, p, plan, {begin, first, steps}, here, has_gate);
        }
      }
      __syncthreads();
      if constexpr (Shared::kFours == 1) {
        write_shares<Configuration>(shared, p, plan, 0, {begin, block_begin, steps});
        __syncthreads();
      }
    }
    finish_backward<Configuration>(shared, grad_D, grad_bias, steps, p.delta_softplus != 0, has_gate, precise);
    __syncthreads();
    const auto write = [&](const wmk_view& view, char* origin, const T* tile) {
      if (view.data == nullptr) return;
      ChannelTile::write(tile, kPitch, channel_rows(origin, view), begin, dtype, part.channels, steps);
    };
    write(p.grad_u, shared.origin_grad_u, shared.u);
    write(p.grad_delta, shared.origin_grad_delta, shared.step);
    write(p.grad_z, shared.origin_grad_z, shared.gate);
    __syncthreads();
    end = begin;
  }

  T grad_A[kStates];
#pragma unroll
  for (int j = 0; j < Shared::kFours; ++j) {
    const Quad<T> four = load_grad_A<Configuration>(thread, shared, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) grad_A[4 * j + k] = four.value[k];
  }
  store_states(grad_A, place, states, plan.partial_A, partial_offset(thread, part, place, p));
  // A channel's sums for D and delta_bias lie with the neighbouring threads that finished its steps.
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
    if (ChannelTile::in_tile(i) && first == 0 && row < part.channels) {
      const int64_t at = part.slot * p.channels + part.channel + row;
      static_cast<T*>(plan.partial_D)[at] = grad_D[i];
      static_cast<T*>(plan.partial_bias)[at] = grad_bias[i];
    }
  }
  if (part.exists && part.index == 0 && p.grad_initial_state.data != nullptr) {
    store_states(thread.x, place, states, p.grad_initial_state.data,
                 (part.sequence * p.channels + place.channel) * p.state);
  }
}

}  // namespace wmk
