// What the gated delta rule's kernels share.
//
// A block runs a panel, up to 32 values of one head of one sequence, through all steps, a tile of up to 32 steps at a
// time. A tile ends with its chunk and before a reset. With S the state before the tile, d_i the decay since then, D_ij
// that from step j to i, D_j that from j to the tile's last step n, a tile is
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
//
// All arrays lie in shared memory where it holds them, within the 99 KB that every GPU has, else in the workspace, in
// the caches: kernels take either by `SHARED`. Products run over whole vectors, so what is summed over is zero past the
// last step, key or value. A product over a triangle leaves out the terms outside, so that NaN reaches no earlier step.
#pragma once

#include "cuda/gated_delta_rule/gated_delta_rule_products.cuh"

namespace wmk {

constexpr int kDeltaThreads = 256, kDeltaWarps = kDeltaThreads / 32;
constexpr int kDeltaSteps = 32;               // of a tile: a lane each
constexpr int kDeltaPitch = kDeltaSteps + 4;  // of rows of steps: vectors of eight rows lie in different banks
constexpr int64_t kDeltaShared = 99 * 1024;

// Sizes of a call, and where its partial gradients are.
struct DeltaPlan {
  int64_t panels, width;  // width: values of a panel, in whole vectors
  int64_t rows;           // d_k in whole vectors
  int64_t arena;          // elements of a block's arrays
  bool shared;
  double scale;
  void* arenas;                                     // [blocks][arena], if not shared
  wmk_view grad_q, grad_k, grad_gate, grad_beta;    // of the first panel, to be summed; the gradients if it is the only
  int64_t vector_elements, scalar_elements, dtype;  // from panel to panel; dtype of grad_q and grad_k
};

__host__ __device__ constexpr int64_t delta_groups(int64_t rows) { return ceil_div(rows, 16); }

// Elements of the arrays that DeltaBlock and DeltaReverse take.
__host__ __device__ constexpr int64_t delta_arena(int64_t rows, int64_t width, bool backward) {
  const int64_t states = (backward ? 2 : 1) * rows * (width + 4), keys = 2 * rows * kDeltaPitch;
  const int64_t scores = 3 * kDeltaSteps * kDeltaPitch, values = (backward ? 4 : 3) * kDeltaSteps * (width + 4);
  const int64_t parts = backward ? 3 * delta_groups(rows) * kDeltaSteps + kDeltaWarps : 0;
  return states + keys + scores + values + parts + 5 * kDeltaSteps;
}

// Steps without a cut.
struct DeltaTile {
  int64_t begin;
  int steps;
  bool has_state;  // false: the state before it is zero

  __device__ __forceinline__ int whole_vectors() const { return (steps + 3) / 4 * 4; }
};

template <typename T>
struct DeltaBlock {
  const wmk_gated_delta_rule& p;
  const DeltaPlan& plan;
  int64_t panel = 0, sequence = 0, head = 0, row = 0, begin = 0, end = 0, first_value = 0;
  int count = 0;  // of values
  int d_k = 0, rows = 0, width = 0, pitch = 0;
  T scale = T(0);
  T* next = nullptr;                                             // of the arena
  T* state = nullptr;                                            // [rows][pitch]
  T *keys = nullptr, *queries = nullptr;                         // [rows][kDeltaPitch]
  T* between = nullptr;                                          // [i][kDeltaPitch]: D_ij
  T *recall = nullptr, *attention = nullptr;                     // [j][i] forward, [i][j] backward
  T* residuals = nullptr;                                        // [step][pitch]: e
  T* corrections = nullptr;                                      // [step][pitch]: u
  T *since_start = nullptr, *to_end = nullptr, *beta = nullptr;  // [step]: d_i, D_j, beta
  T *read_decay = nullptr, *write_decay = nullptr;               // [step]: scale d_i, D_j beta_j

