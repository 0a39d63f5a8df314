// Selective scan, forward, on a GPU.
//
// LANES threads share a channel and keep its states in registers; a block's tile of channels reads B and C from shared
// memory, where they are converted once. Time goes by in tiles of 32 steps, fetched while the one before is computed.
// Per state and step: one multiplication and one exponential on the special-function unit for the decay, one
// multiplication and two multiply-adds. Sums over states cost three shuffles for four steps. D u and the gate are
// added once a tile is through, four steps a thread at a time. So nothing larger than the inputs is read or
// written, and the special-function unit (one exponential a state, softplus and gate two each) is what bounds it.
//
// LOCAL is the first of three passes where time is split: it runs a segment from a zero state and keeps only where that
// leads and by how much the segment decays what enters it.
#pragma once

#include <type_traits>

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

template <typename Configuration, bool LOCAL>
struct ForwardShared {
  using T = typename Configuration::T;
  using C = Configuration;
  alignas(16) T u[C::kChannels * C::kPitch];
  alignas(16) T step[C::kChannels * C::kPitch];              // delta after bias and softplus, then the output
  alignas(16) T gate[LOCAL ? 4 : C::kChannels * C::kPitch];  // z
  alignas(16) T B_tile[C::kStateRows * C::kStatePitch];      // [steps, states], or [channels, states] where constant
  alignas(16) T C_tile[LOCAL ? 4 : C::kStateRows * C::kStatePitch];
  T D[C::kChannels];
  T bias[C::kChannels];
  char *origin_u, *origin_delta, *origin_z, *origin_B, *origin_C, *origin_out;
  BlockPart part;
  alignas(16) uint32_t resets;
};

// Advances the states by four steps; y: what C makes of them. Four states go through all four steps before the next
// four do, so that few numbers are in registers at a time.
template <typename Configuration, bool LOCAL, bool RESETS, typename T = typename Configuration::T>
__device__ __forceinline__ void advance(T (&h)[Configuration::kStates], const T (&A)[Configuration::kStates], T (&y)[4],
                                        const Quad<T>& step, const Quad<T>& u, const T* B, int B_pitch, const T* C,
                                        int C_pitch, uint32_t resets) {
  constexpr int kStates = Configuration::kStates;
  constexpr int kFar = 4 * Configuration::kLanes;  // from a thread's four states to its next four
#pragma unroll
  for (int j = 0; j < kStates / 4; ++j) {
#pragma unroll Configuration::kUnroll
    for (int t = 0; t < 4; ++t) {
      if (RESETS && (resets >> t & 1u)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) h[4 * j + i] = T(0);
      }
      const T this_step = pick(step.value, t), input = this_step * pick(u.value, t);
      T sum = j == 0 ? T(0) : pick(y, t);
      const Quad<T> b = load_quad(B + t * B_pitch + j * kFar);
      Quad<T> c;
      if (!LOCAL) c = load_quad(C + t * C_pitch + j * kFar);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T& state = h[4 * j + i];
        state = exp2_fast(this_step * A[4 * j + i]) * state + input * b.value[i];
        if (!LOCAL) sum += c.value[i] * state;
      }
      put(y, t, sum);
    }
  }
}

// From y: the output, in its place.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void finish(T* y_tile, const T* u_tile, const T* z_tile, const T* D, bool has_gate,
                                       bool precise) {
  using ChannelTile = typename Configuration::ChannelTile;
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) {
    if (!ChannelTile::in_tile(i)) break;
    int row, step;
    ChannelTile::template position<true>(i, row, step);
    const int at = row * Configuration::kPitch + step;
    Quad<T> y = load_quad(y_tile + at);
    const Quad<T> u = load_quad(u_tile + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) y.value[j] += D[row] * u.value[j];
    if (has_gate) {
      const Quad<T> z = load_quad(z_tile + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) y.value[j] *= z.value[j] * sigmoid(z.value[j], precise);
    }
    store_quad(y_tile + at, y);
  }
}

