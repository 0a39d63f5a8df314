// SSD scan, backward, on the CPU.
//
// Segments of `kept_interval` steps run in reverse. Each starts from its saved state: the states before its chunks are
// computed once more, then its chunks run in reverse. With dS of the state at a chunk's end, d the decays since its
// start, D those between its steps and w the weights, per head
//
//   u_j = sum over i > j of D_ij (C_i·B_j) dy_i + D_end,j dS B_j     dx = w u        dw = u · x
//   dC = d S dy + dG B      dB = w D_end dS x + dG^T C               dG_ij = D_ij w_j (dy_i · x_j)
//   dS = d_end dS + (d dy)^T C
//
// and a step's own weight on the diagonal. dG is summed over the heads of a work item before it is multiplied. The work
// items of a group run segment by segment together: they share the scores, and their sums of dB and dC, of one segment
// at a time, are added in a fixed order. A wave of a few groups bounds the workspace, whatever the number of sequences.
//
// The gradient of a gate sums what every decay over it passes on. The sums run from the last step to the first and only
// add: taking differences of sums over the chunk would lose small gradients.
//
// Per step and head 5 n d + Q d multiply-adds, with z also n d + Q d / 2: bound by arithmetic.
#include "cpu/ssd_scan/ssd_scan.h"

namespace wmk::WMK_ISA {

namespace {

constexpr int64_t kBackwardHeads = 12;  // per work item: few partial sums of dB and dC

template <class T>
class Backward : SSD<T> {
 public:
  explicit Backward(const wmk_ssd_scan& op) : SSD<T>(op, kBackwardHeads, false) {}

  int64_t workspace() const { return Buffers(*this, nullptr).bytes * wave_team() + Wave(*this, nullptr).bytes; }

  void run() const {
    const Wave wave(*this, (char*)op_.workspace + Buffers(*this, nullptr).bytes * wave_team());
    for (int64_t first = 0; first < pairs(); first += wave_pairs()) run_wave(wave, first);
    if (op_.D.data) add_D(wave);
  }

 private:
  using Base = SSD<T>;
  using Base::block_heads_, Base::blocks_, Base::d_pitch_, Base::d_width_, Base::n_pitch_, Base::n_width_, Base::op_,
      Base::pitch_, Base::width_;
  typedef typename Base::WorkItem WorkItem;

  // Groups of a sequence.
  int64_t pairs() const { return op_.sequences * op_.groups; }
  // Those of a wave: two work items per thread.
  int64_t wave_pairs() const { return min(pairs(), ceil_div(2 * op_.threads, blocks_)); }
  int64_t wave_team() const { return min(op_.threads, wave_pairs() * blocks_); }
  int64_t segment_steps() const { return min(op_.kept_interval, round_up(max(op_.time, 1), op_.chunk)); }

  // What the work items of a wave share or pass from segment to segment.
  struct Wave {
    Wave(const Backward& f, void* memory) {
      Arena arena(memory);
      const int64_t rows = f.wave_pairs() * f.segment_steps(), items = f.wave_pairs() * f.blocks_;
      for (T** matrix : {&B, &C}) *matrix = f.take_matrix(arena, rows, f.n_pitch_);
      scores = f.take_matrix(arena, rows, f.pitch_);
      for (T** sums : {&d_B, &d_C}) *sums = f.take_matrix(arena, rows * f.blocks_, f.n_pitch_);
      d_states = f.take_state(arena, items * f.block_heads_);
      has_d_state = arena.take<bool>(items);
      d_D = f.op_.D.data ? f.take_matrix(arena, f.op_.sequences * f.op_.heads, f.d_pitch_) : nullptr;
      bytes = round_up(arena.used(), 64);
    }
    T *B, *C;           // [pair][step of the segment][n]
    T* scores;          // [pair][step of the segment][step]
    T *d_B, *d_C;       // [work item][step of the segment][n]
    T* d_states;        // [work item][head][n][d]
    bool* has_d_state;  // [work item]; false: it is zero
    T* d_D;             // [sequence][head][d]
    int64_t bytes;
  };

