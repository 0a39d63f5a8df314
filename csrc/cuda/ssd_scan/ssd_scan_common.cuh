// What the SSD scan's kernels share.
//
// Tiles of a panel of a head run one after another (common/panel.cuh). With S the state before the tile, d_i the decay
// since then, D_ij that from step j to i, D_j that from j to the tile's last step n, w and o the weights and own
// weights, a tile is
//
//   for every i:  y_i = d_i S^T C_i + sum_{j < i} M_ij w_j x_j + M_ii o_i x_i + skip x_i     M_ij = D_ij C_i . B_j
//                 out_i = y_i silu(z_i)
//   then:         S = d_n S + sum_j B_j (D_j w_j x_j)^T
//
// and, with dS the gradient of the state after it,
//
//   for every i:     dy_i = dout_i silu(z_i)       dz_i = dout_i y_i silu'(z_i)
//   for every j:     u_j = D_j dS^T B_j + sum_{i > j} M_ij dy_i
//                    dx_j = w_j u_j + (o_j M_jj + skip) dy_j      dw_j = u_j . x_j      do_j = M_jj dy_j . x_j
//   for every i, j:  dM_ij = D_ij w_j dy_i . x_j, with o_i for w_j on the diagonal: of C_i . B_j
//   for every i:     dC_i = d_i S dy_i + sum_{j <= i} dM_ij B_j
//   for every j:     dB_j = D_j w_j dS x_j + sum_{i >= j} dM_ij C_i
//   then:            dS = d_n dS + sum_i C_i (d_i dy_i)^T
//
// Without own weights, o is w and dw_j also has do_j.
//
// A thread holds 4 x 4 results and reads four terms of four rows and columns at once, eight vector loads per 64
// multiply-adds.
#pragma once

#include "cuda/common/panel.cuh"

namespace wmk {

// Sizes of a call, and where its partial gradients are.
struct SSDPlan : PanelSizes {
  int64_t group_heads;               // heads per group
  int64_t block_heads, head_blocks;  // heads that a block takes one after another; blocks per group
  wmk_view grad_B, grad_C;           // [batch, groups, n, time]: the gradients, or the first of the partial sums
  wmk_view grad_gate, grad_weight, grad_own_weight;  // [batch, heads, time], likewise
  int64_t vector_elements, scalar_elements;          // from part to part: of a panel's block of heads, of a panel
  int64_t dtype;                                     // of grad_B and grad_C
  void* grad_D;                                      // [sequences, heads, d], partial
  void* states;                                      // [blocks][slots][rows][width]: before the tiles of a segment
  int64_t slots;

  int64_t parts() const { return panels * head_blocks; }
};

// [batch, time, heads, ..] as [batch, heads, .., time].
__host__ __device__ __forceinline__ wmk_view vectors_by_head(const wmk_view& view) {
  return {view.data, {view.stride[0], view.stride[2], view.stride[3], view.stride[1]}};
}
__host__ __device__ __forceinline__ wmk_view scalars_by_head(const wmk_view& view) {
  return {view.data, {view.stride[0], view.stride[2], view.stride[1], 0}};
}
// [sequences, heads, d, n] as [sequences, heads, n, d].
__device__ __forceinline__ wmk_view state_by_row(const wmk_view& view) {
  return {view.data, {view.stride[0], view.stride[1], view.stride[3], view.stride[2]}};
}

// 4 x 4 steps of the lower triangle's blocks: `index` counts them row by row.
__device__ __forceinline__ void triangle_block(int index, int& row, int& column) {
  row = 0;
  while (index > row) index -= ++row;
  column = index;
}

template <typename T>
struct SSDBlock : PanelBlock<T, wmk_ssd_scan> {
  using Base = PanelBlock<T, wmk_ssd_scan>;
  using Base::between, Base::count, Base::first_value, Base::head, Base::keys, Base::p, Base::pitch, Base::queries;
  using Base::rows, Base::since_start, Base::state, Base::take, Base::to_end, Base::width;
  static constexpr int kVectors = kTileSteps / 4;
  const SSDPlan& plan;
  int64_t group = 0;
  int head_block = 0;            // of the group
  T* scores = nullptr;           // [i][kTilePitch]: M_ij, of blocks on and below the diagonal
  T *x = nullptr, *y = nullptr;  // [step][pitch]
  T *weight = nullptr, *own = nullptr, *entering = nullptr;  // [step]: w, o, D_j w_j
  T* skip = nullptr;                                         // [value]: D

