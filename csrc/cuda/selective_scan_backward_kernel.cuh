// Selective scan, backward, on a GPU.
//
// Blocks and threads as forward. A block walks over its segment from the end in tiles of 32 steps. In a tile it first
// runs forward from the saved state and keeps the state at every SUB steps in shared memory; then, last part first, it
// runs SUB steps forward with every decay and state in registers, and SUB steps backward:
//
//   g_t = C_t dy_t + x_{t+1}        gradient of h_t; x: what the later steps send back
//   x_t = a_t g_t                   gradient of h_{t-1}, with a_t = exp(step_t A)
//   dB_t += step_t u_t g_t          dC_t += dy_t h_t                       summed over channels
//   du_t  = step_t sum_n g_t B_t    dstep_t = u_t sum_n g_t B_t + sum_n A x_t h_{t-1}
//   dA   += step_t x_t h_{t-1}
//
// Sums over states are three shuffles for four steps. Sums over channels: those of a warp every four steps, on the tensor
// cores for 16-bit data (whose gradients are rounded far more than the ten bits that those keep of each product) and
// through shared memory otherwise; those of a block's warps every SUB steps; and each block writes its share, which
// sum_tiles_kernel adds to the others in a fixed order. So no atomics, and the same bits every time.
//
// Where time is split, selective_scan_backward_local_kernel first finds what each segment sends back from nothing and
// combine_kernel.cuh chains the segments, as forward.
#pragma once

#include "selective_scan_forward_kernel.cuh"

namespace wmk {

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
    ChannelTile::fetch(slots.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, part.channels, steps);
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
      ChannelTile::template place<false>(shared.gate, kPitch, slots.z,
                                         channel_rows(shared.origin_z, p.z).along_time(), dtype, part.channels,
                                         steps, same);
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
#pragma unroll
      for (int t = 3; t >= 0; --t) {
#pragma unroll
        for (int j = 0; j < kStates / 4; ++j) {
          const Quad<T> c = load_quad(C + (first + t) * C_pitch + j * 4 * kLanes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T& back = x[4 * j + i];
            back = exp2_fast(step.value[t] * A[4 * j + i]) * (c.value[i] * grad.value[t] + back);
          }
        }
        if (resets >> (first + t) & 1u) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) x[i] = T(0);
        }
        total_step += step.value[t];
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

template <typename Configuration, int SUB>
struct BackwardShared {
  using T = typename Configuration::T;
  using C = Configuration;
  // How a warp's channels are summed: by the tensor cores, four at a time; through shared memory; or not at all.
  static constexpr bool kTensorSums = C::kWarpChannels == 8 && (C::kDtype == WMK_BFLOAT16 || C::kDtype == WMK_FLOAT16);
  static constexpr bool kAlone = C::kWarpChannels == 1;
  static constexpr bool kUsesProducts = !kTensorSums && !kAlone;
  // one step's products of a warp, for B or C: [channels, states], and a shift of the banks
  static constexpr int kProducts = 32 * C::kStates + 16;
  static constexpr int kBlockSteps = kTensorSums ? 8 : SUB;  // between two sums over the block's warps
  static constexpr int kShares = C::kWarps * (kTensorSums ? 2 : 1);  // sums that the block adds up
  struct alignas(16) Share {
    T sum[2][kBlockSteps][C::kStatePitch];  // [B or C][step][state]
    T shift_of_banks[16];
  };

  alignas(16) T u[C::kChannels * C::kPitch];     // then its gradient
  alignas(16) T step[C::kChannels * C::kPitch];  // then the gradient of delta
  alignas(16) T grad[C::kChannels * C::kPitch];  // of out, then of y
  alignas(16) T gate[C::kChannels * C::kPitch];  // z, then what y is multiplied by, then the gradient of z
  alignas(16) T through_B[C::kChannels * C::kPitch];  // sums over states: of g B,
  alignas(16) T through_A[C::kChannels * C::kPitch];  // of A x h,
  alignas(16) T y[C::kChannels * C::kPitch];          // and of C h
  alignas(16) T B_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T C_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T checkpoint[C::kSteps / SUB][C::kThreads * C::kStates];
  alignas(16) T products[kUsesProducts ? C::kWarps : 1][4][2][kUsesProducts ? kProducts : 4];
  Share shares[kShares];
  T D[C::kChannels];
  T bias[C::kChannels];
  char *origin_u, *origin_delta, *origin_grad_out, *origin_z, *origin_B, *origin_C;
  char *origin_grad_u, *origin_grad_delta, *origin_grad_z;
  int64_t share_origin;  // of the block in tile_B and tile_C
  BlockPart part;
  alignas(16) uint32_t resets;
};

