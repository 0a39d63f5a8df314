// The inner part of the selective scan's backward pass: a few steps, forward and back (backward_steps), and what is
// left to do for a whole tile (finish_backward). selective_scan_backward_kernel.cuh says how they fit together.
//
// A thread takes four of its states through four steps and back before it takes the next four: in registers are the
// decays and states of four times four steps, whatever the number of its states, besides what it carries on; of that A
// and its gradient go to shared memory where a thread has more than four states. So registers last for every
// configuration; in double precision with eight states, where each takes two, decays are computed again, step by step.
#pragma once

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

constexpr int kSub = 4;  // steps that go forward and back in registers

template <typename Configuration>
struct BackwardShared {
  using T = typename Configuration::T;
  using C = Configuration;
  static constexpr int kFours = C::kStates / 4;
  // How a warp's channels are summed: by the tensor cores, four at a time; through shared memory; or not at all.
  static constexpr bool kTensorSums = C::kWarpChannels == 8 && (C::kDtype == WMK_BFLOAT16 || C::kDtype == WMK_FLOAT16);
  static constexpr bool kAlone = C::kWarpChannels == 1;
  static constexpr bool kUsesProducts = !kTensorSums && !kAlone;
  static_assert(kFours == 1 || kAlone, "products of several channels are those of four states a thread");
  // one step's products of a warp, for B or C: [channels, states], and a shift of the banks
  static constexpr int kProducts = 32 * C::kStates + 16;
  static constexpr int kShareStates = 4 * C::kLanes;                 // the states of which a block adds up its sums
  static constexpr int kBlockSteps = kTensorSums ? 8 : kSub;         // and the steps
  static constexpr int kShares = C::kWarps * (kTensorSums ? 2 : 1);  // sums that the block adds up
  struct alignas(16) Share {
    T sum[2][kBlockSteps][kShareStates + 4];  // [B or C][step][state]
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
  alignas(16) T checkpoint[C::kSteps / kSub][C::kThreads * C::kStates];
  alignas(16) T products[kUsesProducts ? C::kWarps : 1][4][2][kUsesProducts ? kProducts : 4];
  Share shares[kShares];
  alignas(16) T A[kFours == 1 ? 4 : C::kThreads * C::kStates];
  alignas(16) T grad_A[kFours == 1 ? 4 : C::kThreads * C::kStates];
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

// What a thread carries through its segment. A and its gradient: of four states; of more, they are in shared memory.
template <typename Configuration>
struct BackwardThread {
  using T = typename Configuration::T;
  T A[Configuration::kStates];  // times log2(e)
  T x[Configuration::kStates];
  T grad_A[Configuration::kStates];
  int64_t partial_offset;
  const T* B;
  const T* C;
  int B_pitch, C_pitch;
};

// A thread's states to shared memory, and four of them back.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void store_checkpoint(const T (&h)[Configuration::kStates], T* checkpoint) {
#pragma unroll
  for (int i = 0; i < Configuration::kStates; i += 4) {
    store_quad(checkpoint + (i * Configuration::kThreads + 4 * threadIdx.x), {{h[i], h[i + 1], h[i + 2], h[i + 3]}});
  }
}
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ Quad<T> load_checkpoint(const T* checkpoint, int j) {
  return load_quad(checkpoint + (4 * j * Configuration::kThreads + 4 * threadIdx.x));
}

// Four of A times log2(e), or of its gradient, from where they are kept, and the latter back.
template <typename Configuration, typename Shared, typename T = typename Configuration::T>
__device__ __forceinline__ Quad<T> load_A(const BackwardThread<Configuration>& thread, const Shared& shared, int j) {
  if constexpr (Shared::kFours == 1) return {{thread.A[0], thread.A[1], thread.A[2], thread.A[3]}};
  return load_checkpoint<Configuration>(shared.A, j);
}
template <typename Configuration, typename Shared, typename T = typename Configuration::T>
__device__ __forceinline__ Quad<T> load_grad_A(const BackwardThread<Configuration>& thread, const Shared& shared,
                                               int j) {
  if constexpr (Shared::kFours == 1) {
    return {{thread.grad_A[0], thread.grad_A[1], thread.grad_A[2], thread.grad_A[3]}};
  }
  return load_checkpoint<Configuration>(shared.grad_A, j);
}
template <typename Configuration, typename Shared, typename T = typename Configuration::T>
__device__ __forceinline__ void store_grad_A(BackwardThread<Configuration>& thread, Shared& shared, int j,
                                             const Quad<T>& grad_A) {
  if constexpr (Shared::kFours == 1) {
#pragma unroll
    for (int k = 0; k < 4; ++k) thread.grad_A[k] = grad_A.value[k];
  } else {
    store_quad(shared.grad_A + (4 * j * Configuration::kThreads + 4 * threadIdx.x), grad_A);
  }
}

// Where the segment's and channel's numbers are in partial_A, partial_B and partial_C: kept with four states, and found
// again with more.
template <typename Configuration>
__device__ __forceinline__ int64_t partial_offset(const BackwardThread<Configuration>& thread, const BlockPart& part,
                                                  const ThreadPlace<Configuration>& place,
                                                  const wmk_selective_scan& p) {
  if constexpr (Configuration::kStates == 4) return thread.partial_offset;
  return (part.slot * p.channels + place.channel) * p.state;
}

// Adds to the gradient of a B or C that does not vary, where the block collects it; only this thread uses those
// numbers.
template <typename Configuration, typename T = typename Configuration::T>
__device__ __forceinline__ void add_constant(void* partial, int64_t offset, const ThreadPlace<Configuration>& place,
                                             const wmk_selective_scan& p, int j, const Quad<T>& grad) {
  if (!place.exists) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int n = place.state(4 * j + k);
    if (n < p.state) static_cast<T*>(partial)[offset + n] += grad.value[k];
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

// Where a few steps lie.
struct StepsPlace {
  int64_t begin;  // of the tile
  int first;      // of the steps, in the tile
  int steps;      // of the tile
};

// Adds up the block's shares of the gradients of B and C, of the states from `first_state`; all threads of the block
// call this, between two barriers.
template <typename Configuration>
__device__ __forceinline__ void write_shares(const BackwardShared<Configuration>& shared, const wmk_selective_scan& p,
                                             const ScanPlan& plan, int first_state, const StepsPlace& at_steps) {
  using T = typename Configuration::T;
  using Shared = BackwardShared<Configuration>;
  constexpr int kBlockSteps = Shared::kBlockSteps, kItems = Shared::kShareStates * kBlockSteps;
  const int states = static_cast<int>(p.state);
#pragma unroll
  for (int i = threadIdx.x; i < kItems; i += Configuration::kThreads) {
    const int t = i % kBlockSteps, n = i / kBlockSteps;
    if (first_state + n >= states || at_steps.first + t >= at_steps.steps) continue;
    const int64_t at = shared.share_origin + (first_state + n) * p.time + at_steps.begin + at_steps.first + t;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (!(which == 0 ? p.B_varies : p.C_varies)) continue;
      T total = shared.shares[0].sum[which][t][n];
#pragma unroll
      for (int share = 1; share < Shared::kShares; ++share) total += shared.shares[share].sum[which][t][n];
      static_cast<T*>(which == 0 ? plan.tile_B : plan.tile_C)[at] = total;
    }
  }
}

// Four steps, forward from the checkpoint and back. SIMPLE: no resets, and both B and C vary.
template <typename Configuration, bool SIMPLE>
__device__ __forceinline__ void backward_steps(BackwardThread<Configuration>& thread,
                                               BackwardShared<Configuration>& shared,
                                               const ThreadPlace<Configuration>& place, const wmk_selective_scan& p,
                                               const ScanPlan& plan, const StepsPlace& at_steps, uint32_t resets,
                                               bool has_gate) {
  using T = typename Configuration::T;
  using Shared = BackwardShared<Configuration>;
  constexpr int kLanes = Configuration::kLanes, kFar = 4 * kLanes;
  constexpr int kPitch = Configuration::kPitch, kPadded = Configuration::kPaddedStates;
  constexpr int kWarpChannels = Configuration::kWarpChannels;
  const int first = at_steps.first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, within = first % Shared::kBlockSteps;
  const T* row_u = shared.u + place.row * kPitch + first;
  const T* row_step = shared.step + place.row * kPitch + first;
  const T* row_grad = shared.grad + place.row * kPitch + first;
  const T* B = thread.B + first * thread.B_pitch;
  const T* C = thread.C + first * thread.C_pitch;
  const int B_pitch = SIMPLE ? Configuration::kStatePitch : thread.B_pitch;
  const int C_pitch = SIMPLE ? Configuration::kStatePitch : thread.C_pitch;
  const auto forgets = [&](int t) { return !SIMPLE && (resets >> t & 1u) != 0; };

  constexpr bool kKeepsDecay = Configuration::kUnroll == kSub;
  float sums_B[4] = {0, 0, 0, 0}, sums_C[4] = {0, 0, 0, 0};  // the tensor cores'
#pragma unroll
  for (int j = 0; j < Shared::kFours; ++j) {
    T y[kSub], through_B[kSub], through_A[kSub];
    T before[4][kSub], decay[4][kSub];  // h_{t-1}, a_t, of each step
    Quad<T> h = load_checkpoint<Configuration>(shared.checkpoint[first / kSub], j);
    const Quad<T> A = load_A<Configuration>(thread, shared, j);
#pragma unroll Configuration::kUnroll
    for (int t = 0; t < kSub; ++t) {
      const T step = row_step[t], input = step * row_u[t];
      if (forgets(t)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) h.value[k] = T(0);
      }
      T sum = T(0);
      const Quad<T> b = load_quad(B + t * B_pitch + j * kFar), c = load_quad(C + t * C_pitch + j * kFar);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        put(before[k], t, h.value[k]);
        const T factor = exp2_fast(step * A.value[k]);
        if (kKeepsDecay) put(decay[k], t, factor);
        h.value[k] = factor * h.value[k] + input * b.value[k];
        sum += c.value[k] * h.value[k];
      }
      put(y, t, sum);
    }

