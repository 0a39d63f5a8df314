// The inner loop of the selective scan's forward pass, and what comes before and after it.
#pragma once

#include "cpu/selective_scan/selective_scan.h"

namespace wmk::WMK_ISA {

// A stretch of time of one tile.
template <class T>
struct Piece {
  T* state;               // [state][lane]
  const T* A2;            // A log2(e), [state][lane]
  const T *step, *input;  // [time][lane]
  const T *B, *C;         // [time][pitch], or [state][lane] where they do not vary
  T* output;              // [time][lane], added to
  int64_t pitch, steps;
  bool fresh;                // start from zero instead of from `state`
  const char* const* lines;  // cache lines to ask for on the way,
  int64_t lines_per_step;    // so many a step
};

// States of a full block.
constexpr int kForwardBlock = kVectorBytes == 64 ? 16 : 8;

template <class T, int States, bool BVaries, bool CVaries>
__attribute__((noinline)) static void scan_block(const Piece<T>& piece, int64_t n0) {
  constexpr int lanes = kLanes<T>;
  T* state = piece.state + n0 * lanes;
  const T *A2 = piece.A2 + n0 * lanes, *step = piece.step, *input = piece.input;
  const T *B = piece.B + n0 * (BVaries ? 1 : lanes), *C = piece.C + n0 * (CVaries ? 1 : lanes);
  T* output = piece.output;
  const char* const* lines = piece.lines;
  // Every block of states passes the same time; the first one does the asking.
  int64_t lines_per_step = n0 == 0 ? piece.lines_per_step : 0, pitch = piece.pitch;
  Vector<T> h[States];
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) h[n] = piece.fresh ? Vector<T>{} : load(state + n * lanes);
  for (int64_t t = piece.steps; t > 0; --t) {
    Vector<T> step_t = load(step), input_t = load(input), sum[2] = {};
    for (int64_t i = 0; i < lines_per_step; ++i) __builtin_prefetch(*lines++, 0, 2);
#pragma GCC unroll 16
    for (int n = 0; n < States; ++n) {
      Vector<T> decay = exp2(step_t * load(A2 + n * lanes));
      h[n] = decay * h[n] + input_t * (BVaries ? broadcast(B[n]) : load(B + n * lanes));
      sum[n & 1] += h[n] * (CVaries ? broadcast(C[n]) : load(C + n * lanes));
    }
    store(output, load(output) + (sum[0] + sum[1]));
    step += lanes, input += lanes, output += lanes;
    if (BVaries) B += pitch;
    if (CVaries) C += pitch;
  }
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) store(state + n * lanes, h[n]);
}

template <class T, bool BVaries, bool CVaries>
static void scan_blocks(const Piece<T>& piece, int64_t first, int64_t last) {
  for (int64_t n = first; n < last;) {
    auto run = [&](auto block) {
      scan_block<T, sizeof(block), BVaries, CVaries>(piece, n);
      n += int64_t(sizeof(block));
    };
    int64_t left = last - n;
    // Constant B and C are rare and get fewer block sizes.
    if constexpr (BVaries && CVaries) {
      if (kForwardBlock == 16 && left >= 16) {
        run(Block<16>{});
      } else if (left >= 8) {
        run(Block<8>{});
      } else if (left >= 4) {
        run(Block<4>{});
      } else if (left >= 2) {
        run(Block<2>{});
      } else {
        run(Block<1>{});
      }
    } else if (left >= 4) {
      run(Block<4>{});
    } else {
      run(Block<1>{});
    }
  }
}

// States [first, last) of a piece.
template <class T>
static void scan_states(const Piece<T>& piece, const wmk_selective_scan& scan, int64_t first, int64_t last) {
  if (scan.B_varies && scan.C_varies) {
    scan_blocks<T, true, true>(piece, first, last);
  } else if (scan.B_varies) {
    scan_blocks<T, true, false>(piece, first, last);
  } else if (scan.C_varies) {
    scan_blocks<T, false, true>(piece, first, last);
  } else {
    scan_blocks<T, false, false>(piece, first, last);
  }
}

// The parameters of one tile or of several, and their states.
template <class T>
struct Tables {
  T *A2, *B, *C, *state;  // [tiles][state][lane]

