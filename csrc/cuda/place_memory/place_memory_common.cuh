// What the place memory's kernels share.
//
// A block runs up to 16 channels of one group of one sequence through all steps. Per step it has two products, and a
// barrier after each:
//   spread   rows of the state from a view: a thread takes a frequency's pair of rows and four channels
//   collect  a view from rows: a warp takes every eighth row, a lane four places and four channels; the warps' partial
//            sums are added in order
// Four channels are a vector, so are four places of a matrix's row: a multiply-add needs 3/16 (spread) or 1/8 (collect)
// of a shared-memory access, and both are bound by the fp32 units.
//
// All arrays lie in shared memory where it holds them (226 rows, 25 places and 16 channels of fp32 take 95 KB of the
// 99 KB that every GPU has), else in the workspace, in the caches: kernels take either by `SHARED`.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

constexpr int kPlaceThreads = 256, kPlaceWarps = kPlaceThreads / 32;
constexpr int64_t kPlaceSteps = 16;  // between two saved states
constexpr int64_t kPlaceShared = 99 * 1024;

// Sizes of a call and its workspace. A row of a matrix holds a place per column, `pitch` apart: an odd multiple of
// four, so that eight rows lie in different banks. Rows of states and views hold `width` channels, of vectors of four.
struct PlacePlan {
  int64_t tiles, vectors, width, rows, places, pitch, arena, slots;
  bool shared;
  void* matrices;    // keys, mix: [rows][pitch] each
  void* arenas;      // [blocks][arena], if not shared
  void* states;      // [slots][groups][tiles][rows][width]: before steps 0, kPlaceSteps, ... of each sequence
  void* work;        // [blocks][2 kPlaceSteps + 1][rows][width]: states of kPlaceSteps steps, what they wrote,
                     // and a state as it was read
  void* grad_phase;  // [tiles] gradients, to be summed; the gradient itself if there is one tile
  void* grad_gate;
  void* grad_initial_phase;
  void* key_sums;  // [blocks + 1][2][rows][places]: gradients of keys as read and of mix; the last: their sums
};

template <typename T>
__device__ __forceinline__ void add_scaled(Vec4<T>& sum, T factor, const Vec4<T>& vec) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.value[i] += factor * vec.value[i];
}

template <typename T>
__device__ __forceinline__ T dot(const Vec4<T>& a, const Vec4<T>& b) {
  return a.value[0] * b.value[0] + a.value[1] * b.value[1] + a.value[2] * b.value[2] + a.value[3] * b.value[3];
}

// A frequency's pair of rows, in the world's frame (x, y) or the observer's (u, v).
template <typename T>
struct RowPair {
  Vec4<T> x, y;
};

template <typename T>
struct Turn {
  T cos, sin;

  __device__ __forceinline__ RowPair<T> to_observer(const RowPair<T>& world) const {
    RowPair<T> found;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      found.x.value[i] = cos * world.x.value[i] + sin * world.y.value[i];
      found.y.value[i] = cos * world.y.value[i] - sin * world.x.value[i];
    }
    return found;
  }
  // Where nothing is added, `world` stays bit for bit.
  __device__ __forceinline__ void add_to_world(RowPair<T>& world, const RowPair<T>& observed) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T u = observed.x.value[i], v = observed.y.value[i];
      if (u == T(0) && v == T(0)) continue;
      world.x.value[i] += cos * u - sin * v;
      world.y.value[i] += sin * u + cos * v;
    }
  }
};

template <typename T>
struct PlaceBlock {
  const wmk_place_memory& p;
  const PlacePlan& plan;
  int64_t tile = 0, sequence = 0, group = 0, row = 0, begin = 0, end = 0, block = 0;
  int64_t channel = 0;  // of the tensors' channels
  int count = 0;        // of channels
  int frequencies = 0, places = 0, vectors = 0, width = 0, pitch = 0;
  T *keys = nullptr, *mix = nullptr, *state = nullptr, *turned = nullptr, *views = nullptr, *writes = nullptr,
    *partials = nullptr;

