// Selective scan, backward, on the CPU.
//
// Chunks run from last to first, their states recomputed from the saved one into scratch that fits L2
// (selective_scan_backward.h): memory does not grow with channels x state x time.
//
// For dB and dC, sums over a group's channels, each work item sums its tiles into a partial; partials are reduced in
// order after each pass of a few chunks. A seq_group runs its sequences in turn and sums the parameter gradients; all
// advance pass by pass. The shape alone fixes the work items, so results do not depend on the number of threads.
//
// With StateSplit, epilogue_slice() adds the blocks' partial gradients.
#include "cpu/selective_scan/selective_scan_backward_tile.h"

namespace wmk::WMK_ISA {
namespace {

constexpr int64_t kMaxWorkItems = 32;  // over all groups and seq_groups
constexpr int64_t kMaxSeqGroups = 16;
constexpr int64_t kSumsBytes = int64_t(8) << 20;  // of a pass's partials: the more, the fewer barriers
constexpr int64_t kReductionSlices = 8;           // per group and seq_group

// A seq_group's next chunk; a sequence's chunks run from last to first.
struct Cursor {
  int64_t sequence, chunk;
};

template <class T>
class Backward {
 public:
  static constexpr int lanes = kLanes<T>;

  Backward(const wmk_selective_scan& scan, Arena arena)
      : scan_(scan), shape_(scan), split_(scan, shape_.tiles, kBlockStates<T>) {
    chunk_steps_ = min(scan.chunk, max(scan.time, 1));
    seq_groups_ = max(1, min(scan.sequences, kMaxSeqGroups));
    partials_per_group_ = max(1, min(shape_.tiles_per_group, kMaxWorkItems / (seq_groups_ * shape_.groups)));
    work_items_ = seq_groups_ * shape_.groups * partials_per_group_;
    sums_pitch_ = ceil_div(shape_.state, kBlockStates<T>) * lanes;
    table_ = shape_.pitch * lanes;
    int64_t tiles = seq_groups_ * shape_.tiles;
    cursors_ = arena.take<Cursor>(seq_groups_);
    accumulators_ = tiles * (table_ * (2 + !scan.B_varies + !scan.C_varies) + 2 * kReductionSlices * lanes);
    dh_ = arena.take<T>(accumulators_);
    grad_A_ = dh_ + tiles * table_;
    grad_B_ = grad_A_ + tiles * table_;
    grad_C_ = grad_B_ + tiles * (scan.B_varies ? 0 : table_);
    grad_D_ = grad_C_ + tiles * (scan.C_varies ? 0 : table_);
    grad_bias_ = grad_D_ + tiles * kReductionSlices * lanes;
    int64_t block_partials = split_.count > 1 ? tiles * split_.blocks * 3 * lanes : 0;
    int64_t window = kSumsBytes / ((work_items_ * sums_pitch_ + block_partials) * int64_t(sizeof(T)));
    window_ = max(chunk_steps_, min(window, ceil_div(scan.time, chunk_steps_) * chunk_steps_));
    sums_ = arena.take<T>(scan.B_varies || scan.C_varies ? work_items_ * window_ * sums_pitch_ : 0);
    block_partials_ = arena.take<T>(block_partials * window_);
    scratch_ = arena.take<char>(0);
    scratch_bytes_ = round_up(measure_scratch(nullptr).bytes, 4096) + 4096;
    workspace_ = arena.used() + scratch_bytes_ * scan.threads;
  }
  int64_t workspace() const { return workspace_; }

  void run() const {
    begin();
    while (any_left()) {
      parallel_for(work_items_ * split_.count, scan_.threads, [&](int64_t item, int64_t thread) {
        run_work_item(item / split_.count, item % split_.count, thread);
      });
      if (split_.count > 1) {
        parallel_for(seq_groups_ * shape_.tiles * kReductionSlices, scan_.threads, [&](int64_t item, int64_t thread) {
          epilogue_slice(item / kReductionSlices / shape_.tiles, item / kReductionSlices % shape_.tiles,
                         item % kReductionSlices, scratch(thread));
        });
      }
      if (scan_.B_varies || scan_.C_varies) {
        parallel_for(seq_groups_ * shape_.groups * kReductionSlices, scan_.threads, [&](int64_t item, int64_t thread) {
          reduce_partials(item / kReductionSlices / shape_.groups, item / kReductionSlices % shape_.groups,
                          item % kReductionSlices, scratch(thread));
        });
      }
      advance();
    }
    parallel_for(shape_.tiles, scan_.threads,
                 [&](int64_t tile, int64_t thread) { store_parameter_gradients(tile, scratch(thread)); });
  }