  __device__ __forceinline__ T* take(int64_t elements) {
    T* taken = next;
    next += elements;
    return taken;
  }
  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    const int64_t block = blockIdx.x;
    panel = block % plan.panels;
    head = block / plan.panels % p.heads;
    sequence = row = block / plan.panels / p.heads;
    begin = 0, end = p.time;
    if (p.cu_seqlens.data != nullptr) {
      const int64_t* bounds = static_cast<const int64_t*>(p.cu_seqlens.data);
      row = 0, begin = bounds[sequence], end = bounds[sequence + 1];
    }
    first_value = panel * plan.width;
    count = static_cast<int>(p.d_v - first_value < plan.width ? p.d_v - first_value : plan.width);
    d_k = static_cast<int>(p.d_k), rows = static_cast<int>(plan.rows);
    width = static_cast<int>(plan.width), pitch = width + 4;
    scale = static_cast<T>(plan.scale);
    next = SHARED ? reinterpret_cast<T*>(shared) : static_cast<T*>(plan.arenas) + block * plan.arena;
    state = take(plan.rows * pitch);
    keys = take(plan.rows * kDeltaPitch);
    queries = take(plan.rows * kDeltaPitch);
    between = take(kDeltaSteps * kDeltaPitch);
    recall = take(kDeltaSteps * kDeltaPitch);
    attention = take(kDeltaSteps * kDeltaPitch);
    residuals = take(kDeltaSteps * pitch);
    corrections = take(kDeltaSteps * pitch);
    since_start = take(kDeltaSteps);
    to_end = take(kDeltaSteps);
    beta = take(kDeltaSteps);
    read_decay = take(kDeltaSteps);
    write_decay = take(kDeltaSteps);
  }

  __device__ __forceinline__ bool is_reset(int64_t t) const {
    const wmk_view& view = p.reset;
    return view.data != nullptr &&
           static_cast<const uint8_t*>(view.data)[row * view.stride[0] + t * view.stride[1]] != 0;
  }
  __device__ __forceinline__ DeltaTile tile(int64_t first, int64_t last) const {
    const bool has_state = !is_reset(first) && (first > begin || p.initial_state.data != nullptr);
    return {first, static_cast<int>(last - first), has_state};
  }
  __device__ __forceinline__ int64_t chunk_start(int64_t t) const { return begin + (t - begin) / p.chunk * p.chunk; }
  // The tile from step t on, before step `limit`. Each lane looks at a step.
  __device__ __forceinline__ DeltaTile tile_from(int64_t t, int64_t limit) const {
    const int64_t last = min(min(limit, chunk_start(t) + p.chunk), t + kDeltaSteps);
    const int64_t step = t + 1 + threadIdx.x % 32;
    const uint32_t resets = __ballot_sync(0xffffffffu, step < last && is_reset(step));
    return tile(t, resets != 0 ? t + __ffs(static_cast<int>(resets)) : last);
  }
  // The tile that ends before step t.
  __device__ __forceinline__ DeltaTile tile_before(int64_t t) const {
    const int64_t first = max(chunk_start(t - 1), t - kDeltaSteps), step = t - 1 - threadIdx.x % 32;
    const uint32_t resets = __ballot_sync(0xffffffffu, step >= first && is_reset(step));
    return tile(resets != 0 ? t - __ffs(static_cast<int>(resets)) : first, t);
  }

  // to[i * across + t * along] = element `first` + i of step t of a view [batch, heads, size, time], zero past `size`
  // and the tile's steps; `padded` elements.
  __device__ __forceinline__ void load(T* to, int across, int along, const wmk_view& view, int64_t dtype,
                                       const DeltaTile& at, int64_t first, int size, int padded) const {
    const int64_t offset =
        row * view.stride[0] + head * view.stride[1] + first * view.stride[2] + at.begin * view.stride[3];
    const bool by_element = view.stride[2] == 1;
    for (int index = static_cast<int>(threadIdx.x); index < padded * kDeltaSteps; index += kDeltaThreads) {
      const int i = by_element ? index % padded : index / kDeltaSteps;
      const int t = by_element ? index / padded : index % kDeltaSteps;
      T value = T(0);
      if (i < size && t < at.steps)
        value = load_element<T>(view.data, dtype, offset + i * view.stride[2] + t * view.stride[3]);
      to[i * across + t * along] = value;
    }
  }
  __device__ __forceinline__ void load_keys(T* to, const wmk_view& view, const DeltaTile& at) const {
    load(to, kDeltaPitch, 1, view, p.dtype, at, 0, d_k, rows);
  }
  __device__ __forceinline__ void load_values(T* to, const wmk_view& view, int64_t dtype, const DeltaTile& at) const {
    load(to, 1, pitch, view, dtype, at, first_value, count, width);
  }
  __device__ __forceinline__ void store_values(const T* from, const wmk_view& view, int64_t dtype,
                                               const DeltaTile& at) const {
    const int64_t offset =
        row * view.stride[0] + head * view.stride[1] + first_value * view.stride[2] + at.begin * view.stride[3];
    const bool by_element = view.stride[2] == 1;
    for (int index = static_cast<int>(threadIdx.x); index < count * kDeltaSteps; index += kDeltaThreads) {
      const int i = by_element ? index % count : index / kDeltaSteps;
      const int t = by_element ? index / count : index % kDeltaSteps;
      if (t < at.steps)
        store_element(view.data, dtype, offset + i * view.stride[2] + t * view.stride[3], from[t * pitch + i]);
    }
  }
  __device__ __forceinline__ static constexpr int64_t state_dtype() {
    return sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32;
  }
  // The saved residuals, as a view [batch, heads, size, time].
  __device__ __forceinline__ wmk_view residual_view() const {
    const wmk_view& view = p.residuals;
    return {view.data, {view.stride[0], view.stride[1], view.stride[3], view.stride[2]}};
  }

