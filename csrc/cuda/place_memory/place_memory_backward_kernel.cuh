// Place memory, backward, on a GPU.
//
// The state's gradient dh stays in shared memory and runs through the steps in reverse, by the forward pass's products
// with `keys` and `mix` exchanged. States are needed only by gradients of phases and keys: then the states before every
// 16th step are recomputed first, from the residuals, which need no reads, and those between before their reverse
// sweep. These lie in global memory, in the caches; a thread reads only what it wrote. With phases a step costs twice
// the forward pass's multiply-adds and four more barriers; with keys twice those again.
//
// Sums over channels, for the gradients of phases and gates, are partial per tile, those of keys per block;
// place_memory_sum_kernel adds them in order.
#pragma once

#include "cuda/place_memory/place_memory_common.cuh"

namespace wmk {

// What the backward kernel adds to a block.
template <typename T>
struct PlaceReverse {
  const PlaceBlock<T>& block;
  T *states, *work, *key_sums;  // of this block

  __device__ __forceinline__ explicit PlaceReverse(const PlaceBlock<T>& of) : block(of) {
    const PlacePlan& plan = of.plan;
    const int64_t steps = of.p.time / kPlaceSteps, size = plan.rows * plan.width;
    const int64_t slot = of.p.cu_seqlens.data != nullptr ? of.begin / kPlaceSteps + of.sequence : of.row * (steps + 1);
    states = static_cast<T*>(plan.states) + ((slot * of.p.groups + of.group) * plan.tiles + of.tile) * size;
    work = static_cast<T*>(plan.work) + of.block * (2 * kPlaceSteps + 1) * size;
    key_sums = static_cast<T*>(plan.key_sums) + of.block * 2 * key_elements();
  }
  __device__ __forceinline__ int64_t key_elements() const { return block.plan.rows * block.plan.places; }
  __device__ __forceinline__ T* read_rows() const { return working(2 * kPlaceSteps); }
  __device__ __forceinline__ T* saved(int64_t chunk) const {
    return states + chunk * block.p.groups * block.plan.tiles * block.plan.rows * block.plan.width;
  }
  __device__ __forceinline__ T* working(int64_t index) const {
    return work + index * block.plan.rows * block.plan.width;
  }
  __device__ __forceinline__ Vec4<T> residual(int64_t t, int place, int vector) const {
    const wmk_place_memory& p = block.p;
    if (p.inverse.data == nullptr) return block.load_view(p.values, p.dtype, t, place, vector);
    return block.load_view(p.residual, sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32, t, place, vector);
  }

  // `writes`: what step t writes.
  __device__ __forceinline__ void prepare_write(int64_t t) const {
    block.for_views([&](int place, int vector, bool exists) {
      if (!exists) return;
      Vec4<T> view = residual(t, place, vector);
      const T gate = block.gate_of(t, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) view.value[i] *= gate;
      store_vec4(block.writes + place * block.width + 4 * vector, view);
    });
  }
  // target: the state after step t; written: what the step adds in the observer's frame, or null.
  __device__ __forceinline__ void recompute(int64_t t, const T* source, T* target, T* written) const {
    prepare_write(t);
    __syncthreads();  // the written view is there
    const bool reset = block.is_reset(t);
    block.for_rows([&](int f, int vector, bool exists) {
      if (!exists) return;
      const RowPair<T> added = block.spread(block.mix, block.writes, f, vector);
      RowPair<T> rows = {};
      if (!reset) rows = block.load_rows(source, f, vector);
      block.turn_of(t, reset, f).add_to_world(rows, added);
      block.store_rows(target, f, vector, rows);
      if (written != nullptr) block.store_rows(written, f, vector, added);
    });
    __syncthreads();  // the written view has been read
  }
  // Saves the states before steps 0, kPlaceSteps, ... of the sequence.
  __device__ __forceinline__ void recompute_sequence() const {
    block.for_rows([&](int f, int vector, bool exists) {
      if (exists) block.store_rows(states, f, vector, block.load_state(block.p.initial_state, f, vector));
    });
    for (int64_t t = block.begin; t < block.end; ++t) {
      const int64_t local = t - block.begin;
      const T* source = local % kPlaceSteps == 0 ? saved(local / kPlaceSteps) : work;
      T* target = (local + 1) % kPlaceSteps == 0 ? saved((local + 1) / kPlaceSteps) : work;
      recompute(t, source, target, nullptr);
    }
  }
  // The states of the chunk that ends with step `last`.
  __device__ __forceinline__ void recompute_chunk(int64_t last) const {
    const int64_t chunk = (last - block.begin) / kPlaceSteps;
    for (int64_t t = block.begin + chunk * kPlaceSteps; t <= last; ++t) {
      const int64_t index = (t - block.begin) % kPlaceSteps;
      recompute(t, index == 0 ? saved(chunk) : working(index - 1), working(index), working(kPlaceSteps + index));
    }
  }

