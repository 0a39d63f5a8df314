// SSD scan, forward, on the CPU.
//
// A step of the loop reads and writes the whole state for four operations on each of its numbers. Here, a chunk of
// Q = 64 steps reads and writes it once, in two products of matrices in registers; a third, of a triangular matrix,
// adds what the chunk's steps pass to each other. The scores C_i · B_j serve all heads of a work item. Per step and
// head that makes 2 n d + Q d / 2 multiply-adds, 18,400 for a state of 64 x 128, and one exponential: it is bound by
// arithmetic. Blocks of heads run in parallel, on states that stay in the second cache.
#include "cpu/ssd_scan/ssd_scan.h"

namespace wmk::WMK_ISA {

namespace {

constexpr int64_t kForwardHeads = 6;  // per work item

template <class T>
class Forward : SSD<T> {
 public:
  explicit Forward(const wmk_ssd_scan& op) : SSD<T>(op, kForwardHeads, true) {}

  int64_t workspace() const { return Buffers(*this, nullptr).bytes * this->team(); }

  void run() const {
    const int64_t bytes = Buffers(*this, nullptr).bytes;
    parallel_for(this->work_items(), op_.threads, [&](int64_t item, int64_t thread) {
      run_item(this->work_item(item), Buffers(*this, (char*)op_.workspace + thread * bytes));
    });
  }

 private:
  using Base = SSD<T>;
  using Base::d_pitch_, Base::d_width_, Base::n_pitch_, Base::n_width_, Base::op_, Base::pitch_;
  typedef typename Base::WorkItem WorkItem;

  struct Buffers {
    Buffers(const Forward& f, void* memory) {
      Arena arena(memory);
      const int64_t chunk = f.op_.chunk;
      states = f.take_state(arena, f.block_heads_);
      for (T** rows : {&B, &C}) *rows = f.take_matrix(arena, chunk, f.n_pitch_);
      B_by_step = f.take_matrix(arena, f.op_.n, f.pitch_);
      for (T** square : {&scores, &lower}) *square = f.take_matrix(arena, chunk, f.pitch_);
      for (T** rows : {&x, &y, &entering, &z}) *rows = f.take_matrix(arena, chunk, f.d_pitch_);
      D = arena.take<T>(f.d_pitch_);
      decays = f.take_decays(arena);
      bytes = round_up(arena.used(), 64);
    }
    T* states;                // [head][n][d]
    T *B, *C, *B_by_step;     // [step][n]; [n][step]
    T *scores, *lower;        // [step][step]
    T *x, *y, *entering, *z;  // [step][d]
    T* D;
    typename Base::Decays decays;
    int64_t bytes;
  };

  // One step reads and writes the state where it is, a row per channel: a chunk would transpose it twice.
  void run_step(const WorkItem& w, const Buffers& b) const {
    const SSDChunk c = this->chunk_from(w, w.begin);
    this->load_rows(b.B, n_pitch_, op_.B, c, w.group, op_.n);
    this->load_rows(b.C, n_pitch_, op_.C, c, w.group, op_.n);
    Vector<T> products = {};
    for (int64_t k = 0; k < n_width_; k += kLanes<T>) products += load(b.B + k) * load(b.C + k);
    T score = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) score += products[lane];
    for (int64_t head = w.first_head; head < w.first_head + w.heads; ++head) {
      this->load_rows(b.x, d_pitch_, op_.x, c, head, op_.d);
      const T decay = exp(this->per_head(op_.gate, c, 0, head)), weight = this->per_head(op_.weight, c, 0, head);
      const T own = score * (op_.own_weight.data ? this->per_head(op_.own_weight, c, 0, head) : weight);
      const wmk_view& initial = op_.initial_state;
      const T* from = (const T*)initial.data + w.sequence * initial.stride[0] + head * initial.stride[1];
      T* to = (T*)op_.last_state.data + (w.sequence * op_.heads + head) * op_.d * op_.n;
      for (int64_t i = 0; i < d_width_; i += kLanes<T>) {
        Vector<T> sums[kLanes<T>] = {};
        const int rows = int(min(kLanes<T>, op_.d - i));
        for (int row = 0; row < rows; ++row) {
          const T input = weight * b.x[i + row];
          const T* old_row = from + (i + row) * initial.stride[2];
          T* new_row = to + (i + row) * op_.n;
          for (int64_t k = 0; k < op_.n; k += kLanes<T>) {
            const int count = int(min(kLanes<T>, op_.n - k));
            const Vector<T> old = c.has_state ? decay * gather<T>(old_row + k, 1, count) : Vector<T>{};
            sums[row] += old * load(b.C + k);
            scatter<T>(new_row + k, 1, count, old + input * load(b.B + k));
          }
        }
        store(b.y + i, sum_lanes<T>([&](int row) { return sums[row]; }) + own * load(b.x + i));
      }
      if (op_.D.data || op_.z.data) skip_and_gate(c, b, head);
      this->store_rows(b.y, d_pitch_, op_.out, c, head, op_.d);
    }
  }

