// Gated delta rule, backward, on the CPU.
//
// Chunks run in reverse; each starts from its saved state and residuals, so that no state is computed again. The
// gradients w of the residuals solve the transposed triangular system, from the last row up. With dS of the state at
// the chunk's end, d the decays since its start and D those between steps:
//
//   du = A^T dy + D K dS        w = beta (du - recalled^T w)      dv = w       dbeta = du . e
//   dA = dy u^T                 dL = -w u^T                       both times D
//   dq = scale d S dy + dA k    dk = -d S w + D dS u + (dL + dL^T) k + dA^T q
//   dS = d dS + Q^T (scale d dy) - K^T (d w)
//
// The gradient of a gate sums what every decay over it passes on. The sums run from the last step to the first and only
// add: taking differences of sums over the chunk would lose small gradients.
//
// Per step and head 6 d_k d_v + C (2 d_k + 3 d_v) multiply-adds, all in registers: bound by arithmetic.
#include "cpu/gated_delta_rule/gated_delta_rule.h"

namespace wmk::WMK_ISA {

namespace {

template <class T>
class Backward : DeltaRule<T> {
 public:
  explicit Backward(const wmk_gated_delta_rule& op) : DeltaRule<T>(op) {}

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
    Buffers(const Backward& f, void* memory) {
      Arena arena(memory);
      const wmk_gated_delta_rule& op = f.op_;
      auto states = [&](T*& plain, T*& transposed) {
        plain = f.take_matrix(arena, op.d_k, f.v_pitch_);
        transposed = f.take_matrix(arena, op.d_v, f.k_pitch_);
      };
      states(state, state_by_value);
      states(d_state, d_state_by_value);
      for (T** matrix : {&keys, &queries}) *matrix = f.take_matrix(arena, op.d_k, f.pitch_);
      for (T** matrix : {&key_rows, &query_rows, &d_keys, &d_queries})
        *matrix = f.take_matrix(arena, op.chunk, f.k_pitch_);
      for (T** matrix : {&d_out, &scaled_d_out, &residuals, &corrections, &w, &scaled_w})
        *matrix = f.take_matrix(arena, op.chunk, f.v_pitch_);
      corrections_by_value = f.take_matrix(arena, op.d_v, f.pitch_);
      for (T** matrix : {&recall, &attention, &d_recall, &d_attention, &d_between})
        *matrix = f.take_matrix(arena, op.chunk, f.pitch_);
      for (T** parts : {&d_beta, &d_start, &d_end}) *parts = arena.take<T>(f.pitch_ * kLanes<T>);
      for (T** sums : {&row_sums, &column_sums}) *sums = arena.take<T>(f.pitch_);
      decays = f.take_decays(arena);
      bytes = round_up(arena.used(), 64);
    }
    T *state, *state_by_value;                      // [d_k][d_v], [d_v][d_k]
    T *d_state, *d_state_by_value;                  // of the state at the chunk's end
    T *keys, *queries;                              // [d_k][step]
    T *key_rows, *query_rows, *d_keys, *d_queries;  // [step][d_k]
    T *d_out, *scaled_d_out;                        // [step][d_v]; times scale d
    T *residuals, *corrections;                     // [step][d_v]: e, u = beta e
    T *w, *scaled_w;                                // [step][d_v]: gradient of e; times -d
    T* corrections_by_value;                        // [d_v][step]
    T *recall, *attention;                          // [step][step], as in the forward pass
    T *d_recall, *d_attention;                      // [step][step]: dL, dA
    T* d_between;                                   // [step][step]: of the logarithm of D
    T *d_beta, *d_start, *d_end;                    // [step][lane], partial: of beta; of the logarithms of d and D
    T *row_sums, *column_sums;                      // [step]
    typename Base::Decays decays;
    int64_t bytes;
  };

  void run_sequence(const Sequence& s, const Buffers& b) const {
    bool has_d_state = op_.grad_last_state.data != nullptr;  // false: it is zero
    if (has_d_state) this->load_state(b.d_state, op_.grad_last_state, s.index, s.head);
    for (int64_t t = s.end; t > s.begin;) {
      const DeltaRuleChunk c = this->chunk_before(s, t);
      run_chunk(c, b, has_d_state);
      has_d_state = c.has_state;
      t = c.begin;
    }
    if (!op_.grad_initial_state.data) return;
    if (!has_d_state) memset(b.d_state, 0, op_.d_k * v_pitch_ * sizeof(T));
    this->store_state(b.d_state, op_.grad_initial_state, s.index, s.head);
  }

