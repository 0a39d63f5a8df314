// Gated delta rule, forward, on the CPU.
//
// A step of the loop reads and writes the whole state for four operations on each of its numbers. Here, a chunk of
// C = 32 steps reads and writes it once. What keys and queries recall of it are matrix products in registers; the
// corrections of the chunk's steps form a triangular system, solved row by row for a panel of values at a time. Per
// step and head that makes 3 d_k d_v + C (d_k + d_v) multiply-adds, 16,400 for a state of 64 x 64, and one exponential:
// it is bound by arithmetic. Heads run in parallel. The backward pass is given the states at chunks' starts and the
// residuals.
#include "cpu/gated_delta_rule/gated_delta_rule.h"

namespace wmk::WMK_ISA {

namespace {

template <class T>
class Forward : DeltaRule<T> {
 public:
  explicit Forward(const wmk_gated_delta_rule& op) : DeltaRule<T>(op) {}

  int64_t workspace() const { return Buffers(*this, nullptr).bytes * this->team(); }

  void run() const {
    const int64_t bytes = Buffers(*this, nullptr).bytes;
    parallel_for(op_.sequences * op_.heads, op_.threads, [&](int64_t item, int64_t thread) {
      run_sequence(this->sequence(item), Buffers(*this, (char*)op_.workspace + thread * bytes));
    });
  }

 private:
  using Base = DeltaRule<T>;
  using Base::k_pitch_, Base::op_, Base::pitch_, Base::scale_, Base::v_pitch_;
  typedef typename Base::Sequence Sequence;

  struct Buffers {
    Buffers(const Forward& f, void* memory) {
      Arena arena(memory);
      const wmk_gated_delta_rule& op = f.op_;
      state = f.take_matrix(arena, op.d_k, f.v_pitch_);
      keys = f.take_matrix(arena, op.d_k, f.pitch_);
      queries = f.take_matrix(arena, op.d_k, f.pitch_);
      recall = f.take_matrix(arena, op.chunk, f.pitch_);
      attention = f.take_matrix(arena, op.chunk, f.pitch_);
      values = f.take_matrix(arena, op.chunk, f.v_pitch_);
      residuals = f.take_matrix(arena, op.chunk, f.v_pitch_);
      corrections = f.take_matrix(arena, op.chunk, f.v_pitch_);
      remaining = f.take_matrix(arena, op.chunk, f.v_pitch_);
      decays = f.take_decays(arena);
      bytes = round_up(arena.used(), 64);
    }
    T* state;                    // [d_k][d_v]
    T *keys, *queries;           // [d_k][step]
    T *recall, *attention;       // [step][step]
    T* values;                   // [step][d_v]; the outputs overwrite it
    T *residuals, *corrections;  // [step][d_v]: e, u = beta e
    T* remaining;                // [step][d_v]: of u at the chunk's end
    typename Base::Decays decays;
    int64_t bytes;
  };

  void run_sequence(const Sequence& s, const Buffers& b) const {
    if (op_.initial_state.data) {
      this->load_state(b.state, op_.initial_state, s.index, s.head);
    } else if (s.begin == s.end) {
      memset(b.state, 0, op_.d_k * v_pitch_ * sizeof(T));
    }
    for (int64_t t = s.begin; t < s.end;) {
      const DeltaRuleChunk c = this->chunk_from(s, t);
      run_chunk(c, b);
      t += c.steps;
    }
    this->store_state(b.state, op_.last_state, s.index, s.head);
  }

  void run_chunk(const DeltaRuleChunk& c, const Buffers& b) const {
    if (!c.has_state) memset(b.state, 0, op_.d_k * v_pitch_ * sizeof(T));
    if (op_.chunk_states.data && c.state_row >= 0) this->store_state(b.state, op_.chunk_states, c.state_row, c.head);
    this->load_by_step(b.keys, op_.k, c, op_.d_k);
    this->load_by_step(b.queries, op_.q, c, op_.d_k);
    this->load_rows(b.values, v_pitch_, op_.v, c, op_.d_v);
    this->compute_decays(b.decays, c);
    this->compute_scores(b.recall, b.attention, b.keys, b.queries, b.decays, c.steps);
    for_tiles<T>(c.steps, v_pitch_, [&](auto M, auto N, int64_t row, int64_t column) {
      correct<decltype(M)::value, decltype(N)::value>(c, b, row, column);
      attend<decltype(M)::value, decltype(N)::value>(c, b, row, column);
    });
    this->store_rows(b.values, v_pitch_, op_.out, c, op_.d_v);
    if (op_.residuals.data) {
      T* to = this->residuals(c);
      for (int64_t i = 0; i < c.steps; ++i) memcpy(to + i * op_.d_v, b.residuals + i * v_pitch_, op_.d_v * sizeof(T));
    }
    update_state(c, b);
  }