    T y_sum = T(0);
    if (Shared::kFours > 1 && has_gate) y_sum = sum_over_lanes<kLanes>(y, place.quarter);

    Quad<T> grad_A = load_grad_A<Configuration>(thread, shared, j);
    const int at = 4 * place.quarter;
#pragma unroll Configuration::kUnroll
    for (int t = kSub - 1; t >= 0; --t) {
      const T step = row_step[t], input = step * row_u[t], grad = row_grad[t];
      // The tensor cores cut the products off; this gives back what they lose on average.
      const T grad_scaled = Shared::kTensorSums && SIMPLE ? grad * T(kMeanOfCut) : grad;
      const T input_scaled = Shared::kTensorSums && SIMPLE ? input * T(kMeanOfCut) : input;
      T sum_B = T(0), sum_A = T(0);
      const Quad<T> b = load_quad(B + t * B_pitch + j * kFar), c = load_quad(C + t * C_pitch + j * kFar);
      Quad<T> grad_b, grad_c;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * j + k;
        const T factor = kKeepsDecay ? pick(decay[k], t) : exp2_fast(step * A.value[k]);
        const T earlier = pick(before[k], t);
        const bool starts = t + 1 < kSub && forgets(t + 1);  // the next step, from nothing
        const T after = starts ? factor * earlier + input * b.value[k] : h.value[k];
        h.value[k] = earlier;
        const T g = c.value[k] * grad + thread.x[i];
        grad_c.value[k] = grad_scaled * after;
        grad_b.value[k] = g * input_scaled;
        sum_B += g * b.value[k];
        thread.x[i] = forgets(t) ? T(0) : factor * g;
        const T q = thread.x[i] * earlier;
        sum_A += q * A.value[k];
        grad_A.value[k] += q * step;
      }
      const auto offset = [&] { return partial_offset(thread, shared.part, place, p); };
      if (!SIMPLE && !p.B_varies) add_constant(plan.partial_B, offset(), place, p, j, grad_b);
      if (!SIMPLE && !p.C_varies) add_constant(plan.partial_C, offset(), place, p, j, grad_c);
      if constexpr (Shared::kTensorSums && SIMPLE) {
        sum_over_four(sums_B, grad_b.value, t);
        sum_over_four(sums_C, grad_c.value, t);
      } else if constexpr (Shared::kTensorSums) {
        shuffle_over_four(sums_B, grad_b.value, t);
        shuffle_over_four(sums_C, grad_c.value, t);
      } else if constexpr (Shared::kAlone) {
        store_quad(&shared.shares[warp].sum[0][within + t][at], grad_b);
        store_quad(&shared.shares[warp].sum[1][within + t][at], grad_c);
      } else {
        store_quad(&shared.products[warp][t][0][lane % kWarpChannels * kPadded + at], grad_b);
        store_quad(&shared.products[warp][t][1][lane % kWarpChannels * kPadded + at], grad_c);
      }
      put(through_B, t, sum_B);
      put(through_A, t, sum_A);
    }
    store_grad_A<Configuration>(thread, shared, j, grad_A);

    if constexpr (Shared::kTensorSums) {
      // the four threads of a half of the warp's channels hold a step each
      auto& share = shared.shares[2 * warp + lane / 4 % 2];
      store_quad(&share.sum[0][within + lane % 4][at], {{sums_B[0], sums_B[1], sums_B[2], sums_B[3]}});
      store_quad(&share.sum[1][within + lane % 4][at], {{sums_C[0], sums_C[1], sums_C[2], sums_C[3]}});
    } else if constexpr (Shared::kUsesProducts) {
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
        store_quad(&shared.shares[warp].sum[which][within + t][n], total);
      }
    }
    if constexpr (Shared::kFours > 1) {
      __syncthreads();
      write_shares<Configuration>(shared, p, plan, j * kFar, at_steps);
      __syncthreads();
    }
    const T through_B_sum = sum_over_lanes<kLanes>(through_B, place.quarter);
    const T through_A_sum = sum_over_lanes<kLanes>(through_A, place.quarter);
    if (Shared::kFours == 1 && has_gate) y_sum = sum_over_lanes<kLanes>(y, place.quarter);
    if (place.quarter < 4) {
      const int sum_at = place.row * kPitch + first + place.quarter;
      shared.through_B[sum_at] = j == 0 ? through_B_sum : shared.through_B[sum_at] + through_B_sum;
      shared.through_A[sum_at] = j == 0 ? through_A_sum : shared.through_A[sum_at] + through_A_sum;
      if (has_gate) shared.y[sum_at] = j == 0 ? y_sum : shared.y[sum_at] + y_sum;
    }
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