  void run_chunk(const DeltaRuleChunk& c, const Buffers& b, bool has_d_state) const {
    load_chunk(c, b, has_d_state);
    for (T* parts : {b.d_beta, b.d_start, b.d_end}) memset(parts, 0, pitch_ * kLanes<T> * sizeof(T));
    for_tiles<T, true>(c.steps, v_pitch_, [&](auto M, auto N, int64_t row, int64_t column) {
      solve<decltype(M)::value, decltype(N)::value>(c, b, has_d_state, row, column);
    });
    compute_score_gradients(c, b);
    for_tiles<T>(c.steps, k_pitch_, [&](auto M, auto N, int64_t row, int64_t column) {
      query_gradients<decltype(M)::value, decltype(N)::value>(c, b, row, column);
      key_gradients<decltype(M)::value, decltype(N)::value>(c, b, has_d_state, row, column);
    });
    this->store_rows(b.d_queries, k_pitch_, op_.grad_q, c, op_.d_k);
    this->store_rows(b.d_keys, k_pitch_, op_.grad_k, c, op_.d_k);
    this->store_rows(b.w, v_pitch_, op_.grad_v, c, op_.d_v);
    const T whole = c.has_state ? pass_state_gradient(c, b, has_d_state) : T(0);
    gate_gradients(c, b, whole);
  }

  void load_chunk(const DeltaRuleChunk& c, const Buffers& b, bool has_d_state) const {
    const int64_t d_k = op_.d_k, d_v = op_.d_v;
    this->load_by_step(b.keys, op_.k, c, d_k);
    this->load_by_step(b.queries, op_.q, c, d_k);
    for (int64_t t = 0; t < c.steps; t += kLanes<T>) {
      const int64_t rows = min(kLanes<T>, c.steps - t);
      Base::transpose_matrix(b.key_rows + t * k_pitch_, k_pitch_, b.keys + t, pitch_, d_k, rows);
      Base::transpose_matrix(b.query_rows + t * k_pitch_, k_pitch_, b.queries + t, pitch_, d_k, rows);
    }
    this->load_rows(b.d_out, v_pitch_, op_.grad_out, c, d_v);
    this->compute_decays(b.decays, c);
    this->compute_scores(b.recall, b.attention, b.keys, b.queries, b.decays, c.steps);
    const T* residuals = this->residuals(c);
    for (int64_t i = 0; i < c.steps; ++i) {
      T* row = b.residuals + i * v_pitch_;
      memcpy(row, residuals + i * d_v, d_v * sizeof(T));
      memset(row + d_v, 0, (v_pitch_ - d_v) * sizeof(T));
      for (int64_t j = 0; j < v_pitch_; j += kLanes<T>) {
        const int64_t at = i * v_pitch_ + j;
        store(b.corrections + at, b.decays.beta[i] * load(row + j));
        store(b.scaled_d_out + at, T(scale_) * b.decays.since_start[i] * load(b.d_out + at));
      }
    }
    Base::transpose_matrix(b.corrections_by_value, pitch_, b.corrections, v_pitch_, c.steps, d_v);
    if (c.has_state) {
      const int64_t strides[4] = {op_.heads * d_k * d_v, d_k * d_v, d_v, 1};
      wmk_view states = {op_.chunk_states.data, {strides[0], strides[1], strides[2], strides[3]}};
      this->load_state(b.state, states, c.state_row, c.head);
      Base::transpose_matrix(b.state_by_value, k_pitch_, b.state, v_pitch_, d_k, d_v);
    }
    if (has_d_state) Base::transpose_matrix(b.d_state_by_value, k_pitch_, b.d_state, v_pitch_, d_k, d_v);
  }

