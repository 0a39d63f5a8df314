#pragma once

#include "cpu/common/load_store.h"
#include "cpu/common/parallel.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

constexpr int kProductRows = kVectorBytes == 64 ? 16 : 12;  // accumulators of a product, in registers

// out[r] = sum over k of A[k, r] x[k] for `Rows` rows; x and out hold a vector per row.
template <class T, int Rows>
static void product_rows(const T* A, int64_t pitch, int64_t depth, const T* x, T* out) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sums[Rows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> x_k = load(x + k * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sums[r] += broadcast(A[k * pitch + r]) * x_k;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) store(out + r * lanes, sums[r]);
}
template <class T, int Rows>
static void product_rows(int64_t rows, const T* A, int64_t pitch, int64_t depth, const T* x, T* out) {
  if (rows == Rows) return product_rows<T, Rows>(A, pitch, depth, x, out);
  if constexpr (Rows > 1) product_rows<T, Rows - 1>(rows, A, pitch, depth, x, out);
}
// A is [depth][rows], x [depth][lanes], out [rows][lanes]. Blocks of rows are of even size.
template <class T>
static void product(const T* A, int64_t rows, int64_t depth, const T* x, T* out) {
  int64_t blocks = ceil_div(rows, kProductRows);
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t begin = rows * i / blocks, end = rows * (i + 1) / blocks;
    product_rows<T, kProductRows>(end - begin, A + begin, rows, depth, x, out + begin * kLanes<T>);
  }
}

// What all work items share.
//
// A view is mostly symmetric: places at o and -o have equal cosines and opposite sines. So cosine rows and sine rows
// are each stored once: `even` and `odd` rows, to which `even_of`, `odd_of` and `sign` map places. That halves the
// work.
template <class T>
struct PlaceTables {
  int64_t frequencies, places, evens = 0, odds = 0;
  T *even, *odd;                // [frequencies][evens], [frequencies][odds]
  T *even_by_row, *odd_by_row;  // [evens][frequencies], [odds][frequencies]
  T *mix, *mix_by_row;        // [places][evens + odds], the inverse, its rows added up as places share them; transposed
  T* inverse_by_column;       // [places][places]
  int64_t *even_of, *odd_of;  // [places]
  T* sign;                    // [places]

  PlaceTables(const wmk_place_memory& op, Arena& arena) : frequencies(op.frequencies), places(op.places) {
    int64_t entries = frequencies * places;
    even = arena.take<T>(entries), odd = arena.take<T>(entries);
    even_by_row = arena.take<T>(entries), odd_by_row = arena.take<T>(entries);
    mix = arena.take<T>(2 * places * places), mix_by_row = arena.take<T>(2 * places * places);
    inverse_by_column = arena.take<T>(places * places);
    even_of = arena.take<int64_t>(places), odd_of = arena.take<int64_t>(places);
    sign = arena.take<T>(places);
  }

  void fill(const wmk_place_memory& op) {
    for (int64_t j = 0; j < places; ++j) {
      T* row = even_by_row + evens * frequencies;
      for (int64_t f = 0; f < frequencies; ++f) row[f] = key(op, j, f);
      even_of[j] = find(even_by_row, evens, T(1));
      if (even_of[j] == evens) ++evens;
      row = odd_by_row + odds * frequencies;
      for (int64_t f = 0; f < frequencies; ++f) row[f] = key(op, j, frequencies + f);
      sign[j] = T(1);
      odd_of[j] = find(odd_by_row, odds, T(1));
      if (odd_of[j] == odds) {
        odd_of[j] = find(odd_by_row, odds, T(-1));
        if (odd_of[j] == odds) {
          ++odds;
        } else {
          sign[j] = T(-1);
        }
      }
    }
    transpose_rows(even_by_row, even, evens);
    transpose_rows(odd_by_row, odd, odds);
    if (!op.inverse.data) return;
    int64_t rows = evens + odds;
    for (int64_t i = 0; i < 2 * places * places; ++i) mix_by_row[i] = T(0);
    for (int64_t j = 0; j < places; ++j)
      for (int64_t k = 0; k < places; ++k) {
        T value = at(op.inverse, j, k);
        inverse_by_column[k * places + j] = value;
        mix_by_row[even_of[j] * places + k] += value;
        mix_by_row[(evens + odd_of[j]) * places + k] += sign[j] * value;
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < places; ++k) mix[k * rows + r] = mix_by_row[r * places + k];
  }

 private:
  static T at(const wmk_view& view, int64_t i, int64_t j) {
    return ((const T*)view.data)[i * view.stride[0] + j * view.stride[1]];
  }
  static T key(const wmk_place_memory& op, int64_t place, int64_t row) { return at(op.keys, place, row); }

  // The row equal to `factor` times row `count`, or `count`.
  int64_t find(const T* rows, int64_t count, T factor) const {
    const T* wanted = rows + count * frequencies;
    for (int64_t i = 0; i < count; ++i) {
      int64_t f = 0;
      while (f < frequencies && rows[i * frequencies + f] == factor * wanted[f]) ++f;
      if (f == frequencies) return i;
    }
    return count;
  }
  void transpose_rows(const T* from, T* to, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < frequencies; ++f) to[f * rows + r] = from[r * frequencies + f];
  }
};