  // Runs `body(i, j, offset)` for the elements of a panel of a state tensor, always by the same thread.
  template <typename Body>
  __device__ __forceinline__ void for_state(const wmk_view& view, int64_t index, Body body) const {
    const int64_t offset = index * view.stride[0] + head * view.stride[1] + first_value * view.stride[3];
    for (int element = static_cast<int>(threadIdx.x); element < rows * width; element += kDeltaThreads) {
      const int i = element / width, j = element % width;
      body(i, j, offset + i * view.stride[2] + j * view.stride[3]);
    }
  }
  // Zeros if the view is absent.
  __device__ __forceinline__ void load_state(T* to, const wmk_view& view, int64_t index) const {
    for_state(view, index, [&](int i, int j, int64_t offset) {
      const bool exists = i < d_k && j < count && view.data != nullptr;
      to[i * pitch + j] = exists ? static_cast<const T*>(view.data)[offset] : T(0);
    });
  }
  __device__ __forceinline__ void store_state(const T* from, bool is_zero, const wmk_view& view, int64_t index) const {
    if (view.data == nullptr) return;
    for_state(view, index, [&](int i, int j, int64_t offset) {
      if (i < d_k && j < count) static_cast<T*>(view.data)[offset] = is_zero ? T(0) : from[i * pitch + j];
    });
  }
  // Of chunk_states.
  __device__ __forceinline__ int64_t chunk_row(int64_t t) const {
    const int64_t before =
        p.cu_seqlens.data != nullptr ? begin / p.chunk + sequence : sequence * ceil_div(p.time, p.chunk);
    return before + (t - begin) / p.chunk;
  }

  __device__ __forceinline__ T scalar(const wmk_view& view, int64_t t) const {
    return static_cast<const T*>(view.data)[row * view.stride[0] + head * view.stride[1] + t * view.stride[2]];
  }
  // By the first warp, a lane per step. Products of decays are built step by step, as the reference does: they never
  // divide, and are exact for a decay of zero.
  __device__ __forceinline__ void compute_decays(const DeltaTile& at) const {
    if (threadIdx.x >= 32) return;
    const int lane = static_cast<int>(threadIdx.x);
    const bool exists = lane < at.steps;
    const bool drops = lane == 0 && !at.has_state;  // the gate as well, which may be NaN
    const T decay = exists && !drops ? exp(scalar(p.gate, at.begin + lane)) : T(0);
    const T step_size = exists ? scalar(p.beta, at.begin + lane) : T(0);
    T product = T(1), since = T(0), column = T(0);
    for (int i = 0; i < kDeltaSteps; ++i) {
      const T decay_i = __shfl_sync(0xffffffffu, decay, i);
      if (i < at.steps) {
        product *= decay_i;
        column = i > lane ? column * decay_i : i == lane ? T(1) : T(0);
        if (i == lane) since = product;
      }
      between[i * kDeltaPitch + lane] = i < at.steps ? column : T(0);
    }
    since_start[lane] = since;
    read_decay[lane] = scale * since;
    to_end[lane] = column;
    beta[lane] = step_size;
    write_decay[lane] = column * step_size;
  }
  __device__ __forceinline__ T whole_decay(const DeltaTile& at) const { return since_start[at.steps - 1]; }

