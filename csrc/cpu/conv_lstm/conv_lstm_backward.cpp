// ConvLSTM, backward, on the CPU.
//
// A step's gates, saved or recomputed, become their gradients in place. While these are in the cache, they are
// convolved with the weights (gradients of h and x) and multiplied by h and x (weight gradients): no gate tensor is
// written. Each of the three convolutions costs as much as forward. Weight gradients are summed per worker, then
// reduced in fixed order.
#include "cpu/conv_lstm/conv_lstm_gradients.h"

namespace wmk::WMK_ISA {
namespace {

template <class T, class S>
class Backward : Gradients<T, S> {
  using Base = Gradients<T, S>;
  using Base::block;
  using Base::halo;
  using Base::hh;
  using Base::ih;
  using Base::lanes;
  using Base::op;
  using Base::sizes;

 public:
  explicit Backward(const wmk_conv_lstm& arguments)
      : Base(arguments),
        partial_size_(Base::weights_size_ih() + Base::weights_size_hh() + sizes.gates + Base::packed_peephole()),
        partition_(op, sizes.tiled, max(1, kPartialsBytes / (partial_size_ * int64_t(sizeof(T))))),
        arena_(op.workspace) {
    weight_ih_ = take<T>(recomputes() ? Base::weights_size_ih() : 0);
    weight_hh_ = take<T>(recomputes() ? Base::weights_size_hh() : 0);
    const int64_t flipped_ih = Base::flipped_size(ih, sizes.gates), flipped_hh = Base::flipped_size(hh, sizes.gates);
    packed_ =
        take<T>(sizes.tiled ? max(partition_.workers * Base::pack_scratch_size(), max(flipped_ih, flipped_hh)) : 0);
    flipped_ih_ = take<T>(Base::tiles_x() ? flipped_ih * kTileElements / 9 : flipped_ih);
    flipped_hh_ = take<T>(Base::tiles_h() ? flipped_hh * kTileElements / 9 : flipped_hh);
    bias_ = take<T>(sizes.gates);
    peephole_ = take<T>(Base::packed_peephole());
    x_ = take<T>(partition_.buffers * x_size());
    h_ = take<T>(partition_.buffers * h_size());
    gates_ = take<T>(partition_.buffers * Base::gate_size());
    grad_h_ = take<T>(partition_.buffers * sizes.positions * grad_pitch());
    grad_c_ = take<T>(partition_.buffers * sizes.positions * sizes.padded_hidden);
    partials_ = take<T>(partition_.workers * partial_size_);
    scratch_ = Base::take_scratch(arena_, partition_.workers);
  }
  int64_t workspace() const { return arena_.used(); }

