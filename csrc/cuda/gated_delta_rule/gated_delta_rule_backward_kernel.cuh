// Gated delta rule, backward, on a GPU: the tiles of gated_delta_rule_common.cuh in reverse, with the state before a
// tile and the gradient of the state after it in shared memory.
//
// A tile starts from its chunk's saved state and residuals; in a chunk of more than one tile, the tiles before are run
// again first. The gradient of a gate sums what every decay over it passes on. The sums run from the last step to the
// first and only add: differences of sums over the tile would lose small gradients.
//
// Multiply-adds per step and head: 6 d_k d_v + 32 (2 d_k + 3 d_v), and 96 d_k for each panel after the first. Gradients
// but those of v and the initial state are partial per panel, and added in order by gated_delta_rule_sum_kernel.
#pragma once

#include "cuda/gated_delta_rule/gated_delta_rule_common.cuh"

namespace wmk {

// What the backward kernel adds to a block.
template <typename T>
struct DeltaReverse : DeltaBlock<T> {
  using Base = DeltaBlock<T>;
  using Base::attention, Base::beta, Base::between, Base::corrections, Base::count, Base::d_k, Base::head, Base::keys;
  using Base::p, Base::panel, Base::pitch, Base::plan, Base::queries, Base::recall, Base::residuals, Base::row;
  using Base::rows, Base::since_start, Base::state, Base::take, Base::to_end, Base::width;
  T* d_state = nullptr;                            // [rows][pitch]: of the state after the tile
  T* d_out = nullptr;                              // [step][pitch]: dy
  T* w = nullptr;                                  // [step][pitch]: du, then w
  T *start_parts = nullptr, *end_parts = nullptr;  // [group][step]: of the logarithms of d_i and D_j
  T* state_parts = nullptr;                        // [warp]: of that of the whole tile's decay
  int groups = 0;                                  // of 16 keys

  __device__ __forceinline__ DeltaReverse(const wmk_gated_delta_rule& arguments, const DeltaPlan& sizes)
      : Base{arguments, sizes} {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    Base::template prologue<SHARED>(shared);
    groups = static_cast<int>(delta_groups(plan.rows));
    d_state = take(plan.rows * pitch);
    d_out = take(kDeltaSteps * pitch);
    w = take(kDeltaSteps * pitch);
    start_parts = take(2 * groups * kDeltaSteps);
    end_parts = take(groups * kDeltaSteps);
    state_parts = take(kDeltaWarps);
  }

  // The state before the tile. Ends with a barrier if it runs tiles again.
  __device__ __forceinline__ void restore_state(const DeltaTile& at) const {
    if (!at.has_state) return;
    int64_t t = this->chunk_start(at.begin);
    this->load_state(state, p.chunk_states, this->chunk_row(t));
    while (t < at.begin) {
      const DeltaTile before = this->tile_from(t, at.begin);
      this->load_keys(keys, p.k, before);
      this->load_values(residuals, this->residual_view(), this->state_dtype(), before);
      this->compute_decays(before);
      __syncthreads();  // keys, residuals, decays and the state of this chunk's earlier tile are there
      this->pass_state(before);
      __syncthreads();  // these have been read
      t += before.steps;
    }
  }

  __device__ __forceinline__ void load_tile(const DeltaTile& at) const {
    this->load_keys(keys, p.k, at);
    this->load_keys(queries, p.q, at);
    this->load_values(residuals, this->residual_view(), this->state_dtype(), at);
    this->load_values(d_out, p.grad_out, p.dtype, at);
    this->compute_decays(at);
  }

