// SSD scan, forward, on a GPU: the tiles of ssd_scan_common.cuh in order, with the state in shared memory.
//
// Bytes per step and head from and to memory: x, z and out, B and C of its group (from the caches for all heads but
// one), and for the backward pass 1/512 of a state. Multiply-adds: 2 n d + 18 (n + d), and 18 n for each panel after
// the first, whose scores are computed again. Bound by the fp32 units with many heads, by the latency of a tile's three
// phases with few. Predicted, not measured.
#pragma once

#include "cuda/ssd_scan/ssd_scan_common.cuh"

namespace wmk {

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPanelThreads, SHARED && sizeof(T) == 4 ? 2 : 1)
    ssd_scan_forward_kernel(const WMK_GRID_CONSTANT wmk_ssd_scan p, const WMK_GRID_CONSTANT SSDPlan plan) {
  WMK_SHARED_MEMORY(shared);
  SSDBlock<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  block.take_values();
  block.load_state(block.state, state_by_row(p.initial_state), block.sequence);
  block.load_skip();
  for (int64_t t = block.begin; t < block.end;) {
    const PanelTile tile = block.tile_from(t, block.end);
    if ((t - block.begin) % p.kept_interval == 0)
      block.store_state(block.state, !tile.has_state, p.chunk_states, block.saved_row(t, p.kept_interval));
    block.load_inputs(tile);
    block.load_queries(tile);
    __syncthreads();  // B, C, x, decays and the state are there
    block.multiply(tile, true, nullptr, nullptr, false);
    __syncthreads();  // scores and what the state gives are there
    block.for_tiles(tile.steps, [&](int step, int value) {
      T sums[4][4];
      block.output_sums(sums, step, value);
      store_sums(block.y + step * block.pitch + value, block.pitch, sums);
    });
    block.pass_state(tile, block.x, block.entering);
    __syncthreads();  // outputs and the state are there, B, x and decays have been read
    const wmk_view z = vectors_by_head(p.z);
    const int64_t first = block.row * z.stride[0] + block.head * z.stride[1] + block.first_value * z.stride[2];
    block.for_values(vectors_by_head(p.out), p.dtype, tile, [&](int i, int step) {
      const T y = block.y[step * block.pitch + i];
      if (z.data == nullptr) return y;
      const int64_t offset = first + i * z.stride[2] + (tile.begin + step) * z.stride[3];
      const T z_t = load_from<T>(z, p.dtype, offset);
      return y * z_t * sigmoid(z_t, true);
    });
    t += tile.steps;
  }
  block.store_state(block.state, false, state_by_row(p.last_state), block.sequence);
}

}  // namespace wmk