  struct Buffers {
    Buffers(const Backward& f, void* memory) {
      Arena arena(memory);
      const wmk_ssd_scan& op = f.op_;
      const int64_t chunk = op.chunk, segment = f.segment_steps();
      states = f.take_state(arena, segment / chunk);
      state_by_channel = f.take_matrix(arena, op.d, f.n_pitch_);
      B_by_step = f.take_matrix(arena, op.n, f.pitch_);
      d_scores = f.take_matrix(arena, segment, f.pitch_);
      for (T** square : {&lower, &d_between}) *square = f.take_matrix(arena, chunk, f.pitch_);
      for (T** rows : {&x, &entering, &d_out, &decayed_d_out, &d_x}) *rows = f.take_matrix(arena, chunk, f.d_pitch_);
      for (T** rows : {&y, &z}) *rows = op.z.data ? f.take_matrix(arena, chunk, f.d_pitch_) : nullptr;
      x_by_channel = f.take_matrix(arena, op.d, f.pitch_);
      for (T** parts : {&d_weight, &d_start, &d_end}) *parts = f.take_matrix(arena, f.pitch_, kLanes<T>);
      for (T** sums : {&row_sums, &column_sums}) *sums = arena.take<T>(f.pitch_);
      decays = f.take_decays(arena);
      bytes = round_up(arena.used(), 64);
    }
    T* states;                       // [chunk][n][d]: before the chunks of a segment
    T* state_by_channel;             // [d][n]
    T* B_by_step;                    // [n][step]
    T* d_scores;                     // [step of the segment][step]
    T *lower, *d_between;            // [step][step]; d_between: of the logarithm of D
    T *x, *y, *entering, *z;         // [step][d]; y and z: with z
    T *d_out, *decayed_d_out, *d_x;  // [step][d]; times d
    T* x_by_channel;                 // [d][step]
    T *d_weight, *d_start, *d_end;   // [step][lane], partial; the latter two of logarithms
    T *row_sums, *column_sums;       // [step]
    typename Base::Decays decays;
    int64_t bytes;
    // of the wave
    T *B, *C, *scores;
    T *d_B, *d_C, *d_states;
  };

  // A thread's, and those of the wave's work item `item`.
  Buffers buffers(const Wave& wave, int64_t thread, int64_t item) const {
    Buffers b(*this, nullptr);
    b = Buffers(*this, (char*)op_.workspace + thread * b.bytes);
    const int64_t steps = segment_steps(), pair = item / blocks_;
    b.B = wave.B + pair * steps * n_pitch_, b.C = wave.C + pair * steps * n_pitch_;
    b.scores = wave.scores + pair * steps * pitch_;
    b.d_B = wave.d_B + item * steps * n_pitch_, b.d_C = wave.d_C + item * steps * n_pitch_;
    b.d_states = wave.d_states + item * block_heads_ * this->state_size();
    return b;
  }