  // `recall` and `attention` of a tile, a row per step that is summed over; BACKWARD: over i, else over j. In the same
  // pass, `use(is_query, step, value, products)` gets 4 x 4 products of keys, and forward of queries, with a state:
  // zeros without one.
  template <bool BACKWARD, typename Use>
  __device__ __forceinline__ void multiply_keys(const DeltaTile& at, const T* with, bool has_state, Use use) const {
    constexpr int kVectors = kDeltaSteps / 4, kScores = 2 * kVectors * kVectors;
    constexpr int kSides = BACKWARD ? kVectors : 2 * kVectors;
    const int products = kScores + kSides * (width / 4);
    for (int index = static_cast<int>(threadIdx.x); index < products; index += kDeltaThreads) {
      const bool is_score = index < kScores;
      const int rest = is_score ? index : index - kScores, sides = is_score ? 2 * kVectors : kSides;
      const bool is_query = rest % sides >= kVectors;
      const int step = 4 * (rest % sides % kVectors), column = 4 * (rest / sides);
      if (step >= at.steps || (is_score && column > step)) continue;
      T sums[4][4] = {};
      if (is_score || has_state) {
        accumulate<false, false>(sums, (is_query ? queries : keys) + step, kDeltaPitch,
                                 (is_score ? keys : with) + column, is_score ? kDeltaPitch : pitch, 0, rows);
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
        scores[BACKWARD ? i * kDeltaPitch + j : j * kDeltaPitch + i] =
            is_used ? factor * between[i * kDeltaPitch + j] * sums[a][b] : T(0);
      }
    }
  }

  // Solves x_i = rows_i + sum over the steps before i of matrix[j][i] beta_j x_j, BACKWARD with the steps in reverse.
  // Calls `use(step, value, x, beta x)`, with zeros past the last step and value.
  template <bool BACKWARD, typename Use>
  __device__ __forceinline__ void solve(const DeltaTile& at, const T* right, Use use) const {
    const int value = static_cast<int>(threadIdx.x);
    if (value >= width) return;
    T x[kDeltaSteps];
#pragma unroll
    for (int i = 0; i < kDeltaSteps; ++i) x[i] = right[i * pitch + value];
#pragma unroll
    for (int k = 0; k < kDeltaSteps; ++k) {
      const int step = BACKWARD ? kDeltaSteps - 1 - k : k;
      if (step >= at.steps || value >= count) {
        use(step, value, T(0), T(0));
        continue;
      }
      const T weighted = beta[step] * x[step];
      use(step, value, x[step], weighted);
#pragma unroll
      for (int other = BACKWARD ? 0 : (step + 1) / 4 * 4; other < (BACKWARD ? step : kDeltaSteps); other += 4) {
        const Vec4<T> factors = load_vec4(recall + step * kDeltaPitch + other);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (BACKWARD ? other + i < step : other + i > step) x[other + i] += factors.value[i] * weighted;
      }
    }
  }

  // Runs `body(row, column)` for 4 x 4 elements each of [rows_of][width].
  template <typename Body>
  __device__ __forceinline__ void for_tiles(int rows_of, Body body) const {
    const int vectors = width / 4, items = (rows_of + 3) / 4 * vectors;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += kDeltaThreads)
      body(4 * (item / vectors), 4 * (item % vectors));
  }
  // to = decay `to` + sums, where `add(row, column, sums)` adds to sums; without the old value if not `keep`.
  template <typename Add>
  __device__ __forceinline__ void update_state(T* to, bool keep, T decay, Add add) const {
    for_tiles(rows, [&](int i, int j) {
      T sums[4][4] = {};
      add(i, j, sums);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (i + a >= d_k || j + b >= count) continue;
          T& element = to[(i + a) * pitch + j + b];
          element = keep ? decay * element + sums[a][b] : sums[a][b];
        }
      }
    });
  }
  // The state after the tile, from its keys and residuals.
  __device__ __forceinline__ void pass_state(const DeltaTile& at) const {
    update_state(state, at.has_state, whole_decay(at), [&](int i, int j, T(&sums)[4][4]) {
      accumulate<true, false>(sums, keys + i * kDeltaPitch, kDeltaPitch, residuals + j, pitch, 0, at.whole_vectors(),
                              write_decay);
    });
  }
};

// A gradient [batch, heads, size, time] from its partial sums [panels][batch, heads, time, size], in order.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    gated_delta_rule_sum_kernel(const T* from, const WMK_GRID_CONSTANT wmk_view to, int64_t dtype, int64_t elements,
                                int64_t panels, int64_t heads, int64_t time, int64_t size) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kDeltaThreads) + threadIdx.x;
  if (index >= elements) return;
  T sum = T(0);
  for (int64_t panel = 0; panel < panels; ++panel) sum += from[panel * elements + index];
  const int64_t i = index % size, t = index / size % time, head = index / size / time % heads;
  const int64_t row = index / size / time / heads;
  store_element(to.data, dtype, row * to.stride[0] + head * to.stride[1] + i * to.stride[2] + t * to.stride[3], sum);
}

}  // namespace wmk