// A thread's memory: states and turned rows are [2 frequencies][lanes], views [places][lanes].
template <class T>
struct PlaceScratch {
  T *state, *turned, *views, *rows, *held;
  T *write_phase, *read_phase;  // [2 frequencies]

  PlaceScratch(const wmk_place_memory& op, Arena& arena) {
    constexpr int lanes = kLanes<T>;
    state = arena.take<T>(2 * op.frequencies * lanes), turned = arena.take<T>(2 * op.frequencies * lanes);
    views = arena.take<T>(op.places * lanes), rows = arena.take<T>(2 * op.places * lanes);
    held = arena.take<T>(op.places * lanes);
    write_phase = arena.take<T>(2 * op.frequencies), read_phase = arena.take<T>(2 * op.frequencies);
  }
};

// One vector of channels of one group of one sequence.
template <class T>
class PlaceItem {
 public:
  static constexpr int lanes = kLanes<T>;
  const wmk_place_memory& op;
  const PlaceTables<T>& tables;
  int64_t sequence, group, tile, batch, begin, end;  // the sequence's steps
  int64_t channel;                                   // in the group
  int count;                                         // of channels

  PlaceItem(const wmk_place_memory& arguments, const PlaceTables<T>& shared, int64_t index)
      : op(arguments), tables(shared), begin(0), end(op.time) {
    int64_t per_group = op.channels / op.groups;
    tile = index % tiles(op), group = index / tiles(op) % op.groups, sequence = index / tiles(op) / op.groups;
    batch = sequence;
    channel = tile * lanes;
    count = int(min(lanes, per_group - channel));
    if (op.cu_seqlens.data) {
      const int64_t* bounds = (const int64_t*)op.cu_seqlens.data;
      batch = 0, begin = bounds[sequence], end = bounds[sequence + 1];
    }
  }
  static int64_t tiles(const wmk_place_memory& arguments) {
    return ceil_div(arguments.channels / arguments.groups, lanes);
  }

  bool is_reset(int64_t t) const {
    return op.reset.data && ((const char*)op.reset.data)[batch * op.reset.stride[0] + t * op.reset.stride[1]];
  }
  T gate(int64_t t, int64_t place) const {
    const wmk_view& view = op.gate;
    if (!view.data) return T(1);
    return ((const T*)view
                .data)[batch * view.stride[0] + t * view.stride[1] + place * view.stride[2] + group * view.stride[3]];
  }
  // The element of the first channel at a step, as `values`.
  int64_t offset(const wmk_view& view, int64_t t, int64_t place) const {
    return batch * view.stride[0] + t * view.stride[1] + place * view.stride[2] +
           (group * (op.channels / op.groups) + channel) * view.stride[3];
  }
  template <class S>
  Vector<T> load_view(const wmk_view& view, int64_t t, int64_t place) const {
    return gather<T>((const S*)view.data + offset(view, t, place), view.stride[3], count);
  }
  template <class S>
  void store_view(const wmk_view& view, int64_t t, int64_t place, Vector<T> value) const {
    scatter<T>((S*)view.data + offset(view, t, place), view.stride[3], count, value);
  }

