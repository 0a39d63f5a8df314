// Recurrences with a matrix as state per head, by tiles of steps: what the gated delta rule and the SSD scan share.
//
// A block runs a panel, up to 32 values of one head of one sequence, through all steps. Its state is [rows][values],
// with a row per element of the vectors that write it (keys) and read it (queries). Steps are taken in tiles of up to
// 32. A tile ends at every 32nd step of a chunk, with its chunk, and before a reset.
//
// Products are of small matrices: a thread holds 4 x 4 results (small_products.cuh).
//
// All arrays lie in shared memory where it holds them, within the 99 KB that every GPU has, else in the workspace, in
// the caches: kernels take either by `SHARED`. Products run over whole vectors, so what is summed over is zero past the
// last step, row or value. A product over a triangle leaves out the terms outside, so that NaN reaches no earlier step.
#pragma once

#include "cuda/common/small_products.cuh"

namespace wmk {

constexpr int kPanelThreads = 256, kPanelWarps = kPanelThreads / 32;
constexpr int kTileSteps = 32;              // a lane each
constexpr int kTilePitch = kTileSteps + 4;  // of rows of steps: vectors of eight rows lie in different banks
constexpr int64_t kPanelShared = 99 * 1024;

struct PanelSizes {
  int64_t panels, width;  // width: values of a panel, in whole vectors
  int64_t rows;           // of the state, in whole vectors
  int64_t arena;          // elements of a block's arrays
  bool shared;
  void* arenas;  // [blocks][arena], if not shared
};

// The widest panels that fit shared memory, of 8 values at least; `arena(rows, width)` counts elements. Sizes depend on
// no address.
template <typename Arena>
PanelSizes panel_sizes(int64_t row_count, int64_t values, int64_t element_bytes, Arena arena) {
  PanelSizes sizes = {};
  const auto fits = [&](int64_t width) { return element_bytes * arena(sizes.rows, width) <= kPanelShared; };
  sizes.rows = ceil_div(row_count, 4) * 4;
  const int64_t widest = values > 16 ? 32 : values > 8 ? 16 : values > 4 ? 8 : 4;
  sizes.width = widest;
  while (sizes.width > 8 && !fits(sizes.width)) sizes.width /= 2;
  sizes.shared = fits(sizes.width);
  if (!sizes.shared) sizes.width = widest;
  sizes.panels = ceil_div(values, sizes.width);
  sizes.arena = arena(sizes.rows, sizes.width);
  return sizes;
}

// Arrays in a workspace, each aligned to 256 bytes.
struct WorkspaceLayout {
  char* base;
  int64_t bytes = 0;

  explicit WorkspaceLayout(void* workspace) : base(static_cast<char*>(workspace)) {}
  void* take(int64_t elements, int64_t element_bytes) {
    void* at = base + bytes;
    bytes += ceil_div(elements * element_bytes, 256) * 256;
    return at;
  }
};

// Elements of a call's dtype; double is for fp64 alone.
template <typename T>
__device__ __forceinline__ T load_from(const wmk_view& view, int64_t dtype, int64_t offset) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const T*>(view.data)[offset];
  } else {
    return load_element<T>(view.data, dtype, offset);
  }
}
template <typename T>
__device__ __forceinline__ void store_to(const wmk_view& view, int64_t dtype, int64_t offset, T value) {
  if constexpr (sizeof(T) == 8) {
    static_cast<T*>(view.data)[offset] = value;
  } else {
    store_element(view.data, dtype, offset, value);
  }
}

// Of 16 rows of the state: a warp's share of their gradients.
__host__ __device__ constexpr int64_t row_groups(int64_t rows) { return ceil_div(rows, 16); }

// Steps without a cut.
struct PanelTile {
  int64_t begin;
  int steps;
  bool has_state;  // false: the state before it is zero

  __device__ __forceinline__ int whole_vectors() const { return (steps + 3) / 4 * 4; }
};