 private:
  BackwardScratch<T> measure_scratch(char* memory) const { return {shape_, chunk_steps_, Arena(memory)}; }
  BackwardScratch<T> scratch(int64_t thread) const { return measure_scratch(scratch_ + thread * scratch_bytes_); }

  int64_t first_sequence(int64_t seq_group) const { return scan_.sequences * seq_group / seq_groups_; }
  int64_t chunks_of(int64_t sequence) const {
    Sequence s(scan_, sequence);
    return ceil_div(s.end - s.begin, scan_.chunk);
  }

  void begin() const {
    memset(dh_, 0, accumulators_ * sizeof(T));
    for (int64_t seq_group = 0; seq_group < seq_groups_; ++seq_group) {
      cursors_[seq_group] = next(seq_group, {first_sequence(seq_group) - 1, 0});
    }
    for (int64_t sequence = 0; sequence < scan_.sequences; ++sequence)
      if (chunks_of(sequence) == 0) pass_empty(sequence);
  }
  // An empty sequence passes its last state's gradient to its initial state.
  void pass_empty(int64_t sequence) const {
    if (!scan_.grad_initial_state.data) return;
    T* tile = scratch(0).first_state;
    for (int64_t k = 0; k < shape_.tiles; ++k) {
      memset(tile, 0, table_ * sizeof(T));
      if (scan_.grad_last_state.data)
        load_state(tile, scan_.grad_last_state, sequence, shape_.channel(k), shape_.rows(k), 0, shape_.state);
      store_state(tile, scan_.grad_initial_state, sequence, scan_.channels, shape_.state, shape_.channel(k),
                  shape_.rows(k), 0, shape_.state);
    }
  }
  // The previous chunk of this sequence, or the last of the next non-empty one.
  Cursor next(int64_t seq_group, Cursor cursor) const {
    int64_t end = first_sequence(seq_group + 1);
    --cursor.chunk;
    while (cursor.chunk < 0 && ++cursor.sequence < end) cursor.chunk = chunks_of(cursor.sequence) - 1;
    return cursor;
  }
  // Calls work(sequence, chunk, first time, steps, window offset) per chunk of a pass; returns the next pass's start.
  template <class Work>
  Cursor for_each_chunk_of_pass(int64_t seq_group, const Work& work) const {
    Cursor cursor = cursors_[seq_group];
    for (int64_t offset = 0; cursor.sequence < first_sequence(seq_group + 1); cursor = next(seq_group, cursor)) {
      Sequence sequence(scan_, cursor.sequence);
      int64_t time = sequence.begin + cursor.chunk * scan_.chunk, steps = min(scan_.chunk, sequence.end - time);
      if (offset + steps > window_) break;
      work(sequence, cursor.chunk, time, steps, offset);
      offset += steps;
    }
    return cursor;
  }
  void advance() const {
    for (int64_t seq_group = 0; seq_group < seq_groups_; ++seq_group)
      cursors_[seq_group] =
          for_each_chunk_of_pass(seq_group, [](const Sequence&, int64_t, int64_t, int64_t, int64_t) {});
  }
  bool is_done(int64_t seq_group) const { return cursors_[seq_group].sequence >= first_sequence(seq_group + 1); }
  bool any_left() const {
    for (int64_t seq_group = 0; seq_group < seq_groups_; ++seq_group)
      if (!is_done(seq_group)) return true;
    return false;
  }