template <typename Configuration, bool LOCAL>
__global__ void __launch_bounds__(Configuration::kThreads, Configuration::kForwardBlocks)
    selective_scan_forward_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p, const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Configuration::T;
  using ChannelTile = typename Configuration::ChannelTile;
  using StateTile = typename Configuration::StateTile;
  constexpr int kStates = Configuration::kStates, kLanes = Configuration::kLanes;
  constexpr int kPitch = Configuration::kPitch, kStatePitch = Configuration::kStatePitch;
  constexpr int kSteps = Configuration::kSteps;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<ForwardShared<Configuration, LOCAL>*>(memory);
  const Slots<Configuration> slots(memory + sizeof(ForwardShared<Configuration, LOCAL>), Configuration::dtype(p));

  if (threadIdx.x == 0) {
    const BlockPart part = block_part<Configuration>(p, plan);
    shared.part = part;
    shared.origin_u = channel_origin(p.u, p, part);
    shared.origin_delta = channel_origin(p.delta, p, part);
    shared.origin_z = channel_origin(p.z, p, part);
    shared.origin_B = state_origin(p.B, p, part);
    shared.origin_C = state_origin(p.C, p, part);
    shared.origin_out = channel_origin(p.out, p, part);
  }
  __syncthreads();
  const BlockPart& part = shared.part;
  if (!part.exists || (LOCAL && part.index + 1 == part.count)) return;
  const ThreadPlace<Configuration> place(part);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Configuration::dtype(p);
  const bool precise = Configuration::precise(p);
  const bool has_gate = !LOCAL && p.z.data != nullptr;

  T A[kStates], h[kStates];
  load_states(A, place, states, p.A.data, place.channel * p.A.stride[0], p.A.stride[1]);