// 1 - exp(-step): softplus's derivative, from its value.
__device__ __forceinline__ float softplus_slope(float step, bool precise) {
  if (precise) return -expm1f(-step);
  const float series = step * (1.0f + step * (-0.5f + step * (1.0f / 6.0f - step * (1.0f / 24.0f))));
  return step < 0.0625f ? series : 1.0f - exp2_fast(-kLog2E * step);
}
__device__ __forceinline__ double softplus_slope(double step, bool) { return -expm1(-step); }

// What a thread carries through its segment.
template <typename Configuration>
struct BackwardThread {
  using T = typename Configuration::T;
  T A[Configuration::kStates];  // times log2(e)
  T x[Configuration::kStates];
  T grad_A[Configuration::kStates];
  int64_t partial_offset;  // of the segment's and channel's numbers in partial_A, partial_B, partial_C
  const T* B;
  const T* C;
  int B_pitch, C_pitch;
};

// A thread's states, to shared memory and back.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void load_checkpoint(T (&h)[Configuration::kStates], const T* checkpoint) {
#pragma unroll
  for (int i = 0; i < Configuration::kStates; i += 4) {
    const Quad<T> quad = load_quad(checkpoint + (i * Configuration::kThreads + 4 * threadIdx.x));
#pragma unroll
    for (int j = 0; j < 4; ++j) h[i + j] = quad.value[j];
  }
}
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void store_checkpoint(const T (&h)[Configuration::kStates], T* checkpoint) {
#pragma unroll
  for (int i = 0; i < Configuration::kStates; i += 4) {
    store_quad(checkpoint + (i * Configuration::kThreads + 4 * threadIdx.x), {{h[i], h[i + 1], h[i + 2], h[i + 3]}});
  }
}

// Adds to the gradient of a B or C that does not vary, where the block collects it; only this thread uses those numbers.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void add_constant(void* partial, const BackwardThread<Configuration>& thread,
                                             const ThreadPlace<Configuration>& place, const wmk_selective_scan& p,
                                             int j, const Quad<T>& grad) {
  if (!place.exists) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int n = place.state(4 * j + k);
    if (n < p.state) static_cast<T*>(partial)[thread.partial_offset + n] += grad.value[k];
  }
}

// 1 + 2^-11 E[1 / m] for a mantissa m in [1, 2) with uniform logarithm, of which ten bits are kept.
constexpr double kMeanOfCut = 1.0 + 0.7213 / 2048.0;