  // w += the product of attention and dy: from step j on.
  __device__ __forceinline__ void add_attended(const DeltaTile& at) const {
    this->for_tiles(at.steps, [&](int step, int value) {
      T sums[4][4];
      load_terms<false>(sums, w + value, pitch, step);
      const T *scores = attention + step, *gradients = d_out + value;
      accumulate_diagonal<false, false>(sums, scores, kDeltaPitch, gradients, pitch, step,
                                        [](int i, int j, int) { return i >= j; });
      accumulate<false, false>(sums, scores, kDeltaPitch, gradients, pitch, step + 4, at.whole_vectors());
      store_sums(w + step * pitch + value, pitch, sums);
    });
  }

  // Turns recall into dL + dL^T, attention into dA and between into the gradient of its logarithm: [i][j].
  __device__ __forceinline__ void score_gradients(const DeltaTile& at) const {
    constexpr int kVectors = kDeltaSteps / 4;
    for (int index = static_cast<int>(threadIdx.x); index < kVectors * kVectors; index += kDeltaThreads) {
      const int step = 4 * (index / kVectors), column = 4 * (index % kVectors);
      if (column > step || step >= at.steps) continue;
      T erased[4][4] = {}, attended[4][4] = {};
      const T* right = corrections + column * pitch;
      accumulate<true, true>(erased, w + step * pitch, pitch, right, pitch, 0, width);
      accumulate<true, true>(attended, d_out + step * pitch, pitch, right, pitch, 0, width);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int i = step + a, j = column + b, to = i * kDeltaPitch + j;
          if (j > i) continue;
          const bool exists = i < at.steps, is_before = exists && j < i;
          const T decay = between[to];
          between[to] = is_before ? recall[to] * erased[a][b] + attention[to] * attended[a][b] : T(0);
          recall[to] = is_before ? -decay * erased[a][b] : T(0);
          recall[j * kDeltaPitch + i] = recall[to];
          attention[to] = exists ? this->scale * decay * attended[a][b] : T(0);
        }
      }
    }
  }

  // Of beta, from du e in `residuals`; and state_parts.
  __device__ __forceinline__ void row_sums(const DeltaTile& at, bool has_d_state) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < at.steps) {
      T sum = T(0);
      for (int j = 0; j < width; ++j) sum += residuals[thread * pitch + j];
      store_step(plan.grad_beta, at.begin + thread, sum);
    }
    if (!at.has_state || !has_d_state) return;
    const T decay = this->whole_decay(at);
    T sum = T(0);
    for (int element = thread; element < rows * width; element += kDeltaThreads) {
      const int index = element / width * pitch + element % width;
      sum += decay * d_state[index] * state[index];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (thread % 32 == 0) state_parts[thread / 32] = sum;
  }

  __device__ __forceinline__ void store_step(const wmk_view& view, int64_t t, T value) const {
    T* to = static_cast<T*>(view.data) + panel * plan.scalar_elements;
    to[row * view.stride[0] + head * view.stride[1] + t * view.stride[2]] = value;
  }
  // Of 4 keys of 4 steps.
  __device__ __forceinline__ void store_keys(const wmk_view& view, const DeltaTile& at, int i, int step,
                                             const T (&sums)[4][4]) const {
    const int64_t offset = panel * plan.vector_elements + row * view.stride[0] + head * view.stride[1] +
                           i * view.stride[2] + (at.begin + step) * view.stride[3];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        if (i + a < d_k && step + b < at.steps)
          store_element(view.data, plan.dtype, offset + a * view.stride[2] + b * view.stride[3], sums[a][b]);
      }
    }
  }

  // sums[key][step] times factors[step]; adds their products with x, [key][step], to products[step].
  static __device__ __forceinline__ void weigh(T (&sums)[4][4], const T* factors, bool negative, const T* x,
                                               T (&products)[4]) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const T factor = negative ? -factors[b] : factors[b];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        sums[a][b] *= factor;
        products[b] += sums[a][b] * x[a * kDeltaPitch + b];
      }
    }
  }
  __device__ __forceinline__ void query_gradients(const DeltaTile& at, int i, int step, T (&start)[4]) const {
    T sums[4][4] = {};
    if (at.has_state) {
      accumulate<true, true>(sums, state + i * pitch, pitch, d_out + step * pitch, pitch, 0, width);
      weigh(sums, this->read_decay + step, false, queries + i * kDeltaPitch + step, start);
    }
    const T *left = keys + i * kDeltaPitch, *right = attention + step * kDeltaPitch;
    accumulate<true, true>(sums, left, kDeltaPitch, right, kDeltaPitch, 0, step);
    accumulate_diagonal<true, true>(sums, left, kDeltaPitch, right, kDeltaPitch, step,
                                    [](int j, int, int of) { return j <= of; });
    store_keys(plan.grad_q, at, i, step, sums);
  }
  __device__ __forceinline__ void key_gradients(const DeltaTile& at, bool has_d_state, int i, int step, T (&start)[4],
                                                T (&end_of)[4]) const {
    const T* own = keys + i * kDeltaPitch + step;
    T sums[4][4] = {}, more[4][4] = {};
    if (has_d_state) {
      accumulate<true, true>(sums, d_state + i * pitch, pitch, corrections + step * pitch, pitch, 0, width);
      weigh(sums, to_end + step, false, own, end_of);
    }
    if (at.has_state) {
      accumulate<true, true>(more, state + i * pitch, pitch, w + step * pitch, pitch, 0, width);
      weigh(more, since_start + step, true, own, start);
    }
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) sums[a][b] += more[a][b];
    const int steps = at.whole_vectors();
    accumulate<true, true>(sums, keys + i * kDeltaPitch, kDeltaPitch, recall + step * kDeltaPitch, kDeltaPitch, 0,
                           steps);
    const T *left = queries + i * kDeltaPitch, *right = attention + step;
    accumulate_diagonal<true, false>(sums, left, kDeltaPitch, right, kDeltaPitch, step,
                                     [](int attending, int, int of) { return attending >= of; });
    accumulate<true, false>(sums, left, kDeltaPitch, right, kDeltaPitch, step + 4, steps);
    store_keys(plan.grad_k, at, i, step, sums);
  }
  // Of q, k, start_parts and end_parts. A warp takes 16 keys' part of q's gradient or of k's.
  __device__ __forceinline__ void vector_gradients(const DeltaTile& at, bool has_d_state) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int step = 4 * (lane % 8);
    for (int group = warp; group < 2 * groups; group += kDeltaWarps) {
      const bool is_query = group < groups;
      const int i = 16 * (group % groups) + 4 * (lane / 8);
      T start[4] = {}, end_of[4] = {};
      if (i < rows && step < at.steps) {
        if (is_query) {
          query_gradients(at, i, step, start);
        } else {
          key_gradients(at, has_d_state, i, step, start, end_of);
        }
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        for (int distance = 8; distance < 32; distance *= 2) {
          start[b] += __shfl_xor_sync(0xffffffffu, start[b], distance);
          end_of[b] += __shfl_xor_sync(0xffffffffu, end_of[b], distance);
        }
        if (lane >= 8) continue;
        start_parts[group * kDeltaSteps + step + b] = start[b];
        if (!is_query) end_parts[group % groups * kDeltaSteps + step + b] = end_of[b];
      }
    }
  }

  // By the first warp, a lane per step. The gate of step t is part of the decays from before t, or the start, to t and
  // later, or the end.
  __device__ __forceinline__ void gate_gradients(const DeltaTile& at, bool has_d_state) const {
    if (threadIdx.x >= 32) return;
    const int lane = static_cast<int>(threadIdx.x);
    // between[i][j]: what decays from j to i and later pass on
    T sum = T(0);
    for (int group = 0; group < groups; ++group) sum += end_parts[group * kDeltaSteps + lane];
    for (int i = at.steps - 1; i > lane; --i) {
      sum += between[i * kDeltaPitch + lane];
      between[i * kDeltaPitch + lane] = sum;
    }
    __syncwarp();  // the sums over i are there
    T from_start = T(0);
    for (int group = 0; group < 2 * groups; ++group) from_start += start_parts[group * kDeltaSteps + lane];
    if (lane >= at.steps) from_start = T(0);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const T later = __shfl_down_sync(0xffffffffu, from_start, distance);
      if (lane + distance < 32) from_start += later;
    }
    if (lane >= at.steps) return;
    if (at.has_state && has_d_state)
      for (int warp = 0; warp < kDeltaWarps; ++warp) from_start += state_parts[warp];
    for (int j = 0; j < lane; ++j) from_start += between[lane * kDeltaPitch + j];
    store_step(plan.grad_gate, at.begin + lane, from_start);
  }

  // d_state becomes the gradient of the state before the tile.
  __device__ __forceinline__ void pass_gradient(const DeltaTile& at, bool has_d_state) const {
    const int steps = at.whole_vectors();
    this->update_state(d_state, has_d_state, this->whole_decay(at), [&](int i, int j, T(&sums)[4][4]) {
      accumulate<true, false>(sums, keys + i * kDeltaPitch, kDeltaPitch, w + j, pitch, 0, steps, since_start);
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[a][b] = -sums[a][b];
      accumulate<true, false>(sums, queries + i * kDeltaPitch, kDeltaPitch, d_out + j, pitch, 0, steps,
                              this->read_decay);
    });
  }
};

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kDeltaThreads, 1)
    gated_delta_rule_backward_kernel(const WMK_GRID_CONSTANT wmk_gated_delta_rule p,
                                     const WMK_GRID_CONSTANT DeltaPlan plan) {
  WMK_SHARED_MEMORY(shared);
  DeltaReverse<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  const int pitch = block.pitch;
  bool has_d_state = p.grad_last_state.data != nullptr;  // false: it is zero
  block.load_state(block.d_state, p.grad_last_state, block.sequence);
  for (int64_t end = block.end; end > block.begin;) {
    const DeltaTile tile = block.tile_before(end);
    block.restore_state(tile);
    block.load_tile(tile);
    __syncthreads();  // the tile, the state and its gradient are there
    for (int index = static_cast<int>(threadIdx.x); index < kDeltaSteps * pitch; index += kDeltaThreads)
      block.corrections[index] = block.beta[index / pitch] * block.residuals[index];
    block.template multiply_keys<true>(tile, block.d_state, has_d_state,
                                       [&](bool, int step, int value, T(&products)[4][4]) {
#pragma unroll
                                         for (int a = 0; a < 4; ++a)
#pragma unroll
                                           for (int b = 0; b < 4; ++b) products[a][b] *= block.to_end[step + a];
                                         store_sums(block.w + step * pitch + value, pitch, products);
                                       });
    __syncthreads();  // scores, corrections and what keys find in the state's gradient are there
    block.add_attended(tile);
    __syncthreads();  // the right-hand side is there
    block.template solve<true>(tile, block.w, [&](int step, int value, T d_correction, T gradient) {
      block.residuals[step * pitch + value] *= d_correction;
      block.w[step * pitch + value] = gradient;
    });
    __syncthreads();  // w and du e are there
    block.score_gradients(tile);
    block.row_sums(tile, has_d_state);
    block.store_values(block.w, p.grad_v, p.dtype, tile);
    __syncthreads();  // gradients of scores and decays are there
    block.vector_gradients(tile, has_d_state);
    __syncthreads();  // partial sums are there, the state's gradient has been read
    block.gate_gradients(tile, has_d_state);
    if (tile.has_state) block.pass_gradient(tile, has_d_state);
    __syncthreads();  // keys, values and decays have been read
    has_d_state = tile.has_state;
    end = tile.begin;
  }
  block.store_state(block.d_state, !has_d_state, p.grad_initial_state, block.sequence);
}

}  // namespace wmk