  // Where the gradient of the phase of the write of step t is, or null.
  __device__ __forceinline__ T* phase_gradient(int64_t t) const {
    const wmk_place_memory& p = block.p;
    const int64_t rows = block.plan.rows;
    if (t > block.begin) {
      if (block.plan.grad_phase == nullptr) return nullptr;
      const int64_t index = (block.tile * p.batch + block.row) * p.time + t - 1;
      return static_cast<T*>(block.plan.grad_phase) + (index * p.groups + block.group) * rows;
    }
    if (block.plan.grad_initial_phase == nullptr) return nullptr;
    const int64_t index = block.tile * p.sequences + block.sequence;
    return static_cast<T*>(block.plan.grad_initial_phase) + (index * p.groups + block.group) * rows;
  }
  // For `observed` rows, or their gradient, and `world` rows, or theirs. By the lanes of a frequency together.
  __device__ __forceinline__ void add_phase_gradient(int64_t t, bool add, bool is_constant, int f, int vector,
                                                     bool exists, const RowPair<T>& observed,
                                                     const RowPair<T>& world) const {
    const T cos = block.sum_vectors(dot(observed.x, world.x) + dot(observed.y, world.y));
    const T sin = block.sum_vectors(dot(observed.x, world.y) - dot(observed.y, world.x));
    T* target = phase_gradient(t);
    if (!exists || vector != 0 || target == nullptr) return;
    const int other = f + block.frequencies;
    target[f] = (add ? target[f] : T(0)) + (is_constant ? T(0) : cos);
    target[other] = (add ? target[other] : T(0)) + (is_constant ? T(0) : sin);
  }
};

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_memory_backward_kernel(const WMK_GRID_CONSTANT wmk_place_memory p, const WMK_GRID_CONSTANT PlacePlan plan) {
  WMK_SHARED_MEMORY(shared);
  PlaceBlock<T> block{p, plan};
  block.template prologue<SHARED>(shared);
  const PlaceReverse<T> reverse(block);
  const bool states = plan.states != nullptr, keys = plan.key_sums != nullptr;
  if (keys) {
    for (int64_t i = threadIdx.x; i < 2 * reverse.key_elements(); i += kPlaceThreads) reverse.key_sums[i] = T(0);
  }
  __syncthreads();  // matrices are there, views are zero
  if (states) reverse.recompute_sequence();
  block.for_rows([&](int f, int vector, bool exists) {
    if (exists) block.store_rows(block.state, f, vector, block.load_state(p.grad_last_state, f, vector));
  });
  block.for_views([&](int place, int vector, bool exists) {
    if (!exists || block.end == block.begin) return;
    store_vec4(block.views + place * block.width + 4 * vector,
               block.load_view(p.grad_out, p.dtype, block.end - 1, place, vector));
  });
  __syncthreads();  // the gradient of the last view is there

  // `views`: the gradient of what was read after step t; `state`: that of the state after step `now`.
  for (int64_t now = block.end;; --now) {
    const int64_t t = now - 1, local = t - block.begin;
    const bool first = now == block.begin;
    if (states && !first && (now == block.end || (local + 1) % kPlaceSteps == 0)) reverse.recompute_chunk(t);
    if (keys && !first) reverse.prepare_write(t);
    const bool cut = block.is_reset(now), reset = block.is_reset(t);
    // Without a gradient of what was read, its phase and state are in no product: they may be NaN.
    const bool was_read =
        (p.grad_out.data != nullptr && !first) || (p.inverse.data != nullptr && now < block.end && !cut);
    block.for_rows([&](int f, int vector, bool exists) {
      RowPair<T> rows = {};
      if (exists && !cut) rows = block.load_rows(block.state, f, vector);
      const RowPair<T> read = block.spread(block.keys, block.views, f, vector);
      const Turn<T> turn = block.turn_of(now, !was_read, f);
      turn.add_to_world(rows, read);
      if (exists) block.store_rows(block.state, f, vector, rows);
      if (exists && !first) block.store_rows(block.turned, f, vector, block.turn_of(t, reset, f).to_observer(rows));
      if (!states) return;
      RowPair<T> held = {}, written = {};
      if (exists && was_read)
        held = block.load_rows(first ? reverse.saved(0) : reverse.working(local % kPlaceSteps), f, vector);
      if (exists && keys) block.store_rows(reverse.read_rows(), f, vector, turn.to_observer(held));
      reverse.add_phase_gradient(now, now < block.end, false, f, vector, exists, read, held);
      if (first) return;
      if (exists) written = block.load_rows(reverse.working(kPlaceSteps + local % kPlaceSteps), f, vector);
      reverse.add_phase_gradient(t, false, reset, f, vector, exists, written, rows);
    });
    if (first && !keys) break;
    __syncthreads();  // turned rows, and the written view, are there
    if (keys) {
      block.add_outer(reverse.key_sums, block.views, reverse.read_rows());
      if (!first) block.add_outer(reverse.key_sums + reverse.key_elements(), block.writes, block.turned);
    }
    if (first) break;
    block.collect(block.mix);
    __syncthreads();  // partial sums are there
    const bool found_nothing = p.inverse.data == nullptr || reset;
    block.for_views([&](int place, int vector, bool exists) {
      Vec4<T> grad = {};
      if (exists) grad = block.collected(place, vector);
      if (p.gate.data != nullptr) {
        const T sum = block.sum_vectors(exists ? dot(grad, reverse.residual(t, place, vector)) : T(0));
        if (exists && vector == 0 && plan.grad_gate != nullptr) {
          const int64_t index = ((block.tile * p.batch + block.row) * p.time + t) * p.places + place;
          static_cast<T*>(plan.grad_gate)[index * p.groups + block.group] = sum;
        }
      }
      if (!exists) return;
      const T gate = block.gate_of(t, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) grad.value[i] *= gate;
      block.store_view(p.grad_values, p.dtype, t, place, vector, grad);
      Vec4<T> view = {};
      if (t > block.begin) view = block.load_view(p.grad_out, p.dtype, t - 1, place, vector);
      if (!found_nothing) add_scaled(view, T(-1), grad);
      store_vec4(block.views + place * block.width + 4 * vector, view);
    });
    __syncthreads();  // the gradient of the view before is there
  }
  block.for_rows([&](int f, int vector, bool exists) {
    if (exists) block.store_state(p.grad_initial_state, f, vector, block.load_rows(block.state, f, vector));
  });
}

// to[i] = sum over tiles of from[tile][i], in order.
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads)
    place_memory_sum_kernel(const T* from, T* to, int64_t elements, int64_t tiles) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kPlaceThreads) + threadIdx.x;
  if (index >= elements) return;
  T sum = T(0);
  for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * elements + index];
  to[index] = sum;
}

