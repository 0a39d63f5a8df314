// Selective scan, forward, on a GPU.
//
// States stay in registers. A block converts B and C once for its channels, in shared memory; D u and the gate are
// applied per tile.
//
// Per state and step: one exponential, two multiplications, two multiply-adds. Bytes per element, bf16 with gate: 8,
// and 2 for chunk states. Bound by instruction issue, then shared-memory reads, then exponentials (softplus and gate:
// two each).
//
// LOCAL: each segment's final state from zero, and its decay.
#pragma once

#include <type_traits>

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

template <typename Traits, bool LOCAL>
struct ForwardShared {
  using T = typename Traits::T;
  using C = Traits;
  alignas(16) T u[C::kChannels * C::kPitch];
  alignas(16) T step[C::kChannels * C::kPitch];              // softplus(delta + bias), then the output
  alignas(16) T gate[LOCAL ? 4 : C::kChannels * C::kPitch];  // z
  alignas(16) T B_tile[C::kStateRows * C::kStatePitch];      // [steps, states]; constant: [channels, states]
  alignas(16) T C_tile[LOCAL ? 4 : C::kStateRows * C::kStatePitch];
  T D[C::kChannels];
  T bias[C::kChannels];
  char *origin_u, *origin_delta, *origin_z, *origin_B, *origin_C, *origin_out;
  WorkTile work;
  alignas(16) uint32_t resets;
};

// Four steps; y = C h. Four states at a time keep few values live.
template <typename Traits, bool LOCAL, bool RESETS, typename T = typename Traits::T>
__device__ __forceinline__ void advance(T (&h)[Traits::kStates], const T (&A)[Traits::kStates], T (&y)[4],
                                        const Vec4<T>& step, const Vec4<T>& u, const T* B, int B_pitch, const T* C,
                                        int C_pitch, uint32_t resets) {
  constexpr int kStates = Traits::kStates;
  constexpr int kStateStride = 4 * Traits::kLanes;
#pragma unroll
  for (int j = 0; j < kStates / 4; ++j) {
#pragma unroll Traits::kUnroll
    for (int t = 0; t < 4; ++t) {
      const T this_step = select(step.value, t), input = this_step * select(u.value, t);
      const bool reset = RESETS && (resets >> t & 1u);
      T sum = j == 0 ? T(0) : select(y, t);
      const Vec4<T> b = load_vec4(B + t * B_pitch + j * kStateStride);
      Vec4<T> c;
      if (!LOCAL) c = load_vec4(C + t * C_pitch + j * kStateStride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T& state = h[4 * j + i];
        // selected: an infinite decay would turn a zero state into NaN
        const T kept = reset ? T(0) : exp2_fast(this_step * A[4 * j + i]) * state;
        state = kept + input * b.value[i];
        if (!LOCAL) sum += c.value[i] * state;
      }
      insert(y, t, sum);
    }
  }
}

template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void epilogue(T* y_tile, const T* u_tile, const T* z_tile, const T* D, bool has_gate,
                                         bool precise) {
  using ChannelTile = typename Traits::ChannelTile;
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) {
    if (!ChannelTile::in_tile(i)) break;
    int row, step;
    ChannelTile::template position<true>(i, row, step);
    const int at = row * Traits::kPitch + step;
    Vec4<T> y = load_vec4(y_tile + at);
    const Vec4<T> u = load_vec4(u_tile + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) y.value[j] += D[row] * u.value[j];
    if (has_gate) {
      const Vec4<T> z = load_vec4(z_tile + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) y.value[j] *= z.value[j] * sigmoid(z.value[j], precise);
    }
    store_vec4(y_tile + at, y);
  }
}

