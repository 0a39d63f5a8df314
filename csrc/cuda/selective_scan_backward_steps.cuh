// The inner part of the selective scan's backward pass: a few steps, forward and back (backward_steps), and what is
// left to do for a whole tile (finish_backward). selective_scan_backward_kernel.cuh says how they fit together.
#pragma once

#include "selective_scan_common.cuh"

namespace wmk {

template <typename Configuration, int SUB>
struct BackwardShared {
  using T = typename Configuration::T;
  using C = Configuration;
  // How a warp's channels are summed: by the tensor cores, four at a time; through shared memory; or not at all.
  static constexpr bool kTensorSums = C::kWarpChannels == 8 && (C::kDtype == WMK_BFLOAT16 || C::kDtype == WMK_FLOAT16);
  static constexpr bool kAlone = C::kWarpChannels == 1;
  static constexpr bool kRegistersLast = C::kStates == 4;  // for A and the decays
  static constexpr bool kUsesProducts = !kTensorSums && !kAlone;
  // one step's products of a warp, for B or C: [channels, states], and a shift of the banks
  static constexpr int kProducts = 32 * C::kStates + 16;
  static constexpr int kBlockSteps = kTensorSums ? 8 : SUB;          // between two sums over the block's warps
  static constexpr int kShares = C::kWarps * (kTensorSums ? 2 : 1);  // sums that the block adds up
  struct alignas(16) Share {
    T sum[2][kBlockSteps][C::kStatePitch];  // [B or C][step][state]
    T shift_of_banks[16];
  };