#pragma unroll
  for (int i = 0; i < kStates; ++i) A[i] *= log2_e(T(0));

  if (part.index > 0 && !LOCAL) {
    load_states(h, place, states, plan.boundary, (part.slot * p.channels + place.channel) * p.state, 1);
  } else if (part.index == 0 && p.initial_state.data != nullptr) {
    load_states(h, place, states, p.initial_state.data,
                part.sequence * p.initial_state.stride[0] + place.channel * p.initial_state.stride[1],
                p.initial_state.stride[2]);
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = T(0);
  }

  place_parameter<Configuration>(shared.D, p.D, part);
  place_parameter<Configuration>(shared.bias, p.delta_bias, part);
  if (!p.B_varies) place_constant<Configuration>(shared.B_tile, p.B, p, part);
  if (!LOCAL && !p.C_varies) place_constant<Configuration>(shared.C_tile, p.C, p, part);
  const T* B = shared.B_tile + (p.B_varies ? 0 : place.row * kStatePitch) + 4 * place.quarter;
  const T* C = shared.C_tile + (p.C_varies || LOCAL ? 0 : place.row * kStatePitch) + 4 * place.quarter;
  const int B_pitch = p.B_varies ? kStatePitch : 0, C_pitch = p.C_varies ? kStatePitch : 0;

  // A tile ends where a chunk does, if chunks are saved.
  const bool saves = !LOCAL && p.chunk_states.data != nullptr;
  int64_t chunk = part.first_chunk, chunk_end = saves ? (chunk + 1) * p.chunk : part.end;
  const auto tile_end = [&](int64_t begin, int64_t limit) {
    const int64_t end = begin + kSteps < part.end ? begin + kSteps : part.end;
    return end < limit ? end : limit;
  };
  const auto fetch = [&](int64_t begin, int steps) {
    ChannelTile::fetch(slots.u, channel_rows(shared.origin_u, p.u), begin, dtype, part.channels, steps);
    ChannelTile::fetch(slots.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, part.channels, steps);
    if (p.B_varies) StateTile::fetch(slots.B, state_rows(shared.origin_B, p.B), begin, dtype, states, steps);
    if (LOCAL) return;
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
  int64_t begin = part.begin, end = tile_end(begin, chunk_end);
  bool chunk_begins = saves && begin == chunk * p.chunk;
  if (begin < part.end) fetch(begin, static_cast<int>(end - begin));
  __syncthreads();
  while (begin < part.end) {
    const int steps = static_cast<int>(end - begin);
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
    if (has_gate) {
      ChannelTile::template place<false>(shared.gate, kPitch, slots.z, channel_rows(shared.origin_z, p.z).along_time(),
                                         dtype, part.channels, steps, same);
    }
    if (!LOCAL && p.C_varies) {
      StateTile::template place<true>(shared.C_tile, kStatePitch, slots.C,
                                      state_rows(shared.origin_C, p.C).along_time(), dtype, states, steps, same);
    }
    place_resets<Configuration>(&shared.resets, p, part, begin, steps);
    __syncthreads();

    if (chunk_begins) {
      store_states(h, place, states, p.chunk_states.data,
                   ((part.chunk_slot + chunk) * p.channels + place.channel) * p.state);
    }
    chunk_begins = saves && end == chunk_end;
    if (chunk_begins) {
      ++chunk;
      chunk_end += p.chunk;
    }
    const int64_t next_end = tile_end(end, chunk_end);
    if (end < part.end) fetch(end, static_cast<int>(next_end - end));
    const uint32_t resets = shared.resets;
    if (resets != 0) forgets = true;
    T* row_step = shared.step + place.row * kPitch;
    const T* row_u = shared.u + place.row * kPitch;
    // Eight steps at a time where registers last, so that two sums over states are under way at once. What C makes of a
    // step takes the place of its size, which all the channel's threads have read by then.
    constexpr int kQuads = kStates == 4 ? 2 : 1;
    const auto run = [&](auto with_resets, int first) {
      T y[kQuads][4];
#pragma unroll
      for (int half = 0; half < kQuads; ++half) {
        const int at = first + 4 * half;
        const Quad<T> step = load_quad(row_step + at), u = load_quad(row_u + at);
        advance<Configuration, LOCAL, decltype(with_resets)::value>(h, A, y[half], step, u, B + at * B_pitch, B_pitch,
                                                                    C + at * C_pitch, C_pitch, resets >> at);
        if (LOCAL) total_step += (step.value[0] + step.value[1]) + (step.value[2] + step.value[3]);
      }
      if (!LOCAL) __syncwarp();  // all the channel's threads have read the sizes
#pragma unroll
      for (int half = 0; half < kQuads; ++half) {
        if constexpr (!LOCAL) {
          const T sum = sum_over_lanes<kLanes>(y[half], place.quarter);
          if (place.quarter < 4) row_step[first + 4 * half + place.quarter] = sum;
        }
      }
    };
    if (resets == 0) {
#pragma unroll 1
      for (int first = 0; first < steps; first += 4 * kQuads) run(std::false_type(), first);
    } else {
#pragma unroll 1
      for (int first = 0; first < steps; first += 4 * kQuads) run(std::true_type(), first);
    }
    __syncthreads();
    if (!LOCAL) {
      finish<Configuration>(shared.step, shared.u, shared.gate, shared.D, has_gate, precise);
      const StridedRows to = channel_rows(shared.origin_out, p.out);
      // whole tiles along time are written by the threads that finished them
      if (!to.along_time() || part.channels < Configuration::kChannels || steps < kSteps ||
          !to.aligned(to.data + begin * to.time_stride * element_size(dtype), element_size(dtype))) {
        __syncthreads();
      }
      ChannelTile::write(shared.step, kPitch, to, begin, dtype, part.channels, steps);
      __syncthreads();
    }
    begin = end;
    end = next_end;
  }

  if (LOCAL) {
    const int64_t offset = (part.slot * p.channels + place.channel) * p.state;
    store_states(h, place, states, plan.boundary, offset);
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = exp2_fast(total_step * A[i]);
    store_states(h, place, states, plan.decay, offset);
    if (threadIdx.x == 0) plan.forgets[part.slot * plan.tiles + part.tile] = forgets;
  } else if (part.index + 1 == part.count) {
    store_states(h, place, states, p.last_state.data, (part.sequence * p.channels + place.channel) * p.state);
  }
}

}  // namespace wmk