  __device__ __forceinline__ SSDBlock(const wmk_ssd_scan& arguments, const SSDPlan& of)
      : Base(arguments, of), plan(of) {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    const int64_t block = blockIdx.x / plan.panels, of_group = block / plan.head_blocks;
    head_block = static_cast<int>(block % plan.head_blocks);
    group = static_cast<int>(of_group % p.groups);
    Base::template prologue<SHARED>(shared, blockIdx.x % plan.panels, of_group / p.groups, first_head(), p.n, p.d);
    take_scores();
  }
  __device__ __forceinline__ void take_scores() {
    scores = take(kTileSteps * kTilePitch);
    weight = take(kTileSteps);
    own = take(kTileSteps);
    entering = take(kTileSteps);
  }
  // Of the block's heads, and the one after the last.
  __device__ __forceinline__ int64_t first_head() const {
    return group * plan.group_heads + head_block * plan.block_heads;
  }
  __device__ __forceinline__ int64_t end_head() const {
    return group * plan.group_heads + min((head_block + 1) * plan.block_heads, plan.group_heads);
  }
  __device__ __forceinline__ void take_values() {
    this->take_state();
    x = take(kTileSteps * pitch);
    y = take(kTileSteps * pitch);
    skip = take(width);
  }
  // Elements that it and the backward kernel take.
  static __host__ __device__ constexpr int64_t arena(int64_t rows, int64_t width, bool backward) {
    const int64_t values = kTileSteps * (width + 4), square = kTileSteps * kTilePitch;
    return Base::arena(rows, width) + square + 2 * values + 3 * kTileSteps + width +
           (backward ? Base::reverse_arena(rows, width) + square + 3 * values + width : 0);
  }

  __device__ __forceinline__ void load_skip() const {
    const int value = static_cast<int>(threadIdx.x);
    if (p.D.data == nullptr || value >= width) return;
    const int64_t offset = head * p.D.stride[0] + (first_value + value) * p.D.stride[1];
    skip[value] = value < count ? static_cast<const T*>(p.D.data)[offset] : T(0);
  }
  // What passes the state on.
  __device__ __forceinline__ void load_inputs(const PanelTile& at) const {
    this->load_keys(keys, vectors_by_head(p.B), group, at);
    this->load_values(x, vectors_by_head(p.x), p.dtype, at);
    if (threadIdx.x >= 32) return;
    this->compute_decays(scalars_by_head(p.gate), at);
    const int lane = static_cast<int>(threadIdx.x);
    const bool exists = lane < at.steps;
    const T w = exists ? this->scalar(scalars_by_head(p.weight), at.begin + lane) : T(0);
    const bool has_own = exists && p.own_weight.data != nullptr;
    weight[lane] = w;
    own[lane] = has_own ? this->scalar(scalars_by_head(p.own_weight), at.begin + lane) : w;
    entering[lane] = to_end[lane] * w;
  }
  __device__ __forceinline__ void load_queries(const PanelTile& at) const {
    this->load_keys(queries, vectors_by_head(p.C), group, at);
  }

  // Scores; y = d C S if `reads`; u = D_j B dS if `with` is not null.
  __device__ __forceinline__ void multiply(const PanelTile& at, bool reads, const T* with, T* u,
                                           bool has_d_state) const {
    constexpr int kScores = kVectors * (kVectors + 1) / 2;
    const int products = kVectors * (width / 4), all = kScores + ((reads ? 1 : 0) + (u ? 1 : 0)) * products;
    for (int index = static_cast<int>(threadIdx.x); index < all; index += kPanelThreads) {
      if (index < kScores) {
        score(at, index);
        continue;
      }
      const int rest = (index - kScores) % products, step = 4 * (rest % kVectors), value = 4 * (rest / kVectors);
      if (step >= at.steps) continue;
      const bool is_query = reads && index - kScores < products;
      T sums[4][4] = {};
      if (is_query ? at.has_state : has_d_state) {
        const T *left = (is_query ? queries : keys) + step, *right = (is_query ? state : with) + value;
        accumulate<false, false>(sums, left, kTilePitch, right, pitch, 0, rows);
        const T* factors = (is_query ? since_start : to_end) + step;
#pragma unroll
        for (int a = 0; a < 4; ++a)
#pragma unroll
          for (int b = 0; b < 4; ++b) sums[a][b] *= factors[a];
      }
      store_sums((is_query ? y : u) + step * pitch + value, pitch, sums);
    }
  }
  __device__ __forceinline__ void score(const PanelTile& at, int index) const {
    int step = 0, column = 0;
    triangle_block(index, step, column);
    step *= 4, column *= 4;
    if (step >= at.steps) return;
    T sums[4][4] = {};
    accumulate<false, false>(sums, queries + step, kTilePitch, keys + column, kTilePitch, 0, rows);
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int i = step + a, j = column + b, to = i * kTilePitch + j;
        scores[to] = i < at.steps && j <= i ? between[to] * sums[a][b] : T(0);
      }
    }
  }

  // The sums of y for 4 steps and values: what the state gives, in y, and the tile's own inputs.
  __device__ __forceinline__ void output_sums(T (&sums)[4][4], int step, int value) const {
    load_terms<false>(sums, y + value, pitch, step);
    const T *left = scores + step * kTilePitch, *right = x + value;
    accumulate<true, false>(sums, left, kTilePitch, right, pitch, 0, step, weight);
    accumulate_four<true, false>(sums, left, kTilePitch, right, pitch, step, weight,
                                 [](int j, int i, int) { return j < i; });
    T own_x[4][4];
    load_terms<false>(own_x, right, pitch, step);
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const T factor = left[a * kTilePitch + step + a] * own[step + a];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        sums[a][b] += factor * own_x[a][b];
        if (p.D.data != nullptr) sums[a][b] += skip[value + b] * own_x[a][b];
      }
    }
  }
};

}  // namespace wmk
