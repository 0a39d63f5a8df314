// Place memory, backward, on the CPU.
//
// The state's gradient dh runs through the forward pass's steps in reverse: what spreads values there collects their
// gradients here, at the cost of the forward pass. States are needed only by the gradients of phases and keys. Then the
// states at the start of every chunk of kPlaceChunk steps are recomputed first, from the residuals, which need no
// reads, and those within a chunk before its reverse sweep. Gradients of keys and inverse are sums over lanes,
// sequences and groups: a vector per element, which is reduced once, and then partials in a fixed order.
#include "cpu/place_memory/place_memory.h"
#include "cpu/simd/shuffle.h"

namespace wmk::WMK_ISA {

namespace {

constexpr int64_t kPlaceChunk = 16;

bool has_phase_gradient(const wmk_place_memory& op) { return op.grad_phase.data || op.grad_initial_phase.data; }
bool has_key_gradient(const wmk_place_memory& op) { return op.grad_keys.data || op.grad_inverse.data; }
bool needs_states(const wmk_place_memory& op) { return has_phase_gradient(op) || has_key_gradient(op); }
int64_t key_gradients(const wmk_place_memory& op) { return op.places * (2 * op.frequencies + op.places); }

template <class T>
struct BackwardScratch : PlaceScratch<T> {
  T *states, *writes, *chunk_states;  // [kPlaceChunk], [kPlaceChunk], [chunks] states
  T *read, *cotangents, *inputs;      // a state, as read; [places][lanes]
  T* key_sums;                        // [places][2 frequencies][lanes], then [places][places][lanes]
  T* phase_gradient;                  // [2 frequencies]
  T* gate_products;                   // [places rounded up to lanes][lanes]

  BackwardScratch(const wmk_place_memory& op, Arena& arena) : PlaceScratch<T>(op, arena) {
    constexpr int lanes = kLanes<T>;
    int64_t numbers = needs_states(op) ? 2 * op.frequencies * lanes : 0;
    int64_t view = has_key_gradient(op) ? op.places * lanes : 0;
    read = arena.take<T>(numbers), cotangents = arena.take<T>(view), inputs = arena.take<T>(view);
    key_sums = arena.take<T>(has_key_gradient(op) ? key_gradients(op) * lanes : 0);
    states = arena.take<T>(kPlaceChunk * numbers), writes = arena.take<T>(kPlaceChunk * numbers);
    chunk_states = arena.take<T>(ceil_div(op.time, kPlaceChunk) * numbers);
    phase_gradient = arena.take<T>(2 * op.frequencies);
    gate_products = arena.take<T>(round_up(op.places, lanes) * lanes);
  }
};

template <class T, class S>
class Reverse {
 public:
  Reverse(const PlaceItem<T>& item, const BackwardScratch<T>& scratch)
      : item_(item), op_(item.op), tables_(item.tables), s_(scratch), vectors_(2 * op_.frequencies) {}

  void run() {
    bool states = needs_states(op_);
    int64_t begin = item_.begin, steps = item_.end - begin;
    if (states) recompute_chunk_states();
    item_.load_state(s_.state, op_.grad_last_state);  // dh
    item_.clear(s_.held, op_.places);                 // gradient of what the next step's delta write found
    clear_phase_gradient();
    for (int64_t chunk = ceil_div(steps, kPlaceChunk) - 1; chunk >= 0; --chunk) {
      int64_t first = begin + chunk * kPlaceChunk, last = min(item_.end, first + kPlaceChunk);
      if (states) recompute_states(chunk, first, last);
      for (int64_t t = last - 1; t >= first; --t) step(t, states ? t - first : -1);
    }
    // The first delta write reads the initial state.
    if (was_read(begin)) {
      item_.load_initial_phase(s_.read_phase);
      gather_rows([&](int64_t j) { return load(s_.held + j * lanes); });
      item_.spread(s_.rows, s_.turned);
      if (states) {
        item_.load_state(s_.states, op_.initial_state);
        add_read_gradient(s_.states);
        if (has_key_gradient(op_)) add_read_keys(s_.states, s_.held);
      }
      item_.add_and_look(s_.read_phase, s_.read_phase, s_.state, s_.turned);
    }
    if (states) store_phase_gradient(op_.grad_initial_phase, item_.sequence, 0);
    item_.store_state(s_.state, op_.grad_initial_state);
  }

