// Inner loop of the selective scan's backward pass.
//
// A thread takes four states through four steps forward and back, then its next four: registers hold 16 decays and 16
// states. Beyond four states, A and its gradient live in shared memory; with eight fp64 states, decays are recomputed.
#pragma once

#include "cuda/selective_scan/selective_scan_common.cuh"

namespace wmk {

constexpr int kSubtileSteps = 4;

template <typename Traits>
struct BackwardShared {
  using T = typename Traits::T;
  using C = Traits;
  static constexpr int kStateVectors = C::kStates / 4;
  // How dB and dC are summed over a warp's channels.
  static constexpr bool kSumsOnTensorCores =
      C::kWarpChannels == 8 && (C::kDtype == WMK_BFLOAT16 || C::kDtype == WMK_FLOAT16);
  static constexpr bool kOneChannelPerWarp = C::kWarpChannels == 1;
  static constexpr bool kSumsInSharedMemory = !kSumsOnTensorCores && !kOneChannelPerWarp;
  static_assert(kStateVectors == 1 || kOneChannelPerWarp,
                "products of several channels are those of four states a thread");
  // per step, padded against bank conflicts
  static constexpr int kProductPitch = 32 * C::kStates + 16;
  static constexpr int kPartialStates = 4 * C::kLanes;                        // per reduction over warps
  static constexpr int kBlockSteps = kSumsOnTensorCores ? 8 : kSubtileSteps;  // per reduction
  static constexpr int kPartials = C::kWarps * (kSumsOnTensorCores ? 2 : 1);  // per block
  struct alignas(16) Partial {
    T sum[2][kBlockSteps][kPartialStates + 4];  // [B or C][step][state]
    T bank_padding[16];
  };

