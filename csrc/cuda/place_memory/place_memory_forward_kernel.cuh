// Place memory, forward, on a GPU.
//
// A block keeps a state, turned to the observer, in shared memory, and runs all steps. What is read is also what the
// next delta write finds, so a step multiplies the state twice, not three times.
//
// Bytes per step from and to memory: values, gates and phases, out and residual; 4 KB in fp32 for 226 rows, 25 places
// and 16 channels. Multiply-adds: 4 x frequencies x places per value, 180,000 per step, 1,600 cycles with padding at
// 128 per cycle. Latency: three barriers and the chains between, some 500 cycles. So about 1.1 us per step whatever the
// batch, up to one block per multiprocessor. Predicted, not measured.
#pragma once

#include "cuda/place_memory/place_memory_common.cuh"

namespace wmk {

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPlaceThreads, 1)
    place_memory_forward_kernel(const WMK_GRID_CONSTANT wmk_place_memory p, const WMK_GRID_CONSTANT PlacePlan plan) {
  WMK_SHARED_MEMORY(shared);
  PlaceBlock<T> block{p, plan};
  block.template prologue<SHARED>(shared);
  const int64_t state_dtype = sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32;
  block.for_rows([&](int f, int vector, bool exists) {
    if (!exists) return;
    const RowPair<T> rows = block.load_state(p.initial_state, f, vector);
    block.store_rows(block.state, f, vector, rows);
    block.store_rows(block.turned, f, vector, block.turn_of(block.begin, false, f).to_observer(rows));
  });
  __syncthreads();  // matrices, views and turned rows are there
  for (int64_t now = block.begin;; ++now) {
    block.collect(block.keys);
    __syncthreads();  // partial sums are there
    const bool last = now == block.end, found_nothing = p.inverse.data == nullptr || block.is_reset(now);
    block.for_views([&](int place, int vector, bool exists) {
      if (!exists) return;
      const Vec4<T> held = block.collected(place, vector);
      if (now > block.begin) block.store_view(p.out, p.dtype, now - 1, place, vector, held);
      if (last) return;
      Vec4<T> view = block.load_view(p.values, p.dtype, now, place, vector);
      if (!found_nothing) add_scaled(view, T(-1), held);
      if (p.residual.data != nullptr) block.store_view(p.residual, state_dtype, now, place, vector, view);
      const T gate = block.gate_of(now, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) view.value[i] *= gate;
      store_vec4(block.views + place * block.width + 4 * vector, view);
    });
    if (last) break;
    __syncthreads();  // the view is there
    const bool reset = block.is_reset(now);
    block.for_rows([&](int f, int vector, bool exists) {
      if (!exists) return;
      const Turn<T> write = block.turn_of(now, reset, f), read = block.turn_of(now + 1, false, f);
      const RowPair<T> written = block.spread(block.mix, block.views, f, vector);
      RowPair<T> rows = {};
      if (!reset) rows = block.load_rows(block.state, f, vector);
      write.add_to_world(rows, written);
      block.store_rows(block.state, f, vector, rows);
      block.store_rows(block.turned, f, vector, read.to_observer(rows));
    });
    __syncthreads();  // turned rows are there
  }
  block.for_rows([&](int f, int vector, bool exists) {
    if (exists) block.store_state(p.last_state, f, vector, block.load_rows(block.state, f, vector));
  });
}

}  // namespace wmk