  alignas(16) T u[C::kChannels * C::kPitch];          // then its gradient
  alignas(16) T step[C::kChannels * C::kPitch];       // then the gradient of delta
  alignas(16) T grad[C::kChannels * C::kPitch];       // of out, then of y
  alignas(16) T gate[C::kChannels * C::kPitch];       // z, then what y is multiplied by, then the gradient of z
  alignas(16) T through_B[C::kChannels * C::kPitch];  // sums over states: of g B,
  alignas(16) T through_A[C::kChannels * C::kPitch];  // of A x h,
  alignas(16) T y[C::kChannels * C::kPitch];          // and of C h
  alignas(16) T B_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T C_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T checkpoint[C::kSteps / SUB][C::kThreads * C::kStates];
  alignas(16) T products[kUsesProducts ? C::kWarps : 1][4][2][kUsesProducts ? kProducts : 4];
  Share shares[kShares];
  alignas(16) T A[kRegistersLast ? 4 : C::kThreads * C::kStates];
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
// Where softplus is the identity, above 20, so is its derivative one; softplus(20) itself is a little more than 20.
__device__ __forceinline__ double softplus_slope(double step, bool) {
  return step > 20.0000000020612 ? 1.0 : -expm1(-step);
}

// What a thread carries through its segment.
template <typename Configuration>
struct BackwardThread {
  using T = typename Configuration::T;
  T A[Configuration::kStates];  // times log2(e); where registers are short, only in shared memory
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

// A times log2(e), from where it is kept.
template <typename Configuration, typename Shared, typename T = typename Configuration::T>
__device__ __forceinline__ void load_A(T (&A)[Configuration::kStates], const BackwardThread<Configuration>& thread,
                                       const Shared& shared) {
  if constexpr (Shared::kRegistersLast) {
#pragma unroll
    for (int i = 0; i < Configuration::kStates; ++i) A[i] = thread.A[i];
  } else {
    __syncwarp();  // so that the compiler reads it again rather than keeps it
    load_checkpoint<Configuration>(A, shared.A);
  }
}

// Adds to the gradient of a B or C that does not vary, where the block collects it; only this thread uses those
// numbers.
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

// sum_over_four without the tensor cores, whose products with zero would carry NaN and infinity from one step to the
// next, across a reset.
__device__ __forceinline__ void shuffle_over_four(float (&sums)[4], const float (&values)[4], int which) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = values[i] + __shfl_xor_sync(0xffffffffu, values[i], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (static_cast<int>(threadIdx.x) % 4 == which) sums[i] += sum;
  }
}

// SUB steps, forward from the checkpoint and back. SIMPLE: no resets, and both B and C vary.
template <typename Configuration, int SUB, bool SIMPLE>
__device__ __forceinline__ void backward_steps(BackwardThread<Configuration>& thread,
                                               BackwardShared<Configuration, SUB>& shared,
                                               const ThreadPlace<Configuration>& place, const wmk_selective_scan& p,
                                               const ScanPlan& plan, int first, uint32_t resets, bool has_gate) {
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

  constexpr bool kKeepsDecay = Shared::kRegistersLast;                        // or computes it again
  T before[SUB][kStates], decay[kKeepsDecay ? SUB : 1][kStates], h[kStates];  // h_{t-1}, a_t
  T y[SUB];
  load_checkpoint<Configuration>(h, shared.checkpoint[first / SUB]);
  T A[kStates];
  load_A<Configuration>(A, thread, shared);
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
        const T factor = exp2_fast(step * A[i]);
        if (kKeepsDecay) decay[kKeepsDecay ? t : 0][i] = factor;
        h[i] = factor * h[i] + input * b.value[i % 4];
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
      const T grad_scaled = Shared::kTensorSums && SIMPLE ? grad * T(kMeanOfCut) : grad;
      const T input_scaled = Shared::kTensorSums && SIMPLE ? input * T(kMeanOfCut) : input;
      T sum_B = T(0), sum_A = T(0);
      load_A<Configuration>(A, thread, shared);
#pragma unroll
      for (int j = 0; j < kStates / 4; ++j) {
        const Quad<T> b = load_quad(B + t * B_pitch + j * kFar), c = load_quad(C + t * C_pitch + j * kFar);
        Quad<T> grad_b, grad_c;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = 4 * j + k;
          const T factor = kKeepsDecay ? decay[kKeepsDecay ? t : 0][i] : exp2_fast(step * A[i]);
          T after = h[i];
          if (t + 1 < SUB) {
            after = forgets(t + 1) ? factor * before[t][i] + input * b.value[k] : before[t + 1 < SUB ? t + 1 : t][i];
          }
          const T g = c.value[k] * grad + thread.x[i];
          grad_c.value[k] = grad_scaled * after;
          grad_b.value[k] = g * input_scaled;
          sum_B += g * b.value[k];
          thread.x[i] = forgets(t) ? T(0) : factor * g;
          const T q = thread.x[i] * before[t][i];
          sum_A += q * A[i];
          thread.grad_A[i] += q * step;
        }
        const int at = 4 * place.quarter + j * kFar;
        if (!SIMPLE && !p.B_varies) add_constant(plan.partial_B, thread, place, p, j, grad_b);
        if (!SIMPLE && !p.C_varies) add_constant(plan.partial_C, thread, place, p, j, grad_c);
        if constexpr (Shared::kTensorSums && SIMPLE) {
          sum_over_four(sums_B, grad_b.value, t % 4);
          sum_over_four(sums_C, grad_c.value, t % 4);
        } else if constexpr (Shared::kTensorSums) {
          shuffle_over_four(sums_B, grad_b.value, t % 4);
          shuffle_over_four(sums_C, grad_c.value, t % 4);
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
      store_quad(&share.sum[0][within + group + lane % 4][4 * place.quarter],
                 {{sums_B[0], sums_B[1], sums_B[2], sums_B[3]}});
      store_quad(&share.sum[1][within + group + lane % 4][4 * place.quarter],
                 {{sums_C[0], sums_C[1], sums_C[2], sums_C[3]}});
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

// From the sums over states of a whole tile: the gradients of u, delta and z, in the places of u, step and gate. A
// thread always has the same channels, so it keeps their sums for D and delta_bias.
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

}  // namespace wmk