 private:
  static constexpr int lanes = kLanes<T>;

  template <class Place>
  void gather_rows(const Place& place) {
    item_.clear(s_.rows, tables_.evens + tables_.odds);
    for (int64_t j = 0; j < op_.places; ++j) item_.add_place(s_.rows, j, place(j));
  }
  Vector<T> residual(int64_t t, int64_t j) const {
    return op_.inverse.data ? item_.template load_view<T>(op_.residual, t, j)
                            : item_.template load_view<S>(op_.values, t, j);
  }

  // Whether what the phase before step `now` read has a gradient. Without, that phase is in no product: it may be NaN.
  bool was_read(int64_t now) const {
    return (op_.grad_out.data && now > item_.begin) || (op_.inverse.data && now < item_.end && !item_.is_reset(now));
  }

  void step(int64_t t, int64_t in_chunk) {
    item_.load_write_phase(s_.write_phase, t);
    bool keys = has_key_gradient(op_);
    if (was_read(t + 1)) {
      item_.load_phase(s_.read_phase, op_.phase, item_.batch, t);
      gather_rows([&](int64_t j) {
        Vector<T> grad = load(s_.held + j * lanes);
        if (op_.grad_out.data) grad += item_.template load_view<S>(op_.grad_out, t, j);
        if (keys) store(s_.cotangents + j * lanes, grad);
        return grad;
      });
      item_.spread(s_.rows, s_.turned);
      if (in_chunk >= 0) {
        add_read_gradient(s_.states + in_chunk * vectors_ * lanes);
        if (keys) add_read_keys(s_.states + in_chunk * vectors_ * lanes, s_.cotangents);
      }
      item_.add_and_look(s_.read_phase, s_.write_phase, s_.state, s_.turned);
    } else {
      item_.look(s_.write_phase, s_.state, s_.turned);
    }
    if (in_chunk >= 0) store_phase_gradient(op_.grad_phase, item_.batch, t);
    bool reset = item_.is_reset(t);
    if (in_chunk >= 0) {
      clear_phase_gradient();
      if (!reset) add_write_gradient(s_.writes + in_chunk * vectors_ * lanes);
    }
    item_.collect(s_.turned, s_.rows);
    if (keys) add_write_keys(t);
    item_.view_gradients(s_.rows, s_.views);
    for (int64_t j = 0; j < op_.places; ++j) {
      Vector<T> grad = load(s_.views + j * lanes);
      if (op_.grad_gate.data) store(s_.gate_products + j * lanes, grad * residual(t, j));
      if (op_.gate.data) grad *= item_.gate(t, j);
      item_.template store_view<S>(op_.grad_values, t, j, grad);
      store(s_.held + j * lanes, op_.inverse.data && !reset ? -grad : Vector<T>{});
    }
    if (op_.grad_gate.data) store_gate_gradient(t);
    if (reset) item_.clear(s_.state, vectors_);
  }

  void store_gate_gradient(int64_t t) {
    const wmk_view& view = op_.grad_gate;
    T* to = (T*)view.data + item_.batch * view.stride[0] + t * view.stride[1] + item_.group * view.stride[3];
    for (int64_t j = 0; j < op_.places; j += lanes) {
      int count = int(min(lanes, op_.places - j));
      for (int i = count; i < lanes; ++i) store(s_.gate_products + (j + i) * lanes, Vector<T>{});
      Vector<T> sums = sum_lanes<T>([&](int i) { return load(s_.gate_products + (j + i) * lanes); });
      if (item_.tile) sums += gather<T>(to + j * view.stride[2], view.stride[2], count);
      scatter<T>(to + j * view.stride[2], view.stride[2], count, sums);
    }
  }