  template <bool SHARED>
  __device__ __forceinline__ void prologue(unsigned char* shared) {
    block = blockIdx.x;
    tile = block % plan.tiles;
    group = block / plan.tiles % p.groups;
    sequence = row = block / plan.tiles / p.groups;
    begin = 0, end = p.time;
    if (p.cu_seqlens.data != nullptr) {
      const int64_t* bounds = static_cast<const int64_t*>(p.cu_seqlens.data);
      row = 0, begin = bounds[sequence], end = bounds[sequence + 1];
    }
    const int64_t channels = p.channels / p.groups, first = tile * plan.width;
    channel = group * channels + first;
    count = static_cast<int>(channels - first < plan.width ? channels - first : plan.width);
    frequencies = static_cast<int>(p.frequencies), places = static_cast<int>(p.places);
    vectors = static_cast<int>(plan.vectors), width = static_cast<int>(plan.width);
    pitch = static_cast<int>(plan.pitch);
    const int64_t matrix = plan.rows * plan.pitch;
    const T* matrices = static_cast<const T*>(plan.matrices);
    T* arena = SHARED ? reinterpret_cast<T*>(shared) : static_cast<T*>(plan.arenas) + block * plan.arena;
    if (SHARED) {
      for (int64_t i = threadIdx.x; i < 2 * matrix; i += kPlaceThreads) arena[i] = matrices[i];
      keys = arena;
      arena += 2 * matrix;
    } else {
      keys = const_cast<T*>(matrices);
    }
    mix = keys + matrix;
    state = arena;
    turned = state + plan.rows * plan.width;
    views = turned + plan.rows * plan.width;
    writes = views + plan.places * plan.width;
    partials = writes + plan.places * plan.width;
    for (int64_t i = threadIdx.x; i < 2 * plan.places * plan.width; i += kPlaceThreads) views[i] = T(0);
  }

  __device__ __forceinline__ bool is_reset(int64_t t) const {
    const wmk_view& view = p.reset;
    return view.data != nullptr && t >= begin && t < end &&
           static_cast<const uint8_t*>(view.data)[row * view.stride[0] + t * view.stride[1]] != 0;
  }
  // Of the write of step t: what the step before read at.
  __device__ __forceinline__ Turn<T> turn_of(int64_t t, bool reset, int f) const {
    const bool first = t == begin;
    const wmk_view& view = first ? p.initial_phase : p.phase;
    if (reset || view.data == nullptr) return {T(1), T(0)};
    const int64_t offset = first ? sequence * view.stride[0] + group * view.stride[1]
                                 : row * view.stride[0] + (t - 1) * view.stride[1] + group * view.stride[2];
    const int64_t stride = view.stride[first ? 2 : 3];
    const T* data = static_cast<const T*>(view.data) + offset;
    return {data[f * stride], data[(frequencies + f) * stride]};
  }
  __device__ __forceinline__ T gate_of(int64_t t, int place) const {
    const wmk_view& view = p.gate;
    if (view.data == nullptr) return T(1);
    return static_cast<const T*>(
        view.data)[row * view.stride[0] + t * view.stride[1] + place * view.stride[2] + group * view.stride[3]];
  }