  alignas(16) T u[C::kChannels * C::kPitch];        // then grad_u
  alignas(16) T step[C::kChannels * C::kPitch];     // then grad_delta
  alignas(16) T grad[C::kChannels * C::kPitch];     // dout, then dy
  alignas(16) T gate[C::kChannels * C::kPitch];     // z, then dz's factor of y, then dz
  alignas(16) T sum_gB[C::kChannels * C::kPitch];   // over states
  alignas(16) T sum_gAh[C::kChannels * C::kPitch];  // sum of A dh h_{t-1}
  alignas(16) T y[C::kChannels * C::kPitch];
  alignas(16) T B_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T C_tile[C::kStateRows * C::kStatePitch];
  alignas(16) T checkpoint[C::kSteps / kSubtileSteps][C::kThreads * C::kStates];
  alignas(16) T products[kSumsInSharedMemory ? C::kWarps : 1][4][2][kSumsInSharedMemory ? kProductPitch : 4];
  Partial partials[kPartials];
  alignas(16) T A[kStateVectors == 1 ? 4 : C::kThreads * C::kStates];
  alignas(16) T grad_A[kStateVectors == 1 ? 4 : C::kThreads * C::kStates];
  T D[C::kChannels];
  T bias[C::kChannels];
  char *origin_u, *origin_delta, *origin_grad_out, *origin_z, *origin_B, *origin_C;
  char *origin_grad_u, *origin_grad_delta, *origin_grad_z;
  int64_t partial_origin;  // in tile_partial_B, tile_partial_C
  WorkTile work;
  alignas(16) uint32_t resets;
};

__device__ __forceinline__ float softplus_slope(float step, bool precise) {
  if (precise) return -expm1f(-step);
  const float series = step * (1.0f + step * (-0.5f + step * (1.0f / 6.0f - step * (1.0f / 24.0f))));
  return step < 0.0625f ? series : 1.0f - exp2_fast(-kLog2E * step);
}
// 1 above x = 20, as softplus(20) is slightly larger.
__device__ __forceinline__ double softplus_slope(double step, bool) {
  return step > 20.0000000020612 ? 1.0 : -expm1(-step);
}

template <typename Traits>
struct BackwardThread {
  using T = typename Traits::T;
  T A[Traits::kStates];  // times log2(e)
  T dh[Traits::kStates];
  T grad_A[Traits::kStates];
  int64_t partial_offset;
  const T* B;
  const T* C;
  int B_pitch, C_pitch;
};

template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void store_checkpoint(const T (&h)[Traits::kStates], T* checkpoint) {
#pragma unroll
  for (int i = 0; i < Traits::kStates; i += 4) {
    store_vec4(checkpoint + (i * Traits::kThreads + 4 * threadIdx.x), {{h[i], h[i + 1], h[i + 2], h[i + 3]}});
  }
}
template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ Vec4<T> load_checkpoint(const T* checkpoint, int j) {
  return load_vec4(checkpoint + (4 * j * Traits::kThreads + 4 * threadIdx.x));
}

// A log2(e) or dA.
template <typename Traits, typename Shared, typename T = typename Traits::T>
__device__ __forceinline__ Vec4<T> load_A(const BackwardThread<Traits>& thread, const Shared& shared, int j) {
  if constexpr (Shared::kStateVectors == 1) return {{thread.A[0], thread.A[1], thread.A[2], thread.A[3]}};
  return load_checkpoint<Traits>(shared.A, j);
}
template <typename Traits, typename Shared, typename T = typename Traits::T>
__device__ __forceinline__ Vec4<T> load_grad_A(const BackwardThread<Traits>& thread, const Shared& shared, int j) {
  if constexpr (Shared::kStateVectors == 1) {
    return {{thread.grad_A[0], thread.grad_A[1], thread.grad_A[2], thread.grad_A[3]}};
  }
  return load_checkpoint<Traits>(shared.grad_A, j);
}
template <typename Traits, typename Shared, typename T = typename Traits::T>
__device__ __forceinline__ void store_grad_A(BackwardThread<Traits>& thread, Shared& shared, int j,
                                             const Vec4<T>& grad_A) {
  if constexpr (Shared::kStateVectors == 1) {
#pragma unroll
    for (int k = 0; k < 4; ++k) thread.grad_A[k] = grad_A.value[k];
  } else {
    store_vec4(shared.grad_A + (4 * j * Traits::kThreads + 4 * threadIdx.x), grad_A);
  }
}

// Recomputed beyond four states, to save a register.
template <typename Traits>
__device__ __forceinline__ int64_t partial_offset(const BackwardThread<Traits>& thread, const WorkTile& work,
                                                  const ThreadCoord<Traits>& coord, const wmk_selective_scan& p) {
  if constexpr (Traits::kStates == 4) return thread.partial_offset;
  return (work.segment * p.channels + coord.channel) * p.state;
}

// Of a constant B or C.
template <typename Traits, typename T = typename Traits::T>
__device__ __forceinline__ void add_constant(void* partial, int64_t offset, const ThreadCoord<Traits>& coord,
                                             const wmk_selective_scan& p, int j, const Vec4<T>& grad) {
  if (!coord.exists) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int n = coord.state(4 * j + k);
    if (n < p.state) static_cast<T*>(partial)[offset + n] += grad.value[k];
  }
}

// 1 + 2^-11 E[1 / m], for a mantissa m in [1, 2) with uniform logarithm.
constexpr double kTf32TruncationCorrection = 1.0 + 0.7213 / 2048.0;

// Near a reset: tensor-core products with zero would carry NaN between steps.
__device__ __forceinline__ void warp_sum4_shuffle(float (&sums)[4], const float (&values)[4], int which) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = values[i] + __shfl_xor_sync(0xffffffffu, values[i], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (static_cast<int>(threadIdx.x) % 4 == which) sums[i] += sum;
  }
}

struct TileCoord {
  int64_t begin;  // of the tile
  int first;      // in the tile
  int steps;      // of the tile
};

