// What the gated delta rule's kernels share.
//
// Tiles of a panel of a head run one after another (common/panel.cuh). With S the state before the tile, d_i the decay
// since then, D_ij that from step j to i, D_j that from j to the tile's last step n, a tile is
//
//   for i in order:    e_i = v_i - d_i S^T k_i + sum_{j < i} L_ij u_j          L_ij = -D_ij k_i . k_j       recall
//                      u_i = beta_i e_i
//   for every i:       y_i = scale d_i S^T q_i + sum_{j <= i} A_ij u_j         A_ij = scale D_ij q_i . k_j  attention
//   then:              S = d_n S + sum_j k_j (D_j u_j)^T
//
// and, with dS the gradient of the state after it,
//
//   for j in reverse:  du_j = D_j dS^T k_j + sum_{i >= j} A_ij dy_i + sum_{i > j} L_ij w_i
//                      w_j = beta_j du_j = dv_j          dbeta_j = du_j . e_j
//   for every i, j:    dA_ij = scale D_ij dy_i . u_j     dL_ij = -D_ij w_i . u_j
//   for every i:       dq_i = scale d_i S dy_i + sum_{j <= i} dA_ij k_j
//   for every j:       dk_j = D_j dS u_j - d_j S w_j + sum_{i >= j} dA_ij q_i + sum_i (dL_ij + dL_ji) k_i
//   then:              dS = d_n dS + sum_i q_i (scale d_i dy_i)^T - k_i (d_i w_i)^T
//
// This is the WY form with its triangular system solved, not inverted. Only the two solves are sequential: a lane of
// one warp takes a value's column, with all 32 rows in registers. The rest are products of small matrices. A thread
// holds 4 x 4 results and reads four terms of four rows and columns at once, eight vector loads per 64 multiply-adds.
#pragma once

#include "cuda/common/panel.cuh"

namespace wmk {

// Sizes of a call, and where its partial gradients are.
struct DeltaPlan : PanelSizes {
  double scale;
  wmk_view grad_q, grad_k, grad_gate, grad_beta;    // of the first panel, to be summed; the gradients if it is the only
  int64_t vector_elements, scalar_elements, dtype;  // from panel to panel; dtype of grad_q and grad_k
};

template <typename T>
struct DeltaBlock : PanelBlock<T, wmk_gated_delta_rule> {
  using Base = PanelBlock<T, wmk_gated_delta_rule>;
  using Base::between, Base::count, Base::head, Base::keys, Base::p, Base::panel, Base::pitch, Base::queries;
  using Base::rows, Base::since_start, Base::state, Base::take, Base::to_end, Base::width;
  const DeltaPlan& plan;
  T scale = T(0);
  T *recall = nullptr, *attention = nullptr;        // [j][i] forward, [i][j] backward
  T* residuals = nullptr;                           // [step][pitch]: e
  T* corrections = nullptr;                         // [step][pitch]: u
  T* beta = nullptr;                                // [step]
  T *read_decay = nullptr, *write_decay = nullptr;  // [step]: scale d_i, D_j beta_j

  __device__ __forceinline__ DeltaBlock(const wmk_gated_delta_rule& arguments, const DeltaPlan& of)
      : Base(arguments, of), plan(of) {}

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    const int64_t block = blockIdx.x, of_head = block / plan.panels % p.heads;
    Base::template prologue<SHARED>(shared, block % plan.panels, block / plan.panels / p.heads, of_head, p.d_k, p.d_v);
    scale = static_cast<T>(plan.scale);
    take_scores();
  }
  __device__ __forceinline__ void take_scores() {
    recall = take(kTileSteps * kTilePitch);
    attention = take(kTileSteps * kTilePitch);
    beta = take(kTileSteps);
    read_decay = take(kTileSteps);
    write_decay = take(kTileSteps);
    this->take_state();
    residuals = take(kTileSteps * pitch);
    corrections = take(kTileSteps * pitch);
  }
  // Elements that it and the kernels take.
  static __host__ __device__ constexpr int64_t arena(int64_t rows, int64_t width, bool backward) {
    return Base::arena(rows, width) + (backward ? Base::reverse_arena(rows, width) : 0) + 2 * kTileSteps * kTilePitch +
           (backward ? 4 : 3) * kTileSteps * (width + 4) + 3 * kTileSteps;
  }

