// Gated delta rule, backward, on a GPU: the tiles of gated_delta_rule_common.cuh in reverse, with the state before a
// tile and the gradient of the state after it in shared memory.
//
// A tile starts from its chunk's saved state and residuals; in a chunk of more than one tile, the tiles before are run
// again first. The gradient of a gate sums what every decay over it passes on. The sums run from the last step to the
// first and only add: differences of sums over the tile would lose small gradients.
//
// Multiply-adds per step and head: 6 d_k d_v + 32 (2 d_k + 3 d_v), and 96 d_k for each panel after the first. Gradients
// but those of v and the initial state are partial per panel, and added in order by panel_sum_kernel.
#pragma once

#include "cuda/gated_delta_rule/gated_delta_rule_common.cuh"

namespace wmk {

// What the backward kernel adds to a block.
template <typename T>
struct DeltaReverse : DeltaBlock<T> {
  using Base = DeltaBlock<T>;
  using Base::attention, Base::beta, Base::between, Base::corrections, Base::d_state, Base::head, Base::keys, Base::p;
  using Base::panel, Base::pitch, Base::plan, Base::queries, Base::recall, Base::residuals, Base::row, Base::rows;
  using Base::since_start, Base::state, Base::take, Base::to_end, Base::weigh, Base::width;
  T* d_out = nullptr;  // [step][pitch]: dy
  T* w = nullptr;      // [step][pitch]: du, then w

  __device__ __forceinline__ DeltaReverse(const wmk_gated_delta_rule& arguments, const DeltaPlan& of)
      : Base(arguments, of) {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    Base::template prologue<SHARED>(shared);
    take_gradients();
  }
  __device__ __forceinline__ void take_gradients() {
    this->reverse_prologue();
    d_out = take(kTileSteps * pitch);
    w = take(kTileSteps * pitch);
  }
  // In a workspace, addresses of arrays take registers: each phase computes those that it uses.
  template <bool SHARED>
  __device__ __forceinline__ void begin_phase() {
    if constexpr (!SHARED) {
      this->next = hidden(between);
      this->take_squares();
      this->take_scores();
      take_gradients();
    }
  }

  // The state before the tile. Ends with a barrier if it runs tiles again.
  __device__ __forceinline__ void restore_state(const PanelTile& at) const {
    if (!at.has_state) return;
    int64_t t = this->chunk_start(at.begin);
    this->load_state(state, p.chunk_states, this->saved_row(t, p.chunk));
    while (t < at.begin) {
      const PanelTile before = this->tile_from(t, at.begin);
      this->load_keys(keys, p.k, head, before);
      this->load_values(residuals, this->residual_view(), this->state_dtype(), before);
      this->compute_decays(before);
      __syncthreads();  // keys, residuals, decays and the state of this chunk's earlier tile are there
      this->pass_state(before);
      __syncthreads();  // these have been read
      t += before.steps;
    }
  }

  __device__ __forceinline__ void load_tile(const PanelTile& at) const {
    this->load_keys(keys, p.k, head, at);
    this->load_keys(queries, p.q, head, at);
    this->load_values(residuals, this->residual_view(), this->state_dtype(), at);
    this->load_values(d_out, p.grad_out, p.dtype, at);
    this->compute_decays(at);
  }

  // w += the product of attention and dy: from step j on.
  __device__ __forceinline__ void add_attended(const PanelTile& at) const {
    this->for_tiles(at.steps, [&](int step, int value) {
      T sums[4][4];
      load_terms<false>(sums, w + value, pitch, step);
      const T *scores = attention + step, *gradients = d_out + value;
      accumulate_diagonal<false, false>(sums, scores, kTilePitch, gradients, pitch, step,
                                        [](int i, int j, int) { return i >= j; });
      accumulate<false, false>(sums, scores, kTilePitch, gradients, pitch, step + 4, at.whole_vectors());
      store_sums(w + step * pitch + value, pitch, sums);
    });
  }