  void run_wave(const Wave& wave, int64_t first_pair) const {
    const int64_t first = first_pair * blocks_, count = min(wave_pairs(), pairs() - first_pair);
    int64_t rounds = 0;
    for (int64_t pair = 0; pair < count; ++pair)
      rounds = max(rounds, segments(this->work_item(first + pair * blocks_)));
    const auto for_items = [&](const auto& work) {
      parallel_for(count * blocks_, wave_team(), [&](int64_t item, int64_t thread) {
        work(this->work_item(first + item), buffers(wave, thread, item), wave.has_d_state[item]);
      });
    };
    const int64_t chunks = segment_steps() / op_.chunk;
    const auto for_chunks = [&](int64_t round, const auto& work) {  // [begin, end) of each pair's segment
      parallel_for(count * chunks, wave_team(), [&](int64_t task, int64_t thread) {
        const int64_t item = task / chunks * blocks_, from = task % chunks * op_.chunk;
        const WorkItem w = this->work_item(first + item);
        const Segment s = segment(w, round);
        if (s.begin + from < s.end)
          work(w, buffers(wave, thread, item), from, min(op_.chunk, s.end - s.begin - from), s.begin);
      });
    };
    for_items([&](const WorkItem& w, const Buffers& b, bool& has_d_state) {
      has_d_state = op_.grad_last_state.data != nullptr;
      for (int64_t head = 0; has_d_state && head < w.heads; ++head)
        this->load_state(d_state(b, head), op_.grad_last_state, w.sequence, w.first_head + head);
      if (op_.D.data) memset(d_D_of(wave, w, 0), 0, w.heads * d_pitch_ * sizeof(T));
    });
    for (int64_t round = 0; round < rounds; ++round) {
      for_chunks(round, [&](const WorkItem& w, const Buffers& b, int64_t row, int64_t steps, int64_t begin) {
        compute_scores_of(w, b, row, steps, begin);
      });
      for_items([&](const WorkItem& w, const Buffers& b, bool& has_d_state) {
        const Segment s = segment(w, round);
        if (s.begin < s.end) has_d_state = run_segment(w, b, wave, s.begin, s.end, has_d_state);
      });
      for_chunks(round, [&](const WorkItem& w, const Buffers& b, int64_t row, int64_t steps, int64_t begin) {
        add_partials(w, b, row, steps, begin);
      });
    }
    if (!op_.grad_initial_state.data) return;
    for_items([&](const WorkItem& w, const Buffers& b, bool& has_d_state) {
      for (int64_t head = 0; head < w.heads; ++head) {
        T* gradient = d_state(b, head);
        if (!has_d_state) memset(gradient, 0, this->state_size() * sizeof(T));
        this->store_state(gradient, op_.grad_initial_state, w.sequence, w.first_head + head);
      }
    });
  }

  struct Segment {
    int64_t begin, end;
  };
  int64_t segments(const WorkItem& w) const { return ceil_div(w.end - w.begin, op_.kept_interval); }
  // The last one in round 0; empty where a sequence has no more.
  Segment segment(const WorkItem& w, int64_t round) const {
    const int64_t index = segments(w) - 1 - round, begin = w.begin + index * op_.kept_interval;
    if (index < 0) return {w.begin, w.begin};
    return {begin, min(w.end, begin + op_.kept_interval)};
  }
  T* d_state(const Buffers& b, int64_t head) const { return b.d_states + head * this->state_size(); }
  T* d_D_of(const Wave& wave, const WorkItem& w, int64_t block_head) const {
    return wave.d_D + (w.sequence * op_.heads + w.first_head + block_head) * d_pitch_;
  }

  // Of `steps` steps from `row` of a segment, within which only resets cut.
  void compute_scores_of(const WorkItem& w, const Buffers& b, int64_t row, int64_t steps, int64_t begin) const {
    this->load_rows(b.B + row * n_pitch_, n_pitch_, op_.B, w.batch, begin + row, steps, w.group, op_.n);
    this->load_rows(b.C + row * n_pitch_, n_pitch_, op_.C, w.batch, begin + row, steps, w.group, op_.n);
    for (const int64_t end = row + steps; row < end;) {
      const SSDChunk c = this->chunk_from(w, begin + row);
      Base::transpose_matrix(b.B_by_step, pitch_, b.B + row * n_pitch_, n_pitch_, c.steps, op_.n);
      this->compute_scores(b.scores + row * pitch_, b.C + row * n_pitch_, b.B_by_step, c.steps);
      row += c.steps;
    }
  }

  // Returns whether the state before it has a gradient.
  bool run_segment(const WorkItem& w, const Buffers& b, const Wave& wave, int64_t begin, int64_t end,
                   bool has_d_state) const {
    memset(b.d_scores, 0, (end - begin) * pitch_ * sizeof(T));
    for (T* sums : {b.d_B, b.d_C}) memset(sums, 0, (end - begin) * n_pitch_ * sizeof(T));
    bool passes = has_d_state;
    for (int64_t head = 0; head < w.heads; ++head) {
      recompute_states(w, b, w.first_head + head, begin, end);
      passes = has_d_state;
      for (int64_t t = end; t > begin;) {
        const SSDChunk c = this->chunk_before(w, t);
        run_chunk(w, b, wave, c, begin, head, passes);
        passes = c.has_state;
        t = c.begin;
      }
    }
    for (int64_t t = begin; t < end;) {
      const SSDChunk c = this->chunk_from(w, t);
      multiply_score_gradients(b, c, t - begin);
      t += c.steps;
    }
    return passes;
  }