  // w = beta (A^T dy + D K dS - recalled^T w)
  template <int M, int N>
  void solve(const DeltaRuleChunk& c, const Buffers& b, bool has_d_state, int64_t row, int64_t column) const {
    const int64_t after = row + M, diagonal = row * pitch_ + row;
    Vector<T> du[M][N] = {};
    if (has_d_state) {
      multiply_accumulate<T, M, N>(du, b.keys + row, 1, pitch_, b.d_state + column, v_pitch_, op_.d_k);
      const T* to_end = b.decays.to_end(c.steps, pitch_);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) du[m][n] *= to_end[row + m];
    }
    multiply_accumulate<T, M, N>(du, b.attention + after * pitch_ + row, 1, pitch_, b.d_out + after * v_pitch_ + column,
                                 v_pitch_, c.steps - after);
    accumulate_triangle<T, false, true, M, N>(du, b.attention + diagonal, 1, pitch_, b.d_out + row * v_pitch_ + column,
                                              v_pitch_);
    multiply_accumulate<T, M, N>(du, b.recall + after * pitch_ + row, 1, pitch_, b.w + after * v_pitch_ + column,
                                 v_pitch_, c.steps - after);
#pragma GCC unroll 16
    for (int i = M - 1; i >= 0; --i) {
      Vector<T> d_beta = load(b.d_beta + (row + i) * kLanes<T>);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const int64_t at = (row + i) * v_pitch_ + column + n * kLanes<T>;
        const Vector<T> w = b.decays.beta[row + i] * du[i][n];
        d_beta += du[i][n] * load(b.residuals + at);
        store(b.w + at, w);
        store(b.scaled_w + at, -b.decays.since_start[row + i] * w);
#pragma GCC unroll 16
        for (int m = 0; m < i; ++m) du[m][n] += b.recall[diagonal + i * pitch_ + m] * w;
      }
      store(b.d_beta + (row + i) * kLanes<T>, d_beta);
    }
  }

  void compute_score_gradients(const DeltaRuleChunk& c, const Buffers& b) const {
    for (int64_t j = 0; j < c.steps; j += kLanes<T>) {
      for_row_tiles<8>(j, c.steps, [&](auto M, int64_t i) {
        constexpr int rows = decltype(M)::value;
        Vector<T> erased[rows][1] = {}, attended[rows][1] = {};
        const T* right = b.corrections_by_value + j;
        multiply_accumulate<T, rows, 1>(erased, b.w + i * v_pitch_, v_pitch_, 1, right, pitch_, op_.d_v);
        multiply_accumulate<T, rows, 1>(attended, b.d_out + i * v_pitch_, v_pitch_, 1, right, pitch_, op_.d_v);
        for (int m = 0; m < rows; ++m) {
          const int64_t at = (i + m) * pitch_ + j;
          const auto step = lane_numbers<T>() + int(j);
          const Vector<T> decay = load(b.decays.between + at), zero = {};
          const Vector<T> of_decay = load(b.recall + at) * erased[m][0] + load(b.attention + at) * attended[m][0];
          store(b.d_recall + at, step < int(i + m) ? -decay * erased[m][0] : zero);
          store(b.d_attention + at, step <= int(i + m) ? T(scale_) * decay * attended[m][0] : zero);
          store(b.d_between + at, step < int(i + m) ? of_decay : zero);
        }
      });
    }
  }

  // parts[row + m] += sums[m] * rows of x, by lane
  template <int M, int N>
  void add_products(T* parts, const Vector<T> (&sums)[M][N], const T* x, int64_t row, int64_t column) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vector<T> part = load(parts + (row + m) * kLanes<T>);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) part += sums[m][n] * load(x + (row + m) * k_pitch_ + column + n * kLanes<T>);
      store(parts + (row + m) * kLanes<T>, part);
    }
  }

  template <int M, int N>
  void query_gradients(const DeltaRuleChunk& c, const Buffers& b, int64_t row, int64_t column) const {
    Vector<T> dq[M][N] = {};
    if (c.has_state) {
      multiply_accumulate<T, M, N>(dq, b.scaled_d_out + row * v_pitch_, v_pitch_, 1, b.state_by_value + column,
                                   k_pitch_, op_.d_v);
      add_products(b.d_start, dq, b.query_rows, row, column);
    }
    const T* left = b.d_attention + row * pitch_;
    multiply_accumulate<T, M, N>(dq, left, pitch_, 1, b.key_rows + column, k_pitch_, row);
    accumulate_triangle<T, true, true, M, N>(dq, left + row, pitch_, 1, b.key_rows + row * k_pitch_ + column, k_pitch_);
    store_sums(b.d_queries, dq, row, column);
  }

  template <int M, int N>
  void key_gradients(const DeltaRuleChunk& c, const Buffers& b, bool has_d_state, int64_t row, int64_t column) const {
    const int64_t after = row + M, diagonal = row * pitch_ + row;
    Vector<T> dk[M][N] = {};
    if (has_d_state) {
      multiply_accumulate<T, M, N>(dk, b.corrections + row * v_pitch_, v_pitch_, 1, b.d_state_by_value + column,
                                   k_pitch_, op_.d_v);
      const T* to_end = b.decays.to_end(c.steps, pitch_);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) dk[m][n] *= to_end[row + m];
      add_products(b.d_end, dk, b.key_rows, row, column);
    }
    if (c.has_state) {
      store_sums(b.d_keys, dk, row, column);
      Vector<T> of_start[M][N] = {};
      multiply_accumulate<T, M, N>(of_start, b.scaled_w + row * v_pitch_, v_pitch_, 1, b.state_by_value + column,
                                   k_pitch_, op_.d_v);
      add_products(b.d_start, of_start, b.key_rows, row, column);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
          dk[m][n] = of_start[m][n] + load(b.d_keys + (row + m) * k_pitch_ + column + n * kLanes<T>);
    }
    const T *keys = b.key_rows + column, *queries = b.query_rows + column;
    const int64_t rest = c.steps - after;
    multiply_accumulate<T, M, N>(dk, b.d_recall + row * pitch_, pitch_, 1, keys, k_pitch_, row);
    accumulate_triangle<T, true, false, M, N>(dk, b.d_recall + diagonal, pitch_, 1, keys + row * k_pitch_, k_pitch_);
    accumulate_triangle<T, false, false, M, N>(dk, b.d_recall + diagonal, 1, pitch_, keys + row * k_pitch_, k_pitch_);
    multiply_accumulate<T, M, N>(dk, b.d_recall + after * pitch_ + row, 1, pitch_, keys + after * k_pitch_, k_pitch_,
                                 rest);
    accumulate_triangle<T, false, true, M, N>(dk, b.d_attention + diagonal, 1, pitch_, queries + row * k_pitch_,
                                              k_pitch_);
    multiply_accumulate<T, M, N>(dk, b.d_attention + after * pitch_ + row, 1, pitch_, queries + after * k_pitch_,
                                 k_pitch_, rest);
    store_sums(b.d_keys, dk, row, column);
  }

  template <int M, int N>
  void store_sums(T* to, const Vector<T> (&sums)[M][N], int64_t row, int64_t column) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(to + (row + m) * k_pitch_ + column + n * kLanes<T>, sums[m][n]);
  }

  // Makes the state's gradient that of the chunk's start; returns that of the logarithm of the decay between them.
  T pass_state_gradient(const DeltaRuleChunk& c, const Buffers& b, bool has_d_state) const {
    const T kept = b.decays.whole(c.steps);
    Vector<T> products = {};
    for_tiles<T>(op_.d_k, v_pitch_, [&](auto M, auto N, int64_t row, int64_t column) {
      constexpr int rows = decltype(M)::value, vectors = decltype(N)::value;
      Vector<T> sums[rows][vectors] = {};
      multiply_accumulate<T, rows, vectors>(sums, b.queries + row * pitch_, pitch_, 1, b.scaled_d_out + column,
                                            v_pitch_, c.steps);
      multiply_accumulate<T, rows, vectors>(sums, b.keys + row * pitch_, pitch_, 1, b.scaled_w + column, v_pitch_,
                                            c.steps);
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < vectors; ++n) {
          const int64_t at = (row + m) * v_pitch_ + column + n * kLanes<T>;
          if (has_d_state) {
            const Vector<T> passed = kept * load(b.d_state + at);
            products += passed * load(b.state + at);
            sums[m][n] += passed;
          }
          store(b.d_state + at, sums[m][n]);
        }
    });
    T sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += products[lane];
    return sum;
  }

  static void sum_parts(T* to, const T* parts, int64_t steps) {
    for (int64_t i = 0; i < steps; i += kLanes<T>)
      store(to + i, sum_lanes<T>([&](int row) { return load(parts + (i + row) * kLanes<T>); }));
  }

  void store_step(const wmk_view& view, const DeltaRuleChunk& c, int64_t t, T value) const {
    T* to = (T*)view.data;
    to[c.batch * view.stride[0] + c.head * view.stride[1] + (c.begin + t) * view.stride[2]] = value;
  }

  // The gate of step t is part of the decays from before t, or the start, to t and later, or the end.
  void gate_gradients(const DeltaRuleChunk& c, const Buffers& b, T whole) const {
    sum_parts(b.row_sums, b.d_beta, c.steps);
    for (int64_t t = 0; t < c.steps; ++t) store_step(op_.grad_beta, c, t, b.row_sums[t]);
    sum_parts(b.row_sums, b.d_start, c.steps);
    sum_parts(b.column_sums, b.d_end, c.steps);
    T from_start = whole;
    for (int64_t t = c.steps - 1; t >= 0; --t) {
      Vector<T> before = {};
      for (int64_t j = 0; j <= t; j += kLanes<T>) {
        const auto step = lane_numbers<T>() + int(j);
        const Vector<T> sums = load(b.column_sums + j) + load(b.d_between + t * pitch_ + j);
        store(b.column_sums + j, sums);
        before += step < int(t) ? sums : Vector<T>{};
      }
      T sum = from_start += b.row_sums[t];
      for (int lane = 0; lane < kLanes<T>; ++lane) sum += before[lane];
      store_step(op_.grad_gate, c, t, sum);
    }
  }
};

}  // namespace

int64_t gated_delta_rule_backward_workspace(const wmk_gated_delta_rule& op) {
  return with_arithmetic(op.dtype, [&](auto type) { return Backward<decltype(type)>(op).workspace(); });
}

int gated_delta_rule_backward(const wmk_gated_delta_rule& op) {
  return with_arithmetic(op.dtype, [&](auto type) {
    Backward<decltype(type)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
