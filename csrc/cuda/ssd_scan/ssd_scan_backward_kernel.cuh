// SSD scan, backward, on a GPU: the tiles of ssd_scan_common.cuh in reverse, with the state before a tile and the
// gradient of the state after it in shared memory.
//
// A segment of `kept_interval` steps starts from its saved state: the states before its tiles are computed once more,
// to the workspace, then its tiles run in reverse. Each thread reads back what it wrote there.
//
// Multiply-adds per step and head: 5 n d + 18 (3 n + 2 d), with z also n d + 18 d, and 54 n for each panel after the
// first. Gradients of B and C are partial per panel and block of heads, those of numbers per step partial per panel;
// panel_sum_kernel adds them in order. A block takes heads of a group one after another where there are more than the
// GPU needs, and adds their gradients of B and C.
#pragma once

#include "cuda/ssd_scan/ssd_scan_common.cuh"

namespace wmk {

// What the backward kernel adds to a block.
template <typename T>
struct SSDReverse : SSDBlock<T> {
  using Base = SSDBlock<T>;
  using Base::between, Base::count, Base::d_state, Base::entering, Base::first_value, Base::group, Base::head;
  using Base::keys, Base::kVectors, Base::own, Base::p, Base::panel, Base::pitch, Base::plan, Base::queries, Base::row;
  using Base::rows, Base::scores, Base::since_start, Base::skip, Base::state, Base::take, Base::weigh, Base::weight;
  using Base::width, Base::x, Base::y;
  T* d_scores = nullptr;             // [i][kTilePitch]: dM, of blocks on and below the diagonal
  T *d_out = nullptr, *u = nullptr;  // [step][pitch]: dout, then dy; u
  bool is_first_head = true;

  __device__ __forceinline__ SSDReverse(const wmk_ssd_scan& arguments, const SSDPlan& of) : Base(arguments, of) {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    Base::template prologue<SHARED>(shared);
    this->reverse_prologue();
    d_scores = take(kTileSteps * kTilePitch);
    d_out = take(kTileSteps * pitch);
    u = take(kTileSteps * pitch);
  }

  // Where the state before a tile is kept that begins at step t of a segment's grid of tiles.
  __device__ __forceinline__ T* kept_state(int64_t segment, int64_t t) const {
    const int64_t chunk = this->chunk_start(t);
    const int64_t slot = (chunk - segment) / p.chunk * ceil_div(p.chunk, kTileSteps) + (t - chunk) / kTileSteps;
    return static_cast<T*>(plan.states) + (blockIdx.x * plan.slots + slot) * rows * width;
  }
  // The states before the tiles of a segment. Between them ends with a barrier.
  __device__ __forceinline__ void recompute_states(int64_t segment, int64_t segment_end) const {
    this->load_state(state, p.chunk_states, this->saved_row(segment, p.kept_interval));
    for (int64_t t = segment;;) {
      const PanelTile at = this->tile_from(t, segment_end);
      if (t == this->tile_start(t)) {
        T* to = kept_state(segment, t);
        for (int element = static_cast<int>(threadIdx.x); element < rows * width; element += kPanelThreads)
          to[element] = state[element / width * pitch + element % width];
      }
      t += at.steps;
      if (t == segment_end) return;
      this->load_inputs(at);
      __syncthreads();  // B, x, decays and the state are there
      this->pass_state(at, x, entering);
      __syncthreads();  // the state is there, B, x and decays have been read
    }
  }
  __device__ __forceinline__ void load_tile(int64_t segment, const PanelTile& at) const {
    this->load_inputs(at);
    this->load_queries(at);
    this->load_values(d_out, vectors_by_head(p.grad_out), p.dtype, at);
    if (!at.has_state) return;
    const T* from = kept_state(segment, at.begin);
    for (int element = static_cast<int>(threadIdx.x); element < rows * width; element += kPanelThreads)
      state[element / width * pitch + element % width] = from[element];
  }