  // Four channels of a place at a step; zeros if absent or past the last channel.
  __device__ __forceinline__ Vec4<T> load_view(const wmk_view& view, int64_t dtype, int64_t t, int place,
                                               int vector) const {
    const int64_t offset =
        row * view.stride[0] + t * view.stride[1] + place * view.stride[2] + (channel + 4 * vector) * view.stride[3];
    Vec4<T> found = {};
    if (view.data == nullptr) return found;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * vector + i < count) found.value[i] = load_element<T>(view.data, dtype, offset + i * view.stride[3]);
    return found;
  }
  __device__ __forceinline__ void store_view(const wmk_view& view, int64_t dtype, int64_t t, int place, int vector,
                                             const Vec4<T>& vec) const {
    const int64_t offset =
        row * view.stride[0] + t * view.stride[1] + place * view.stride[2] + (channel + 4 * vector) * view.stride[3];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * vector + i < count) store_element<T>(view.data, dtype, offset + i * view.stride[3], vec.value[i]);
  }
  // A vector of a state tensor's pair of rows.
  __device__ __forceinline__ RowPair<T> load_state(const wmk_view& view, int f, int vector) const {
    RowPair<T> found = {};
    if (view.data == nullptr) return found;
    const T* data = static_cast<const T*>(view.data) + state_offset(view, f, vector);
    const int64_t pair = p.frequencies * view.stride[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * vector + i >= count) continue;
      found.x.value[i] = data[i * view.stride[3]];
      found.y.value[i] = data[i * view.stride[3] + pair];
    }
    return found;
  }
  __device__ __forceinline__ void store_state(const wmk_view& view, int f, int vector, const RowPair<T>& rows) const {
    if (view.data == nullptr) return;
    T* data = static_cast<T*>(view.data) + state_offset(view, f, vector);
    const int64_t pair = p.frequencies * view.stride[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * vector + i >= count) continue;
      data[i * view.stride[3]] = rows.x.value[i];
      data[i * view.stride[3] + pair] = rows.y.value[i];
    }
  }
  __device__ __forceinline__ int64_t state_offset(const wmk_view& view, int f, int vector) const {
    return sequence * view.stride[0] + group * view.stride[1] + f * view.stride[2] +
           (tile * plan.width + 4 * vector) * view.stride[3];
  }

  // In this block's own [rows][width].
  __device__ __forceinline__ RowPair<T> load_rows(const T* data, int f, int vector) const {
    data += f * width + 4 * vector;
    return {load_vec4(data), load_vec4(data + frequencies * width)};
  }
  __device__ __forceinline__ void store_rows(T* data, int f, int vector, const RowPair<T>& rows) const {
    data += f * width + 4 * vector;
    store_vec4(data, rows.x);
    store_vec4(data + frequencies * width, rows.y);
  }

  // Runs `body(f, vector, exists)` for a frequency's pair of rows and four channels: always by the same thread, and by
  // whole warps, with the vectors of a frequency in adjacent lanes.
  template <typename Body>
  __device__ __forceinline__ void for_rows(Body body) const {
    const int items = frequencies * vectors;
    for (int first = 0; first < items; first += kPlaceThreads) {
      const int item = first + static_cast<int>(threadIdx.x);
      body(item < items ? item / vectors : 0, item % vectors, item < items);
    }
  }
  // The same for a place and four channels.
  template <typename Body>
  __device__ __forceinline__ void for_views(Body body) const {
    const int items = places * vectors;
    for (int first = 0; first < items; first += kPlaceThreads) {
      const int item = first + static_cast<int>(threadIdx.x);
      body(item < items ? item / vectors : 0, item % vectors, item < items);
    }
  }
  // Over the vectors of a frequency or place, in order of distance; every lane calls.
  __device__ __forceinline__ T sum_vectors(T value) const {
    for (int distance = 1; distance < vectors; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
  }

  __device__ __forceinline__ RowPair<T> spread(const T* matrix, const T* from, int f, int vector) const {
    const T *cosines = matrix + f * pitch, *sines = cosines + frequencies * pitch;
    RowPair<T> found = {};
    for (int j = 0; j < places; j += 4) {
      const Vec4<T> a = load_vec4(cosines + j), b = load_vec4(sines + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Vec4<T> view = load_vec4(from + (j + i) * width + 4 * vector);
        add_scaled(found.x, a.value[i], view);
        add_scaled(found.y, b.value[i], view);
      }
    }
    return found;
  }

  // sums [rows][places] plus the product over channels of `rows` and a view; always by the same thread.
  __device__ __forceinline__ void add_outer(T* sums, const T* view, const T* rows) const {
    const int columns = static_cast<int>(plan.places) / 4, items = 2 * frequencies * columns;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += kPlaceThreads) {
      const int r = item / columns, j = item % columns * 4;
      Vec4<T> found = load_vec4(sums + r * static_cast<int>(plan.places) + j);
      for (int vector = 0; vector < vectors; ++vector) {
        const Vec4<T> row_r = load_vec4(rows + r * width + 4 * vector);
#pragma unroll
        for (int i = 0; i < 4; ++i) found.value[i] += dot(load_vec4(view + (j + i) * width + 4 * vector), row_r);
      }
      store_vec4(sums + r * static_cast<int>(plan.places) + j, found);
    }
  }

  // `partials` from `turned`.
  __device__ __forceinline__ void collect(const T* matrix) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int items = static_cast<int>(plan.places) / 4 * vectors;
    for (int item = lane; item < items; item += 32) {
      const int j = item / vectors * 4, vector = item % vectors;
      Vec4<T> sums[4] = {};
      for (int r = warp; r < 2 * frequencies; r += kPlaceWarps) {
        const Vec4<T> a = load_vec4(matrix + r * pitch + j);
        const Vec4<T> rows = load_vec4(turned + r * width + 4 * vector);
#pragma unroll
        for (int i = 0; i < 4; ++i) add_scaled(sums[i], a.value[i], rows);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_vec4(partials + (warp * static_cast<int>(plan.places) + j + i) * width + 4 * vector, sums[i]);
    }
  }
  __device__ __forceinline__ Vec4<T> collected(int place, int vector) const {
    Vec4<T> sum = {};
#pragma unroll
    for (int warp = 0; warp < kPlaceWarps; ++warp)
      add_scaled(sum, T(1), load_vec4(partials + (warp * static_cast<int>(plan.places) + place) * width + 4 * vector));
    return sum;
  }
};

// keys and mix = keys^T inverse (keys^T without), by rows, zero past the last place.
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads)
    place_memory_matrices_kernel(const WMK_GRID_CONSTANT wmk_place_memory p, const WMK_GRID_CONSTANT PlacePlan plan) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kPlaceThreads) + threadIdx.x;
  const int64_t row = index / plan.pitch, j = index % plan.pitch;
  if (row >= plan.rows) return;
  const auto at = [](const wmk_view& view, int64_t a, int64_t b) {
    return static_cast<const T*>(view.data)[a * view.stride[0] + b * view.stride[1]];
  };
  double key = 0.0, mixed = 0.0;
  if (j < p.places) {
    key = at(p.keys, j, row);
    if (p.inverse.data == nullptr) {
      mixed = key;
    } else {
      for (int64_t k = 0; k < p.places; ++k) mixed += static_cast<double>(at(p.keys, k, row)) * at(p.inverse, k, j);
    }
  }
  T* keys = static_cast<T*>(plan.matrices);
  keys[index] = static_cast<T>(key);
  keys[plan.rows * plan.pitch + index] = static_cast<T>(mixed);
}

}  // namespace wmk