// Views of vectors are [batch, heads, size, time], of numbers [batch, heads, time], of states [.., heads, rows,
// values].
template <typename T, typename Op>
struct PanelBlock {
  const Op& p;
  const PanelSizes& sizes;
  int64_t begin = 0, end = 0;
  int panel = 0, sequence = 0, head = 0, row = 0, first_value = 0, count = 0;  // count: of values
  int row_count = 0, rows = 0, width = 0, pitch = 0;
  T* next = nullptr;                            // of the arena
  T* state = nullptr;                           // [rows][pitch]
  T *keys = nullptr, *queries = nullptr;        // [rows][kTilePitch]
  T* between = nullptr;                         // [i][kTilePitch]: the decay from step j to i
  T *since_start = nullptr, *to_end = nullptr;  // [step]: the decay from the tile's start, to its end
  // of the backward pass
  T* d_state = nullptr;                            // [rows][pitch]: of the state after the tile
  T *start_parts = nullptr, *end_parts = nullptr;  // [group][step]: of the logarithms of since_start and to_end
  T* state_parts = nullptr;                        // [warp]: of that of the whole tile's decay
  int groups = 0;                                  // of 16 rows

  __device__ __forceinline__ PanelBlock(const Op& arguments, const PanelSizes& of) : p(arguments), sizes(of) {}