  T* state_before(const Buffers& b, const SSDChunk& c, int64_t begin) const {
    return b.states + (c.begin - begin) / op_.chunk * this->state_size();
  }

  // Chunks that begin with a reset need none.
  void recompute_states(const WorkItem& w, const Buffers& b, int64_t head, int64_t begin, int64_t end) const {
    SSDChunk c = this->chunk_from(w, begin);
    if (c.has_state) {
      const T* from = this->kept_state(c.state_row, head);
      T* to = state_before(b, c, begin);
      memset(to, 0, this->state_size() * sizeof(T));
      for (int64_t i = 0; i < op_.n; ++i) memcpy(to + i * d_pitch_, from + i * op_.d, op_.d * sizeof(T));
    }
    while (c.begin + c.steps < end) {
      const SSDChunk next = this->chunk_from(w, c.begin + c.steps);
      if (next.has_state) {
        this->load_rows(b.x, d_pitch_, op_.x, c, head, op_.d);
        this->compute_decays(b.decays, c, head);
        this->compute_entering(b.entering, b.x, b.decays, c.steps);
        this->pass_state(state_before(b, next, begin), c.has_state ? state_before(b, c, begin) : nullptr,
                         b.decays.since_start[c.steps - 1], b.B + (c.begin - begin) * n_pitch_, b.entering, c.steps);
      }
      c = next;
    }
  }

  void run_chunk(const WorkItem& w, const Buffers& b, const Wave& wave, const SSDChunk& c, int64_t begin,
                 int64_t block_head, bool has_d_state) const {
    const int64_t head = w.first_head + block_head, row = c.begin - begin;
    const T *state = state_before(b, c, begin), *C = b.C + row * n_pitch_, *B = b.B + row * n_pitch_;
    const T* scores = b.scores + row * pitch_;
    T *gradient = d_state(b, block_head), *d_scores = b.d_scores + row * pitch_;
    this->load_rows(b.x, d_pitch_, op_.x, c, head, op_.d);
    this->load_rows(b.d_out, d_pitch_, op_.grad_out, c, head, op_.d);
    this->compute_decays(b.decays, c, head);
    this->compute_lower(b.lower, scores, b.decays, c.steps);
    if (op_.z.data) gate_output(c, b, head, C, state);
    if (op_.D.data) add_skip_gradient(c, b, d_D_of(wave, w, block_head));
    for (int64_t i = 0; i < c.steps; ++i)
      for (int64_t j = 0; j < d_width_; j += kLanes<T>)
        store(b.decayed_d_out + i * d_pitch_ + j, b.decays.since_start[i] * load(b.d_out + i * d_pitch_ + j));
    Base::transpose_matrix(b.x_by_channel, pitch_, b.x, d_pitch_, c.steps, op_.d);
    compute_score_gradients(c, b, scores, d_scores);
    for (T* parts : {b.d_weight, b.d_start, b.d_end}) memset(parts, 0, pitch_ * kLanes<T> * sizeof(T));
    input_gradients(c, b, scores, B, gradient, has_d_state, head);
    this->store_rows(b.d_x, d_pitch_, op_.grad_x, c, head, op_.d);
    if (c.has_state) {
      // dC += d S dy
      Base::transpose_matrix(b.state_by_channel, n_pitch_, state, d_pitch_, op_.n, op_.d);
      add_state_product(b.d_C + row * n_pitch_, b.decayed_d_out, b.state_by_channel, c.steps, C, b.d_start);
    }
    if (has_d_state) {
      // dB += w D_end dS x
      this->compute_entering(b.entering, b.x, b.decays, c.steps);
      Base::transpose_matrix(b.state_by_channel, n_pitch_, gradient, d_pitch_, op_.n, op_.d);
      add_state_product(b.d_B + row * n_pitch_, b.entering, b.state_by_channel, c.steps, B, b.d_end);
    }
    T whole = 0;
    if (c.has_state) {
      const T kept = b.decays.since_start[c.steps - 1];
      if (has_d_state) whole = kept * dot(gradient, state);
      this->pass_state(gradient, has_d_state ? gradient : nullptr, kept, C, b.decayed_d_out, c.steps);
    }
    store_step_gradients(c, b, head, whole);
  }