// Sums dB and dC over warps, from `first_state`. Called by all threads, between two barriers.
template <typename Traits>
__device__ __forceinline__ void reduce_partials(const BackwardShared<Traits>& shared, const wmk_selective_scan& p,
                                                const ScanPlan& plan, int first_state, const TileCoord& subtile) {
  using T = typename Traits::T;
  using Shared = BackwardShared<Traits>;
  constexpr int kBlockSteps = Shared::kBlockSteps, kItems = Shared::kPartialStates * kBlockSteps;
  const int states = static_cast<int>(p.state);
#pragma unroll
  for (int i = threadIdx.x; i < kItems; i += Traits::kThreads) {
    const int t = i % kBlockSteps, n = i / kBlockSteps;
    if (first_state + n >= states || subtile.first + t >= subtile.steps) continue;
    const int64_t offset = shared.partial_origin + (first_state + n) * p.time + subtile.begin + subtile.first + t;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (!(which == 0 ? p.B_varies : p.C_varies)) continue;
      T total = shared.partials[0].sum[which][t][n];
#pragma unroll
      for (int k = 1; k < Shared::kPartials; ++k) total += shared.partials[k].sum[which][t][n];
      static_cast<T*>(which == 0 ? plan.tile_partial_B : plan.tile_partial_C)[offset] = total;
    }
  }
}

// Four steps, forward and back. SIMPLE: four steps without resets, B and C vary. A bit of `resets` per step, then one
// per step of padding.
template <typename Traits, bool SIMPLE>
__device__ __forceinline__ void reverse_sweep(BackwardThread<Traits>& thread, BackwardShared<Traits>& shared,
                                              const ThreadCoord<Traits>& coord, const wmk_selective_scan& p,
                                              const ScanPlan& plan, const TileCoord& subtile, uint32_t resets,
                                              bool has_gate) {
  using T = typename Traits::T;
  using Shared = BackwardShared<Traits>;
  constexpr int kLanes = Traits::kLanes, kStateStride = 4 * kLanes;
  constexpr int kPitch = Traits::kPitch, kPadded = Traits::kPaddedStates;
  constexpr int kWarpChannels = Traits::kWarpChannels;
  const int first = subtile.first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block_step = first % Shared::kBlockSteps;
  const T* row_u = shared.u + coord.row * kPitch + first;
  const T* row_step = shared.step + coord.row * kPitch + first;
  const T* row_grad = shared.grad + coord.row * kPitch + first;
  const T* B = thread.B + first * thread.B_pitch;
  const T* C = thread.C + first * thread.C_pitch;
  const int B_pitch = SIMPLE ? Traits::kStatePitch : thread.B_pitch;
  const int C_pitch = SIMPLE ? Traits::kStatePitch : thread.C_pitch;
  const auto reset_at = [&](int t) { return !SIMPLE && (resets >> t & 1u) != 0; };
  // A step of zero would turn an infinite state into NaN.
  const auto is_padding = [&](int t) { return !SIMPLE && (resets >> (kSubtileSteps + t) & 1u) != 0; };

  constexpr bool kKeepsDecay = Traits::kUnroll == kSubtileSteps;
  float sums_B[4] = {0, 0, 0, 0}, sums_C[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < Shared::kStateVectors; ++j) {
    T y[kSubtileSteps], sum_gB[kSubtileSteps], sum_gAh[kSubtileSteps];
    T h_prev[4][kSubtileSteps], decay[4][kSubtileSteps];  // h_{t-1} and a_t
    Vec4<T> h = load_checkpoint<Traits>(shared.checkpoint[first / kSubtileSteps], j);
    const Vec4<T> A = load_A<Traits>(thread, shared, j);
#pragma unroll Traits::kUnroll
    for (int t = 0; t < kSubtileSteps; ++t) {
      const T step = row_step[t], input = step * row_u[t];
      if (reset_at(t)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) h.value[k] = T(0);
      }
      T sum = T(0);
      const Vec4<T> b = load_vec4(B + t * B_pitch + j * kStateStride),
                    c = load_vec4(C + t * C_pitch + j * kStateStride);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        insert(h_prev[k], t, h.value[k]);
        const T factor = reset_at(t) ? T(0) : exp2_fast(step * A.value[k]);
        if (kKeepsDecay) insert(decay[k], t, factor);
        h.value[k] = factor * h.value[k] + input * b.value[k];
        sum += c.value[k] * h.value[k];
      }
      insert(y, t, sum);
    }

    T y_sum = T(0);
    if (Shared::kStateVectors > 1 && has_gate) y_sum = sum_over_lanes<kLanes>(y, coord.state_lane);

    Vec4<T> grad_A = load_grad_A<Traits>(thread, shared, j);
    const int at = 4 * coord.state_lane;
