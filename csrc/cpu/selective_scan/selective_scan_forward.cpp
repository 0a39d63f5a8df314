// Selective scan, forward, on the CPU.
//
// A vector holds one channel per lane; up to 16 states stay in registers over a tile, so nothing of size channels x
// state x time is written. The prologue converts inputs into tiles in L1. An element costs `state` exponentials with
// three multiply-adds each. With A premultiplied by log2(e), a state takes nine instructions on the multiply-add ports
// and four on others: bound by arithmetic. A block of channel tiles shares the conversion of B and C.
#include "cpu/selective_scan/selective_scan_split_state.h"

namespace wmk::WMK_ISA {
namespace {

// Per thread, for `tiles` channel tiles.
template <class T>
struct Scratch {
  TileParams<T> params;
  T *step, *input, *output, *gate;  // [time][lane]
  T *B, *C;                         // [time][pitch]
  const char** lines;               // of the next tile
  int64_t max_lines;

  Scratch(Arena& arena, const ScanShape<T>& shape, const wmk_selective_scan& scan, int64_t tiles)
      : params(arena, shape, scan, tiles) {
    int64_t rows = shape.steps * shape.lanes;
    step = arena.take<T>(rows);
    input = arena.take<T>(rows);
    output = arena.take<T>(rows);
    gate = arena.take<T>(scan.z.data ? rows : 0);
    B = arena.take<T>(scan.B_varies ? shape.steps * shape.pitch : 0);
    C = arena.take<T>(scan.C_varies ? shape.steps * shape.pitch : 0);
    max_lines = 8 * shape.steps;
    lines = arena.take<const char*>(max_lines + shape.steps);
  }
};

template <class T>
int64_t tiles_per_block(const ScanShape<T>& shape, const wmk_selective_scan& scan) {
  int64_t share = shape.tiles * scan.sequences / (4 * scan.threads);
  return max(1, min(min(share, 8), shape.tiles_per_group));
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
    int64_t blocks = ceil_div(shape_.tiles_per_group, block_);
    parallel_for(scan_.sequences * shape_.groups * blocks, scan_.threads, [&](int64_t item, int64_t thread) {
      Arena arena((char*)scan_.workspace + thread * scratch_bytes());
      Scratch<T> scratch(arena, shape_, scan_, block_);
      int64_t first = item % blocks * block_, group = item / blocks % shape_.groups;
      run_block(scratch, Sequence(scan_, item / blocks / shape_.groups), group, group * shape_.tiles_per_group + first,
                min(block_, shape_.tiles_per_group - first));
    });
  }

 private:
  void run_block(const Scratch<T>& s, const Sequence& sequence, int64_t group, int64_t first_tile,
                 int64_t tiles) const {
    for (int64_t k = 0; k < tiles; ++k) s.params.tile(shape_, k).begin(shape_, scan_, sequence, first_tile + k);
    for (int64_t time = sequence.begin; time < sequence.end;) {
      int64_t within = (time - sequence.begin) % scan_.chunk;
      int64_t steps = min(min(shape_.steps, scan_.chunk - within), sequence.end - time);
      if (within == 0 && scan_.chunk_states.data) {
        int64_t state_row = sequence.first_state_row + (time - sequence.begin) / scan_.chunk;
        for (int64_t k = 0; k < tiles; ++k) save(s, k, first_tile + k, scan_.chunk_states, state_row);
      }
      if (scan_.B_varies)
        load_projection(s.B, shape_, scan_.B, scan_.dtype, sequence.batch, group, time, steps, 0, shape_.state);
      if (scan_.C_varies)
        load_projection(s.C, shape_, scan_.C, scan_.dtype, sequence.batch, group, time, steps, 0, shape_.state);
      ResetSpans spans(scan_, sequence, time, steps);
      for (int64_t k = 0; k < tiles; ++k) {
        PrefetchList ahead(s.lines, s.max_lines);
        if (k + 1 < tiles) {
          list_inputs(ahead, sequence, first_tile + k + 1, time, steps);
        } else if (time + steps < sequence.end) {
          int64_t count = min(steps, sequence.end - time - steps);
          list_inputs(ahead, sequence, first_tile, time + steps, count);
          list_states(ahead, scan_.B, scan_.B_varies, sequence.batch, group, time + steps, count);
          list_states(ahead, scan_.C, scan_.C_varies, sequence.batch, group, time + steps, count);
        }
        run_tile(s, s.params.tile(shape_, k), sequence, first_tile + k, spans, time, steps, ahead.pad(steps));
      }
      time += steps;
    }
    for (int64_t k = 0; k < tiles; ++k) save(s, k, first_tile + k, scan_.last_state, sequence.index);
  }
  void save(const Scratch<T>& s, int64_t k, int64_t tile, const wmk_view& view, int64_t state_row) const {
    store_state(s.params.tile(shape_, k).state, view, state_row, scan_.channels, shape_.state, shape_.channel(tile),
                shape_.rows(tile), 0, shape_.state);
  }

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

  void run_tile(const Scratch<T>& s, const TileParams<T>& params, const Sequence& sequence, int64_t tile,
                const ResetSpans& spans, int64_t time, int64_t steps, int64_t lines_per_step) const {
    TileCoord at{sequence.batch, shape_.channel(tile), shape_.rows(tile), time, steps};
    prologue(scan_, at, s.step, s.input, s.output);
    scan_spans(scan_, shape_, spans, params, s, s.output, 0, shape_.state, s.lines, lines_per_step);
    epilogue(scan_, at, s.output, s.gate);
  }

  const wmk_selective_scan& scan_;
  ScanShape<T> shape_;
  int64_t block_;
};

template <class T>
int64_t workspace(const wmk_selective_scan& scan) {
  return SplitStateForward<T>::suits(scan) ? SplitStateForward<T>(scan, Arena(nullptr)).workspace()
                                           : Forward<T>(scan).workspace();
}
template <class T>
void run(const wmk_selective_scan& scan) {
  if (SplitStateForward<T>::suits(scan)) {
    SplitStateForward<T>(scan, Arena(scan.workspace)).run();
  } else {
    Forward<T>(scan).run();
  }
}

}  // namespace

int64_t selective_scan_forward_workspace(const wmk_selective_scan& scan) {
  return scan.dtype == WMK_FLOAT64 ? workspace<double>(scan) : workspace<float>(scan);
}

int selective_scan_forward(const wmk_selective_scan& scan) {
  scan.dtype == WMK_FLOAT64 ? run<double>(scan) : run<float>(scan);
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