  T dot(const T* a, const T* b) const {
    Vector<T> sum = {};
    for (int64_t row = 0; row < op_.n; ++row, a += d_pitch_, b += d_pitch_)
      for (int64_t i = 0; i < d_width_; i += kLanes<T>) sum += load(a + i) * load(b + i);
    return lane_sum(sum);
  }
  Vector<T> skip_of(int64_t head, int64_t i) const {
    if (!op_.D.data) return Vector<T>{};
    const T* from = (const T*)op_.D.data + head * op_.D.stride[0] + i * op_.D.stride[1];
    return gather<T>(from, op_.D.stride[1], int(min(kLanes<T>, op_.d - i)));
  }

  // Computes the ungated output again; d_out becomes its gradient.
  void gate_output(const SSDChunk& c, const Buffers& b, int64_t head, const T* C, const T* state) const {
    this->compute_outputs(b.y, c, C, state, b.lower, b.decays, b.x);
    this->load_rows(b.z, d_pitch_, op_.z, c, head, op_.d);
    for (int64_t j = 0; j < d_width_; j += kLanes<T>) {
      const Vector<T> D = skip_of(head, j);
      for (int64_t i = 0; i < c.steps; ++i) {
        const int64_t at = i * d_pitch_ + j;
        const Vector<T> z = load(b.z + at), s = sigmoid(z), d_out = load(b.d_out + at);
        Vector<T> y = load(b.y + at);
        if (op_.D.data) y += D * load(b.x + at);
        store(b.z + at, d_out * y * (s * (1 + z * (1 - s))));
        store(b.d_out + at, d_out * (z * s));
      }
    }
    this->store_rows(b.z, d_pitch_, op_.grad_z, c, head, op_.d);
  }

  void add_skip_gradient(const SSDChunk& c, const Buffers& b, T* d_D) const {
    for (int64_t j = 0; j < d_width_; j += kLanes<T>) {
      Vector<T> sum = {};
      for (int64_t i = 0; i < c.steps; ++i) sum += load(b.d_out + i * d_pitch_ + j) * load(b.x + i * d_pitch_ + j);
      store(d_D + j, load(d_D + j) + sum);
    }
  }

  // d_scores += D w (dy_i · x_j), d_between = what it makes of the logarithms of D
  void compute_score_gradients(const SSDChunk& c, const Buffers& b, const T* scores, T* d_scores) const {
    for (int64_t j = 0; j < c.steps; j += 2 * kLanes<T>) {
      if (j + kLanes<T> < width_) {
        score_gradient_panel<2>(c, b, scores, d_scores, j);
      } else {
        score_gradient_panel<1>(c, b, scores, d_scores, j);
      }
    }
  }
  template <int N>
  void score_gradient_panel(const SSDChunk& c, const Buffers& b, const T* scores, T* d_scores, int64_t column) const {
    for_row_tiles<kTileRows<N>>(column, c.steps, [&](auto rows, int64_t i) {
      constexpr int M = decltype(rows)::value;
      Vector<T> sums[M][N] = {};
      multiply_accumulate<T, M, N>(sums, b.d_out + i * d_pitch_, d_pitch_, 1, b.x_by_channel + column, pitch_, op_.d);
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
          const int64_t j = column + n * kLanes<T>, at = (i + m) * pitch_ + j;
          if (j > i + m) break;
          const auto step = lane_numbers<T>() + int(j);
          const Vector<T> weighted = load(b.decays.between + at) * load(b.decays.weight + j) * sums[m][n];
          const Vector<T> own = load(b.decays.own_weight + j) * sums[m][n], zero = {};
          store(d_scores + at, load(d_scores + at) + (step < int(i + m) ? weighted : step == int(i + m) ? own : zero));
          store(b.d_between + at, step < int(i + m) ? load(scores + at) * weighted : zero);
        }
      }
    });
  }