#pragma unroll Traits::kUnroll
    for (int t = kSubtileSteps - 1; t >= 0; --t) {
      const T step = row_step[t], input = step * row_u[t], grad = row_grad[t];
      // Corrects the mean loss of truncation to TF32.
      const T grad_scaled = Shared::kSumsOnTensorCores && SIMPLE ? grad * T(kTf32TruncationCorrection) : grad;
      const T input_scaled = Shared::kSumsOnTensorCores && SIMPLE ? input * T(kTf32TruncationCorrection) : input;
      T sum_B = T(0), sum_A = T(0);
      const Vec4<T> b = load_vec4(B + t * B_pitch + j * kStateStride),
                    c = load_vec4(C + t * C_pitch + j * kStateStride);
      Vec4<T> grad_b, grad_c;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * j + k;
        const T factor = kKeepsDecay ? select(decay[k], t) : reset_at(t) ? T(0) : exp2_fast(step * A.value[k]);
        const T previous = select(h_prev[k], t);
        const bool next_reset = t + 1 < kSubtileSteps && reset_at(t + 1);  // then h is zero
        const T h_t = next_reset ? factor * previous + input * b.value[k] : h.value[k];
        h.value[k] = previous;
        const T g = c.value[k] * grad + thread.dh[i];
        grad_c.value[k] = grad_scaled * h_t;
        grad_b.value[k] = g * input_scaled;
        sum_B += g * b.value[k];
        thread.dh[i] = reset_at(t) ? T(0) : is_padding(t) ? thread.dh[i] : factor * g;
        if (reset_at(t) || is_padding(t)) continue;  // zero times an infinite step or rate would be NaN
        const T q = thread.dh[i] * previous;
        sum_A += q * A.value[k];
        grad_A.value[k] += q * step;
      }
      const auto offset = [&] { return partial_offset(thread, shared.work, coord, p); };
      if (!SIMPLE && !p.B_varies && !is_padding(t)) add_constant(plan.partial_B, offset(), coord, p, j, grad_b);
      if (!SIMPLE && !p.C_varies && !is_padding(t)) add_constant(plan.partial_C, offset(), coord, p, j, grad_c);
      if constexpr (Shared::kSumsOnTensorCores && SIMPLE) {
        warp_sum4_tf32(sums_B, grad_b.value, t);
        warp_sum4_tf32(sums_C, grad_c.value, t);
      } else if constexpr (Shared::kSumsOnTensorCores) {
        warp_sum4_shuffle(sums_B, grad_b.value, t);
        warp_sum4_shuffle(sums_C, grad_c.value, t);
      } else if constexpr (Shared::kOneChannelPerWarp) {
        store_vec4(&shared.partials[warp].sum[0][block_step + t][at], grad_b);
        store_vec4(&shared.partials[warp].sum[1][block_step + t][at], grad_c);
      } else {
        store_vec4(&shared.products[warp][t][0][lane % kWarpChannels * kPadded + at], grad_b);
        store_vec4(&shared.products[warp][t][1][lane % kWarpChannels * kPadded + at], grad_c);
      }
      insert(sum_gB, t, sum_B);
      insert(sum_gAh, t, sum_A);
    }
    store_grad_A<Traits>(thread, shared, j, grad_A);

    if constexpr (Shared::kSumsOnTensorCores) {
      // each thread of four holds one step of half the warp's channels
      auto& i = shared.partials[2 * warp + lane / 4 % 2];
      store_vec4(&i.sum[0][block_step + lane % 4][at], {{sums_B[0], sums_B[1], sums_B[2], sums_B[3]}});
      store_vec4(&i.sum[1][block_step + lane % 4][at], {{sums_C[0], sums_C[1], sums_C[2], sums_C[3]}});
    } else if constexpr (Shared::kSumsInSharedMemory) {
      __syncwarp();
#pragma unroll
      for (int o = lane; o < 2 * kPadded; o += 32) {  // 4 steps x {B, C} x kPadded / 4 vectors
        const int n = 4 * (o % (kPadded / 4)), which = o / (kPadded / 4) % 2, t = o / (kPadded / 2);
        Vec4<T> total = load_vec4(&shared.products[warp][t][which][n]);
#pragma unroll
        for (int channel = 1; channel < kWarpChannels; ++channel) {
          const Vec4<T> product = load_vec4(&shared.products[warp][t][which][channel * kPadded + n]);
#pragma unroll
          for (int k = 0; k < 4; ++k) total.value[k] += product.value[k];
        }
        store_vec4(&shared.partials[warp].sum[which][block_step + t][n], total);
      }
    }
    if constexpr (Shared::kStateVectors > 1) {
      __syncthreads();
      reduce_partials<Traits>(shared, p, plan, j * kStateStride, subtile);
      __syncthreads();
    }
    const T total_gB = sum_over_lanes<kLanes>(sum_gB, coord.state_lane);
    const T total_gAh = sum_over_lanes<kLanes>(sum_gAh, coord.state_lane);
    if (Shared::kStateVectors == 1 && has_gate) y_sum = sum_over_lanes<kLanes>(y, coord.state_lane);
    if (coord.state_lane < 4) {
      const int sum_at = coord.row * kPitch + first + coord.state_lane;
      shared.sum_gB[sum_at] = j == 0 ? total_gB : shared.sum_gB[sum_at] + total_gB;
      shared.sum_gAh[sum_at] = j == 0 ? total_gAh : shared.sum_gAh[sum_at] + total_gAh;
      if (has_gate) shared.y[sum_at] = j == 0 ? y_sum : shared.y[sum_at] + y_sum;
    }
  }
}