  void run_item(const WorkItem& w, const Buffers& b) const {
    const bool in_place = !op_.initial_state.data || op_.initial_state.stride[3] == 1;
    if (w.end - w.begin == 1 && !op_.chunk_states.data && in_place) return run_step(w, b);
    for (int64_t head = 0; head < w.heads; ++head) {
      T* state = b.states + head * this->state_size();
      if (op_.initial_state.data) {
        this->load_state(state, op_.initial_state, w.sequence, w.first_head + head);
      } else {
        memset(state, 0, this->state_size() * sizeof(T));
      }
    }
    for (int64_t t = w.begin; t < w.end;) {
      const SSDChunk c = this->chunk_from(w, t);
      this->load_rows(b.B, n_pitch_, op_.B, c, w.group, op_.n);
      this->load_rows(b.C, n_pitch_, op_.C, c, w.group, op_.n);
      Base::transpose_matrix(b.B_by_step, pitch_, b.B, n_pitch_, c.steps, op_.n);
      this->compute_scores(b.scores, b.C, b.B_by_step, c.steps);
      t += c.steps;
      const int64_t next_steps = min(op_.chunk, w.end - t), calls = this->tiles_of(op_.n);
      RowsAhead B = this->rows_ahead(op_.B, c.batch, t, next_steps, w.group, op_.n, calls * w.heads);
      RowsAhead C = this->rows_ahead(op_.C, c.batch, t, next_steps, w.group, op_.n, calls * w.heads);
      for (int64_t head = w.first_head, end = head + w.heads; head < end; ++head) {
        const bool last = head == end - 1;
        const int64_t next = last ? w.first_head : head + 1, begin = last ? t : c.begin,
                      steps = last ? next_steps : c.steps;
        RowsAhead x = this->rows_ahead(op_.x, c.batch, begin, steps, next, op_.d, calls);
        RowsAhead z = this->rows_ahead(op_.z, c.batch, begin, steps, next, op_.d, calls);
        run_chunk(c, b, head, b.states + (head - w.first_head) * this->state_size(), [&] {
          for (RowsAhead* rows : {&x, &z, &B, &C}) rows->fetch();
        });
      }
    }
    for (int64_t head = 0; head < w.heads; ++head)
      this->store_state(b.states + head * this->state_size(), op_.last_state, w.sequence, w.first_head + head);
  }

  // `fetch_next` is called often, while the state is passed on.
  template <class FetchNext>
  void run_chunk(const SSDChunk& c, const Buffers& b, int64_t head, T* state, const FetchNext& fetch_next) const {
    if (op_.chunk_states.data && c.state_row >= 0) {
      T* to = this->kept_state(c.state_row, head);
      for (int64_t i = 0; i < op_.n; ++i) memcpy(to + i * op_.d, state + i * d_pitch_, op_.d * sizeof(T));
    }
    this->load_rows(b.x, d_pitch_, op_.x, c, head, op_.d);
    this->compute_decays(b.decays, c, head);
    this->compute_lower(b.lower, b.scores, b.decays, c.steps);
    RowsAhead out = this->rows_ahead(op_.out, c.batch, c.begin, c.steps, head, op_.d, this->tiles_of(c.steps));
    this->compute_outputs(b.y, c, b.C, state, b.lower, b.decays, b.x, [&] { out.fetch(); });
    if (op_.D.data || op_.z.data) skip_and_gate(c, b, head);
    this->store_rows(b.y, d_pitch_, op_.out, c, head, op_.d);
    this->compute_entering(b.entering, b.x, b.decays, c.steps);
    this->pass_state(state, c.has_state ? state : nullptr, b.decays.since_start[c.steps - 1], b.B, b.entering, c.steps,
                     fetch_next);
  }

  void skip_and_gate(const SSDChunk& c, const Buffers& b, int64_t head) const {
    if (op_.z.data) this->load_rows(b.z, d_pitch_, op_.z, c, head, op_.d);
    const T* D = (const T*)op_.D.data + head * op_.D.stride[0];
    for (int64_t i = 0; op_.D.data && i < d_width_; i += kLanes<T>)
      store(b.D + i, gather<T>(D + i * op_.D.stride[1], op_.D.stride[1], int(min(kLanes<T>, op_.d - i))));
    for (int64_t t = 0; t < c.steps; ++t)
      for (int64_t i = 0; i < d_width_; i += kLanes<T>) {
        const int64_t at = t * d_pitch_ + i;
        Vector<T> y = load(b.y + at);
        if (op_.D.data) y += load(b.D + i) * load(b.x + at);
        if (op_.z.data) {
          const Vector<T> z = load(b.z + at);
          y *= silu(z);
        }
        store(b.y + at, y);
      }
  }
};

}  // namespace

int64_t ssd_scan_forward_workspace(const wmk_ssd_scan& op) {
  return with_arithmetic(op.dtype, [&](auto type) { return Forward<decltype(type)>(op).workspace(); });
}

int ssd_scan_forward(const wmk_ssd_scan& op) {
  return with_arithmetic(op.dtype, [&](auto type) {
    Forward<decltype(type)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
