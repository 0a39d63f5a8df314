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
  using Base::between, Base::d_state, Base::entering, Base::first_value, Base::group, Base::head;
  using Base::keys, Base::kVectors, Base::own, Base::p, Base::panel, Base::pitch, Base::plan, Base::queries, Base::row;
  using Base::rows, Base::scores, Base::since_start, Base::skip, Base::state, Base::take, Base::weigh, Base::weight;
  using Base::width, Base::x, Base::y;
  T* d_scores = nullptr;             // [i][kTilePitch]: dM, of blocks on and below the diagonal
  T *d_out = nullptr, *u = nullptr;  // [step][pitch]: dout, then dy; u
  T* z = nullptr;                    // [step][pitch]: z, then dz
  T* d_skip = nullptr;               // [value], each of one thread

  __device__ __forceinline__ SSDReverse(const wmk_ssd_scan& arguments, const SSDPlan& of) : Base(arguments, of) {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    Base::template prologue<SHARED>(shared);
    take_gradients();
  }
  __device__ __forceinline__ void take_gradients() {
    d_scores = take(kTileSteps * kTilePitch);
    this->take_values();
    this->reverse_prologue();
    d_out = take(kTileSteps * pitch);
    u = take(kTileSteps * pitch);
    z = take(kTileSteps * pitch);
    d_skip = take(width);
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

  // Where the state is kept before a tile that begins at step t of its segment's grid of tiles.
  __device__ __forceinline__ T* kept_state(int64_t t) const {
    const int64_t step = (t - this->begin) % p.kept_interval, chunk = step / p.chunk;
    const int64_t slot = chunk * ceil_div(p.chunk, kTileSteps) + (step - chunk * p.chunk) / kTileSteps;
    return static_cast<T*>(plan.states) + (blockIdx.x * plan.slots + slot) * rows * width;
  }
  // The states before the tiles of the segment that ends before `segment_end`.
  __device__ __forceinline__ void recompute_states(int64_t segment_end) const {
    int64_t t = this->begin + (segment_end - 1 - this->begin) / p.kept_interval * p.kept_interval;
    this->load_state(state, p.chunk_states, this->saved_row(t, p.kept_interval));
    while (true) {
      const PanelTile at = this->tile_from(t, segment_end);
      if (t == this->tile_start(t)) {
        T* to = kept_state(t);
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
  __device__ __forceinline__ void load_tile(const PanelTile& at) const {
    this->load_inputs(at);
    this->load_queries(at);
    this->load_values(d_out, vectors_by_head(p.grad_out), p.dtype, at);
    if (p.z.data != nullptr) this->load_values(z, vectors_by_head(p.z), p.dtype, at);
    if (!at.has_state) return;
    const T* from = kept_state(at.begin);
    for (int element = static_cast<int>(threadIdx.x); element < rows * width; element += kPanelThreads)
      state[element / width * pitch + element % width] = from[element];
  }

  // dz in z, and dy in d_out.
  __device__ __forceinline__ void gate_outputs(const PanelTile& at) const {
    this->for_tiles(at.steps, [&](int step, int value) {
      T sums[4][4];
      this->output_sums(sums, step, value);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int index = (step + a) * pitch + value + b;
          const T z_t = z[index], s = sigmoid(z_t, true), gradient = d_out[index];
          z[index] = gradient * sums[a][b] * (s * (T(1) + z_t * (T(1) - s)));
          d_out[index] = gradient * (z_t * s);
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

  // Of the weights and D, and state_parts.
  __device__ __forceinline__ void row_sums(const PanelTile& at, bool has_d_state) const {
    const int thread = static_cast<int>(threadIdx.x), step = thread - kTileSteps;
    if (thread < width && p.D.data != nullptr)
      for (int i = at.steps - 1; i >= 0; --i) d_skip[thread] += d_out[i * pitch + thread] * x[i * pitch + thread];
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
      const T earlier = head == this->first_head() ? T(0) : static_cast<const T*>(view.data)[offset];
      store_to(view, plan.dtype, offset, earlier + sums[a][b]);
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
  __device__ __forceinline__ void clear_skip_gradient() const {
    if (static_cast<int>(threadIdx.x) < width) d_skip[threadIdx.x] = T(0);
  }
  __device__ __forceinline__ void store_skip_gradient() const {
    const int value = static_cast<int>(threadIdx.x);
    if (p.D.data == nullptr || value >= this->count) return;
    static_cast<T*>(plan.grad_D)[(this->sequence * p.heads + head) * p.d + first_value + value] = d_skip[value];
  }

  // Returns whether the state before the tile has a gradient.
  template <bool SHARED>
  __device__ __forceinline__ bool reverse_tile(const PanelTile& at, bool has_d_state) {
    begin_phase<SHARED>();
    load_tile(at);
    __syncthreads();  // the tile, the state and its gradient are there
    begin_phase<SHARED>();
    this->multiply(at, p.z.data != nullptr, d_state, u, has_d_state);
    __syncthreads();  // scores, what the state gives and what B finds in the state's gradient are there
    begin_phase<SHARED>();
    if (p.z.data != nullptr) {
      gate_outputs(at);
      __syncthreads();  // dy is there
      begin_phase<SHARED>();
    }
    input_gradients(at);
    score_gradients(at);
    __syncthreads();  // u and the gradients of x, scores and decays are there
    begin_phase<SHARED>();
    this->store_values(y, vectors_by_head(p.grad_x), p.dtype, at);
    if (p.z.data != nullptr) this->store_values(z, vectors_by_head(p.grad_z), p.dtype, at);
    row_sums(at, has_d_state);
    this->vector_gradients(
        at, [&](int i, int step, T(&start)[4]) { query_gradients(at, i, step, start); },
        [&](int i, int step, T(&)[4], T(&end_of)[4]) { key_gradients(at, has_d_state, i, step, end_of); });
    __syncthreads();  // partial sums are there, the state's gradient has been read
    begin_phase<SHARED>();
    this->gate_gradients(at, has_d_state,
                         [&](int step, T gradient) { store_step(plan.grad_gate, at.begin + step, gradient); });
    if (at.has_state) pass_gradient(at, has_d_state);
    __syncthreads();  // C, dy and decays have been read
    begin_phase<SHARED>();
    return at.has_state;
  }
};

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPanelThreads, 1)
    ssd_scan_backward_kernel(const WMK_GRID_CONSTANT wmk_ssd_scan p, const WMK_GRID_CONSTANT SSDPlan plan) {
  WMK_SHARED_MEMORY(shared);
  SSDReverse<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  for (; block.head < block.end_head(); ++block.head) {
    bool has_d_state = p.grad_last_state.data != nullptr;  // false: it is zero
    block.load_state(block.d_state, state_by_row(p.grad_last_state), block.sequence);
    block.load_skip();
    block.clear_skip_gradient();
    for (int64_t end = block.end; end > block.begin;) {
      if (end == block.end || (end - block.begin) % p.kept_interval == 0) block.recompute_states(end);
      const PanelTile tile = block.tile_before(end);
      has_d_state = block.template reverse_tile<SHARED>(tile, has_d_state);
      end = tile.begin;
    }
    block.store_skip_gradient();
    block.store_state(block.d_state, !has_d_state, state_by_row(p.grad_initial_state), block.sequence);
  }
}

}  // namespace wmk