  void load_phase(T* to, const wmk_view& view, int64_t row, int64_t t) const {
    const T* from = (const T*)view.data + row * view.stride[0];
    from += &view == &op.initial_phase ? group * view.stride[1] : t * view.stride[1] + group * view.stride[2];
    int64_t stride = &view == &op.initial_phase ? view.stride[2] : view.stride[3];
    if (stride == 1) {
      memcpy(to, from, size_t(2 * op.frequencies) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < 2 * op.frequencies; ++i) to[i] = from[i * stride];
  }
  void load_initial_phase(T* to) const {
    if (op.initial_phase.data) return load_phase(to, op.initial_phase, sequence, 0);
    for (int64_t f = 0; f < op.frequencies; ++f) to[f] = T(1), to[op.frequencies + f] = T(0);
  }
  // Of the write of step t.
  void load_write_phase(T* to, int64_t t) const {
    if (is_reset(t)) {
      for (int64_t f = 0; f < op.frequencies; ++f) to[f] = T(1), to[op.frequencies + f] = T(0);
    } else if (t == begin) {
      load_initial_phase(to);
    } else {
      load_phase(to, op.phase, batch, t - 1);
    }
  }

  void load_state(T* to, const wmk_view& view) const {
    for (int64_t i = 0; i < 2 * op.frequencies; ++i)
      store(to + i * lanes,
            view.data ? gather<T>((const T*)view.data + at(view, i), view.stride[3], count) : Vector<T>{});
  }
  void store_state(const T* from, const wmk_view& view) const {
    if (!view.data) return;
    for (int64_t i = 0; i < 2 * op.frequencies; ++i)
      scatter<T>((T*)view.data + at(view, i), view.stride[3], count, load(from + i * lanes));
  }
  void clear(T* to, int64_t vectors) const {
    for (int64_t i = 0; i < vectors; ++i) store(to + i * lanes, Vector<T>{});
  }

  bool any(const T* from, int64_t vectors) const {
    typename VectorOf<T>::integers found{};
    for (int64_t i = 0; i < vectors; ++i) found |= load(from + i * lanes) != Vector<T>{};
    int64_t lanes_found = 0;
    for (int lane = 0; lane < lanes; ++lane) lanes_found |= found[lane];
    return lanes_found != 0;
  }

  // turned: what rows write, in the frame of the write.
  void spread(const T* rows, T* turned) const {
    int64_t F = op.frequencies;
    product(tables.even_by_row, F, tables.evens, rows, turned);
    product(tables.odd_by_row, F, tables.odds, rows + tables.evens * lanes, turned + F * lanes);
  }
  // The reverse: what rows read.
  void collect(const T* turned, T* rows) const {
    int64_t F = op.frequencies;
    product(tables.even, tables.evens, F, turned, rows);
    product(tables.odd, tables.odds, F, turned + F * lanes, rows + tables.evens * lanes);
  }
  Vector<T> place_of(const T* rows, int64_t place) const {
    return load(rows + tables.even_of[place] * lanes) +
           tables.sign[place] * load(rows + (tables.evens + tables.odd_of[place]) * lanes);
  }
  void add_place(T* rows, int64_t place, Vector<T> value) const {
    T *even = rows + tables.even_of[place] * lanes, *odd = rows + (tables.evens + tables.odd_of[place]) * lanes;
    store(even, load(even) + value);
    store(odd, load(odd) + tables.sign[place] * value);
  }

  // rows: what views write. Without an inverse no product: a zero times another place's infinity would be NaN.
  void write_rows(const T* views, T* rows) const {
    if (op.inverse.data) return product(tables.mix, tables.evens + tables.odds, op.places, views, rows);
    clear(rows, tables.evens + tables.odds);
    for (int64_t j = 0; j < op.places; ++j) add_place(rows, j, load(views + j * lanes));
  }
  // The reverse: gradients of views, of those of rows.
  void view_gradients(const T* rows, T* views) const {
    if (op.inverse.data) return product(tables.mix_by_row, op.places, tables.evens + tables.odds, rows, views);
    for (int64_t j = 0; j < op.places; ++j) store(views + j * lanes, place_of(rows, j));
  }

  void add_turned(const T* phase, const T* turned, T* state) const {
    int64_t F = op.frequencies;
    for (int64_t f = 0; f < F; ++f) {
      Vector<T> u = load(turned + f * lanes), v = load(turned + (F + f) * lanes);
      store(state + f * lanes, load(state + f * lanes) + (phase[f] * u - phase[F + f] * v));
      store(state + (F + f) * lanes, load(state + (F + f) * lanes) + (phase[F + f] * u + phase[f] * v));
    }
  }
  // turned: the state at `phase`.
  void look(const T* phase, const T* state, T* turned) const {
    int64_t F = op.frequencies;
    for (int64_t f = 0; f < F; ++f) {
      Vector<T> x = load(state + f * lanes), y = load(state + (F + f) * lanes);
      store(turned + f * lanes, phase[f] * x + phase[F + f] * y);
      store(turned + (F + f) * lanes, phase[f] * y - phase[F + f] * x);
    }
  }
  // Adds `turned` to the state at `write`, and looks at `read`, in one pass.
  void add_and_look(const T* write, const T* read, T* state, T* turned) const {
    int64_t F = op.frequencies;
    for (int64_t f = 0; f < F; ++f) {
      Vector<T> x = load(state + f * lanes), y = load(state + (F + f) * lanes);
      Vector<T> u = load(turned + f * lanes), v = load(turned + (F + f) * lanes);
      x += write[f] * u - write[F + f] * v;
      y += write[F + f] * u + write[f] * v;
      store(state + f * lanes, x);
      store(state + (F + f) * lanes, y);
      store(turned + f * lanes, read[f] * x + read[F + f] * y);
      store(turned + (F + f) * lanes, read[f] * y - read[F + f] * x);
    }
  }

 private:
  int64_t at(const wmk_view& view, int64_t row) const {
    return sequence * view.stride[0] + group * view.stride[1] + row * view.stride[2] + channel * view.stride[3];
  }
};

// Tables, then a `Scratch` per thread.
template <class T, template <class> class Scratch>
struct PlaceWorkspace {
  Arena arena;
  PlaceTables<T> tables;
  int64_t shared, each;

  PlaceWorkspace(const wmk_place_memory& op, void* memory) : arena(memory), tables(op, arena), shared(arena.used()) {
    Arena thread(nullptr);
    Scratch<T> measured(op, thread);
    each = thread.used();
  }
  int64_t bytes(int64_t threads) const { return shared + threads * each; }
  Scratch<T> of(const wmk_place_memory& op, int64_t thread) const {
    Arena own((char*)op.workspace + bytes(thread));
    return Scratch<T>(op, own);
  }
};

}  // namespace wmk::WMK_ISA