  // e = v - d S^T k - sum of D k_i.k_j u_j
  template <int M, int N>
  void correct(const DeltaRuleChunk& c, const Buffers& b, int64_t row, int64_t column) const {
    const int64_t start = row * v_pitch_ + column;
    Vector<T> e[M][N] = {};
    if (c.has_state) {
      multiply_accumulate<T, M, N>(e, b.keys + row, 1, pitch_, b.state + column, v_pitch_, op_.d_k);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vector<T> v = load(b.values + start + m * v_pitch_ + n * kLanes<T>);
        e[m][n] = c.has_state ? v - b.decays.since_start[row + m] * e[m][n] : v;
      }
    multiply_accumulate<T, M, N>(e, b.recall + row * pitch_, pitch_, 1, b.corrections + column, v_pitch_, row);
    const T* to_end = b.decays.to_end(c.steps, pitch_);
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const int64_t at = start + j * v_pitch_ + n * kLanes<T>;
        const Vector<T> u = b.decays.beta[row + j] * e[j][n];
        store(b.residuals + at, e[j][n]);
        store(b.corrections + at, u);
        store(b.remaining + at, to_end[row + j] * u);
#pragma GCC unroll 16
        for (int m = j + 1; m < M; ++m) e[m][n] += b.recall[(row + m) * pitch_ + row + j] * u;
      }
    }
  }

  // y = scale d S^T q + sum of scale D q_i.k_j u_j
  template <int M, int N>
  void attend(const DeltaRuleChunk& c, const Buffers& b, int64_t row, int64_t column) const {
    Vector<T> y[M][N] = {};
    if (c.has_state) {
      multiply_accumulate<T, M, N>(y, b.queries + row, 1, pitch_, b.state + column, v_pitch_, op_.d_k);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) y[m][n] *= T(scale_) * b.decays.since_start[row + m];
    }
    const T* left = b.attention + row * pitch_;
    multiply_accumulate<T, M, N>(y, left, pitch_, 1, b.corrections + column, v_pitch_, row);
    accumulate_triangle<T, true, true, M, N>(y, left + row, pitch_, 1, b.corrections + row * v_pitch_ + column,
                                             v_pitch_);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(b.values + (row + m) * v_pitch_ + column + n * kLanes<T>, y[m][n]);
  }

  // S = d S + K^T (D u)
  void update_state(const DeltaRuleChunk& c, const Buffers& b) const {
    const T kept = b.decays.whole(c.steps);
    for_tiles<T>(op_.d_k, v_pitch_, [&](auto M, auto N, int64_t row, int64_t column) {
      constexpr int rows = decltype(M)::value, vectors = decltype(N)::value;
      Vector<T> sums[rows][vectors] = {};
      multiply_accumulate<T, rows, vectors>(sums, b.keys + row * pitch_, pitch_, 1, b.remaining + column, v_pitch_,
                                            c.steps);
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) {
          T* to = b.state + (row + m) * v_pitch_ + column + n * kLanes<T>;
          store(to, c.has_state ? kept * load(to) + sums[m][n] : sums[m][n]);
        }
    });
  }
};

}  // namespace

int64_t gated_delta_rule_forward_workspace(const wmk_gated_delta_rule& op) {
  return with_arithmetic(op.dtype, [&](auto type) { return Forward<decltype(type)>(op).workspace(); });
}

int gated_delta_rule_forward(const wmk_gated_delta_rule& op) {
  return with_arithmetic(op.dtype, [&](auto type) {
    Forward<decltype(type)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
