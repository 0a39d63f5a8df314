// The backward pass over one chunk of one tile and one block of states.
//
// recompute_states() stores states and decays of half a vector's lanes of states at a time: they fit L2.
// reverse_sweep() computes dh_t = C_t dy_t + decay_{t+1} dh_{t+1} and
//
//   d(input_t) = B_t . dh_t           dB_t = sum over channels of dh_t input_t
//   d(step_t)  = A . (decay_t dh_t h_{t-1}) + ...         dC_t = sum over channels of h_t dy_t
//
// Channels are lanes, summed by one tree of additions per block. A table is [state][lane].
#pragma once

#include "cpu/selective_scan/selective_scan.h"
#include "cpu/simd/shuffle.h"

namespace wmk::WMK_ISA {

constexpr char kReset = 1, kStartsAtZero = 2;

template <class T>
constexpr int kBlockStates = kLanes<T> / 2;

template <class T>
struct ChunkTile {
  int64_t steps, pitch;
  const char* reset;                 // [time]: 0, kReset or kStartsAtZero
  const T *step, *input;             // [time][lane]; input = step u
  const T *B, *C;                    // [time][pitch], or tables if constant
  const T* A2;                       // A log2(e), table
  T* output;                         // [time][lane], y
  const T* grad_output;              // [time][lane], dy
  T *grad_input, *grad_step;         // [time][lane]; grad_step without log(2) and the path through input
  T *dh, *grad_A, *grad_B, *grad_C;  // tables; dh is decay_{t+1} dh_{t+1}; grad_B, grad_C: constant B, C
  T *states, *decays;                // [time + 1][block][lane], [time][block][lane]
  const T* zeros;                    // [block][lane]
  T* sums;                           // [time][blocks][lane]: dB, then dC
  int64_t sums_pitch;
  const char* const* lines;  // to prefetch in the first block
  int64_t lines_per_step;
};

template <class T, int States, bool BVaries, bool CVaries, bool WantsOutput>
__attribute__((noinline)) static void recompute_states(const ChunkTile<T>& tile, int64_t n0) {
  constexpr int lanes = kLanes<T>, row = kBlockStates<T> * lanes;
  T *states = tile.states, *decays = tile.decays;
  const char* const* lines = tile.lines;
  int64_t lines_per_step = n0 == 0 ? tile.lines_per_step : 0;
  Vector<T> h[States];
#pragma GCC unroll 8
  for (int n = 0; n < States; ++n) h[n] = load(states + n * lanes);
  for (int64_t t = 0; t < tile.steps; ++t, decays += row) {
    Vector<T> step = load(tile.step + t * lanes), input = load(tile.input + t * lanes), sum[2] = {};
    const T* A2 = tile.A2 + n0 * lanes;
    if (tile.reset[t] == kReset) {
      // No decay: an infinite one would turn the zero state into NaN.
      step = Vector<T>{}, A2 = tile.zeros;
#pragma GCC unroll 8
      for (int n = 0; n < States; ++n) h[n] = Vector<T>{};
    }
    const T* B = BVaries ? tile.B + t * tile.pitch + n0 : tile.B + n0 * lanes;
    const T* C = CVaries ? tile.C + t * tile.pitch + n0 : tile.C + n0 * lanes;
    states += row;
    for (int64_t i = 0; i < lines_per_step; ++i) __builtin_prefetch(*lines++, 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < States; ++n) {
      Vector<T> decay = exp2(step * load(A2 + n * lanes));
      store(decays + n * lanes, decay);
      h[n] = decay * h[n] + input * (BVaries ? broadcast(B[n]) : load(B + n * lanes));
      store(states + n * lanes, h[n]);
      if (WantsOutput) sum[n & 1] += h[n] * (CVaries ? broadcast(C[n]) : load(C + n * lanes));
    }
    if (WantsOutput) store(tile.output + t * lanes, load(tile.output + t * lanes) + (sum[0] + sum[1]));
  }
}

template <class T, int States, bool BVaries, bool CVaries>
__attribute__((noinline)) static void reverse_sweep(const ChunkTile<T>& tile, int64_t n0) {
  constexpr int lanes = kLanes<T>, block = kBlockStates<T>, row = block * lanes;
  const T* A2 = tile.A2 + n0 * lanes;
  T* sums = tile.sums + n0 / block * lanes;
  Vector<T> dh[States], grad_A[States];
#pragma GCC unroll 8
  for (int n = 0; n < States; ++n) {
    dh[n] = load(tile.dh + (n0 + n) * lanes);
    grad_A[n] = load(tile.grad_A + (n0 + n) * lanes);
  }
  for (int64_t t = tile.steps - 1; t >= 0; --t) {
    Vector<T> step = load(tile.step + t * lanes), input = load(tile.input + t * lanes);
    Vector<T> grad_output = load(tile.grad_output + t * lanes);
    Vector<T> grad_input{}, grad_step{};
    const T* B = BVaries ? tile.B + t * tile.pitch + n0 : tile.B + n0 * lanes;
    const T* C = CVaries ? tile.C + t * tile.pitch + n0 : tile.C + n0 * lanes;
    const T *before = tile.reset[t] ? tile.zeros : tile.states + t * row, *after = tile.states + (t + 1) * row;
    const T* decays = tile.decays + t * row;
    if (tile.reset[t]) {
      // Nothing passes through the decay: an infinite gradient times the zero state would be NaN.
#pragma GCC unroll 8
      for (int n = 0; n < States; ++n) store(tile.grad_A + (n0 + n) * lanes, grad_A[n]);
    }
    Vector<T> sum = sum_lanes<T>([&](int i) __attribute__((always_inline)) {
      const int n = i % block;
      if (n >= States) return Vector<T>{};
      if (i >= block) {
        Vector<T> product = load(after + n * lanes) * grad_output;
        if (!CVaries) store(tile.grad_C + (n0 + n) * lanes, load(tile.grad_C + (n0 + n) * lanes) + product);
        return CVaries ? product : Vector<T>{};
      }
      Vector<T> g = dh[n] + grad_output * (CVaries ? broadcast(C[n]) : load(C + n * lanes));
      grad_input += g * (BVaries ? broadcast(B[n]) : load(B + n * lanes));
      dh[n] = g * load(decays + n * lanes);
      Vector<T> through_decay = dh[n] * load(before + n * lanes);
      grad_step += through_decay * load(A2 + n * lanes);
      grad_A[n] += through_decay * step;
      Vector<T> product = g * input;
      if (!BVaries) store(tile.grad_B + (n0 + n) * lanes, load(tile.grad_B + (n0 + n) * lanes) + product);
      return BVaries ? product : Vector<T>{};
    });
    if (BVaries || CVaries) store(sums + t * tile.sums_pitch, load(sums + t * tile.sums_pitch) + sum);
    store(tile.grad_input + t * lanes, load(tile.grad_input + t * lanes) + grad_input);
    if (tile.reset[t]) {
#pragma GCC unroll 8
      for (int n = 0; n < States; ++n) dh[n] = Vector<T>{}, grad_A[n] = load(tile.grad_A + (n0 + n) * lanes);
    } else {
      store(tile.grad_step + t * lanes, load(tile.grad_step + t * lanes) + grad_step);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < States; ++n) {
    store(tile.dh + (n0 + n) * lanes, dh[n]);
    store(tile.grad_A + (n0 + n) * lanes, grad_A[n]);
  }
}

// At most `left` states from n0, rounded up to a block size; tables are zero-padded.
template <class T, int States, bool BVaries, bool CVaries>
static void run_block(const ChunkTile<T>& tile, const T* first_state, int64_t n0, int64_t left, bool wants_output) {
  if constexpr (States > 1) {
    constexpr int smaller_size = BVaries && CVaries ? States / 2 : 1;
    if (left <= smaller_size)
      return run_block<T, smaller_size, BVaries, CVaries>(tile, first_state, n0, left, wants_output);
  }
  memcpy(tile.states, first_state + n0 * kLanes<T>, States * sizeof(Vector<T>));
  if (wants_output) {
    recompute_states<T, States, BVaries, CVaries, true>(tile, n0);
  } else {
    recompute_states<T, States, BVaries, CVaries, false>(tile, n0);
  }
  reverse_sweep<T, States, BVaries, CVaries>(tile, n0);
}

// `first`: a multiple of the block size.
template <class T>
static void run_states(const ChunkTile<T>& tile, const T* first_state, int64_t first, int64_t last, bool B_varies,
                       bool C_varies, bool wants_output) {
  constexpr int block = kBlockStates<T>;
  for (int64_t n0 = first; n0 < last; n0 += block) {
    if (B_varies && C_varies) {
      run_block<T, block, true, true>(tile, first_state, n0, last - n0, wants_output);
    } else if (B_varies) {
      run_block<T, block, true, false>(tile, first_state, n0, last - n0, wants_output);
    } else if (C_varies) {
      run_block<T, block, false, true>(tile, first_state, n0, last - n0, wants_output);
    } else {
      run_block<T, block, false, false>(tile, first_state, n0, last - n0, wants_output);
    }
  }
}

}  // namespace wmk::WMK_ISA
