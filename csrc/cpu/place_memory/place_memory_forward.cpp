// Place memory, forward, on the CPU.
//
// A lane holds a channel, whose state (2 frequencies numbers) stays in the cache for the whole sequence. A step is a
// pass over it: the view's rows are spread to the state's rows, which are turned back, added, turned to the new angle
// and collected to rows again. What is read is also what the next delta write finds, so the state is multiplied twice
// per step, not three times. Spreading and collecting are products with accumulators in registers and keys as broadcast
// operands; symmetric places share them (PlaceTables). 2 x frequencies x places multiply-adds per value, half of that
// in a symmetric view.
#include "cpu/place_memory/place_memory.h"

namespace wmk::WMK_ISA {

namespace {

template <class T, class S>
void run_item(const PlaceItem<T>& item, const PlaceScratch<T>& s) {
  constexpr int lanes = kLanes<T>;
  const wmk_place_memory& op = item.op;
  const PlaceTables<T>& tables = item.tables;
  int64_t rows = tables.evens + tables.odds;
  item.load_state(s.state, op.initial_state);
  item.load_initial_phase(s.read_phase);
  item.look(s.read_phase, s.state, s.turned);
  item.collect(s.turned, s.rows);
  for (int64_t j = 0; j < op.places; ++j) store(s.held + j * lanes, item.place_of(s.rows, j));

  T *write = s.write_phase, *read = s.read_phase;
  for (int64_t t = item.begin; t < item.end; ++t) {
    T* last = read;
    read = write, write = last;
    if (item.is_reset(t)) {
      item.clear(s.state, 2 * op.frequencies);
      item.clear(s.held, op.places);
      item.load_write_phase(write, t);
    }
    item.load_phase(read, op.phase, item.batch, t);
    for (int64_t j = 0; j < op.places; ++j) {
      Vector<T> value = item.template load_view<S>(op.values, t, j);
      if (op.inverse.data) value -= load(s.held + j * lanes);
      if (op.residual.data) item.template store_view<T>(op.residual, t, j, value);
      store(s.views + j * lanes, op.gate.data ? item.gate(t, j) * value : value);
    }
    item.write_rows(s.views, s.rows);
    // A shut gate leaves the state bit for bit, a zero's sign and subnormals included.
    if (item.any(s.rows, rows)) {
      item.spread(s.rows, s.turned);
      item.add_and_look(write, read, s.state, s.turned);
    } else {
      item.look(read, s.state, s.turned);
    }
    item.collect(s.turned, s.rows);
    for (int64_t j = 0; j < op.places; ++j) {
      Vector<T> held = item.place_of(s.rows, j);
      store(s.held + j * lanes, held);
      item.template store_view<S>(op.out, t, j, held);
    }
  }
  item.store_state(s.state, op.last_state);
}

}  // namespace

int64_t place_memory_forward_workspace(const wmk_place_memory& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto) {
    return PlaceWorkspace<decltype(arithmetic), PlaceScratch>(op, nullptr).bytes(op.threads);
  });
}

int place_memory_forward(const wmk_place_memory& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    typedef decltype(arithmetic) T;
    PlaceWorkspace<T, PlaceScratch> workspace(op, op.workspace);
    workspace.tables.fill(op);
    int64_t items = op.sequences * op.groups * PlaceItem<T>::tiles(op);
    parallel_for(items, op.threads, [&](int64_t i, int64_t thread) {
      PlaceItem<T> item(op, workspace.tables, i);
      run_item<T, decltype(storage)>(item, workspace.of(op, thread));
    });
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