// Gradients of u, delta and z, in place of u, step and gate. A thread accumulates its channels' dD and ddelta_bias.
template <typename Traits, typename Shared, typename T = typename Traits::T>
__device__ __forceinline__ void backward_epilogue(Shared& shared, T* grad_D, T* grad_bias, int steps, bool softplus,
                                                  bool has_gate, bool precise) {
  using ChannelTile = typename Traits::ChannelTile;
#pragma unroll
  for (int i = 0; i < ChannelTile::kPerThread; ++i) {
    if (!ChannelTile::in_tile(i)) break;
    int row, first;
    ChannelTile::template position<true>(i, row, first);
    const int at = row * Traits::kPitch + first;
    const T D = shared.D[row];
    Vec4<T> u = load_vec4(shared.u + at), step = load_vec4(shared.step + at);
    const Vec4<T> grad = load_vec4(shared.grad + at), sum_gB = load_vec4(shared.sum_gB + at);
    const Vec4<T> sum_gAh = load_vec4(shared.sum_gAh + at);
    if (has_gate) {
      Vec4<T> gate = load_vec4(shared.gate + at);
      const Vec4<T> y = load_vec4(shared.y + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) gate.value[j] *= y.value[j] + D * u.value[j];
      store_vec4(shared.gate + at, gate);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T grad_delta = u.value[j] * sum_gB.value[j] + sum_gAh.value[j] * T(1.0 / kLog2EDouble);
      if (softplus) grad_delta *= softplus_slope(step.value[j], precise);
      if (first + j < steps) {
        grad_D[i] += grad.value[j] * u.value[j];
        grad_bias[i] += grad_delta;
      }
      u.value[j] = step.value[j] * sum_gB.value[j] + D * grad.value[j];
      step.value[j] = grad_delta;
    }
    store_vec4(shared.u + at, u);
    store_vec4(shared.step + at, step);
  }
}

}  // namespace wmk