  void run_work_item(int64_t work_item, int64_t split, int64_t thread) const {
    int64_t partial_index = work_item % partials_per_group_, group = work_item / partials_per_group_ % shape_.groups,
            seq_group = work_item / partials_per_group_ / shape_.groups;
    BackwardScratch<T> s = scratch(thread);
    memset(s.zeros, 0, lanes * kBlockStates<T> * sizeof(T));
    int64_t tiles = shape_.tiles_per_group;
    int64_t first = group * tiles + tiles * partial_index / partials_per_group_,
            last = group * tiles + tiles * (partial_index + 1) / partials_per_group_;
    for_each_chunk_of_pass(
        seq_group, [&](const Sequence& sequence, int64_t chunk, int64_t time, int64_t steps, int64_t offset) {
          T* sums = sums_ + (work_item * window_ + offset) * sums_pitch_;
          if (scan_.B_varies || scan_.C_varies) clear(sums, split, steps);
          if (scan_.B_varies)
            load_projection(s.B, shape_, scan_.B, scan_.dtype, sequence.batch, group, time, steps, split_.first(split),
                            split_.last(split));
          if (scan_.C_varies)
            load_projection(s.C, shape_, scan_.C, scan_.dtype, sequence.batch, group, time, steps, split_.first(split),
                            split_.last(split));
          for (int64_t step = 0; step < steps; ++step) s.reset[step] = boundary(sequence, time + step);
          for (int64_t tile = first; tile < last; ++tile) {
            PrefetchList ahead(s.lines, s.max_lines);
            if (tile + 1 < last) {
              list_tile(ahead, sequence, tile + 1, time, steps);
            } else if (chunk > 0) {
              list_tile(ahead, sequence, first, time - scan_.chunk, scan_.chunk);
            }
            run_tile(s, sequence, chunk, seq_group, tile, split, time, steps, offset, sums, ahead.pad(steps));
          }
        });
  }
  void clear(T* sums, int64_t split, int64_t steps) const {
    int64_t begin = split_.first(split) / kBlockStates<T>, end = ceil_div(split_.last(split), kBlockStates<T>);
    for (int64_t t = 0; t < steps; ++t)
      memset(sums + t * sums_pitch_ + begin * lanes, 0, (end - begin) * lanes * sizeof(T));
  }
  // Gradient of step, gradient of input, or output: [window][lane].
  T* block_partial(int64_t seq_group, int64_t tile, int64_t block, int64_t which, int64_t offset) const {
    return block_partials_ +
           ((((seq_group * shape_.tiles + tile) * split_.blocks + block) * 3 + which) * window_ + offset) * lanes;
  }

  void list_tile(PrefetchList& list, const Sequence& sequence, int64_t tile, int64_t time, int64_t steps) const {
    const wmk_view* views[] = {&scan_.u,      &scan_.delta,      &scan_.z,     &scan_.grad_out,
                               &scan_.grad_u, &scan_.grad_delta, &scan_.grad_z};
    for (const wmk_view* view : views)
      if (view->data)
        list.add_tile(plane_of(*view, scan_.dtype, sequence.batch), bytes_of(scan_.dtype), shape_.channel(tile),
                      shape_.rows(tile), time, steps);
  }

  // kReset, or kStartsAtZero where no gradient passes the sequence's first decay.
  char boundary(const Sequence& sequence, int64_t time) const {
    const wmk_view& reset = scan_.reset;
    if (reset.data && ((const char*)reset.data)[sequence.batch * reset.stride[0] + time * reset.stride[1]])
      return kReset;
    bool starts_at_zero = !scan_.initial_state.data && !scan_.grad_initial_state.data;
    return time == sequence.begin && starts_at_zero ? kStartsAtZero : 0;
  }
  void load_padded_table(T* table, const wmk_view& view, int64_t channel, int rows) const {
    memset(table, 0, table_ * sizeof(T));
    load_table(table, view, channel, rows, shape_.state);
  }