// SUB steps, forward from the checkpoint and back. SIMPLE: no resets, and both B and C vary.
template <typename Configuration, int SUB, bool SIMPLE>
__device__ __forceinline__ void backward_steps(BackwardThread<Configuration>& thread,
                                               BackwardShared<Configuration, SUB>& shared,
                                               const ThreadPlace<Configuration>& place, const wmk_selective_scan& p,
                                               const ScanPlan& plan, int first, uint32_t resets,
                                               bool has_gate) {
  using T = typename Configuration::T;
  using Shared = BackwardShared<Configuration, SUB>;
  constexpr int kStates = Configuration::kStates, kLanes = Configuration::kLanes, kFar = 4 * kLanes;
  constexpr int kPitch = Configuration::kPitch, kPadded = Configuration::kPaddedStates;
  constexpr int kWarpChannels = Configuration::kWarpChannels;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, within = first % Shared::kBlockSteps;
  const T* row_u = shared.u + place.row * kPitch + first;
  const T* row_step = shared.step + place.row * kPitch + first;
  const T* row_grad = shared.grad + place.row * kPitch + first;
  const T* B = thread.B + first * thread.B_pitch;
  const T* C = thread.C + first * thread.C_pitch;
  const int B_pitch = SIMPLE ? Configuration::kStatePitch : thread.B_pitch;
  const int C_pitch = SIMPLE ? Configuration::kStatePitch : thread.C_pitch;
  const auto forgets = [&](int t) { return !SIMPLE && (resets >> t & 1u) != 0; };

  T before[SUB][kStates], decay[SUB][kStates], h[kStates];  // h_{t-1}, a_t
  T y[SUB];
  load_checkpoint<Configuration>(h, shared.checkpoint[first / SUB]);
#pragma unroll
  for (int t = 0; t < SUB; ++t) {
    const T step = row_step[t], input = step * row_u[t];
    if (forgets(t)) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = T(0);
    }
    T sum = T(0);
#pragma unroll
    for (int j = 0; j < kStates / 4; ++j) {
      const Quad<T> b = load_quad(B + t * B_pitch + j * kFar), c = load_quad(C + t * C_pitch + j * kFar);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        before[t][i] = h[i];
        decay[t][i] = exp2_fast(step * thread.A[i]);
        h[i] = decay[t][i] * h[i] + input * b.value[i % 4];
        sum += c.value[i % 4] * h[i];
      }
    }
    y[t] = sum;
  }
  if (SUB > 4) __syncwarp();  // lest the compiler hold B and C in registers until they are needed again

#pragma unroll
  for (int group = SUB - 4; group >= 0; group -= 4) {
    T through_B[4], through_A[4], y_group[4];
    float sums_B[4] = {0, 0, 0, 0}, sums_C[4] = {0, 0, 0, 0};  // the tensor cores'
#pragma unroll
    for (int t = group + 3; t >= group; --t) {
      const T step = row_step[t], input = step * row_u[t], grad = row_grad[t];
      // The tensor cores cut the products off; this gives back what they lose on average.
      const T scale = Shared::kTensorSums ? T(kMeanOfCut) : T(1), grad_scaled = grad * scale, input_scaled = input * scale;
      T sum_B = T(0), sum_A = T(0);
#pragma unroll
      for (int j = 0; j < kStates / 4; ++j) {
        const Quad<T> b = load_quad(B + t * B_pitch + j * kFar), c = load_quad(C + t * C_pitch + j * kFar);
        Quad<T> grad_b, grad_c;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = 4 * j + k;
          T after = h[i];
          if (t + 1 < SUB) {
            after = forgets(t + 1) ? decay[t][i] * before[t][i] + input * b.value[k] : before[t + 1 < SUB ? t + 1 : t][i];
          }
          const T g = c.value[k] * grad + thread.x[i];
          grad_c.value[k] = grad_scaled * after;
          grad_b.value[k] = g * input_scaled;
          sum_B += g * b.value[k];
          thread.x[i] = forgets(t) ? T(0) : decay[t][i] * g;
          const T q = thread.x[i] * before[t][i];
          sum_A += q * thread.A[i];
          thread.grad_A[i] += q * step;
        }
        const int at = 4 * place.quarter + j * kFar;
        if (!SIMPLE && !p.B_varies) add_constant(plan.partial_B, thread, place, p, j, grad_b);
        if (!SIMPLE && !p.C_varies) add_constant(plan.partial_C, thread, place, p, j, grad_c);
        if constexpr (Shared::kTensorSums) {
          sum_over_four(sums_B, grad_b.value, t % 4);
          sum_over_four(sums_C, grad_c.value, t % 4);
        } else if constexpr (Shared::kAlone) {
          store_quad(&shared.shares[warp].sum[0][within + t][at], grad_b);
          store_quad(&shared.shares[warp].sum[1][within + t][at], grad_c);
        } else {
          store_quad(&shared.products[warp][t % 4][0][lane % kWarpChannels * kPadded + at], grad_b);
          store_quad(&shared.products[warp][t % 4][1][lane % kWarpChannels * kPadded + at], grad_c);
        }
      }
      through_B[t - group] = sum_B;
      through_A[t - group] = sum_A;
      y_group[t - group] = y[t];
    }

    if constexpr (Shared::kTensorSums) {
      // the four threads of a half of the warp's channels hold a step each
      auto& share = shared.shares[2 * warp + lane / 4 % 2];
      store_quad(&share.sum[0][within + group + lane % 4][4 * place.quarter], {{sums_B[0], sums_B[1], sums_B[2], sums_B[3]}});
      store_quad(&share.sum[1][within + group + lane % 4][4 * place.quarter], {{sums_C[0], sums_C[1], sums_C[2], sums_C[3]}});
    } else if constexpr (!Shared::kAlone) {
      __syncwarp();
#pragma unroll
      for (int o = lane; o < 2 * kPadded; o += 32) {  // four steps, B or C, kPadded / 4 quads
        const int n = 4 * (o % (kPadded / 4)), which = o / (kPadded / 4) % 2, t = o / (kPadded / 2);
        Quad<T> total = load_quad(&shared.products[warp][t][which][n]);
#pragma unroll
        for (int channel = 1; channel < kWarpChannels; ++channel) {
          const Quad<T> more = load_quad(&shared.products[warp][t][which][channel * kPadded + n]);
#pragma unroll
          for (int k = 0; k < 4; ++k) total.value[k] += more.value[k];
        }
        store_quad(&shared.shares[warp].sum[which][within + group + t][n], total);
      }
    }
    const T through_B_sum = sum_over_lanes<kLanes>(through_B, place.quarter);
    const T through_A_sum = sum_over_lanes<kLanes>(through_A, place.quarter);
    T y_sum = T(0);
    if (has_gate) y_sum = sum_over_lanes<kLanes>(y_group, place.quarter);
    if (place.quarter < 4) {
      const int at = place.row * kPitch + first + group + place.quarter;
      shared.through_B[at] = through_B_sum;
      shared.through_A[at] = through_A_sum;
      if (has_gate) shared.y[at] = y_sum;
    }
    if (Shared::kUsesProducts) __syncwarp();
  }
}