  void load_inputs(int64_t t, T* to) const {
    for (int64_t j = 0; j < op_.places; ++j) {
      Vector<T> e = residual(t, j);
      store(to + j * lanes, op_.gate.data ? item_.gate(t, j) * e : e);
    }
  }
  // Steps of the forward pass without reads: s.state to the state after step t.
  void recompute_step(int64_t t, T* write) {
    if (item_.is_reset(t)) item_.clear(s_.state, vectors_);
    item_.load_write_phase(s_.write_phase, t);
    load_inputs(t, s_.views);
    item_.write_rows(s_.views, s_.rows);
    item_.spread(s_.rows, write);
    item_.add_turned(s_.write_phase, write, s_.state);
  }
  void recompute_chunk_states() {
    item_.load_state(s_.state, op_.initial_state);
    for (int64_t t = item_.begin; t < item_.end; ++t) {
      int64_t chunk = (t - item_.begin) / kPlaceChunk;
      if ((t - item_.begin) % kPlaceChunk == 0) copy(s_.chunk_states + chunk * vectors_ * lanes, s_.state);
      recompute_step(t, s_.turned);
    }
  }
  // The state is dh meanwhile: it waits in the last chunk's saved state, which is needed no more.
  void recompute_states(int64_t chunk, int64_t first, int64_t last) {
    T* saved = s_.chunk_states + chunk * vectors_ * lanes;
    for (int64_t i = 0; i < vectors_; ++i) {
      Vector<T> dh = load(s_.state + i * lanes);
      store(s_.state + i * lanes, load(saved + i * lanes));
      store(saved + i * lanes, dh);
    }
    for (int64_t t = first; t < last; ++t) {
      recompute_step(t, s_.writes + (t - first) * vectors_ * lanes);
      copy(s_.states + (t - first) * vectors_ * lanes, s_.state);
    }
    copy(s_.state, saved);
  }
  void copy(T* to, const T* from) const {
    for (int64_t i = 0; i < vectors_; ++i) store(to + i * lanes, load(from + i * lanes));
  }

  void clear_phase_gradient() {
    for (int64_t i = 0; i < vectors_; ++i) s_.phase_gradient[i] = T(0);
  }
  // Of the phase at which `state` was read, with the gradient of what was read spread to s.turned.
  void add_read_gradient(const T* state) { add_phase_gradient(s_.turned, state); }
  // Of the phase at which `write` was added to a state of gradient s.state.
  void add_write_gradient(const T* write) { add_phase_gradient(write, s_.state); }