// Gradients of keys and inverse, from those of keys as read and of mix = keys^T inverse: [2][rows][places].
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads)
    place_memory_keys_kernel(const WMK_GRID_CONSTANT wmk_place_memory p, const WMK_GRID_CONSTANT PlacePlan plan,
                             const T* sums) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kPlaceThreads) + threadIdx.x;
  const int64_t columns = plan.rows + (p.inverse.data != nullptr ? p.places : 0);
  const int64_t place = index / columns, column = index % columns;
  if (place >= p.places) return;
  const T* mixed = sums + plan.rows * plan.places;
  const auto at = [](const wmk_view& view, int64_t a, int64_t b) {
    return static_cast<double>(static_cast<const T*>(view.data)[a * view.stride[0] + b * view.stride[1]]);
  };
  if (column < plan.rows) {
    double sum = sums[column * plan.places + place];
    if (p.inverse.data == nullptr) sum += mixed[column * plan.places + place];
    for (int64_t j = 0; p.inverse.data != nullptr && j < p.places; ++j)
      sum += at(p.inverse, place, j) * mixed[column * plan.places + j];
    if (p.grad_keys.data != nullptr)
      static_cast<T*>(p.grad_keys.data)[place * plan.rows + column] = static_cast<T>(sum);
  } else if (p.grad_inverse.data != nullptr) {
    const int64_t j = column - plan.rows;
    double sum = 0.0;
    for (int64_t r = 0; r < plan.rows; ++r) sum += at(p.keys, place, r) * mixed[r * plan.places + j];
    static_cast<T*>(p.grad_inverse.data)[place * p.places + j] = static_cast<T>(sum);
  }
}

}  // namespace wmk