  void run() const {
    if (recomputes()) Base::pack_weights(weight_ih_, weight_hh_, packed_, partition_.workers);
    pack_flipped(flipped_ih_, op.weight_ih, ih, Base::tiles_x());
    pack_flipped(flipped_hh_, op.weight_hh, hh, Base::tiles_h());
    Base::pack_bias(bias_);
    Base::pack_peephole(peephole_);
    memset(h_, 0, size_t(partition_.buffers * h_size()) * sizeof(T));
    memset(gates_, 0, size_t(partition_.buffers * Base::gate_size()) * sizeof(T));
    memset(partials_, 0, size_t(partition_.workers * partial_size_) * sizeof(T));
    if (partition_.by_element) {
      for_each_band(op, partition_, [&](int64_t worker, int64_t batch, int64_t top, int64_t bottom) {
        begin(worker, batch, top, bottom);
        for (int64_t time = op.time - 1; time >= 0; --time) {
          pad(worker, time, batch, top, bottom);
          gate_gradients(worker, worker, time, batch, top, bottom);
          backpropagate(worker, worker, time, batch, top, bottom);
        }
        end(worker, batch, top, bottom);
      });
    } else {
      for_each_band(op, partition_,
                    [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { begin(batch, batch, top, bottom); });
      for (int64_t time = op.time - 1; time >= 0; --time) {
        for_each_band(op, partition_, [&](int64_t, int64_t batch, int64_t top, int64_t bottom) {
          pad(batch, time, batch, top, bottom);
        });
        for_each_band(op, partition_, [&](int64_t worker, int64_t batch, int64_t top, int64_t bottom) {
          gate_gradients(worker, batch, time, batch, top, bottom);
        });
        for_each_band(op, partition_, [&](int64_t worker, int64_t batch, int64_t top, int64_t bottom) {
          backpropagate(worker, batch, time, batch, top, bottom);
        });
      }
      for_each_band(op, partition_,
                    [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { end(batch, batch, top, bottom); });
    }
    store_parameters();
  }

 private:
  template <class Kind>
  Kind* take(int64_t count) {
    return arena_.template take<Kind>(count);
  }
  void pack_flipped(T* to, const wmk_view& weight, const Convolution& by, bool tiles) const {
    if (tiles) return Base::flip_weight_to_tiles(to, packed_, weight, by);
    Base::flip_weight(to, weight, by);
  }
  bool recomputes() const { return !op.gates.data; }
  int64_t x_size() const { return sizes.x_rows * sizes.x_columns * op.input; }
  int64_t h_size() const { return sizes.h_rows * sizes.h_columns * op.hidden; }
  int64_t grad_pitch() const { return hh.blocks * hh.vectors * lanes; }
  PaddedMap<T> x_map(int64_t buffer) const { return {x_ + buffer * x_size(), sizes.x_columns, op.input}; }
  PaddedMap<T> h_map(int64_t buffer) const { return {h_ + buffer * h_size(), sizes.h_columns, op.hidden}; }
  PaddedMap<T> gate_map(int64_t buffer) const {
    return {gates_ + buffer * Base::gate_size(), Base::gate_columns(), sizes.gates};
  }
  T* grad_h(int64_t buffer, int64_t position) const {
    return grad_h_ + (buffer * sizes.positions + position) * grad_pitch();
  }
  T* grad_c(int64_t buffer, int64_t position) const {
    return grad_c_ + (buffer * sizes.positions + position) * sizes.padded_hidden;
  }
  T* sums_ih(int64_t worker) const { return partials_ + worker * partial_size_; }
  T* sums_hh(int64_t worker) const { return sums_ih(worker) + Base::weights_size_ih(); }
  T* sums_bias(int64_t worker) const { return sums_hh(worker) + Base::weights_size_hh(); }
  T* sums_peephole(int64_t worker) const { return sums_bias(worker) + sizes.gates; }

  void begin(int64_t buffer, int64_t batch, int64_t top, int64_t bottom) const {
    const int64_t first = top * op.width, count = (bottom - top) * op.width;
    memset(grad_h(buffer, first), 0, size_t(count * grad_pitch()) * sizeof(T));
    memset(grad_c(buffer, first), 0, size_t(count * sizes.padded_hidden) * sizeof(T));
    if (op.grad_hn.data)
      Base::template read_state<S>(grad_h(buffer, first), grad_pitch(), op.grad_hn, batch, top, bottom);
    if (op.grad_cn.data)
      Base::template read_state<T>(grad_c(buffer, first), sizes.padded_hidden, op.grad_cn, batch, top, bottom);
  }

  void pad(int64_t buffer, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    Base::pad_x(x_map(buffer), time, batch, sizes.x_rows * top / op.height, sizes.x_rows * bottom / op.height);
    if (!Base::recurs(time, batch)) return;
    if (time == 0) return Base::read_h0(h_map(buffer), batch, top, bottom);
    const S* from = (const S*)op.out.data + ((time - 1) * op.batch + batch) * sizes.positions * op.hidden;
    for (int64_t y = top; y < bottom; ++y)
      Base::read_positions(h_map(buffer).at(y + sizes.h_top, sizes.h_left), op.hidden, from + y * op.width * op.hidden,
                           1, op.hidden, op.hidden, op.width);
  }

  void gate_gradients(int64_t worker, int64_t buffer, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    const PaddedMap<T> x = x_map(buffer), h = h_map(buffer), gates = gate_map(buffer);
    const bool recurs = Base::recurs(time, batch);
    const auto use = [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
      T* to = gates.at(y + halo.top, column + halo.left) + b * block;
      segment_gate_gradients(sums, to, worker, buffer, time, batch, b, y * op.width + column, width);
    };
    if (recomputes()) {
      return Base::sum_gates(Base::scratch_of(scratch_, worker), x, weight_ih_, recurs ? &h : nullptr, weight_hh_,
                             bias_, top, bottom, use);
    }
    alignas(64) T sums[kSegmentPositions * block];
    for (int64_t b = 0; b < sizes.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t column = 0; column < op.width; column += kSegmentPositions) {
          const int64_t width = min(kSegmentPositions, op.width - column);
          read_gates(sums, time, batch, b, y * op.width + column, width);
          use(sums, b, y, column, width);
        }
  }
  void read_gates(T* to, int64_t time, int64_t batch, int64_t b, int64_t position, int64_t count) const {
    const int64_t valid = min(lanes, op.hidden - b * lanes), pitch = kGates * op.hidden;
    const T* from = (const T*)op.gates.data + ((time * op.batch + batch) * sizes.positions + position) * pitch;
    from += b * lanes;
    for (int64_t p = 0; p < count; ++p, from += pitch)
      for (int64_t gate = 0; gate < kGates; ++gate, to += lanes)
        store(to, load_lanes<T>(from + gate * op.hidden, valid));
  }

  // `sums`: activated gates, or their sums if recomputed.
  void segment_gate_gradients(const T* sums, T* to, int64_t worker, int64_t buffer, int64_t time, int64_t batch,
                              int64_t b, int64_t position, int64_t count) const {
    const int64_t channel = b * lanes, valid = min(lanes, op.hidden - channel);
    const bool reset = Base::resets(time, batch);
    alignas(64) T grad_out[kSegmentPositions * lanes], before[kSegmentPositions * lanes];
    read_block<S>(grad_out, op.grad_out, 1, time, batch, channel, valid, position, count);
    if (time > 0) {
      read_cells(before, time - 1, batch, channel, valid, position, count);
    } else {
      read_block<T>(before, op.c0, 0, batch, 0, channel, valid, position, count);
    }
    const T* cells = (const T*)op.cells.data + kept_offset(time, batch, position) + channel;
    T* grad_h_here = grad_h(buffer, position) + channel;
    T* grad_c_here = grad_c(buffer, position) + channel;
    const int64_t padded = sizes.padded_hidden;
    const int64_t peephole_step = op.peephole_varies ? 3 * padded : 0;
    const T* peephole = peephole_ + position * peephole_step + channel;
    T* grad_peephole = sums_peephole(worker) + position * peephole_step + channel;
    const Vector<T> one = Vector<T>{} + 1;
    Vector<T> sum_i{}, sum_f{}, sum_g{}, sum_o{}, peep_i{}, peep_f{}, peep_o{};
    for (int64_t p = 0; p < count; ++p, sums += block, to += sizes.gates) {
      Vector<T> i = load(sums), f = load(sums + lanes), g = load(sums + 2 * lanes), o = load(sums + 3 * lanes);
      const Vector<T> c = load_lanes<T>(cells + p * op.hidden, valid);
      const Vector<T> c_prev = reset ? Vector<T>{} : load(before + p * lanes);
      Vector<T> w_i{}, w_f{}, w_o{};
      if (op.peephole.data) {
        const T* weights = peephole + p * peephole_step;
        w_i = load(weights), w_f = load(weights + padded), w_o = load(weights + 2 * padded);
      }
      if (recomputes()) {
        if (op.peephole.data) i += w_i * c_prev, f += w_f * c_prev, o += w_o * c;
        i = sigmoid(i), f = sigmoid(f), g = tanh(g), o = sigmoid(o);
      }
      const Vector<T> tanh_c = tanh(c);
      const Vector<T> d_h = load(grad_out + p * lanes) + load(grad_h_here + p * grad_pitch());
      Vector<T> d_o = d_h * tanh_c * o * (one - o);
      Vector<T> d_c = load(grad_c_here + p * padded) + d_h * o * (one - tanh_c * tanh_c);
      if (op.peephole.data) d_c += d_o * w_o;
      Vector<T> d_i = d_c * g * i * (one - i), d_f = d_c * c_prev * f * (one - f), d_g = d_c * i * (one - g * g);
      if (valid < lanes) {  // padding channels: zero weights times an infinite x or h are NaN
        d_i = first_lanes(d_i, valid), d_f = first_lanes(d_f, valid);
        d_g = first_lanes(d_g, valid), d_o = first_lanes(d_o, valid);
      }
      Vector<T> d_c_prev = d_c * f;
      if (op.peephole.data) d_c_prev += d_i * w_i + d_f * w_f;
      store(grad_c_here + p * padded, reset ? Vector<T>{} : d_c_prev);
      store(to, d_i), store(to + lanes, d_f), store(to + 2 * lanes, d_g), store(to + 3 * lanes, d_o);
      sum_i += d_i, sum_f += d_f, sum_g += d_g, sum_o += d_o;
      if (!op.peephole.data) continue;
      peep_i += d_i * c_prev, peep_f += d_f * c_prev, peep_o += d_o * c;
      if (op.peephole_varies) {
        add_peephole(grad_peephole + p * peephole_step, peep_i, peep_f, peep_o);
        peep_i = peep_f = peep_o = Vector<T>{};
      }
    }
    T* bias = sums_bias(worker) + b * block;
    store(bias, load(bias) + sum_i), store(bias + lanes, load(bias + lanes) + sum_f);
    store(bias + 2 * lanes, load(bias + 2 * lanes) + sum_g), store(bias + 3 * lanes, load(bias + 3 * lanes) + sum_o);
    if (op.peephole.data && !op.peephole_varies) add_peephole(grad_peephole, peep_i, peep_f, peep_o);
  }
  static Vector<T> first_lanes(Vector<T> x, int64_t valid) {
    alignas(64) T values[lanes];
    store(values, x);
    return load_lanes<T>(values, valid);
  }
  void add_peephole(T* to, Vector<T> i, Vector<T> f, Vector<T> o) const {
    const int64_t padded = sizes.padded_hidden;
    store(to, load(to) + i), store(to + padded, load(to + padded) + f),
        store(to + 2 * padded, load(to + 2 * padded) + o);
  }
  int64_t kept_offset(int64_t time, int64_t batch, int64_t position) const {
    return ((time * op.batch + batch) * sizes.positions + position) * op.hidden;
  }
  void read_cells(T* to, int64_t time, int64_t batch, int64_t channel, int64_t valid, int64_t position,
                  int64_t count) const {
    const T* from = (const T*)op.cells.data + kept_offset(time, batch, position) + channel;
    for (int64_t p = 0; p < count; ++p) store(to + p * lanes, load_lanes<T>(from + p * op.hidden, valid));
  }
  // [.., .., channels, positions], channels at dimension `axis` + 1; zeros where absent.
  template <class From>
  void read_block(T* to, const wmk_view& view, int64_t axis, int64_t first, int64_t second, int64_t channel,
                  int64_t valid, int64_t position, int64_t count) const {
    if (!view.data || valid < lanes) memset(to, 0, size_t(count * lanes) * sizeof(T));
    if (!view.data) return;
    const int64_t* stride = view.stride + axis;
    const From* from = (const From*)view.data + first * view.stride[0] + (axis ? second * view.stride[1] : 0);
    Base::read_positions(to, lanes, from + channel * stride[1] + position * stride[2], stride[1], stride[2], valid,
                         count);
  }

  void backpropagate(int64_t worker, int64_t buffer, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    const PaddedMap<T> gates = gate_map(buffer);
    const typename Base::Scratch scratch = Base::scratch_of(scratch_, worker);
    if (Base::recurs(time, batch)) {
      backpropagate_h(scratch, gates, buffer, top, bottom);
    } else {
      memset(grad_h(buffer, top * op.width), 0, size_t((bottom - top) * op.width * grad_pitch()) * sizeof(T));
    }
    backpropagate_x(scratch, gates, time, batch, top, bottom);
    add_weight_gradients(scratch, gates, worker, buffer, Base::recurs(time, batch), top, bottom);
  }
  void backpropagate_h(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t buffer, int64_t top,
                       int64_t bottom) const {
    const int64_t pitch = hh.vectors * lanes;
    if (Base::tiles_h()) {
      return Base::backpropagate_tiles(scratch, gates, hh, flipped_hh_, top, bottom, op.width,
                                       [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
                                         T* to = grad_h(buffer, y * op.width + column) + b * pitch;
                                         for (int64_t p = 0; p < width; ++p)
                                           memcpy(to + p * grad_pitch(), sums + p * pitch, size_t(pitch) * sizeof(T));
                                       });
    }
    for (int64_t b = 0; b < hh.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t count = Base::input_terms(scratch.terms, gates, hh, flipped_hh_, b, y, 0);
        gemm_accumulate(int(hh.vectors), grad_h(buffer, y * op.width) + b * pitch, grad_pitch(), (const T*)nullptr,
                        scratch.terms, count, 0, op.width);
      }
  }
  void backpropagate_x(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t time, int64_t batch,
                       int64_t top, int64_t bottom) const {
    const int64_t pitch = ih.vectors * lanes, together = Base::tiles_x() ? 2 : 1, share = op.x_height / together;
    top = share * top / op.height * together, bottom = share * bottom / op.height * together;
    S* map = (S*)op.grad_x.data + (time * op.batch + batch) * op.x_height * op.x_width * op.input;
    const auto write = [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t count, int64_t stride) {
      const int64_t channel = b * pitch;
      S* to = map + (y * op.x_width + column) * op.input + channel;
      for (int64_t p = 0; p < count; ++p, sums += pitch, to += stride * op.input)
        for (int64_t c = 0; c < pitch && channel + c < op.input; c += lanes)
          store_lanes<T>(to + c, load(sums + c), min(lanes, op.input - channel - c));
    };
    if (Base::tiles_x()) {
      return Base::backpropagate_tiles(scratch, gates, ih, flipped_ih_, top, bottom, op.x_width,
                                       [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
                                         write(sums, b, y, column, width, 1);
                                       });
    }
    alignas(64) T sums[kSegmentPositions * block];
    for (int64_t b = 0; b < ih.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t phase = 0; phase < min(ih.stride_width, op.x_width); ++phase) {
          const int64_t count = Base::input_terms(scratch.terms, gates, ih, flipped_ih_, b, y, phase);
          const int64_t columns = ceil_div(op.x_width - phase, ih.stride_width);
          for (int64_t column = 0; column < columns; column += kSegmentPositions) {
            const int64_t width = min(kSegmentPositions, columns - column);
            gemm_accumulate(int(ih.vectors), sums, pitch, (const T*)nullptr, scratch.terms, count, column, width);
            write(sums, b, y, phase + column * ih.stride_width, width, ih.stride_width);
          }
        }
  }
  void add_weight_gradients(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t worker,
                            int64_t buffer, bool recurs, int64_t top, int64_t bottom) const {
    if (sizes.tiled) {
      Base::add_tiles(sums_ih(worker), scratch, x_map(buffer), gates, ih, top, bottom);
      if (recurs) Base::add_tiles(sums_hh(worker), scratch, h_map(buffer), gates, hh, top, bottom);
      return;
    }
    const int64_t rows = max(1, kChunkBytes / (op.width * sizes.gates * int64_t(sizeof(T))));
    for (int64_t y = top; y < bottom; y += rows) {
      const int64_t end = min(bottom, y + rows);
      Base::add_weight_gradient(sums_ih(worker), x_map(buffer), gates, ih, y, end);
      if (recurs) Base::add_weight_gradient(sums_hh(worker), h_map(buffer), gates, hh, y, end);
    }
  }

  void end(int64_t buffer, int64_t batch, int64_t top, int64_t bottom) const {
    for (int64_t position = top * op.width; position < bottom * op.width; ++position) {
      const int64_t start = (batch * sizes.positions + position) * op.hidden;
      for (int64_t c = 0; c < op.hidden; c += lanes) {
        const int64_t valid = min(lanes, op.hidden - c);
        if (op.grad_h0.data) store_lanes<T>((S*)op.grad_h0.data + start + c, load(grad_h(buffer, position) + c), valid);
        if (op.grad_c0.data) store_lanes<T>((T*)op.grad_c0.data + start + c, load(grad_c(buffer, position) + c), valid);
      }
    }
  }

  void store_parameters() const {
    Base::store_weight_gradient(op.grad_weight_ih, sums_ih(0), partition_.workers, partial_size_, ih);
    Base::store_weight_gradient(op.grad_weight_hh, sums_hh(0), partition_.workers, partial_size_, hh);
    const auto total = [&](const T* sums) {
      T sum = 0;
      for (int64_t worker = 0; worker < partition_.workers; ++worker) sum += sums[worker * partial_size_];
      return sum;
    };
    for (int64_t out = 0; op.grad_bias.data && out < kGates * op.hidden; ++out) {
      const int64_t gate = out / op.hidden, c = out % op.hidden;
      ((T*)op.grad_bias.data)[out] = total(sums_bias(0) + c / lanes * block + gate * lanes + c % lanes);
    }
    const int64_t count = Base::peephole_positions();
    for (int64_t row = 0; op.grad_peephole.data && row < 3 * op.hidden; ++row)
      for (int64_t position = 0; position < count; ++position) {
        const T* sums = sums_peephole(0) + (position * 3 + row / op.hidden) * sizes.padded_hidden + row % op.hidden;
        ((T*)op.grad_peephole.data)[row * count + position] = total(sums);
      }
  }

  int64_t partial_size_;
  WorkPartition partition_;
  Arena arena_;
  T *weight_ih_, *weight_hh_, *packed_;  // if gates are recomputed; packed_: for Winograd transforms
  T *flipped_ih_, *flipped_hh_;
  T *bias_, *peephole_;
  T *x_, *h_, *gates_;   // [buffers]
  T *grad_h_, *grad_c_;  // [buffers][positions][padded channels]
  T* partials_;          // [workers][weight_ih, weight_hh, bias, peephole]
  typename Base::Scratch scratch_;
};

}  // namespace

int64_t conv_lstm_backward_workspace(const wmk_conv_lstm& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    return Backward<decltype(arithmetic), decltype(storage)>(op).workspace();
  });
}
int conv_lstm_backward(const wmk_conv_lstm& op) {
  with_types(op.dtype, [&](auto arithmetic, auto storage) {
    Backward<decltype(arithmetic), decltype(storage)>(op).run();
    return 0;
  });
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