  // u, and with it the gradients of x and the weights
  void input_gradients(const SSDChunk& c, const Buffers& b, const T* scores, const T* B, const T* d_state,
                       bool has_d_state, int64_t head) const {
    T* unweighted = b.lower;  // scores times decays, from here on
    for (int64_t i = 0; i < c.steps; ++i)
      for (int64_t j = 0; j <= i; j += kLanes<T>) {
        const int64_t at = i * pitch_ + j;
        store(unweighted + at, load(scores + at) * load(b.decays.between + at));
      }
    const T* to_end = b.decays.between + (c.steps - 1) * pitch_;
    const bool has_own = op_.own_weight.data != nullptr;
    for (int64_t i = 0; has_own && i < c.steps; ++i) b.row_sums[i] = 0;
    for_tiles<T>(c.steps, d_width_, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
      const int64_t after = row + M, diagonal = row * pitch_ + row;
      Vector<T> u[M][N] = {};
      if (has_d_state) {
        multiply_accumulate<T, M, N>(u, B + row * n_pitch_, n_pitch_, 1, d_state + column, d_pitch_, op_.n);
        for (int m = 0; m < M; ++m)
          for (int n = 0; n < N; ++n) u[m][n] *= to_end[row + m];
      }
      const T* d_out = b.d_out + column;
      multiply_accumulate<T, M, N>(u, unweighted + after * pitch_ + row, 1, pitch_, d_out + after * d_pitch_, d_pitch_,
                                   c.steps - after);
      if (has_own) {
        accumulate_triangle<T, false, false, M, N>(u, unweighted + diagonal, 1, pitch_, d_out + row * d_pitch_,
                                                   d_pitch_);
      } else {
        accumulate_triangle<T, false, true, M, N>(u, unweighted + diagonal, 1, pitch_, d_out + row * d_pitch_,
                                                  d_pitch_);
      }
      for (int m = 0; m < M; ++m) {
        const int64_t t = row + m;
        Vector<T> of_weight = load(b.d_weight + t * kLanes<T>), of_own = {};
        for (int n = 0; n < N; ++n) {
          const int64_t j = column + n * kLanes<T>, at = t * d_pitch_ + j;
          const Vector<T> x = load(b.x + at), dy = load(b.d_out + at);
          Vector<T> d_x = b.decays.weight[t] * u[m][n];
          of_weight += u[m][n] * x;
          if (has_own) {
            const Vector<T> own = scores[t * pitch_ + t] * dy;
            d_x += b.decays.own_weight[t] * own;
            of_own += own * x;
          }
          if (op_.D.data) d_x += skip_of(head, j) * dy;
          store(b.d_x + at, d_x);
        }
        store(b.d_weight + t * kLanes<T>, of_weight);
        if (has_own) b.row_sums[t] += lane_sum(of_own);
      }
    });
    for (int64_t t = 0; has_own && t < c.steps; ++t) store_step(op_.grad_own_weight, c, t, head, b.row_sums[t]);
  }

  // to[step][n] += left right; parts += their products with `other`.
  void add_state_product(T* to, const T* left, const T* right, int64_t steps, const T* other, T* parts) const {
    for_tiles<T>(steps, n_width_, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
      Vector<T> sums[M][N] = {};
      multiply_accumulate<T, M, N>(sums, left + row * d_pitch_, d_pitch_, 1, right + column, n_pitch_, op_.d);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        Vector<T> part = load(parts + (row + m) * kLanes<T>);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const int64_t at = (row + m) * n_pitch_ + column + n * kLanes<T>;
          part += sums[m][n] * load(other + at);
          store(to + at, load(to + at) + sums[m][n]);
        }
        store(parts + (row + m) * kLanes<T>, part);
      }
    });
  }

  // dC += dG B, dB += dG^T C
  void multiply_score_gradients(const Buffers& b, const SSDChunk& c, int64_t begin) const {
    const T *d_scores = b.d_scores + begin * pitch_, *B = b.B + begin * n_pitch_, *C = b.C + begin * n_pitch_;
    T *d_B = b.d_B + begin * n_pitch_, *d_C = b.d_C + begin * n_pitch_;
    for_tiles<T>(c.steps, n_width_, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
      const int64_t after = row + M;
      const T* square = d_scores + row * pitch_ + row;
      Vector<T> of_C[M][N] = {};
      multiply_accumulate<T, M, N>(of_C, d_scores + row * pitch_, pitch_, 1, B + column, n_pitch_, row);
      accumulate_triangle<T, true, true, M, N>(of_C, square, pitch_, 1, B + row * n_pitch_ + column, n_pitch_);
      add_sums(d_C, of_C, row, column);
      Vector<T> of_B[M][N] = {};
      multiply_accumulate<T, M, N>(of_B, d_scores + after * pitch_ + row, 1, pitch_, C + after * n_pitch_ + column,
                                   n_pitch_, c.steps - after);
      accumulate_triangle<T, false, true, M, N>(of_B, square, 1, pitch_, C + row * n_pitch_ + column, n_pitch_);
      add_sums(d_B, of_B, row, column);
    });
  }
  template <int M, int N>
  void add_sums(T* to, const Vector<T> (&sums)[M][N], int64_t row, int64_t column) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        T* at = to + (row + m) * n_pitch_ + column + n * kLanes<T>;
        store(at, load(at) + sums[m][n]);
      }
  }

  static void sum_parts(T* to, const T* parts, int64_t steps) {
    for (int64_t i = 0; i < steps; i += kLanes<T>)
      store(to + i, sum_lanes<T>([&](int row) { return load(parts + (i + row) * kLanes<T>); }));
  }
  void store_step(const wmk_view& view, const SSDChunk& c, int64_t t, int64_t head, T value) const {
    T* to = (T*)view.data;
    to[c.batch * view.stride[0] + (c.begin + t) * view.stride[1] + head * view.stride[2]] = value;
  }

  // The gate of step t is part of the decays from before t, or the start, to t and later, or the end.
  void store_step_gradients(const SSDChunk& c, const Buffers& b, int64_t head, T whole) const {
    sum_parts(b.row_sums, b.d_weight, c.steps);
    for (int64_t t = 0; t < c.steps; ++t) store_step(op_.grad_weight, c, t, head, b.row_sums[t]);
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
      store_step(op_.grad_gate, c, t, head, (from_start += b.row_sums[t]) + lane_sum(before));
    }
  }

  // dB and dC of the steps: the sums of the group's work items, which begin with that of `b`.
  void add_partials(const WorkItem& w, const Buffers& b, int64_t row, int64_t steps, int64_t begin) const {
    const SSDChunk c = {w.batch, begin + row, steps, false, -1};
    for (auto [sums, view] : {SumAndView{b.d_B, &op_.grad_B}, SumAndView{b.d_C, &op_.grad_C}}) {
      T* to = sums + row * n_pitch_;
      for (int64_t block = 1; block < blocks_; ++block) {
        const T* from = to + block * segment_steps() * n_pitch_;
        for (int64_t i = 0; i < steps; ++i)
          for (int64_t j = i * n_pitch_; j < i * n_pitch_ + n_width_; j += kLanes<T>)
            store(to + j, load(to + j) + load(from + j));
      }
      this->store_rows(to, n_pitch_, *view, c, w.group, op_.n);
    }
  }
  struct SumAndView {
    T* sums;
    const wmk_view* view;
  };

  void add_D(const Wave& wave) const {
    T* to = (T*)op_.grad_D.data;
    for (int64_t head = 0; head < op_.heads; ++head)
      for (int64_t i = 0; i < op_.d; ++i) {
        T sum = 0;
        for (int64_t s = 0; s < op_.sequences; ++s) sum += wave.d_D[(s * op_.heads + head) * d_pitch_ + i];
        to[head * op_.d + i] = sum;
      }
  }
};

}  // namespace

int64_t ssd_scan_backward_workspace(const wmk_ssd_scan& op) {
  return with_arithmetic(op.dtype, [&](auto type) { return Backward<decltype(type)>(op).workspace(); });
}

int ssd_scan_backward(const wmk_ssd_scan& op) {
  return with_arithmetic(op.dtype, [&](auto type) {
    Backward<decltype(type)>(op).run();
    return int(WMK_OK);
  });
}

}  // namespace wmk::WMK_ISA
