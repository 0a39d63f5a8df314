#pragma once

#include "cpu/selective_scan/selective_scan.h"

namespace wmk::WMK_ISA {

template <class T>
struct ScanArgs {
  T* state;               // [state][lane]
  const T* A2;            // A log2(e), [state][lane]
  const T *step, *input;  // [time][lane]
  const T *B, *C;         // [time][pitch], or [state][lane] if constant
  T* output;              // [time][lane], accumulated
  int64_t pitch, steps;
  bool reset;                // start from zero
  const char* const* lines;  // to prefetch
  int64_t lines_per_step;
};

constexpr int kForwardBlock = kVectorBytes == 64 ? 16 : 8;

template <class T, int States, bool BVaries, bool CVaries>
__attribute__((noinline)) static void scan_block(const ScanArgs<T>& args, int64_t n0) {
  constexpr int lanes = kLanes<T>;
  T* state = args.state + n0 * lanes;
  const T *A2 = args.A2 + n0 * lanes, *step = args.step, *input = args.input;
  const T *B = args.B + n0 * (BVaries ? 1 : lanes), *C = args.C + n0 * (CVaries ? 1 : lanes);
  T* output = args.output;
  const char* const* lines = args.lines;
  // The first block prefetches for all.
  int64_t lines_per_step = n0 == 0 ? args.lines_per_step : 0, pitch = args.pitch;
  Vector<T> h[States];
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) h[n] = args.reset ? Vector<T>{} : load(state + n * lanes);
  for (int64_t t = args.steps; t > 0; --t) {
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
static void scan_blocks(const ScanArgs<T>& args, int64_t first, int64_t last) {
  for (int64_t n = first; n < last;) {
    auto run = [&](auto block) {
      scan_block<T, sizeof(block), BVaries, CVaries>(args, n);
      n += int64_t(sizeof(block));
    };
    int64_t left = last - n;
    // Constant B and C are rare: fewer instances.
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

template <class T>
static void scan_states(const ScanArgs<T>& args, const wmk_selective_scan& scan, int64_t first, int64_t last) {
  if (scan.B_varies && scan.C_varies) {
    scan_blocks<T, true, true>(args, first, last);
  } else if (scan.B_varies) {
    scan_blocks<T, true, false>(args, first, last);
  } else if (scan.C_varies) {
    scan_blocks<T, false, true>(args, first, last);
  } else {
    scan_blocks<T, false, false>(args, first, last);
  }
}

template <class T>
struct TileParams {
  T *A2, *B, *C, *state;  // [tiles][state][lane]
  T* zeros;               // [state][lane]

  TileParams(Arena& arena, const ScanShape<T>& shape, const wmk_selective_scan& scan, int64_t tiles) {
    int64_t size = tiles * shape.state * shape.lanes;
    A2 = arena.take<T>(size);
    state = arena.take<T>(size);
    B = arena.take<T>(scan.B_varies ? 0 : size);
    C = arena.take<T>(scan.C_varies ? 0 : size);
    zeros = arena.take<T>(shape.state * shape.lanes);
  }
  TileParams tile(const ScanShape<T>& shape, int64_t k) const {
    TileParams one = *this;
    T** const params[] = {&one.A2, &one.B, &one.C, &one.state};
    for (T** table : params) *table += k * shape.state * shape.lanes;
    return one;
  }
  void begin(const ScanShape<T>& shape, const wmk_selective_scan& scan, const Sequence& sequence, int64_t tile) const {
    int64_t channel = shape.channel(tile), size = shape.state * shape.lanes;
    int rows = shape.rows(tile);
    load_table(A2, scan.A, channel, rows, shape.state);
    for (int64_t i = 0; i < size; ++i) A2[i] = times_log2e(A2[i]);
    memset(zeros, 0, size * sizeof(T));
    if (!scan.B_varies) load_table(B, scan.B, channel, rows, shape.state);
    if (!scan.C_varies) load_table(C, scan.C, channel, rows, shape.state);
    if (scan.initial_state.data) {
      load_state(state, scan.initial_state, sequence.index, channel, rows, 0, shape.state);
    } else {
      memset(state, 0, size * sizeof(T));
    }
  }
};

template <class T>
static void prologue(const wmk_selective_scan& scan, const TileCoord& at, T* step, T* input, T* output) {
  load_tile_at(input, scan.u, scan.dtype, at);
  load_tile_at(step, scan.delta, scan.dtype, at);
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

// States [first, last).
template <class T, class Scratch>
static void scan_spans(const wmk_selective_scan& scan, const ScanShape<T>& shape, const ResetSpans& spans,
                       const TileParams<T>& params, const Scratch& scratch, T* output, int64_t first, int64_t last,
                       const char* const* lines, int64_t lines_per_step) {
  for (int i = 0; i < spans.count; ++i) {
    int64_t begin = spans.begin[i], at = begin * shape.lanes;
    ScanArgs<T> args{};
    args.state = params.state, args.A2 = params.A2;
    args.step = scratch.step + at, args.input = scratch.input + at, args.output = output + at;
    args.B = scan.B_varies ? scratch.B + begin * shape.pitch : params.B;
    args.C = scan.C_varies ? scratch.C + begin * shape.pitch : params.C;
    args.pitch = shape.pitch, args.steps = spans.begin[i + 1] - begin, args.reset = spans.reset[i];
    args.lines = lines + begin * lines_per_step, args.lines_per_step = lines_per_step;
    if (args.reset) {
      // The first step has no decay: an infinite one would turn the zero state into NaN.
      store(scratch.step + at, Vector<T>{});
      ScanArgs<T> step = args;
      step.A2 = params.zeros, step.steps = 1;
      scan_states(step, scan, first, last);
      if (--args.steps == 0) continue;
      args.step += shape.lanes, args.input += shape.lanes, args.output += shape.lanes;
      if (scan.B_varies) args.B += shape.pitch;
      if (scan.C_varies) args.C += shape.pitch;
      args.lines += lines_per_step, args.reset = false;
    }
    scan_states(args, scan, first, last);
  }
}

template <class T>
static void epilogue(const wmk_selective_scan& scan, const TileCoord& at, T* output, T* gate) {
  if (scan.z.data) {
    load_tile_at(gate, scan.z, scan.dtype, at);
    for (int64_t t = 0; t < at.steps * kLanes<T>; t += kLanes<T>)
      store(output + t, load(output + t) * silu(load(gate + t)));
  }
  store_tile_at(output, scan.out, scan.dtype, at);
}

}  // namespace wmk::WMK_ISA