  // dz, and dy in d_out.
  __device__ __forceinline__ void gate_outputs(const PanelTile& at) const {
    const wmk_view z = vectors_by_head(p.z), to = vectors_by_head(p.grad_z);
    const auto offset = [&](const wmk_view& view, int value, int step) {
      return row * view.stride[0] + head * view.stride[1] + (first_value + value) * view.stride[2] +
             (at.begin + step) * view.stride[3];
    };
    this->for_tiles(at.steps, [&](int step, int value) {
      T sums[4][4];
      this->output_sums(sums, step, value);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (step + a >= at.steps || value + b >= count) continue;
          const T z_t = load_element<T>(z.data, p.dtype, offset(z, value + b, step + a));
          const T s = sigmoid(z_t, true);
          T& gradient = d_out[(step + a) * pitch + value + b];
          const T dz = gradient * sums[a][b] * (s * (T(1) + z_t * (T(1) - s)));
          store_element(to.data, p.dtype, offset(to, value + b, step + a), dz);
          gradient *= z_t * s;
        }
      }
    });
  }

  // u, with what a step's own output adds if it has no weight of its own; dx in y.
  __device__ __forceinline__ void input_gradients(const PanelTile& at) const {
    const bool has_own = p.own_weight.data != nullptr, has_skip = p.D.data != nullptr;
    this->for_tiles(at.steps, [&](int step, int value) {
      T sums[4][4];
      load_terms<false>(sums, u + value, pitch, step);
      const T *left = scores + step, *right = d_out + value;
      accumulate_diagonal<false, false>(sums, left, kTilePitch, right, pitch, step,
                                        [](int i, int j, int) { return i > j; });
      accumulate<false, false>(sums, left, kTilePitch, right, pitch, step + 4, at.whole_vectors());
      T dy[4][4];
      load_terms<false>(dy, right, pitch, step);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const T score = scores[(step + a) * kTilePitch + step + a];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const T own_part = score * dy[a][b];
          if (!has_own) sums[a][b] += own_part;
          T dx = weight[step + a] * sums[a][b];
          if (has_own) dx += own[step + a] * own_part;
          if (has_skip) dx += skip[value + b] * dy[a][b];
          y[(step + a) * pitch + value + b] = dx;
        }
      }
      store_sums(u + step * pitch + value, pitch, sums);
    });
  }
  // d_scores, the gradients of own weights, and between as the gradient of its logarithm.
  __device__ __forceinline__ void score_gradients(const PanelTile& at) const {
    for (int index = static_cast<int>(threadIdx.x); index < kVectors * (kVectors + 1) / 2; index += kPanelThreads) {
      int step = 0, column = 0;
      triangle_block(index, step, column);
      step *= 4, column *= 4;
      if (step >= at.steps) continue;
      T sums[4][4] = {};
      accumulate<true, true>(sums, d_out + step * pitch, pitch, x + column * pitch, pitch, 0, width);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int i = step + a, j = column + b, to = i * kTilePitch + j;
          if (j > i) continue;
          const bool exists = i < at.steps;
          if (i == j) {
            d_scores[to] = exists ? own[i] * sums[a][b] : T(0);
            if (exists && p.own_weight.data != nullptr)
              store_step(plan.grad_own_weight, at.begin + i, scores[to] * sums[a][b]);
            continue;
          }
          const T weighted = exists ? weight[j] * sums[a][b] : T(0);
          d_scores[to] = exists ? between[to] * weighted : T(0);
          between[to] = exists ? scores[to] * weighted : T(0);
        }
      }
    }
  }

  // Of the weights, D, in d_skip, and state_parts.
  __device__ __forceinline__ void row_sums(const PanelTile& at, bool has_d_state, T& d_skip) const {
    const int thread = static_cast<int>(threadIdx.x), step = thread - kTileSteps;
    if (thread < width && p.D.data != nullptr)
      for (int i = at.steps - 1; i >= 0; --i) d_skip += d_out[i * pitch + thread] * x[i * pitch + thread];
    if (step >= 0 && step < at.steps) {
      T sum = T(0);
      for (int j = 0; j < width; ++j) sum += u[step * pitch + j] * x[step * pitch + j];
      store_step(plan.grad_weight, at.begin + step, sum);
    }
    if (at.has_state && has_d_state) this->sum_state_products(at);
  }
  __device__ __forceinline__ void store_step(const wmk_view& view, int64_t t, T value) const {
    T* to = static_cast<T*>(view.data) + panel * plan.scalar_elements;
    to[row * view.stride[0] + head * view.stride[1] + t * view.stride[2]] = value;
  }
  // Of 4 states of 4 steps; added to those of the block's earlier heads, which the same thread has stored.
  __device__ __forceinline__ void store_vectors(const wmk_view& view, const PanelTile& at, int i, int step,
                                                const T (&sums)[4][4]) const {
    const int64_t part = panel * plan.head_blocks + this->head_block;
    this->for_vectors(view, group, at, i, step, [&](int a, int b, int64_t offset) {
      offset += part * plan.vector_elements;
      const T earlier = is_first_head ? T(0) : static_cast<const T*>(view.data)[offset];
      store_element(view.data, plan.dtype, offset, earlier + sums[a][b]);
    });
  }
  __device__ __forceinline__ void query_gradients(const PanelTile& at, int i, int step, T (&start)[4]) const {
    T sums[4][4] = {};
    if (at.has_state) {
      accumulate<true, true>(sums, state + i * pitch, pitch, d_out + step * pitch, pitch, 0, width);
      weigh(sums, since_start + step, false, queries + i * kTilePitch + step, start);
    }
    const T *left = keys + i * kTilePitch, *right = d_scores + step * kTilePitch;
    accumulate<true, true>(sums, left, kTilePitch, right, kTilePitch, 0, step);
    accumulate_diagonal<true, true>(sums, left, kTilePitch, right, kTilePitch, step,
                                    [](int j, int, int of) { return j <= of; });
    store_vectors(plan.grad_C, at, i, step, sums);
  }
  __device__ __forceinline__ void key_gradients(const PanelTile& at, bool has_d_state, int i, int step,
                                                T (&end_of)[4]) const {
    T sums[4][4] = {};
    if (has_d_state) {
      accumulate<true, true>(sums, d_state + i * pitch, pitch, x + step * pitch, pitch, 0, width);
      weigh(sums, entering + step, false, keys + i * kTilePitch + step, end_of);
    }
    const T *left = queries + i * kTilePitch, *right = d_scores + step;
    accumulate_diagonal<true, false>(sums, left, kTilePitch, right, kTilePitch, step,
                                     [](int attending, int, int of) { return attending >= of; });
    accumulate<true, false>(sums, left, kTilePitch, right, kTilePitch, step + 4, at.whole_vectors());
    store_vectors(plan.grad_B, at, i, step, sums);
  }

  // d_state becomes the gradient of the state before the tile.
  __device__ __forceinline__ void pass_gradient(const PanelTile& at, bool has_d_state) const {
    this->update_state(d_state, has_d_state, this->whole_decay(at), [&](int i, int j, T(&sums)[4][4]) {
      accumulate<true, false>(sums, queries + i * kTilePitch, kTilePitch, d_out + j, pitch, 0, at.whole_vectors(),
                              since_start);
    });
  }
  __device__ __forceinline__ void store_skip_gradient(T d_skip) const {
    const int value = static_cast<int>(threadIdx.x);
    if (p.D.data == nullptr || value >= count) return;
    static_cast<T*>(plan.grad_D)[(this->sequence * p.heads + head) * p.d + first_value + value] = d_skip;
  }

  // Returns whether the state before the tile has a gradient.
  __device__ __forceinline__ bool reverse_tile(int64_t segment, const PanelTile& at, bool has_d_state,
                                               T& d_skip) const {
    load_tile(segment, at);
    __syncthreads();  // the tile, the state and its gradient are there
    this->multiply(at, p.z.data != nullptr, d_state, u, has_d_state);
    __syncthreads();  // scores, what the state gives and what B finds in the state's gradient are there
    if (p.z.data != nullptr) {
      gate_outputs(at);
      __syncthreads();  // dy is there
    }
    input_gradients(at);
    score_gradients(at);
    __syncthreads();  // u and the gradients of x, scores and decays are there
    this->store_values(y, vectors_by_head(p.grad_x), p.dtype, at);
    row_sums(at, has_d_state, d_skip);
    this->vector_gradients(
        at, [&](int i, int step, T(&start)[4]) { query_gradients(at, i, step, start); },
        [&](int i, int step, T(&)[4], T(&end_of)[4]) { key_gradients(at, has_d_state, i, step, end_of); });
    __syncthreads();  // partial sums are there, the state's gradient has been read
    this->gate_gradients(at, has_d_state,
                         [&](int step, T gradient) { store_step(plan.grad_gate, at.begin + step, gradient); });
    if (at.has_state) pass_gradient(at, has_d_state);
    __syncthreads();  // C, dy and decays have been read
    return at.has_state;
  }
};

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPanelThreads, 1)
    ssd_scan_backward_kernel(const WMK_GRID_CONSTANT wmk_ssd_scan p, const WMK_GRID_CONSTANT SSDPlan plan) {
  WMK_SHARED_MEMORY(shared);
  SSDReverse<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  for (; block.head < block.last_head; ++block.head) {
    bool has_d_state = p.grad_last_state.data != nullptr;  // false: it is zero
    T d_skip = T(0);
    block.load_state(block.d_state, state_by_row(p.grad_last_state), block.sequence);
    block.load_skip();
    for (int64_t end = block.end; end > block.begin;) {
      const int64_t segment = block.begin + (end - 1 - block.begin) / p.kept_interval * p.kept_interval;
      block.recompute_states(segment, end);
      while (end > segment) {
        const PanelTile tile = block.tile_before(end);
        has_d_state = block.reverse_tile(segment, tile, has_d_state, d_skip);
        end = tile.begin;
      }
    }
    block.store_skip_gradient(d_skip);
    block.store_state(block.d_state, !has_d_state, state_by_row(p.grad_initial_state), block.sequence);
    block.is_first_head = false;
  }
}

}  // namespace wmk
