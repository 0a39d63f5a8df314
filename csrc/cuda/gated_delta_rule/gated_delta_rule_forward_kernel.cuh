// Gated delta rule, forward, on a GPU: the tiles of gated_delta_rule_common.cuh in order, with the state in shared
// memory.
//
// Bytes per step and head from and to memory: q, k, v and y, and for the backward pass residuals and 1/32 of a state.
// Multiply-adds: 3 d_k d_v + 32 (d_k + d_v), and 32 d_k for each panel after the first, whose scores are computed
// again. Bound by the fp32 units with many heads, by the latency of a tile's four phases with few. Predicted, not
// measured.
#pragma once

#include "cuda/gated_delta_rule/gated_delta_rule_common.cuh"

namespace wmk {

template <typename T, bool SHARED>
__global__ void __launch_bounds__(kPanelThreads, 1)
    gated_delta_rule_forward_kernel(const WMK_GRID_CONSTANT wmk_gated_delta_rule p,
                                    const WMK_GRID_CONSTANT DeltaPlan plan) {
  WMK_SHARED_MEMORY(shared);
  DeltaBlock<T> block(p, plan);
  block.template prologue<SHARED>(shared);
  T* outputs = block.take(kTileSteps * block.pitch);  // [step][pitch]
  block.load_state(block.state, p.initial_state, block.sequence);
  for (int64_t t = block.begin; t < block.end;) {
    const PanelTile tile = block.tile_from(t, block.end);
    if (t == block.chunk_start(t))
      block.store_state(block.state, !tile.has_state, p.chunk_states, block.saved_row(t, p.chunk));
    block.load_keys(block.keys, p.k, block.head, tile);
    block.load_keys(block.queries, p.q, block.head, tile);
    block.load_values(block.residuals, p.v, p.dtype, tile);
    block.compute_decays(tile);
    __syncthreads();  // keys, queries, values, decays and the state are there
    block.template multiply_keys<false>(tile, block.state, tile.has_state,
                                        [&](bool is_query, int step, int value, const T(&products)[4][4]) {
#pragma unroll
                                          for (int a = 0; a < 4; ++a) {
#pragma unroll
                                            for (int b = 0; b < 4; ++b) {
                                              const int at = (step + a) * block.pitch + value + b;
                                              if (is_query) {
                                                outputs[at] = block.read_decay[step + a] * products[a][b];
                                              } else if (tile.has_state) {
                                                block.residuals[at] -= block.since_start[step + a] * products[a][b];
                                              }
                                            }
                                          }
                                        });
    __syncthreads();  // scores and what the state recalls are there
    block.template solve<false>(tile, block.residuals, [&](int step, int value, T residual, T correction) {
      block.residuals[step * block.pitch + value] = residual;
      block.corrections[step * block.pitch + value] = correction;
    });
    __syncthreads();  // residuals and corrections are there
    block.for_tiles(tile.steps, [&](int step, int value) {
      T sums[4][4];
      load_terms<false>(sums, outputs + value, block.pitch, step);
      const T *scores = block.attention + step, *corrections = block.corrections + value;
      accumulate<false, false>(sums, scores, kTilePitch, corrections, block.pitch, 0, step);
      accumulate_diagonal<false, false>(sums, scores, kTilePitch, corrections, block.pitch, step,
                                        [](int j, int i, int) { return j <= i; });
      store_sums(outputs + step * block.pitch + value, block.pitch, sums);
    });
    block.pass_state(tile);
    if (p.residuals.data != nullptr)
      block.store_values(block.residuals, block.residual_view(), block.state_dtype(), tile);
    __syncthreads();  // outputs and the state are there, keys and residuals have been read
    block.store_values(outputs, p.out, p.dtype, tile);
    t += tile.steps;
  }
  block.store_state(block.state, false, p.last_state, block.sequence);
}

}  // namespace wmk
