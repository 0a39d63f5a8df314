// Linear scan, forward and backward, on the CPU.
//
// A multiply-add an element: the kernel is bound by memory, which it touches once, forward 2 reads and 1 write,
// backward 3 and 2. Where the channels are contiguous (channel-last) a time step is a row of vectors, and the states of
// up to 4 KB of a row stay in the first-level cache while time goes by. Otherwise one vector holds a channel a lane, of
// any batch element; squares of lanes x lanes elements are turned round in registers, and the lines of later squares
// are asked for in time, since as many streams as there are lanes are more than the hardware foresees. Large outputs
// are written past the cache, which saves reading the lines that are about to be overwritten. With fewer rows than keep
// the threads busy, time is cut into segments: their ends are found from a zero state first, chained, and the real pass
// starts each segment from the right state.
#include "../isa.h"
#include "../parallel.h"
#include "../tile.h"

namespace wmk::WMK_ISA {
namespace {

constexpr int64_t kStreamBytes = int64_t(16) << 20;  // outputs from this size on are written past the cache
constexpr int64_t kRowBytes = 4096;                  // states of one item where channels are contiguous
constexpr int64_t kBusyItems = 8;                    // with fewer items than these, time is cut
constexpr int64_t kSegmentSteps = 4096;              // into segments of at least this many steps
constexpr int64_t kMaxSegments = 16;

WMK_INLINE int64_t bytes_of(int64_t dtype) { return dtype == WMK_FLOAT64 ? 8 : dtype == WMK_FLOAT32 ? 4 : 2; }

// A whole vector, written past the cache where the level can; `to` is aligned to the bytes written.
template <class S, class V>
WMK_INLINE void stream_as(S* to, V value) {
#if defined(WMK_AVX512)
  if constexpr (sizeof(S) >= 4) {
    _mm512_stream_si512((__m512i*)to, (__m512i)value);
  } else {
    alignas(32) S halves[kLanes<float>];
    store_as(halves, value);
    _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)halves));
  }
#elif defined(WMK_AVX2)
  if constexpr (sizeof(S) >= 4) {
    _mm256_stream_si256((__m256i*)to, (__m256i)value);
  } else {
    store_as(to, value);
  }
#else
  store_as(to, value);