  // d cos: u x + v y, d sin: u y - v x, for rows (u, v) in the observer's frame and (x, y) in the world's.
  void add_phase_gradient(const T* turned, const T* world) {
    int64_t F = op_.frequencies;
    for (int64_t f = 0; f < F; f += lanes) {
      int64_t last = F - 1;
      auto row = [&](const T* from, int64_t i) { return load(from + i * lanes); };
      Vector<T> cos = sum_lanes<T>([&](int i) {
        int64_t k = min(f + i, last);
        return row(turned, k) * row(world, k) + row(turned, F + k) * row(world, F + k);
      });
      Vector<T> sin = sum_lanes<T>([&](int i) {
        int64_t k = min(f + i, last);
        return row(turned, k) * row(world, F + k) - row(turned, F + k) * row(world, k);
      });
      for (int i = 0; i < lanes && f + i < F; ++i) {
        s_.phase_gradient[f + i] += cos[i];
        s_.phase_gradient[F + f + i] += sin[i];
      }
    }
  }
  // sums[i][j] += a[i] b[j], a vector each.
  void add_outer(T* sums, const T* a, int64_t count, const T* b, int64_t other) const {
    for (int64_t i = 0; i < count; ++i) {
      Vector<T> a_i = load(a + i * lanes);
      T* row = sums + i * other * lanes;
      for (int64_t j = 0; j < other; ++j) store(row + j * lanes, load(row + j * lanes) + a_i * load(b + j * lanes));
    }
  }
  void add_read_keys(const T* state, const T* cotangents) {
    item_.look(s_.read_phase, state, s_.read);
    add_outer(s_.key_sums, cotangents, op_.places, s_.read, vectors_);
  }
  // s.turned holds dh at the write's phase, s.rows what the places read of it.
  void add_write_keys(int64_t t) {
    T* written = s_.cotangents;
    load_inputs(t, s_.inputs);
    for (int64_t j = 0; j < op_.places; ++j) store(s_.views + j * lanes, item_.place_of(s_.rows, j));
    if (op_.inverse.data) {
      add_outer(s_.key_sums + op_.places * vectors_ * lanes, s_.views, op_.places, s_.inputs, op_.places);
      product(tables_.inverse_by_column, op_.places, op_.places, s_.inputs, written);
    } else {
      written = s_.inputs;
    }
    add_outer(s_.key_sums, written, op_.places, s_.turned, vectors_);
  }
  void store_phase_gradient(const wmk_view& view, int64_t row, int64_t t) {
    if (!view.data) return;
    bool initial = &view == &op_.grad_initial_phase;
    T* to = (T*)view.data + row * view.stride[0];
    to += initial ? item_.group * view.stride[1] : t * view.stride[1] + item_.group * view.stride[2];
    for (int64_t i = 0; i < vectors_; ++i) to[i] = item_.tile ? to[i] + s_.phase_gradient[i] : s_.phase_gradient[i];
  }

  const PlaceItem<T>& item_;
  const wmk_place_memory& op_;
  const PlaceTables<T>& tables_;
  const BackwardScratch<T>& s_;
  int64_t vectors_;
};

}  // namespace

int64_t place_memory_backward_workspace(const wmk_place_memory& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto) {
    typedef decltype(arithmetic) T;
    int64_t partials = has_key_gradient(op) ? op.sequences * op.groups * key_gradients(op) : 0;
    return PlaceWorkspace<T, BackwardScratch>(op, nullptr).bytes(op.threads) + partials * int64_t(sizeof(T));
  });
}

int place_memory_backward(const wmk_place_memory& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    typedef decltype(arithmetic) T;
    PlaceWorkspace<T, BackwardScratch> workspace(op, op.workspace);
    workspace.tables.fill(op);
    int64_t items = op.sequences * op.groups, sums = has_key_gradient(op) ? key_gradients(op) : 0;
    T* partials = (T*)((char*)op.workspace + workspace.bytes(op.threads));  // [items][sums]
    // A group's vectors of channels add to the same gradients, one after another.
    parallel_for(items, op.threads, [&](int64_t i, int64_t thread) {
      constexpr int lanes = kLanes<T>;
      BackwardScratch<T> scratch = workspace.of(op, thread);
      for (int64_t k = 0; k < sums; ++k) store(scratch.key_sums + k * lanes, Vector<T>{});
      for (int64_t tile = 0, tiles = PlaceItem<T>::tiles(op); tile < tiles; ++tile) {
        PlaceItem<T> item(op, workspace.tables, i * tiles + tile);
        Reverse<T, decltype(storage)>(item, scratch).run();
      }
      for (int64_t k = 0; k < sums; ++k) {
        T sum = T(0);
        for (int lane = 0; lane < lanes; ++lane) sum += scratch.key_sums[k * lanes + lane];
        partials[i * sums + k] = sum;
      }
    });
    int64_t keys = op.places * 2 * op.frequencies;
    for (int64_t k = 0; k < sums; ++k) {
      T sum = T(0);
      for (int64_t i = 0; i < items; ++i) sum += partials[i * sums + k];
      const wmk_view& view = k < keys ? op.grad_keys : op.grad_inverse;
      if (view.data) ((T*)view.data)[k < keys ? k : k - keys] = sum;
    }
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
