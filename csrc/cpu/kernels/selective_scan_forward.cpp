// Selective scan, forward, on the CPU.
//
// One vector holds as many channels of a group as it has lanes, and up to sixteen states of those channels stay in
// registers over a tile of time: nothing of size channels x state x time is ever written. The inner loop reads scratch
// tiles in the first-level cache, already widened, biased and through softplus, so every dtype and layout runs the same
// code. An element costs `state` exponentials and three multiply-adds each; with A scaled by log2(e) beforehand an
// exponential is a product, a rounding, five multiply-adds and a scaling, so a state takes nine instructions on the
// multiply-add pipes and four on others, and the kernel is bound by arithmetic. The tiles of B and C are converted once
// for a block of channel tiles. The state at each chunk's start is kept for the backward pass.
#include "../selective_scan.h"

namespace wmk::WMK_ISA {
namespace {

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

template <class T, int States, bool BVaries, bool CVaries>
__attribute__((noinline)) void scan_block(const Piece<T>& piece, int64_t n0) {
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
    Vector<T> step_t = load(step), input_t = load(input), sum[2] = {load(output), Vector<T>{}};
    for (int64_t i = 0; i < lines_per_step; ++i) __builtin_prefetch(*lines++, 0, 2);
#pragma GCC unroll 16
    for (int n = 0; n < States; ++n) {
      Vector<T> decay = exp2(step_t * load(A2 + n * lanes));
      h[n] = decay * h[n] + input_t * (BVaries ? broadcast(B[n]) : load(B + n * lanes));
      sum[n & 1] += h[n] * (CVaries ? broadcast(C[n]) : load(C + n * lanes));
    }
    store(output, sum[0] + sum[1]);
    step += lanes, input += lanes, output += lanes;
    if (BVaries) B += pitch;
    if (CVaries) C += pitch;
  }
#pragma GCC unroll 16
  for (int n = 0; n < States; ++n) store(state + n * lanes, h[n]);
}

template <class T, bool BVaries, bool CVaries>
void scan_states(const Piece<T>& piece, int64_t state) {
  for (int64_t n = 0; n < state;) {
    auto run = [&](auto block) {
      scan_block<T, sizeof(block), BVaries, CVaries>(piece, n);
      n += int64_t(sizeof(block));
    };
    int64_t left = state - n;
    // Constant B and C are rare and get fewer block sizes.
    if constexpr (BVaries && CVaries) {
      if (kVectorBytes == 64 && left >= 16) {
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

// Scratch of one thread, for a block of `tiles` channel tiles.
template <class T>
struct Scratch {
  T *A2, *B_table, *C_table, *state;  // [tiles][state][lane]
  T *step, *input, *output, *gate;    // [time][lane]
  T *B, *C;                           // [time][pitch]
  const char** lines;                 // of the tile after this one
  int64_t most_lines;

  Scratch(Arena& arena, const ScanShape<T>& shape, const wmk_selective_scan& scan, int64_t tiles) {
    int64_t table = tiles * shape.state * shape.lanes, rows = shape.steps * shape.lanes;
    A2 = arena.take<T>(table);
    state = arena.take<T>(table);
    B_table = arena.take<T>(scan.B_varies ? 0 : table);
    C_table = arena.take<T>(scan.C_varies ? 0 : table);
    step = arena.take<T>(rows);
    input = arena.take<T>(rows);
    output = arena.take<T>(rows);
    gate = arena.take<T>(scan.z.data ? rows : 0);
    B = arena.take<T>(scan.B_varies ? shape.steps * shape.pitch : 0);
    C = arena.take<T>(scan.C_varies ? shape.steps * shape.pitch : 0);
    most_lines = 8 * shape.steps;
    lines = arena.take<const char*>(most_lines + shape.steps);
  }
};

// Channel tiles that one thread takes through time together, sharing the conversion of B and C.
template <class T>
int64_t tiles_per_block(const ScanShape<T>& shape, const wmk_selective_scan& scan) {
  int64_t share = shape.tiles * scan.sequences / (4 * scan.threads);
  return larger(1, smaller(smaller(share, 8), shape.tiles_per_group));
}

template <class T>
class Forward {
 public:
  explicit Forward(const wmk_selective_scan& scan) : scan_(scan), shape_(scan), block_(tiles_per_block(shape_, scan)) {}

  int64_t scratch_bytes() const {
    Arena arena(nullptr);
    Scratch<T>(arena, shape_, scan_, block_);
    return round_up(arena.used(), 4096) + 4096;
  }
  int64_t workspace() const { return scratch_bytes() * scan_.threads; }

  void run() const {
    int64_t blocks = divide_up(shape_.tiles_per_group, block_);
    parallel_for(scan_.sequences * shape_.groups * blocks, scan_.threads, [&](int64_t item, int64_t thread) {
      Arena arena((char*)scan_.workspace + thread * scratch_bytes());
      Scratch<T> scratch(arena, shape_, scan_, block_);
      int64_t first = item % blocks * block_, group = item / blocks % shape_.groups;
      run_block(scratch, Sequence(scan_, item / blocks / shape_.groups), group, group * shape_.tiles_per_group + first,
                smaller(block_, shape_.tiles_per_group - first));
    });
  }

 private:
  void run_block(const Scratch<T>& s, const Sequence& sequence, int64_t group, int64_t first_tile,
                 int64_t tiles) const {
    int64_t table = shape_.state * shape_.lanes;
    for (int64_t k = 0; k < tiles; ++k) {
      int64_t channel = shape_.channel(first_tile + k);
      int rows = shape_.rows(first_tile + k);
      T* A2 = s.A2 + k * table;
      load_table(A2, scan_.A, channel, rows, shape_.state);
      for (int64_t i = 0; i < table; ++i) A2[i] *= kLog2e<T>;
      if (!scan_.B_varies) load_table(s.B_table + k * table, scan_.B, channel, rows, shape_.state);
      if (!scan_.C_varies) load_table(s.C_table + k * table, scan_.C, channel, rows, shape_.state);
      if (scan_.initial_state.data) {
        load_state(s.state + k * table, scan_.initial_state, sequence.index, channel, rows, shape_.state);
      } else {
        memset(s.state + k * table, 0, table * sizeof(T));
      }
    }
    for (int64_t time = sequence.begin; time < sequence.end;) {
      int64_t within = (time - sequence.begin) % scan_.chunk;
      int64_t steps = smaller(smaller(shape_.steps, scan_.chunk - within), sequence.end - time);
      if (within == 0 && scan_.chunk_states.data) {
        int64_t slot = sequence.first_slot + (time - sequence.begin) / scan_.chunk;
        for (int64_t k = 0; k < tiles; ++k)
          store_state(s.state + k * table, scan_.chunk_states, slot, scan_.channels, shape_.channel(first_tile + k),
                      shape_.rows(first_tile + k), shape_.state);
      }
      if (scan_.B_varies) load_states(s.B, scan_.B, sequence.batch, group, time, steps);
      if (scan_.C_varies) load_states(s.C, scan_.C, sequence.batch, group, time, steps);
      Stretches stretches(scan_, sequence, time, steps);
      for (int64_t k = 0; k < tiles; ++k) {
        PrefetchList ahead(s.lines, s.most_lines);
        if (k + 1 < tiles) {
          list_inputs(ahead, sequence, first_tile + k + 1, time, steps);
        } else if (time + steps < sequence.end) {
          int64_t count = smaller(steps, sequence.end - time - steps);
          list_inputs(ahead, sequence, first_tile, time + steps, count);
          list_states(ahead, scan_.B, scan_.B_varies, sequence.batch, group, time + steps, count);
          list_states(ahead, scan_.C, scan_.C_varies, sequence.batch, group, time + steps, count);
        }
        run_tile(s, sequence, first_tile + k, k * table, stretches, time, steps, ahead.pad(steps));
      }
      time += steps;
    }
    for (int64_t k = 0; k < tiles; ++k)
      store_state(s.state + k * table, scan_.last_state, sequence.index, scan_.channels, shape_.channel(first_tile + k),
                  shape_.rows(first_tile + k), shape_.state);
  }

  // What a tile will read and write.
  void list_inputs(PrefetchList& list, const Sequence& sequence, int64_t tile, int64_t time, int64_t steps) const {
    const wmk_view* views[] = {&scan_.u, &scan_.delta, &scan_.z, &scan_.out};
    for (const wmk_view* view : views)
      if (view->data)
        list.add_tile(plane_of(*view, scan_.dtype, sequence.batch), bytes_of(scan_.dtype), shape_.channel(tile),
                      shape_.rows(tile), time, steps);
  }
  void list_states(PrefetchList& list, const wmk_view& view, int64_t varies, int64_t batch, int64_t group, int64_t time,
                   int64_t steps) const {
    if (varies)
      list.add_tile(plane_of(view, scan_.dtype, batch, group), bytes_of(scan_.dtype), 0, int(shape_.state), time,
                    steps);
  }

  // B or C as [time][pitch].
  void load_states(T* tile, const wmk_view& view, int64_t batch, int64_t group, int64_t time, int64_t steps) const {
    Plane plane = plane_of(view, scan_.dtype, batch, group);
    for (int64_t n = 0; n < shape_.state; n += shape_.lanes)
      load_plane(tile + n, shape_.pitch, plane, scan_.dtype, n, int(smaller(shape_.lanes, shape_.state - n)), time,
                 steps);
  }

  void run_tile(const Scratch<T>& s, const Sequence& sequence, int64_t tile, int64_t table, const Stretches& stretches,
                int64_t time, int64_t steps, int64_t lines_per_step) const {
    constexpr int lanes = kLanes<T>;
    int64_t channel = shape_.channel(tile);
    int rows = shape_.rows(tile);
    auto load_input = [&](T* to, const wmk_view& view) {
      load_plane(to, lanes, plane_of(view, scan_.dtype, sequence.batch), scan_.dtype, channel, rows, time, steps);
    };
    load_input(s.input, scan_.u);
    load_input(s.step, scan_.delta);
    Vector<T> bias = load_parameter<T>(scan_.delta_bias, channel, rows),
              skip = load_parameter<T>(scan_.D, channel, rows);
    for (int64_t t = 0; t < steps * lanes; t += lanes) {
      Vector<T> step = load(s.step + t) + bias, u = load(s.input + t);
      if (scan_.delta_softplus) step = softplus(step);
      store(s.step + t, step);
      store(s.input + t, step * u);
      store(s.output + t, scan_.D.data ? skip * u : Vector<T>{});
    }
    for (int i = 0; i < stretches.count; ++i) {
      int64_t begin = stretches.begin[i];
      // No decay where there is nothing to decay: an infinite one would make NaN of the zero.
      if (stretches.fresh[i]) store(s.step + begin * lanes, Vector<T>{});
      run_piece({s.state + table, s.A2 + table, s.step + begin * lanes, s.input + begin * lanes,
                 scan_.B_varies ? s.B + begin * shape_.pitch : s.B_table + table,
                 scan_.C_varies ? s.C + begin * shape_.pitch : s.C_table + table, s.output + begin * lanes,
                 shape_.pitch, stretches.begin[i + 1] - begin, stretches.fresh[i], s.lines + begin * lines_per_step,
                 lines_per_step});
    }
    if (scan_.z.data) {
      load_input(s.gate, scan_.z);
      for (int64_t t = 0; t < steps * lanes; t += lanes) {
        Vector<T> z = load(s.gate + t);
        store(s.output + t, load(s.output + t) * z * sigmoid(z));
      }
    }
    store_plane(s.output, lanes, plane_of(scan_.out, scan_.dtype, sequence.batch), scan_.dtype, channel, rows, time,
                steps);
  }

  void run_piece(const Piece<T>& piece) const {
    if (scan_.B_varies && scan_.C_varies) {
      scan_states<T, true, true>(piece, shape_.state);
    } else if (scan_.B_varies) {
      scan_states<T, true, false>(piece, shape_.state);
    } else if (scan_.C_varies) {
      scan_states<T, false, true>(piece, shape_.state);
    } else {
      scan_states<T, false, false>(piece, shape_.state);
    }
  }

  const wmk_selective_scan& scan_;
  ScanShape<T> shape_;
  int64_t block_;
};

}  // namespace

int64_t selective_scan_forward_workspace(const wmk_selective_scan& scan) {
  return scan.dtype == WMK_FLOAT64 ? Forward<double>(scan).workspace() : Forward<float>(scan).workspace();
}

int selective_scan_forward(const wmk_selective_scan& scan) {
  if (scan.dtype == WMK_FLOAT64) {
    Forward<double>(scan).run();
  } else {
    Forward<float>(scan).run();
  }
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