  // The saved residuals, as a view [batch, heads, size, time].
  __device__ __forceinline__ wmk_view residual_view() const {
    const wmk_view& view = p.residuals;
    return {view.data, {view.stride[0], view.stride[1], view.stride[3], view.stride[2]}};
  }

  __device__ __forceinline__ void compute_decays(const PanelTile& at) const {
    if (threadIdx.x >= 32) return;
    Base::compute_decays(p.gate, at);
    const int lane = static_cast<int>(threadIdx.x);
    const T step_size = lane < at.steps ? this->scalar(p.beta, at.begin + lane) : T(0);
    beta[lane] = step_size;
    read_decay[lane] = scale * since_start[lane];
    write_decay[lane] = to_end[lane] * step_size;
  }

  // `recall` and `attention` of a tile, a row per step that is summed over; BACKWARD: over i, else over j. In the same
  // pass, `use(is_query, step, value, products)` gets 4 x 4 products of keys, and forward of queries, with a state:
  // zeros without one.
  template <bool BACKWARD, typename Use>
  __device__ __forceinline__ void multiply_keys(const PanelTile& at, const T* with, bool has_state, Use use) const {
    constexpr int kVectors = kTileSteps / 4, kScores = 2 * kVectors * kVectors;
    constexpr int kSides = BACKWARD ? kVectors : 2 * kVectors;
    const int products = kScores + kSides * (width / 4);
    for (int index = static_cast<int>(threadIdx.x); index < products; index += kPanelThreads) {
      const bool is_score = index < kScores;
      const int rest = is_score ? index : index - kScores, sides = is_score ? 2 * kVectors : kSides;
      const bool is_query = rest % sides >= kVectors;
      const int step = 4 * (rest % sides % kVectors), column = 4 * (rest / sides);
      if (step >= at.steps || (is_score && column > step)) continue;
      T sums[4][4] = {};
      if (is_score || has_state) {
        accumulate<false, false>(sums, (is_query ? queries : keys) + step, kTilePitch,
                                 (is_score ? keys : with) + column, is_score ? kTilePitch : pitch, 0, rows);
      }
      if (is_score) {
        store_scores<BACKWARD>(sums, is_query, step, column, at.steps);
      } else {
        use(is_query, step, column, sums);
      }
    }
  }
  template <bool BACKWARD>
  __device__ __forceinline__ void store_scores(const T (&sums)[4][4], bool is_query, int step, int column,
                                               int steps) const {
    T* scores = is_query ? attention : recall;
    const T factor = is_query ? scale : T(-1);
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int i = step + a, j = column + b;
        const bool is_used = i < steps && (is_query ? j <= i : j < i);
        scores[BACKWARD ? i * kTilePitch + j : j * kTilePitch + i] =
            is_used ? factor * between[i * kTilePitch + j] * sums[a][b] : T(0);
      }
    }
  }

  // Solves x_i = rows_i + sum over the steps before i of matrix[j][i] beta_j x_j, BACKWARD with the steps in reverse.
  // Calls `use(step, value, x, beta x)`, with zeros past the last step and value.
  template <bool BACKWARD, typename Use>
  __device__ __forceinline__ void solve(const PanelTile& at, const T* right, Use use) const {
    const int value = static_cast<int>(threadIdx.x);
    if (value >= width) return;
    T x[kTileSteps];
    right += value;
#pragma unroll
    for (int i = 0; i < kTileSteps; ++i) {
      x[i] = *right;
      right = hidden(right + pitch);  // offsets kept for `use` would take registers
    }
#pragma unroll
    for (int k = 0; k < kTileSteps; ++k) {
      const int step = BACKWARD ? kTileSteps - 1 - k : k;
      if (step >= at.steps || value >= count) {
        use(step, value, T(0), T(0));
        continue;
      }
      const T weighted = beta[step] * x[step];
      use(step, value, x[step], weighted);
#pragma unroll
      for (int other = BACKWARD ? 0 : (step + 1) / 4 * 4; other < (BACKWARD ? step : kTileSteps); other += 4) {
        const Vec4<T> factors = load_vec4(recall + step * kTilePitch + other);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (BACKWARD ? other + i < step : other + i > step) x[other + i] += factors.value[i] * weighted;
      }
    }
  }
  // The state after the tile, from its keys and residuals.
  __device__ __forceinline__ void pass_state(const PanelTile& at) const {
    Base::pass_state(at, residuals, write_decay);
  }
};

}  // namespace wmk