  void run_tile(const BackwardScratch<T>& s, const Sequence& sequence, int64_t chunk, int64_t seq_group, int64_t tile,
                int64_t split, int64_t time, int64_t steps, int64_t offset, T* sums, int64_t lines_per_step) const {
    int64_t channel = shape_.channel(tile), owner = seq_group * shape_.tiles + tile;
    int64_t first = split_.first(split), last = split_.last(split);
    int rows = shape_.rows(tile);
    load_padded_table(s.A2, scan_.A, channel, rows);
    for (int64_t i = 0; i < table_; ++i) s.A2[i] = times_log2e(s.A2[i]);
    // Padding states: an infinite step times zero would be NaN.
    for (int64_t i = shape_.state * lanes; i < table_; ++i) s.A2[i] = -least_normal(Vector<T>{})[0];
    if (!scan_.B_varies) load_padded_table(s.B_table, scan_.B, channel, rows);
    if (!scan_.C_varies) load_padded_table(s.C_table, scan_.C, channel, rows);
    memset(s.first_state, 0, table_ * sizeof(T));
    load_state(s.first_state, scan_.chunk_states, sequence.first_state_row + chunk, channel, rows, 0, shape_.state);
    T* dh = dh_ + owner * table_;
    if (time + steps == sequence.end) {
      memset(dh + first * lanes, 0, (last - first) * lanes * sizeof(T));
      if (scan_.grad_last_state.data) load_state(dh, scan_.grad_last_state, sequence.index, channel, rows, first, last);
    }
    TileCoord at{sequence.batch, channel, rows, time, steps};
    prologue(scan_, s, at);
    ChunkTile<T> work{};
    work.steps = steps, work.pitch = shape_.pitch, work.reset = s.reset;
    work.step = s.step, work.input = s.input, work.output = s.output, work.A2 = s.A2;
    work.B = scan_.B_varies ? s.B : s.B_table, work.C = scan_.C_varies ? s.C : s.C_table;
    work.grad_output = s.grad_output, work.grad_input = s.grad_input, work.grad_step = s.grad_step;
    work.dh = dh, work.grad_A = grad_A_ + owner * table_;
    work.grad_B = grad_B_ + owner * table_, work.grad_C = grad_C_ + owner * table_;
    work.states = s.states, work.decays = s.decays, work.zeros = s.zeros;
    work.sums = sums, work.sums_pitch = sums_pitch_;
    work.lines = s.lines, work.lines_per_step = lines_per_step;
    auto run_blocks = [&](int64_t begin, int64_t end) {
      run_states<T>(work, s.first_state, begin, end, scan_.B_varies, scan_.C_varies, scan_.grad_z.data);
    };
    if (split_.count > 1) {
      for (int64_t n = first; n < last; n += split_.block) {
        T** const results[] = {&work.grad_input, &work.grad_step, &work.output};
        for (int which = 0; which < 3; ++which) {
          *results[which] = block_partial(seq_group, tile, n / split_.block, which, offset);
          memset(*results[which], 0, steps * lanes * sizeof(T));
        }
        run_blocks(n, min(n + split_.block, last));
      }
    } else {
      run_blocks(0, shape_.state);
      int64_t slice = slice_of(seq_group, tile, chunk) * lanes;
      epilogue(scan_, s, at, grad_D_ + slice, grad_bias_ + slice);
    }
    if (chunk == 0 && scan_.grad_initial_state.data)
      store_state(dh, scan_.grad_initial_state, sequence.index, scan_.channels, shape_.state, channel, rows, first,
                  last);
  }

  // For dD and dbias.
  int64_t slice_of(int64_t seq_group, int64_t tile, int64_t chunk) const {
    return (seq_group * kReductionSlices + chunk % kReductionSlices) * shape_.tiles + tile;
  }
  // Adds the blocks of a slice of the pass, then runs the epilogue.
  void epilogue_slice(int64_t seq_group, int64_t tile, int64_t slice, const BackwardScratch<T>& s) const {
    for_each_chunk_of_pass(seq_group,
                           [&](const Sequence& sequence, int64_t chunk, int64_t time, int64_t steps, int64_t offset) {
                             if (chunk % kReductionSlices != slice) return;
                             TileCoord at{sequence.batch, shape_.channel(tile), shape_.rows(tile), time, steps};
                             prologue(scan_, s, at);
                             T* const results[] = {s.grad_input, s.grad_step, s.output};
                             for (int which = 0; which < 3; ++which) {
                               for (int64_t block = 0; block < split_.blocks; ++block) {
                                 const T* sum = block_partial(seq_group, tile, block, which, offset);
                                 for (int64_t t = 0; t < steps * lanes; t += lanes)
                                   store(results[which] + t, load(results[which] + t) + load(sum + t));
                               }
                             }
                             int64_t owner = slice_of(seq_group, tile, chunk) * lanes;
                             epilogue(scan_, s, at, grad_D_ + owner, grad_bias_ + owner);
                           });
  }