  __device__ __forceinline__ T* take(int elements) {
    T* taken = next;
    next += elements;
    return taken;
  }
  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared, int64_t panel_of_head, int64_t of_sequence,
                                           int64_t of_head, int64_t state_rows, int64_t values) {
    panel = static_cast<int>(panel_of_head), head = static_cast<int>(of_head);
    sequence = row = static_cast<int>(of_sequence);
    begin = 0, end = p.time;
    if (p.cu_seqlens.data != nullptr) {
      const int64_t* bounds = static_cast<const int64_t*>(p.cu_seqlens.data);
      row = 0, begin = bounds[sequence], end = bounds[sequence + 1];
    }
    first_value = static_cast<int>(panel_of_head * sizes.width);
    count = static_cast<int>(min(values - first_value, sizes.width));
    row_count = static_cast<int>(state_rows), rows = static_cast<int>(sizes.rows);
    width = static_cast<int>(sizes.width), pitch = width + 4;
    next = SHARED ? reinterpret_cast<T*>(shared) : static_cast<T*>(sizes.arenas) + blockIdx.x * sizes.arena;
    take_squares();
  }
  __device__ __forceinline__ void take_squares() {
    between = take(kTileSteps * kTilePitch);
    since_start = take(kTileSteps);
    to_end = take(kTileSteps);
  }
  // After the arrays of constant size: constant offsets need no registers.
  __device__ __forceinline__ void take_state() {
    state = take(rows * pitch);
    keys = take(rows * kTilePitch);
    queries = take(rows * kTilePitch);
  }
  // Elements that it takes.
  static __host__ __device__ constexpr int64_t arena(int64_t rows, int64_t width) {
    return rows * (width + 4) + 2 * rows * kTilePitch + kTileSteps * kTilePitch + 2 * kTileSteps;
  }
  __device__ __forceinline__ void reverse_prologue() {
    groups = (rows + 15) / 16;
    d_state = take(rows * pitch);
    start_parts = take(2 * groups * kTileSteps);
    end_parts = take(groups * kTileSteps);
    state_parts = take(kPanelWarps);
  }
  static __host__ __device__ constexpr int64_t reverse_arena(int64_t rows, int64_t width) {
    return rows * (width + 4) + 3 * row_groups(rows) * kTileSteps + kPanelWarps;
  }

  __device__ __forceinline__ bool is_reset(int64_t t) const {
    const wmk_view& view = p.reset;
    return view.data != nullptr &&
           static_cast<const uint8_t*>(view.data)[row * view.stride[0] + t * view.stride[1]] != 0;
  }
  __device__ __forceinline__ PanelTile tile(int64_t first, int64_t last) const {
    const bool has_state = !is_reset(first) && (first > begin || p.initial_state.data != nullptr);
    return {first, static_cast<int>(last - first), has_state};
  }
  __device__ __forceinline__ int64_t chunk_start(int64_t t) const { return begin + (t - begin) / p.chunk * p.chunk; }
  __device__ __forceinline__ int64_t tile_start(int64_t t) const {
    const int64_t first = chunk_start(t);
    return first + (t - first) / kTileSteps * kTileSteps;
  }
  // The tile from step t on, before step `limit`. Each lane looks at a step.
  __device__ __forceinline__ PanelTile tile_from(int64_t t, int64_t limit) const {
    const int64_t last = min(min(limit, chunk_start(t) + p.chunk), tile_start(t) + kTileSteps);
    const int64_t step = t + 1 + threadIdx.x % 32;
    const uint32_t resets = __ballot_sync(0xffffffffu, step < last && is_reset(step));
    return tile(t, resets != 0 ? t + __ffs(static_cast<int>(resets)) : last);
  }
  // The tile that ends before step t.
  __device__ __forceinline__ PanelTile tile_before(int64_t t) const {
    const int64_t first = tile_start(t - 1), step = t - 1 - threadIdx.x % 32;
    const uint32_t resets = __ballot_sync(0xffffffffu, step >= first && is_reset(step));
    return tile(resets != 0 ? t - __ffs(static_cast<int>(resets)) : first, t);
  }

  // to[i * across + t * along] = element `first` + i of step t of a view's head `index`, zero past `size` and the
  // tile's steps; `padded` elements.
  __device__ __forceinline__ void load(T* to, int across, int along, const wmk_view& view, int64_t dtype, int64_t index,
                                       const PanelTile& at, int64_t first, int size, int padded) const {
    const int64_t offset =
        row * view.stride[0] + index * view.stride[1] + first * view.stride[2] + at.begin * view.stride[3];
    const bool by_element = view.stride[2] == 1;
    for (int element = static_cast<int>(threadIdx.x); element < padded * kTileSteps; element += kPanelThreads) {
      const int i = by_element ? element % padded : element / kTileSteps;
      const int t = by_element ? element / padded : element % kTileSteps;
      T value = T(0);
      if (i < size && t < at.steps) value = load_from<T>(view, dtype, offset + i * view.stride[2] + t * view.stride[3]);
      to[i * across + t * along] = value;
    }
  }
  __device__ __forceinline__ void load_keys(T* to, const wmk_view& view, int64_t index, const PanelTile& at) const {
    load(to, kTilePitch, 1, view, p.dtype, index, at, 0, row_count, rows);
  }
  __device__ __forceinline__ void load_values(T* to, const wmk_view& view, int64_t dtype, const PanelTile& at) const {
    load(to, 1, pitch, view, dtype, head, at, first_value, count, width);
  }
  // Stores `value(i, step)` for each value of the panel.
  template <typename Value>
  __device__ __forceinline__ void for_values(const wmk_view& view, int64_t dtype, const PanelTile& at,
                                             Value value) const {
    const int64_t offset =
        row * view.stride[0] + head * view.stride[1] + first_value * view.stride[2] + at.begin * view.stride[3];
    const bool by_element = view.stride[2] == 1;
    for (int index = static_cast<int>(threadIdx.x); index < count * kTileSteps; index += kPanelThreads) {
      const int i = by_element ? index % count : index / kTileSteps;
      const int t = by_element ? index / count : index % kTileSteps;
      if (t < at.steps) store_to<T>(view, dtype, offset + i * view.stride[2] + t * view.stride[3], value(i, t));
    }
  }
  __device__ __forceinline__ void store_values(const T* from, const wmk_view& view, int64_t dtype,
                                               const PanelTile& at) const {
    for_values(view, dtype, at, [&](int i, int t) { return from[t * pitch + i]; });
  }
  __device__ __forceinline__ static constexpr int64_t state_dtype() {
    return sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32;
  }

  // Runs `body(i, j, offset)` for the elements of a panel of a state tensor, always by the same thread.
  template <typename Body>
  __device__ __forceinline__ void for_state(const wmk_view& view, int64_t index, Body body) const {
    const int64_t offset = index * view.stride[0] + head * view.stride[1] + first_value * view.stride[3];
    for (int element = static_cast<int>(threadIdx.x); element < rows * width; element += kPanelThreads) {
      const int i = element / width, j = element % width;
      body(i, j, offset + i * view.stride[2] + j * view.stride[3]);
    }
  }
  // Zeros if the view is absent.
  __device__ __forceinline__ void load_state(T* to, const wmk_view& view, int64_t index) const {
    for_state(view, index, [&](int i, int j, int64_t offset) {
      const bool exists = i < row_count && j < count && view.data != nullptr;
      to[i * pitch + j] = exists ? static_cast<const T*>(view.data)[offset] : T(0);
    });
  }
  __device__ __forceinline__ void store_state(const T* from, bool is_zero, const wmk_view& view, int64_t index) const {
    if (view.data == nullptr) return;
    for_state(view, index, [&](int i, int j, int64_t offset) {
      if (i < row_count && j < count) static_cast<T*>(view.data)[offset] = is_zero ? T(0) : from[i * pitch + j];
    });
  }
  // Of the states saved before every `interval`-th step.
  __device__ __forceinline__ int64_t saved_row(int64_t t, int64_t interval) const {
    const int64_t before =
        p.cu_seqlens.data != nullptr ? begin / interval + sequence : sequence * ceil_div(p.time, interval);
    return before + (t - begin) / interval;
  }

  __device__ __forceinline__ T scalar(const wmk_view& view, int64_t t) const {
    return static_cast<const T*>(view.data)[row * view.stride[0] + head * view.stride[1] + t * view.stride[2]];
  }
  // By the first warp, a lane per step. Products of decays are built step by step, as the reference does: they never
  // divide, and are exact for a decay of zero.
  __device__ __forceinline__ void compute_decays(const wmk_view& gate, const PanelTile& at) const {
    const int lane = static_cast<int>(threadIdx.x);
    const bool drops = lane == 0 && !at.has_state;  // the gate as well, which may be NaN
    const T decay = lane < at.steps && !drops ? exp(scalar(gate, at.begin + lane)) : T(0);
    T product = T(1), since = T(0), column = T(0);
    for (int i = 0; i < kTileSteps; ++i) {
      const T decay_i = __shfl_sync(0xffffffffu, decay, i);
      if (i < at.steps) {
        product *= decay_i;
        column = i > lane ? column * decay_i : i == lane ? T(1) : T(0);
        if (i == lane) since = product;
      }
      between[i * kTilePitch + lane] = i < at.steps ? column : T(0);
    }
    since_start[lane] = since;
    to_end[lane] = column;
  }
  __device__ __forceinline__ T whole_decay(const PanelTile& at) const { return since_start[at.steps - 1]; }

  // Runs `body(row, column)` for 4 x 4 elements each of [rows_of][width].
  template <typename Body>
  __device__ __forceinline__ void for_tiles(int rows_of, Body body) const {
    const int vectors = width / 4, items = (rows_of + 3) / 4 * vectors;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += kPanelThreads)
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
          if (i + a >= row_count || j + b >= count) continue;
          T& element = to[(i + a) * pitch + j + b];
          element = keep ? decay * element + sums[a][b] : sums[a][b];
        }
      }
    });
  }
  // The state after the tile, from its keys and `values`, [step][pitch], times `weights`.
  __device__ __forceinline__ void pass_state(const PanelTile& at, const T* values, const T* weights) const {
    update_state(state, at.has_state, whole_decay(at), [&](int i, int j, T(&sums)[4][4]) {
      accumulate<true, false>(sums, keys + i * kTilePitch, kTilePitch, values + j, pitch, 0, at.whole_vectors(),
                              weights);
    });
  }

  // Backward.

  // state_parts, of the decay of the state before the tile.
  __device__ __forceinline__ void sum_state_products(const PanelTile& at) const {
    const int thread = static_cast<int>(threadIdx.x);
    const T decay = whole_decay(at);
    T sum = T(0);
    for (int element = thread; element < rows * width; element += kPanelThreads) {
      const int index = element / width * pitch + element % width;
      sum += decay * d_state[index] * state[index];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (thread % 32 == 0) state_parts[thread / 32] = sum;
  }
  // sums[row][step] times factors[step]; adds their products with x, [row][step], to products[step].
  static __device__ __forceinline__ void weigh(T (&sums)[4][4], const T* factors, bool negative, const T* x,
                                               T (&products)[4]) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const T factor = negative ? -factors[b] : factors[b];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        sums[a][b] *= factor;
        products[b] += sums[a][b] * x[a * kTilePitch + b];
      }
    }
  }
  // Runs `body(a, b, offset)` for the 4 elements from i on of 4 steps of a view's head `index`.
  template <typename Body>
  __device__ __forceinline__ void for_vectors(const wmk_view& view, int64_t index, const PanelTile& at, int i, int step,
                                              Body body) const {
    const int64_t offset =
        row * view.stride[0] + index * view.stride[1] + i * view.stride[2] + (at.begin + step) * view.stride[3];
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        if (i + a < row_count && step + b < at.steps) body(a, b, offset + a * view.stride[2] + b * view.stride[3]);
      }
    }
  }
  // Of queries, keys, start_parts and end_parts: `query_gradients(i, step, start)` and `key_gradients(i, step, start,
  // end)` take four elements of four steps. A warp takes 16 rows' part of either.
  template <typename QueryGradients, typename KeyGradients>
  __device__ __forceinline__ void vector_gradients(const PanelTile& at, QueryGradients query_gradients,
                                                   KeyGradients key_gradients) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int step = 4 * (lane % 8);
    for (int group = warp; group < 2 * groups; group += kPanelWarps) {
      const bool is_query = group < groups;
      const int i = 16 * (group % groups) + 4 * (lane / 8);
      T start[4] = {}, end_of[4] = {};
      if (i < rows && step < at.steps) {
        if (is_query) {
          query_gradients(i, step, start);
        } else {
          key_gradients(i, step, start, end_of);
        }
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        for (int distance = 8; distance < 32; distance *= 2) {
          start[b] += __shfl_xor_sync(0xffffffffu, start[b], distance);
          end_of[b] += __shfl_xor_sync(0xffffffffu, end_of[b], distance);
        }
        if (lane >= 8) continue;
        start_parts[group * kTileSteps + step + b] = start[b];
        if (!is_query) end_parts[group % groups * kTileSteps + step + b] = end_of[b];
      }
    }
  }
  // Calls `store(lane, gradient)` in the first warp, a lane per step, with between[i][j] the gradient of its logarithm.
  // The gate of step t is part of the decays from before t, or the start, to t and later, or the end. The sums run from
  // the last step to the first and only add: differences of sums over the tile would lose small gradients.
  template <typename Store>
  __device__ __forceinline__ void gate_gradients(const PanelTile& at, bool has_d_state, Store store) const {
    if (threadIdx.x >= 32) return;
    const int lane = static_cast<int>(threadIdx.x);
    // between[i][j]: what decays from j to i and later pass on
    T sum = T(0);
    for (int group = 0; group < groups; ++group) sum += end_parts[group * kTileSteps + lane];
    for (int i = at.steps - 1; i > lane; --i) {
      sum += between[i * kTilePitch + lane];
      between[i * kTilePitch + lane] = sum;
    }
    __syncwarp();  // the sums over i are there
    T from_start = T(0);
    for (int group = 0; group < 2 * groups; ++group) from_start += start_parts[group * kTileSteps + lane];
    if (lane >= at.steps) from_start = T(0);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const T later = __shfl_down_sync(0xffffffffu, from_start, distance);
      if (lane + distance < 32) from_start += later;
    }
    if (lane >= at.steps) return;
    if (at.has_state && has_d_state)
      for (int warp = 0; warp < kPanelWarps; ++warp) from_start += state_parts[warp];
    for (int j = 0; j < lane; ++j) from_start += between[lane * kTilePitch + j];
    store(lane, from_start);
  }
};