#endif
}
WMK_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` lanes of a vector; the others read as zero and are not written.
template <class T, class S>
WMK_INLINE Vector<T> load_some(const S* from, int count) {
  if (count == kLanes<T>) return load_as(from, T(0));
  S padded[kLanes<T>] = {};
  for (int lane = 0; lane < count; ++lane) padded[lane] = from[lane];
  return load_as(padded, T(0));
}
template <class T, class S>
WMK_INLINE void store_some(S* to, Vector<T> value, int count) {
  if (count == kLanes<T>) return store_as(to, value);
  S padded[kLanes<T>];
  store_as(padded, value);
  for (int lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

// A scan over positions 0 .. time - 1 in its own direction; in reverse, position 0 is the last time step.
template <class T>
struct Scan {
  static constexpr int lanes = kLanes<T>;
  typedef typename VectorOf<T>::integers Mask;

  const wmk_linear_scan& op;
  bool backward;

  int64_t time_at(int64_t position) const { return op.reverse ? op.time - 1 - position : position; }

  // Whether what comes before this position does not reach it. In reverse, a reset at t cuts between t and t - 1.
  bool fresh(int64_t batch, int64_t position) const {
    if (!op.reset.data) return false;
    int64_t time = time_at(position);
    if (op.reverse) {
      if (position == 0) return false;
      ++time;
    }
    return reset(batch, time);
  }
  bool reset(int64_t batch, int64_t time) const {
    return ((const char*)op.reset.data)[batch * op.reset.stride[0] + time * op.reset.stride[1]] != 0;
  }
  // Whether the state after the last position is not handed on.
  bool forgotten(int64_t batch) const { return op.reverse && op.reset.data && op.time > 0 && reset(batch, 0); }

  T initial(int64_t batch, int64_t channel) const { return element(op.initial_state, batch, channel); }
  static T element(const wmk_view& view, int64_t batch, int64_t channel) {
    return view.data ? ((const T*)view.data)[batch * view.stride[0] + channel * view.stride[1]] : T(0);
  }
  void put(const wmk_view& view, int64_t batch, int64_t channel, T value) const {
    if (view.data) ((T*)view.data)[batch * op.channels + channel] = value;
  }
  // What enters the first position worked on, and where the carry goes that leaves the last one. Backward, positions
  // are worked on from the last to the first.
  T entering(int64_t batch, int64_t channel) const {
    if (!backward) return initial(batch, channel);
    return forgotten(batch) ? T(0) : element(op.grad_last_state, batch, channel);
  }
  void leave(int64_t batch, int64_t channel, T value) const {
    if (backward) {
      put(op.grad_initial_state, batch, channel, value);
    } else {
      put(op.last_state, batch, channel, forgotten(batch) ? T(0) : value);
    }
  }
  bool streams() const { return op.batch * op.channels * op.time * bytes_of(op.dtype) >= kStreamBytes; }
};

// ---- Channels contiguous in memory: a time step is a row of vectors ----

template <class T, class S>
class Rows {
 public:
  static bool fit(const wmk_linear_scan& op, bool backward) {
    const wmk_view* views[] = {&op.gates, backward ? &op.grad_out : &op.tokens, &op.out, &op.grad_gates,
                               &op.grad_tokens};
    for (const wmk_view* view : views)
      if (view->data && view->stride[1] != 1) return false;
    return op.channels >= kLanes<T>;
  }
  Rows(const wmk_linear_scan& op, bool backward) : scan_{op, backward}, op_(op) {
    int64_t vectors = divide_up(op.channels, lanes), most = kRowBytes / kVectorBytes;
    vectors_ = larger(1, smaller(most, divide_up(vectors * op.batch, op.threads)));
    blocks_ = divide_up(vectors, vectors_);
  }
  void run() const {
    parallel_for(op_.batch * blocks_, op_.threads, [&](int64_t item, int64_t) {
      int64_t batch = item / blocks_, channel = item % blocks_ * vectors_ * lanes;
      int64_t channels = smaller(vectors_ * lanes, op_.channels - channel);
      if (scan_.backward) {
        run_backward(batch, channel, int(channels));
      } else {
        run_forward(batch, channel, int(channels));
      }
      finish_streams();
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;

  const S* from(const wmk_view& view, int64_t batch, int64_t channel, int64_t time) const {
    return (const S*)view.data + batch * view.stride[0] + channel + time * view.stride[2];
  }
  S* to(const wmk_view& view, int64_t batch, int64_t channel, int64_t time) const {
    return (S*)from(view, batch, channel, time);
  }
  // The row that will be read some positions from here.
  const S* ahead(const wmk_view& view, int64_t batch, int64_t channel, int64_t position, int64_t distance) const {
    int64_t there = position + distance;
    return from(view, batch, channel, scan_.time_at(there < 0 || there >= op_.time ? position : there));
  }
  // Whether each of the item's rows starts at a multiple of a vector.
  bool aligned(const wmk_view& view, int64_t batch, int64_t channel) const {
    int64_t width = lanes * int64_t(sizeof(S));
    return int64_t(from(view, batch, channel, 0)) % width == 0 && view.stride[2] * int64_t(sizeof(S)) % width == 0;
  }

  void run_forward(int64_t batch, int64_t channel, int channels) const {
    alignas(64) T state[kRowBytes / sizeof(T)];
    for (int i = 0; i < channels; ++i) state[i] = scan_.entering(batch, channel + i);
    bool stream = scan_.streams() && aligned(op_.out, batch, channel);
    int whole = channels / lanes * lanes;
    for (int64_t p = 0; p < op_.time; ++p) {
      int64_t time = scan_.time_at(p);
      const S *gates = from(op_.gates, batch, channel, time), *tokens = from(op_.tokens, batch, channel, time);
      S* out = to(op_.out, batch, channel, time);
      bool fresh = scan_.fresh(batch, p);
      const S *next_gates = ahead(op_.gates, batch, channel, p, 2),
              *next_tokens = ahead(op_.tokens, batch, channel, p, 2);
      auto advance = [&](int i, int count) {
        __builtin_prefetch(next_gates + i, 0, 2);
        __builtin_prefetch(next_tokens + i, 0, 2);
        Vector<T> h = load_some<T>(tokens + i, count);
        if (!fresh) h += load_some<T>(gates + i, count) * load(state + i);
        store(state + i, h);
        return h;
      };
      if (stream) {
        for (int i = 0; i < whole; i += lanes) stream_as(out + i, advance(i, lanes));
      } else {
        for (int i = 0; i < whole; i += lanes) store_as(out + i, advance(i, lanes));
      }
      if (whole < channels) store_some<T>(out + whole, advance(whole, channels - whole), channels - whole);
    }
    for (int i = 0; i < channels; ++i) scan_.leave(batch, channel + i, state[i]);
  }

  void run_backward(int64_t batch, int64_t channel, int channels) const {
    alignas(64) T carry[kRowBytes / sizeof(T)], initial[kRowBytes / sizeof(T)];
    for (int i = 0; i < channels; ++i) {
      carry[i] = scan_.entering(batch, channel + i);
      initial[i] = scan_.initial(batch, channel + i);
    }
    bool stream =
        scan_.streams() && aligned(op_.grad_gates, batch, channel) && aligned(op_.grad_tokens, batch, channel);
    int whole = channels / lanes * lanes;
    for (int64_t p = op_.time - 1; p >= 0; --p) {
      int64_t time = scan_.time_at(p);
      const S *gates = from(op_.gates, batch, channel, time), *grad_out = from(op_.grad_out, batch, channel, time);
      const S* before = p > 0 ? from(op_.out, batch, channel, scan_.time_at(p - 1)) : nullptr;
      S* grad_gates = to(op_.grad_gates, batch, channel, time);
      S* grad_tokens = to(op_.grad_tokens, batch, channel, time);
      bool fresh = scan_.fresh(batch, p);
      const S *next_gates = ahead(op_.gates, batch, channel, p, -2), *next_out = ahead(op_.out, batch, channel, p, -3);
      const S* next_grad = ahead(op_.grad_out, batch, channel, p, -2);
      auto advance = [&](int i, int count, Vector<T>& grad_gate) {
        __builtin_prefetch(next_gates + i, 0, 2);
        __builtin_prefetch(next_out + i, 0, 2);
        __builtin_prefetch(next_grad + i, 0, 2);
        Vector<T> grad = load_some<T>(grad_out + i, count) + load(carry + i);
        Vector<T> previous = before ? load_some<T>(before + i, count) : load(initial + i);
        grad_gate = fresh ? Vector<T>{} : grad * previous;
        store(carry + i, fresh ? Vector<T>{} : load_some<T>(gates + i, count) * grad);
        return grad;
      };
      Vector<T> grad_gate;
      for (int i = 0; i < whole; i += lanes) {
        Vector<T> grad = advance(i, lanes, grad_gate);
        if (stream) {
          stream_as(grad_tokens + i, grad);
          stream_as(grad_gates + i, grad_gate);
        } else {
          store_as(grad_tokens + i, grad);
          store_as(grad_gates + i, grad_gate);
        }
      }
      if (whole < channels) {
        Vector<T> grad = advance(whole, channels - whole, grad_gate);
        store_some<T>(grad_tokens + whole, grad, channels - whole);
        store_some<T>(grad_gates + whole, grad_gate, channels - whole);
      }
    }
    for (int i = 0; i < channels; ++i) scan_.leave(batch, channel + i, carry[i]);
  }

  Scan<T> scan_;
  const wmk_linear_scan& op_;
  int64_t vectors_, blocks_;  // vectors an item, items a batch element
};

// ---- Any strides: a channel a lane, squares of lanes x lanes elements ----

template <class T, class S>
class Squares {
 public:
  Squares(const wmk_linear_scan& op, bool backward) : scan_{op, backward}, op_(op) {
    joined_ = joins(op.gates) && joins(op.tokens) && joins(op.out) && joins(op.grad_out) && joins(op.grad_gates) &&
              joins(op.grad_tokens);
    rows_ = joined_ ? op.batch * op.channels : op.channels;
    tiles_ = divide_up(rows_, lanes);
    groups_ = joined_ ? 1 : op.batch;
    segments_ = 1;
    if (groups_ * tiles_ < kBusyItems) segments_ = larger(1, smaller(kMaxSegments, op.time / kSegmentSteps));
    segment_ = round_up(divide_up(larger(op.time, 1), segments_), span);
    segments_ = larger(1, divide_up(op.time, segment_));
  }
  // What enters a segment, and what it adds and multiplies: [groups][tiles][segments][lanes].
  int64_t workspace() const {
    Arena arena(nullptr);
    Scratch(arena, segments_ > 1 ? groups_ * tiles_ * segments_ * lanes : 0);
    return arena.used();
  }
  void run() const {
    Arena arena(op_.workspace);
    Scratch s(arena, segments_ > 1 ? groups_ * tiles_ * segments_ * lanes : 0);
    if (segments_ > 1) {
      parallel_for(groups_ * tiles_ * segments_, op_.threads, [&](int64_t item, int64_t) {
        Tile tile = tile_of(item / segments_);
        Vector<T> sum{}, product = broadcast(T(1));
        run_segment<true>(tile, item % segments_, sum, product);
        store(s.added + item * lanes, sum);
        store(s.multiplied + item * lanes, product);
      });
      for (int64_t item = 0; item < groups_ * tiles_; ++item) chain(s, item);
    }
    parallel_for(groups_ * tiles_ * segments_, op_.threads, [&](int64_t item, int64_t) {
      Tile tile = tile_of(item / segments_);
      int64_t segment = item % segments_;
      Vector<T> carry = segments_ > 1 ? load(s.entering + item * lanes) : entering(tile), unused{};
      run_segment<false>(tile, segment, carry, unused);
      if (segment == (scan_.backward ? 0 : segments_ - 1))
        for (int i = 0; i < tile.rows; ++i) scan_.leave(batch_of(tile, i), channel_of(tile, i), carry[i]);
      finish_streams();
    });
  }

 private:
  static constexpr int lanes = kLanes<T>;
  static constexpr int span = 4 * lanes;  // steps worked on at once: the squares of one overlap in the pipeline
  typedef typename Scan<T>::Mask Mask;

  struct Scratch {
    T *added, *multiplied, *entering;
    Scratch(Arena& arena, int64_t count)
        : added(arena.take<T>(count)), multiplied(arena.take<T>(count)), entering(arena.take<T>(count)) {}
  };
  struct Tile {
    int64_t group, row;
    int rows;
  };

  // Whether batch and channels together are rows at one stride.
  bool joins(const wmk_view& view) const {
    return !view.data || op_.batch == 1 || op_.channels == 1 || view.stride[0] == op_.channels * view.stride[1];
  }
  Plane plane(const wmk_view& view, int64_t group) const {
    int64_t row_stride = joined_ && op_.channels == 1 ? view.stride[0] : view.stride[1];
    return {(char*)view.data + group * view.stride[0] * int64_t(sizeof(S)), row_stride, view.stride[2]};
  }
  Tile tile_of(int64_t item) const {
    int64_t row = item % tiles_ * lanes;
    return {item / tiles_, row, int(smaller(lanes, rows_ - row))};
  }
  int64_t batch_of(const Tile& tile, int lane) const { return joined_ ? (tile.row + lane) / op_.channels : tile.group; }
  int64_t channel_of(const Tile& tile, int lane) const {
    return joined_ ? (tile.row + lane) % op_.channels : tile.row + lane;
  }
  Vector<T> entering(const Tile& tile) const {
    Vector<T> values{};
    for (int i = 0; i < tile.rows; ++i) values[i] = scan_.entering(batch_of(tile, i), channel_of(tile, i));
    return values;
  }

  // From each segment's own ends to what enters it. Zero stays zero however large the product has grown.
  void chain(const Scratch& s, int64_t item) const {
    Vector<T> carry = entering(tile_of(item));
    for (int64_t i = 0; i < segments_; ++i) {
      int64_t segment = scan_.backward ? segments_ - 1 - i : i, at = (item * segments_ + segment) * lanes;
      store(s.entering + at, carry);
      Vector<T> added = load(s.added + at), multiplied = load(s.multiplied + at);
      carry = (carry == 0) | (multiplied == 0) ? added : multiplied * carry + added;
    }
  }

  // The lanes that start afresh at each of `steps` positions, from `position` on; false where there is none.
  bool load_fresh(Mask* fresh, const Tile& tile, int64_t position, int64_t steps) const {
    if (!op_.reset.data) return false;
    bool any = false;
    for (int64_t step = 0; step < steps; ++step) {
      fresh[step] = Mask{};
      for (int lane = 0; lane < tile.rows;) {
        int64_t batch = batch_of(tile, lane);
        bool here = scan_.fresh(batch, position + step);
        for (; lane < tile.rows && batch_of(tile, lane) == batch; ++lane)
          if (here) fresh[step][lane] = -1;
        any |= here;
      }
    }
    return any;
  }

  // Square of one plane in the order of positions: row i is position + i.
  void load_square(T* square, const wmk_view& view, const Tile& tile, int64_t position, int64_t steps) const {
    Plane p = plane(view, tile.group);
    int64_t time = scan_.time_at(position), step = op_.reverse ? -1 : 1;
    const S* from = (const S*)p.data + tile.row * p.row_stride + time * p.time_stride;
    if (step < 0 && p.time_stride == 1 && steps % lanes == 0) {
      // Read forwards, whole lines at a time, and turn the order of the rows round.
      load_tile(square + (steps - 1) * lanes, -lanes, from - (steps - 1), p.row_stride, 1, tile.rows, steps);
    } else {
      load_tile(square, lanes, from, p.row_stride, step * p.time_stride, tile.rows, steps);
    }
  }
  void store_square(const T* square, const wmk_view& view, const Tile& tile, int64_t position, int64_t steps,
                    bool stream) const {
    Plane p = plane(view, tile.group);
    int64_t time = scan_.time_at(position), step = op_.reverse ? -1 : 1, pitch = lanes;
    S* to = (S*)p.data + tile.row * p.row_stride + time * p.time_stride;
    if (step < 0 && p.time_stride == 1 && steps % lanes == 0) {
      square += (steps - 1) * lanes;
      pitch = -lanes;
      to -= steps - 1;
      step = 1;
    }
    if (stream && p.time_stride == 1 && step == 1 && steps % lanes == 0 && tile.rows == lanes &&
        sizeof(S) == sizeof(T) && int64_t(to) % kVectorBytes == 0 && p.row_stride % lanes == 0) {
      for (int64_t done = 0; done < steps; done += lanes) {
        Vector<T> turned[lanes];
        for (int i = 0; i < lanes; ++i) turned[i] = load(square + (done + i) * pitch);
        transpose<T>(turned);
        for (int i = 0; i < lanes; ++i) stream_as(to + i * p.row_stride + done, turned[i]);
      }
    } else {
      store_tile(square, pitch, to, p.row_stride, step * p.time_stride, tile.rows, steps);
    }
  }
  // Asks for what will be read two spans from here.
  void prefetch(const wmk_view& view, const Tile& tile, int64_t position) const {
    int64_t ahead = position + (scan_.backward ? -2 : 2) * span;
    if (ahead < 0 || ahead + span > op_.time) return;
    Plane p = plane(view, tile.group);
    int64_t time = smaller(scan_.time_at(ahead), scan_.time_at(ahead + span - 1));
    const char* from = (const char*)((const S*)p.data + tile.row * p.row_stride + time * p.time_stride);
    int64_t bytes = p.time_stride == 1 ? span * int64_t(sizeof(S)) : 1;
    for (int row = 0; row < tile.rows; ++row)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(from + row * p.row_stride * int64_t(sizeof(S)) + byte, 0, 2);
  }

  // One segment. Ends: only the carry that leaves it, from the one given, and the product of its gates.
  template <bool Ends>
  void run_segment(const Tile& tile, int64_t segment, Vector<T>& carry, Vector<T>& product) const {
    int64_t begin = segment * segment_, end = smaller(op_.time, begin + segment_);
    bool stream = !Ends && scan_.streams();
    int64_t spans = divide_up(end - begin, span);
    for (int64_t i = 0; i < spans; ++i) {
      int64_t position = begin + (scan_.backward ? spans - 1 - i : i) * span;
      int64_t steps = smaller(span, end - position);
      alignas(64) T gates[span * lanes], values[span * lanes];
      Mask fresh[span];
      prefetch(op_.gates, tile, position);
      prefetch(scan_.backward ? op_.grad_out : op_.tokens, tile, position);
      bool any = load_fresh(fresh, tile, position, steps);
      load_square(gates, op_.gates, tile, position, steps);
      load_square(values, scan_.backward ? op_.grad_out : op_.tokens, tile, position, steps);
      if (!scan_.backward) {
        for (int64_t t = 0; t < steps; ++t) {
          Vector<T> gate = load(gates + t * lanes), token = load(values + t * lanes), moved = gate * carry + token;
          carry = any ? fresh[t] ? token : moved : moved;
          if (Ends) product = any ? fresh[t] ? Vector<T>{} : product * gate : product * gate;
          store(values + t * lanes, carry);
        }
        if (!Ends) store_square(values, op_.out, tile, position, steps, stream);
      } else {
        for (int64_t t = steps; t-- > 0;) {
          Vector<T> gate = load(gates + t * lanes), grad = load(values + t * lanes) + carry, moved = gate * grad;
          carry = any ? fresh[t] ? Vector<T>{} : moved : moved;
          if (Ends) product = any ? fresh[t] ? Vector<T>{} : product * gate : product * gate;
          store(values + t * lanes, grad);
        }
        if (!Ends) finish_backward(values, fresh, any, tile, position, steps, stream);
      }
    }
  }

  // Gradients of tokens and gates, from those of the states: a gate's is its state's times the state before.
  void finish_backward(const T* grads, const Mask* fresh, bool any, const Tile& tile, int64_t position, int64_t steps,
                       bool stream) const {
    alignas(64) T before[(span + 1) * lanes];
    prefetch(op_.out, tile, position);
    load_square(before + lanes, op_.out, tile, position, steps);
    if (position > 0) {
      load_square(before, op_.out, tile, position - 1, 1);
    } else {
      for (int i = 0; i < lanes; ++i)
        before[i] = i < tile.rows ? scan_.initial(batch_of(tile, i), channel_of(tile, i)) : T(0);
    }
    for (int64_t t = 0; t < steps; ++t) {
      Vector<T> grad = load(grads + t * lanes) * load(before + t * lanes);
      store(before + t * lanes, any ? fresh[t] ? Vector<T>{} : grad : grad);
    }
    store_square(grads, op_.grad_tokens, tile, position, steps, stream);
    store_square(before, op_.grad_gates, tile, position, steps, stream);
  }

  Scan<T> scan_;
  const wmk_linear_scan& op_;
  bool joined_;                    // rows are all channels of all batch elements, not those of one
  int64_t rows_, tiles_, groups_;  // rows of a group, tiles of a group, groups
  int64_t segments_, segment_;     // segments of time, and their length
};

// Calls work with the types of arithmetic and storage.
template <class Work>
auto with_types(const wmk_linear_scan& op, const Work& work) {
  switch (op.dtype) {
    case WMK_FLOAT64:
      return work(double(), double());
    case WMK_BFLOAT16:
      return work(float(), BFloat16());
    case WMK_FLOAT16:
      return work(float(), Float16());
    default:
      return work(float(), float());
  }
}

int run(const wmk_linear_scan& op, bool backward) {
  return with_types(op, [&](auto arithmetic, auto storage) {
    typedef decltype(arithmetic) T;
    typedef decltype(storage) S;
    if (Rows<T, S>::fit(op, backward)) {
      Rows<T, S>(op, backward).run();
    } else {
      Squares<T, S>(op, backward).run();
    }
    return int(WMK_OK);
  });
}

int64_t workspace(const wmk_linear_scan& op, bool backward) {
  return with_types(op, [&](auto arithmetic, auto storage) {
    return Squares<decltype(arithmetic), decltype(storage)>(op, backward).workspace();
  });
}

}  // namespace

int64_t linear_scan_forward_workspace(const wmk_linear_scan& op) { return workspace(op, false); }
int64_t linear_scan_backward_workspace(const wmk_linear_scan& op) { return workspace(op, true); }
int linear_scan_forward(const wmk_linear_scan& op) { return run(op, false); }
int linear_scan_backward(const wmk_linear_scan& op) { return run(op, true); }

}  // namespace wmk::WMK_ISA