// From the sums over states of a whole tile: the gradients of u, delta and z, in the places of u, step and gate. A thread
// always has the same channels, so it keeps their sums for D and delta_bias.
template <typename Configuration, typename Shared, typename T = typename Configuration::T>
__device__ __forceinline__ void finish_backward(Shared& shared, T* grad_D, T* grad_bias, int steps, bool softplus,
                                                bool has_gate, bool precise) {
  using ChannelTile = typename Configuration::ChannelTile;
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) {
    if (!ChannelTile::in_tile(i)) break;
    int row, first;
    ChannelTile::template position<true>(i, row, first);
    const int at = row * Configuration::kPitch + first;
    const T D = shared.D[row];
    Quad<T> u = load_quad(shared.u + at), step = load_quad(shared.step + at);
    const Quad<T> grad = load_quad(shared.grad + at), through_B = load_quad(shared.through_B + at);
    const Quad<T> through_A = load_quad(shared.through_A + at);
    if (has_gate) {
      Quad<T> gate = load_quad(shared.gate + at);
      const Quad<T> y = load_quad(shared.y + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) gate.value[j] *= y.value[j] + D * u.value[j];
      store_quad(shared.gate + at, gate);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T grad_delta = u.value[j] * through_B.value[j] + through_A.value[j] * T(1.0 / kLog2EDouble);
      if (softplus) grad_delta *= softplus_slope(step.value[j], precise);
      if (first + j < steps) {
        grad_D[i] += grad.value[j] * u.value[j];
        grad_bias[i] += grad_delta;
      }
      u.value[j] = step.value[j] * through_B.value[j] + D * grad.value[j];
      step.value[j] = grad_delta;
    }
    store_quad(shared.u + at, u);
    store_quad(shared.step + at, step);
  }
}