  Tables(Arena& arena, const ScanShape<T>& shape, const wmk_selective_scan& scan, int64_t tiles) {
    int64_t size = tiles * shape.state * shape.lanes;
    A2 = arena.take<T>(size);
    state = arena.take<T>(size);
    B = arena.take<T>(scan.B_varies ? 0 : size);
    C = arena.take<T>(scan.C_varies ? 0 : size);
  }
  Tables tile(const ScanShape<T>& shape, int64_t k) const {
    Tables one = *this;
    T** const tables[] = {&one.A2, &one.B, &one.C, &one.state};
    for (T** table : tables) *table += k * shape.state * shape.lanes;
    return one;
  }
  // Fills the tables of one tile for the start of a sequence.
  void begin(const ScanShape<T>& shape, const wmk_selective_scan& scan, const Sequence& sequence, int64_t tile) const {
    int64_t channel = shape.channel(tile), size = shape.state * shape.lanes;
    int rows = shape.rows(tile);
    load_table(A2, scan.A, channel, rows, shape.state);
    for (int64_t i = 0; i < size; ++i) A2[i] *= kLog2e<T>;
    if (!scan.B_varies) load_table(B, scan.B, channel, rows, shape.state);
    if (!scan.C_varies) load_table(C, scan.C, channel, rows, shape.state);
    if (scan.initial_state.data) {
      load_state(state, scan.initial_state, sequence.index, channel, rows, 0, shape.state);
    } else {
      memset(state, 0, size * sizeof(T));
    }
  }
};

// Before the scan: step sizes, inputs of the state, and what reaches the output past the state.
template <class T>
static void prepare(const wmk_selective_scan& scan, const Place& at, T* step, T* input, T* output) {
  load_place(input, scan.u, scan.dtype, at);
  load_place(step, scan.delta, scan.dtype, at);
  Vector<T> bias = load_parameter<T>(scan.delta_bias, at.channel, at.rows);
  Vector<T> skip = load_parameter<T>(scan.D, at.channel, at.rows);
  for (int64_t t = 0; t < at.steps * kLanes<T>; t += kLanes<T>) {
    Vector<T> step_t = load(step + t) + bias, u = load(input + t);
    if (scan.delta_softplus) step_t = softplus(step_t);
    store(step + t, step_t);
    store(input + t, step_t * u);
    store(output + t, scan.D.data ? skip * u : Vector<T>{});
  }
}

// States [first, last) of a tile, a stretch between two resets at a time. `scratch` has step, input, B and C; the
// cache lines are asked for on the way.
template <class T, class Scratch>
static void scan_stretches(const wmk_selective_scan& scan, const ScanShape<T>& shape, const Stretches& stretches,
                           const Tables<T>& tables, const Scratch& scratch, T* output, int64_t first, int64_t last,
                           const char* const* lines, int64_t lines_per_step) {
  for (int i = 0; i < stretches.count; ++i) {
    int64_t begin = stretches.begin[i], at = begin * shape.lanes;
    // No decay where there is nothing to decay: an infinite one would make NaN of the zero.
    if (stretches.fresh[i]) store(scratch.step + at, Vector<T>{});
    Piece<T> piece{};
    piece.state = tables.state, piece.A2 = tables.A2;
    piece.step = scratch.step + at, piece.input = scratch.input + at, piece.output = output + at;
    piece.B = scan.B_varies ? scratch.B + begin * shape.pitch : tables.B;
    piece.C = scan.C_varies ? scratch.C + begin * shape.pitch : tables.C;
    piece.pitch = shape.pitch, piece.steps = stretches.begin[i + 1] - begin, piece.fresh = stretches.fresh[i];
    piece.lines = lines + begin * lines_per_step, piece.lines_per_step = lines_per_step;
    scan_states(piece, scan, first, last);
  }
}

// After it: the gate, and out of scratch. `gate` is scratch too.
template <class T>
static void conclude(const wmk_selective_scan& scan, const Place& at, T* output, T* gate) {
  if (scan.z.data) {
    load_place(gate, scan.z, scan.dtype, at);
    for (int64_t t = 0; t < at.steps * kLanes<T>; t += kLanes<T>) {
      Vector<T> z = load(gate + t);
      store(output + t, load(output + t) * z * sigmoid(z));
    }
  }
  store_place(output, scan.out, scan.dtype, at);
}

}  // namespace wmk::WMK_ISA
