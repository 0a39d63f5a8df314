// Selective scan, forward, on the CPU, with fewer tiles than threads.
//
// Splitting time would repeat every exponential; states combine only in the output. Threads split a tile's states, and
// time advances by windows in two stages: the scan, parallel over tiles and splits, with an output per block; then sum,
// gate and store, parallel over time. Every split repeats the prologue: cheaper than reading another core's cache.
#pragma once

#include "cpu/selective_scan/selective_scan_forward.h"

namespace wmk::WMK_ISA {

template <class T>
class SplitStateForward {
 public:
  static constexpr int lanes = kLanes<T>;

  static bool suits(const wmk_selective_scan& scan) {
    return scan.state % kForwardBlock == 0 && split_of(scan).count > 1;
  }

  SplitStateForward(const wmk_selective_scan& scan, Arena arena)
      : scan_(scan),
        shape_(scan),
        split_(split_of(scan)),
        work_items_(scan.sequences * shape_.tiles),
        params_(arena, shape_, scan, work_items_) {
    int64_t row = work_items_ * split_.blocks * lanes * int64_t(sizeof(T));
    int64_t slices = min(kWindowBytes / (row * shape_.steps), ceil_div(scan.time, shape_.steps));
    window_ = max(1, slices) * shape_.steps;
    output_ = arena.take<T>(work_items_ * split_.blocks * window_ * lanes);
    scratch_ = arena.take<char>(0);
    scratch_bytes_ = round_up(Scratch(*this, Arena(nullptr)).bytes, 4096) + 4096;
    workspace_ = arena.used() + scratch_bytes_ * scan.threads;
  }
  int64_t workspace() const { return workspace_; }

  void run() const {
    int64_t longest = 0, slices = window_ / shape_.steps;
    for (int64_t sequence = 0; sequence < scan_.sequences; ++sequence) {
      Sequence s(scan_, sequence);
      longest = max(longest, s.end - s.begin);
      for (int64_t tile = 0; tile < shape_.tiles; ++tile)
        params_.tile(shape_, sequence * shape_.tiles + tile).begin(shape_, scan_, s, tile);
    }
    for (int64_t offset = 0; offset < longest; offset += window_) {
      parallel_for(work_items_ * split_.count, scan_.threads, [&](int64_t item, int64_t thread) {
        scan_split(item / split_.count, item % split_.count, offset, scratch(thread));
      });
      parallel_for(work_items_ * slices, scan_.threads, [&](int64_t item, int64_t thread) {
        store_slice(item / slices, offset, item % slices, scratch(thread).input);
      });
    }
    for (int64_t work_item = 0; work_item < work_items_; ++work_item)
      save(work_item, scan_.last_state, work_item / shape_.tiles, 0, shape_.state);
  }

 private:
  static constexpr int64_t kWindowBytes = int64_t(1) << 18;

  // For at most `steps` of a tile.
  struct Scratch {
    T *step, *input;  // [time][lane]
    T *B, *C;         // [time][pitch]
    int64_t bytes;

    Scratch(const SplitStateForward& f, Arena arena) {
      step = arena.take<T>(f.shape_.steps * lanes);
      input = arena.take<T>(f.shape_.steps * lanes);
      B = arena.take<T>(f.scan_.B_varies ? f.shape_.steps * f.shape_.pitch : 0);
      C = arena.take<T>(f.scan_.C_varies ? f.shape_.steps * f.shape_.pitch : 0);
      bytes = arena.used();
    }
  };
  Scratch scratch(int64_t thread) const { return Scratch(*this, Arena(scratch_ + thread * scratch_bytes_)); }

  static StateSplit split_of(const wmk_selective_scan& scan) { return {scan, ScanShape<T>(scan).tiles, kForwardBlock}; }

  T* output(int64_t work_item, int64_t block, int64_t step) const {
    return output_ + ((work_item * split_.blocks + block) * window_ + step) * lanes;
  }
  TileCoord coord(const Sequence& sequence, int64_t tile, int64_t time, int64_t steps) const {
    return {sequence.batch, shape_.channel(tile), shape_.rows(tile), time, steps};
  }
  void save(int64_t work_item, const wmk_view& view, int64_t state_row, int64_t first, int64_t last) const {
    int64_t tile = work_item % shape_.tiles;
    store_state(params_.tile(shape_, work_item).state, view, state_row, scan_.channels, shape_.state,
                shape_.channel(tile), shape_.rows(tile), first, last);
  }

  void scan_split(int64_t work_item, int64_t split, int64_t offset, const Scratch& s) const {
    int64_t tile = work_item % shape_.tiles, group = tile / shape_.tiles_per_group;
    int64_t first = split_.first(split), last = split_.last(split), first_block = split_.first_block(split);
    Sequence sequence(scan_, work_item / shape_.tiles);
    TileParams<T> params = params_.tile(shape_, work_item);
    int64_t start = sequence.begin + offset, end = min(start + window_, sequence.end);
    for (int64_t time = start; time < end;) {
      int64_t within = (time - sequence.begin) % scan_.chunk;
      int64_t steps = min(min(shape_.steps, scan_.chunk - within), end - time);
      if (within == 0 && scan_.chunk_states.data)
        save(work_item, scan_.chunk_states, sequence.first_state_row + (time - sequence.begin) / scan_.chunk, first,
             last);
      if (scan_.B_varies)
        load_projection(s.B, shape_, scan_.B, scan_.dtype, sequence.batch, group, time, steps, first, last);
      if (scan_.C_varies)
        load_projection(s.C, shape_, scan_.C, scan_.dtype, sequence.batch, group, time, steps, first, last);
      ResetSpans spans(scan_, sequence, time, steps);
      prologue(scan_, coord(sequence, tile, time, steps), s.step, s.input,
               output(work_item, first_block, time - start));
      for (int64_t block = first_block; block < split_.first_block(split + 1); ++block) {
        T* sum = output(work_item, block, time - start);
        if (block > 0) memset(sum, 0, steps * lanes * sizeof(T));
        int64_t n = block * split_.block;
        scan_spans(scan_, shape_, spans, params, s, sum, n, n + split_.block, nullptr, 0);
      }
      time += steps;
    }
  }

  void store_slice(int64_t work_item, int64_t offset, int64_t slice, T* gate) const {
    Sequence sequence(scan_, work_item / shape_.tiles);
    int64_t begin = slice * shape_.steps, time = sequence.begin + offset + begin;
    int64_t steps = min(shape_.steps, sequence.end - time);
    if (steps <= 0) return;
    T* sum = output(work_item, 0, begin);
    for (int64_t block = 1; block < split_.blocks; ++block) {
      const T* other = output(work_item, block, begin);
      for (int64_t t = 0; t < steps * lanes; t += lanes) store(sum + t, load(sum + t) + load(other + t));
    }
    epilogue(scan_, coord(sequence, work_item % shape_.tiles, time, steps), sum, gate);
  }

  const wmk_selective_scan& scan_;
  ScanShape<T> shape_;
  StateSplit split_;
  int64_t work_items_;  // tiles of all sequences
  TileParams<T> params_;
  int64_t window_, workspace_, scratch_bytes_;
  T* output_;  // [work_items][blocks][window][lane]
  char* scratch_;
};

}  // namespace wmk::WMK_ISA