  // Turns recall into dL + dL^T, attention into dA and between into the gradient of its logarithm: [i][j].
  __device__ __forceinline__ void score_gradients(const PanelTile& at) const {
    constexpr int kVectors = kTileSteps / 4;
    for (int index = static_cast<int>(threadIdx.x); index < kVectors * kVectors; index += kPanelThreads) {
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
          const int i = step + a, j = column + b, to = i * kTilePitch + j;
          if (j > i) continue;
          const bool exists = i < at.steps, is_before = exists && j < i;
          const T decay = between[to];
          between[to] = is_before ? recall[to] * erased[a][b] + attention[to] * attended[a][b] : T(0);
          recall[to] = is_before ? -decay * erased[a][b] : T(0);
          recall[j * kTilePitch + i] = recall[to];
          attention[to] = exists ? this->scale * decay * attended[a][b] : T(0);
        }
      }
    }
  }

  // Of beta, from du e in `residuals`; and state_parts.
  __device__ __forceinline__ void row_sums(const PanelTile& at, bool has_d_state) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < at.steps) {
      T sum = T(0);
      for (int j = 0; j < width; ++j) sum += residuals[thread * pitch + j];
      store_step(plan.grad_beta, at.begin + thread, sum);
    }
    if (at.has_state && has_d_state) this->sum_state_products(at);
  }

  __device__ __forceinline__ void store_step(const wmk_view& view, int64_t t, T value) const {
    T* to = static_cast<T*>(view.data) + panel * plan.scalar_elements;
    to[row * view.stride[0] + head * view.stride[1] + t * view.stride[2]] = value;
  }
  // Of 4 keys of 4 steps.
  __device__ __forceinline__ void store_keys(const wmk_view& view, const PanelTile& at, int i, int step,
                                             const T (&sums)[4][4]) const {
    this->for_vectors(view, head, at, i, step, [&](int a, int b, int64_t offset) {
      store_to(view, plan.dtype, panel * plan.vector_elements + offset, sums[a][b]);
    });
  }

  __device__ __forceinline__ void query_gradients(const PanelTile& at, int i, int step, T (&start)[4]) const {
    T sums[4][4] = {};
    if (at.has_state) {
      accumulate<true, true>(sums, state + i * pitch, pitch, d_out + step * pitch, pitch, 0, width);
      weigh(sums, this->read_decay + step, false, queries + i * kTilePitch + step, start);
    }
    const T *left = keys + i * kTilePitch, *right = attention + step * kTilePitch;
    accumulate<true, true>(sums, left, kTilePitch, right, kTilePitch, 0, step);
    accumulate_diagonal<true, true>(sums, left, kTilePitch, right, kTilePitch, step,
                                    [](int j, int, int of) { return j <= of; });
    store_keys(plan.grad_q, at, i, step, sums);
  }
  __device__ __forceinline__ void key_gradients(const PanelTile& at, bool has_d_state, int i, int step, T (&start)[4],
                                                T (&end_of)[4]) const {
    const T* own = keys + i * kTilePitch + step;
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
    accumulate<true, true>(sums, keys + i * kTilePitch, kTilePitch, recall + step * kTilePitch, kTilePitch, 0, steps);
    const T *left = queries + i * kTilePitch, *right = attention + step;
    accumulate_diagonal<true, false>(sums, left, kTilePitch, right, kTilePitch, step,
                                     [](int attending, int, int of) { return attending >= of; });
    accumulate<true, false>(sums, left, kTilePitch, right, kTilePitch, step + 4, steps);
    store_keys(plan.grad_k, at, i, step, sums);
  }
  // d_state becomes the gradient of the state before the tile.
  __device__ __forceinline__ void pass_gradient(const PanelTile& at, bool has_d_state) const {
    const int steps = at.whole_vectors();
    this->update_state(d_state, has_d_state, this->whole_decay(at), [&](int i, int j, T(&sums)[4][4]) {
      accumulate<true, false>(sums, keys + i * kTilePitch, kTilePitch, w + j, pitch, 0, steps, since_start);
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[a][b] = -sums[a][b];
      accumulate<true, false>(sums, queries + i * kTilePitch, kTilePitch, d_out + j, pitch, 0, steps, this->read_decay);
    });
  }
};

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPanelThreads, 1)
    gated_delta_rule_backward_kernel(const WMK_GRID_CONSTANT wmk_gated_delta_rule p,
                                     const WMK_GRID_CONSTANT DeltaPlan plan) {
  WMK_SHARED_MEMORY(shared);
  DeltaReverse<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  const int pitch = block.pitch;
  bool has_d_state = p.grad_last_state.data != nullptr;  // false: it is zero
  block.load_state(block.d_state, p.grad_last_state, block.sequence);
  for (int64_t end = block.end; end > block.begin;) {
    const PanelTile tile = block.tile_before(end);
    block.template begin_phase<SHARED>();
    block.restore_state(tile);
    block.load_tile(tile);
    __syncthreads();  // the tile, the state and its gradient are there
    block.template begin_phase<SHARED>();
    for (int index = static_cast<int>(threadIdx.x); index < kTileSteps * pitch; index += kPanelThreads)
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
    block.template begin_phase<SHARED>();
    block.add_attended(tile);
    __syncthreads();  // the right-hand side is there
    block.template begin_phase<SHARED>();
    block.template solve<true>(tile, block.w, [&](int step, int value, T d_correction, T gradient) {
      block.residuals[step * pitch + value] *= d_correction;
      block.w[step * pitch + value] = gradient;
    });
    __syncthreads();  // w and du e are there
    block.template begin_phase<SHARED>();
    block.score_gradients(tile);
    block.row_sums(tile, has_d_state);
    block.store_values(block.w, p.grad_v, p.dtype, tile);
    __syncthreads();  // gradients of scores and decays are there
    block.template begin_phase<SHARED>();
    block.vector_gradients(
        tile, [&](int i, int step, T(&start)[4]) { block.query_gradients(tile, i, step, start); },
        [&](int i, int step, T(&start)[4], T(&end_of)[4]) {
          block.key_gradients(tile, has_d_state, i, step, start, end_of);
        });
    __syncthreads();  // partial sums are there, the state's gradient has been read
    block.template begin_phase<SHARED>();
    block.gate_gradients(tile, has_d_state,
                         [&](int step, T gradient) { block.store_step(plan.grad_gate, tile.begin + step, gradient); });
    if (tile.has_state) block.pass_gradient(tile, has_d_state);
    __syncthreads();  // keys, values and decays have been read
    block.template begin_phase<SHARED>();
    has_d_state = tile.has_state;
    end = tile.begin;
  }
  block.store_state(block.d_state, !has_d_state, p.grad_initial_state, block.sequence);
}

}  // namespace wmk