template <typename Traits, bool LOCAL>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kForwardBlocks)
    selective_scan_forward_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p, const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Traits::T;
  using ChannelTile = typename Traits::ChannelTile;
  using StateTile = typename Traits::StateTile;
  constexpr int kStates = Traits::kStates;
  constexpr int kPitch = Traits::kPitch, kStatePitch = Traits::kStatePitch;
  constexpr int kSteps = Traits::kSteps;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<ForwardShared<Traits, LOCAL>*>(memory);
  const StageBuffers<Traits> stages(memory + sizeof(ForwardShared<Traits, LOCAL>), Traits::dtype(p));

  if (threadIdx.x == 0) {
    const WorkTile work = work_tile<Traits>(p, plan);
    shared.work = work;
    shared.origin_u = channel_origin(p.u, p, work);
    shared.origin_delta = channel_origin(p.delta, p, work);
    shared.origin_z = channel_origin(p.z, p, work);
    shared.origin_B = state_origin(p.B, p, work);
    shared.origin_C = state_origin(p.C, p, work);
    shared.origin_out = channel_origin(p.out, p, work);
  }
  __syncthreads();
  const WorkTile& work = shared.work;
  if (!work.exists || (LOCAL && work.segment_in_sequence + 1 == work.segments_in_sequence)) return;
  const ThreadCoord<Traits> coord(work);
  const int states = static_cast<int>(p.state);
  const int64_t dtype = Traits::dtype(p);
  const bool precise = Traits::precise(p);
  const bool has_gate = !LOCAL && p.z.data != nullptr;

  T A[kStates], h[kStates];
  load_decay_rates(A, coord, p);
  if (work.segment_in_sequence > 0 && !LOCAL) {
    load_states(h, coord, states, plan.boundary, (work.segment * p.channels + coord.channel) * p.state, 1);
  } else if (work.segment_in_sequence == 0 && p.initial_state.data != nullptr) {
    load_states(h, coord, states, p.initial_state.data,
                work.sequence * p.initial_state.stride[0] + coord.channel * p.initial_state.stride[1],
                p.initial_state.stride[2]);
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = T(0);
  }

  load_parameter<Traits>(shared.D, p.D, work);
  load_parameter<Traits>(shared.bias, p.delta_bias, work);
  if (!p.B_varies) load_constant<Traits>(shared.B_tile, p.B, p, work);
  if (!LOCAL && !p.C_varies) load_constant<Traits>(shared.C_tile, p.C, p, work);
  const T* B = shared.B_tile + (p.B_varies ? 0 : coord.row * kStatePitch) + 4 * coord.state_lane;
  const T* C = shared.C_tile + (p.C_varies || LOCAL ? 0 : coord.row * kStatePitch) + 4 * coord.state_lane;
  const int B_pitch = p.B_varies ? kStatePitch : 0, C_pitch = p.C_varies ? kStatePitch : 0;

  // A tile ends where a saved chunk ends.
  const bool saves = !LOCAL && p.chunk_states.data != nullptr;
  int64_t chunk = work.first_chunk, chunk_end = saves ? (chunk + 1) * p.chunk : work.end;
  const auto tile_end = [&](int64_t begin, int64_t limit) {
    const int64_t end = begin + kSteps < work.end ? begin + kSteps : work.end;
    return end < limit ? end : limit;
  };
  const auto fetch = [&](int64_t begin, int steps) {
    ChannelTile::fetch(stages.u, channel_rows(shared.origin_u, p.u), begin, dtype, work.channels, steps);
    ChannelTile::fetch(stages.delta, channel_rows(shared.origin_delta, p.delta), begin, dtype, work.channels, steps);
    if (p.B_varies) StateTile::fetch(stages.B, state_rows(shared.origin_B, p.B), begin, dtype, states, steps);
    if (LOCAL) return;
    if (has_gate) {
      ChannelTile::fetch(stages.z, channel_rows(shared.origin_z, p.z), begin, dtype, work.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(stages.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto identity = [](T value, int) { return value; };
  // Captured by value: constants stay constants.
  const auto step_size = [precise, bias = shared.bias, softplus_on = p.delta_softplus != 0](T value, int row) {
    value += bias[row];
    return softplus_on ? softplus(value, precise) : value;
  };

  T total_step = T(0);
  bool reset = false;
  int64_t begin = work.begin, end = tile_end(begin, chunk_end);
  bool chunk_begins = saves && begin == chunk * p.chunk;
  if (begin < work.end) fetch(begin, static_cast<int>(end - begin));
  __syncthreads();
  while (begin < work.end) {
    const int steps = static_cast<int>(end - begin);
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
    if (has_gate) {
      ChannelTile::template store<false>(shared.gate, kPitch, stages.z, channel_rows(shared.origin_z, p.z).along_time(),
                                         dtype, work.channels, steps, identity);
    }
    if (!LOCAL && p.C_varies) {
      StateTile::template store<true>(shared.C_tile, kStatePitch, stages.C,
                                      state_rows(shared.origin_C, p.C).along_time(), dtype, states, steps, identity);
    }
    load_resets<Traits>(&shared.resets, p, work, begin, steps);
    __syncthreads();

    if (chunk_begins) {
      store_states(h, coord, states, p.chunk_states.data,
                   ((work.chunk_base + chunk) * p.channels + coord.channel) * p.state);
    }
    chunk_begins = saves && end == chunk_end;
    if (chunk_begins) {
      ++chunk;
      chunk_end += p.chunk;
    }
    const int64_t next_end = tile_end(end, chunk_end);
    if (end < work.end) fetch(end, static_cast<int>(next_end - end));
    const uint32_t resets = shared.resets;
    if (resets != 0) reset = true;
    T* row_step = shared.step + coord.row * kPitch;
    const T* row_u = shared.u + coord.row * kPitch;
    // Eight steps where registers allow: two sums over states overlap. y overwrites step sizes already read.
    constexpr int kQuads = kStates == 4 ? 2 : 1;
    const auto run = [&](auto with_resets, int first) {
      T y[kQuads][4];
#pragma unroll
      for (int half = 0; half < kQuads; ++half) {
        const int at = first + 4 * half;
        const Vec4<T> step = load_vec4(row_step + at), u = load_vec4(row_u + at);
        advance<Traits, LOCAL, decltype(with_resets)::value>(h, A, y[half], step, u, B + at * B_pitch, B_pitch,
                                                             C + at * C_pitch, C_pitch, resets >> at);
        if (LOCAL) total_step += (step.value[0] + step.value[1]) + (step.value[2] + step.value[3]);
      }
      if (!LOCAL) __syncwarp();  // step sizes have been read
#pragma unroll
      for (int half = 0; half < kQuads; ++half) {
        if constexpr (!LOCAL) {
          const T sum = sum_over_lanes<Traits::kLanes>(y[half], coord.state_lane);
          if (coord.state_lane < 4) row_step[first + 4 * half + coord.state_lane] = sum;
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
      epilogue<Traits>(shared.step, shared.u, shared.gate, shared.D, has_gate, precise);
      const StridedRows to = channel_rows(shared.origin_out, p.out);
      // full tiles along time: each thread writes its own results
      if (!to.along_time() || work.channels < Traits::kChannels || steps < kSteps ||
          !to.aligned(to.data + begin * to.time_stride * element_size(dtype), element_size(dtype))) {
        __syncthreads();
      }
      ChannelTile::write(shared.step, kPitch, to, begin, dtype, work.channels, steps);
      __syncthreads();
    }
    begin = end;
    end = next_end;
  }

  if (LOCAL) {
    const int64_t offset = (work.segment * p.channels + coord.channel) * p.state;
    store_states(h, coord, states, plan.boundary, offset);
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = exp2_fast(total_step * A[i]);
    store_states(h, coord, states, plan.decay, offset);
    if (threadIdx.x == 0) plan.reset[work.segment * plan.tiles + work.tile] = reset;
  } else if (work.segment_in_sequence + 1 == work.segments_in_sequence) {
    store_states(h, coord, states, p.last_state.data, (work.sequence * p.channels + coord.channel) * p.state);
  }
}

}  // namespace wmk
