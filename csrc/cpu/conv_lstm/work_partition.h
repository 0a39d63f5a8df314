#pragma once

#include "cpu/common/parallel.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

constexpr int kGates = 4;
constexpr int64_t kMinWorkPerThread = int64_t(2) << 20;  // multiply-adds that are worth waking a thread

// If batch elements keep the threads busy, workers run whole elements through time without waiting. Otherwise, maps are
// cut into bands of rows, with a barrier per stage of a step.
struct WorkPartition {
  bool by_element;
  int64_t rows;   // bands are multiples of this
  int64_t bands;  // per map
  int64_t workers;
  int64_t buffers;  // sets of padded maps

  WorkPartition(const wmk_conv_lstm& op, bool tiled, int64_t max_workers) : rows(tiled ? 2 : 1) {
    const int64_t taps = op.input * op.ih_height * op.ih_width + op.hidden * op.hh_height * op.hh_width;
    const int64_t work = op.time * op.batch * op.height * op.width * kGates * op.hidden * taps;
    const int64_t threads = max(1, min(min(op.threads, max_workers), work / kMinWorkPerThread));
    by_element = threads == 1 || op.batch % threads == 0 || op.batch >= 4 * threads;
    bands = by_element ? 1 : min(op.height / rows, threads);
    workers = min(threads, op.batch * bands);
    buffers = by_element ? workers : op.batch;
  }
};

// Calls work(worker, batch element, first row, end row) per band, in order per worker.
template <class Work>
static void for_each_band(const wmk_conv_lstm& op, const WorkPartition& partition, const Work& work) {
  const int64_t items = op.batch * partition.bands;
  parallel_for(partition.workers, op.threads, [&](int64_t worker, int64_t) {
    for (int64_t item = items * worker / partition.workers; item < items * (worker + 1) / partition.workers; ++item) {
      const int64_t band = item % partition.bands, rows = op.height / partition.rows;
      work(worker, item / partition.bands, rows * band / partition.bands * partition.rows,
           rows * (band + 1) / partition.bands * partition.rows);
    }
  });
}

}  // namespace wmk::WMK_ISA