// to[a][b][c][d] = the sum over `parts` of from[part][a][b][c][d], in order; sizes of the last three dimensions.
template <typename T>
__global__ void __launch_bounds__(kPanelThreads)
    panel_sum_kernel(const T* from, const WMK_GRID_CONSTANT wmk_view to, int64_t dtype, int64_t elements, int64_t parts,
                     int64_t size_b, int64_t size_c, int64_t size_d) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kPanelThreads) + threadIdx.x;
  if (index >= elements) return;
  T sum = T(0);
  for (int64_t part = 0; part < parts; ++part) sum += from[part * elements + index];
  const int64_t d = index % size_d, c = index / size_d % size_c, b = index / size_d / size_c % size_b;
  const int64_t a = index / size_d / size_c / size_b;
  store_to(to, dtype, a * to.stride[0] + b * to.stride[1] + c * to.stride[2] + d * to.stride[3], sum);
}

template <typename T>
int sum_partials([[maybe_unused]] int64_t stream, const void* from, const wmk_view& to, int64_t dtype, int64_t parts,
                 int64_t size_a, int64_t size_b, int64_t size_c, int64_t size_d) {
  const int64_t elements = size_a * size_b * size_c * size_d;
  return WMK_LAUNCH(panel_sum_kernel<T>, ceil_div(elements, kPanelThreads), kPanelThreads, 0, stream,
                    static_cast<const T*>(from), to, dtype, elements, parts, size_b, size_c, size_d);
}

}  // namespace wmk