  void reduce_partials(int64_t seq_group, int64_t group, int64_t slice, const BackwardScratch<T>& s) const {
    constexpr int block = kBlockStates<T>;
    int64_t item = 0;
    for_each_chunk_of_pass(
        seq_group, [&](const Sequence& sequence, int64_t, int64_t time, int64_t steps, int64_t offset) {
          for (int64_t begin = 0; begin < steps; begin += kSumSteps) {
            if (item++ % kReductionSlices != slice) continue;
            int64_t count = min(kSumSteps, steps - begin);
            const T* first =
                sums_ +
                ((seq_group * shape_.groups + group) * partials_per_group_ * window_ + offset + begin) * sums_pitch_;
            for (int64_t t = 0; t < count; ++t) {
              for (int64_t n = 0; n * lanes < sums_pitch_; ++n) {
                Vector<T> sum{};
                for (int64_t p = 0; p < partials_per_group_; ++p)
                  sum += load(first + (p * window_ + t) * sums_pitch_ + n * lanes);
                memcpy(s.B + t * shape_.pitch + n * block, &sum, sizeof(sum) / 2);
                memcpy(s.C + t * shape_.pitch + n * block, (const T*)&sum + block, sizeof(sum) / 2);
              }
            }
            if (scan_.B_varies) store_states(s.B, scan_.grad_B, sequence.batch, group, time + begin, count);
            if (scan_.C_varies) store_states(s.C, scan_.grad_C, sequence.batch, group, time + begin, count);
          }
        });
  }
  void store_states(const T* tile, const wmk_view& view, int64_t batch, int64_t group, int64_t time,
                    int64_t steps) const {
    if (!view.data) return;
    Plane plane = plane_of(view, scan_.dtype, batch, group);
    for (int64_t n = 0; n < shape_.state; n += lanes)
      store_plane(tile + n, shape_.pitch, plane, scan_.dtype, n, int(min(lanes, shape_.state - n)), time, steps);
  }

  void store_parameter_gradients(int64_t tile, const BackwardScratch<T>& s) const {
    int64_t channel = shape_.channel(tile);
    int rows = shape_.rows(tile);
    auto add_seq_groups = [&](T* sum, const T* gradients, int64_t size, int64_t seq_groups) {
      memset(sum, 0, size * sizeof(T));
      for (int64_t seq_group = 0; seq_group < seq_groups; ++seq_group)
        for (int64_t i = 0; i < size; ++i) sum[i] += gradients[(seq_group * shape_.tiles + tile) * size + i];
    };
    auto store_table = [&](const T* gradients, const wmk_view& view) {
      if (!view.data) return;
      add_seq_groups(s.first_state, gradients, table_, seq_groups_);
      store_state(s.first_state, view, 0, scan_.channels, shape_.state, channel, rows, 0, shape_.state);
    };
    auto store_vector = [&](const T* gradients, const wmk_view& view) {
      if (!view.data) return;
      add_seq_groups(s.first_state, gradients, lanes, seq_groups_ * kReductionSlices);
      memcpy((T*)view.data + channel, s.first_state, rows * sizeof(T));
    };
    store_table(grad_A_, scan_.grad_A);
    if (!scan_.B_varies) store_table(grad_B_, scan_.grad_B);
    if (!scan_.C_varies) store_table(grad_C_, scan_.grad_C);
    store_vector(grad_D_, scan_.grad_D);
    store_vector(grad_bias_, scan_.grad_delta_bias);
  }

  const wmk_selective_scan& scan_;
  ScanShape<T> shape_;
  StateSplit split_;
  int64_t chunk_steps_;  // maximum steps per chunk
  int64_t window_;       // maximum steps per seq_group and pass
  int64_t seq_groups_, partials_per_group_, work_items_, table_, sums_pitch_, scratch_bytes_, workspace_;
  Cursor* cursors_;
  int64_t accumulators_;  // elements from dh_ to grad_bias_
  char* scratch_;
  T *dh_, *grad_A_, *grad_B_, *grad_C_;  // [seq_groups][tiles][pitch][lane]
  T *grad_D_, *grad_bias_;               // [seq_groups][slices][tiles][lane]
  T* sums_;                              // [work_items][window][sums_pitch]
  T* block_partials_;
};

}  // namespace

int64_t selective_scan_backward_workspace(const wmk_selective_scan& scan) {
  Arena measure(nullptr);
  return scan.dtype == WMK_FLOAT64 ? Backward<double>(scan, measure).workspace()
                                   : Backward<float>(scan, measure).workspace();
}

int selective_scan_backward(const wmk_selective_scan& scan) {
  if (scan.dtype == WMK_FLOAT64) {
    Backward<double>(scan, Arena(scan.workspace)).run();
  } else {
    Backward<float>(scan, Arena(scan.workspace)).run();
  }
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