template <typename Configuration, int SUB>
__global__ void __launch_bounds__(Configuration::kThreads, Configuration::kBackwardBlocks)
    selective_scan_backward_kernel(const WMK_GRID_CONSTANT wmk_selective_scan p,
                                   const WMK_GRID_CONSTANT ScanPlan plan) {
  using T = typename Configuration::T;
  using ChannelTile = typename Configuration::ChannelTile;
  using StateTile = typename Configuration::StateTile;
  constexpr int kStates = Configuration::kStates, kThreads = Configuration::kThreads;
  constexpr int kPitch = Configuration::kPitch, kStatePitch = Configuration::kStatePitch;
  constexpr int kSteps = Configuration::kSteps;
  WMK_SHARED_MEMORY(memory);
  using Shared = BackwardShared<Configuration, SUB>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Slots<Configuration> slots(memory + sizeof(BackwardShared<Configuration, SUB>), Configuration::dtype(p));

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
    ChannelTile::fetch(slots.grad, channel_rows(shared.origin_grad_out, p.grad_out), begin, dtype, part.channels, steps);
    if (has_gate) {
      ChannelTile::fetch(slots.z, channel_rows(shared.origin_z, p.z), begin, dtype, part.channels, steps);
    }
    if (p.C_varies) StateTile::fetch(slots.C, state_rows(shared.origin_C, p.C), begin, dtype, states, steps);
  };
  const auto place_inputs = [&](int64_t begin, int steps) {
    copy_async_wait();
    ChannelTile::template place<false>(shared.u, kPitch, slots.u,
                                       channel_rows(shared.origin_u, p.u).along_time(), dtype, part.channels, steps,
                                       same);
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
    const T* row_step = shared.step + place.row * kPitch;
    const T* row_u = shared.u + place.row * kPitch;
    for (int sub = 0; sub < parts; ++sub) {
      store_checkpoint<Configuration>(h, shared.checkpoint[sub]);
#pragma unroll
      for (int first = 0; first < SUB; first += 4) {
        const int at = sub * SUB + first;
        T unused[4];
        const uint32_t here = resets >> at & 15u;
        const Quad<T> step = load_quad(row_step + at), u = load_quad(row_u + at);
        if (here == 0) {
          advance<Configuration, true, false>(h, thread.A, unused, step, u, thread.B + at * thread.B_pitch,
                                              thread.B_pitch, thread.C, 0, 0);
        } else {
          advance<Configuration, true, true>(h, thread.A, unused, step, u, thread.B + at * thread.B_pitch,
                                             thread.B_pitch, thread.C, 0, here);
        }
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
      run_forward(kSteps / SUB);
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
      ChannelTile::template place<false>(shared.gate, kPitch, slots.z,
                                         channel_rows(shared.origin_z, p.z).along_time(), dtype, part.channels,
                                         steps, same);
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

    const int parts = (steps + SUB - 1) / SUB;
    run_forward(parts - 1);
    store_checkpoint<Configuration>(h, shared.checkpoint[parts - 1]);
    const uint32_t resets = shared.resets;
    constexpr int kBlockSteps = Shared::kBlockSteps;
    for (int block_begin = (steps - 1) / kBlockSteps * kBlockSteps; block_begin >= 0; block_begin -= kBlockSteps) {
#pragma unroll 1
      for (int first = block_begin + kBlockSteps - SUB; first >= block_begin; first -= SUB) {
        if (first >= steps) continue;
        const uint32_t here = resets >> first & ((1u << SUB) - 1u);
        if (here == 0 && p.B_varies && p.C_varies) {
          backward_steps<Configuration, SUB, true>(thread, shared, place, p, plan, first, 0, has_gate);
        } else {
          backward_steps<Configuration, SUB, false>(thread, shared, place, p, plan, first, here, has_gate);
        }
      }
      __syncthreads();
      // The block's shares of the gradients of B and C.
      constexpr int kItems = Configuration::kPaddedStates * kBlockSteps;
#pragma unroll
      for (int i = threadIdx.x; i < kItems; i += kThreads) {
        const int t = i % kBlockSteps, n = i / kBlockSteps;
        if (n >= states || block_begin + t >= steps) continue;
        const int64_t at = shared.share_origin + n * p.time + begin + block_begin + t;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (!(which == 0 ? p.B_varies : p.C_varies)) continue;
          T total = shared.shares[0].sum[which][t][n];
#pragma unroll
          for (int share = 1; share < Shared::kShares; ++share) total += shared.shares[share].sum[which][t][n];
          static_cast<T*>(which == 0 ? plan.tile_B : plan.tile_C)[at] = total;
        }
      }
      __syncthreads();
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

  store_states(thread.grad_A, place, states, plan.partial_A, thread.partial_offset);
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
