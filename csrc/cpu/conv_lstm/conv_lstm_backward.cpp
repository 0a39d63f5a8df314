// ConvLSTM, backward, on the CPU.
//
// Time runs backwards once. A step's gates, kept by the forward pass or summed again from x and h as there, turn into
// their gradients in place; these go through the weights to h of the step before and to x, and are multiplied by x and
// h into the weights' gradients, all while the map of gradients is still in the cache: no tensor of gates is written.
// Each of the three convolutions costs what the forward one does. The weights' gradients are summed over time and batch
// in as many copies as there are workers, which are added in a fixed order at the end.
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
  explicit Backward(const wmk_conv_lstm& op)
      : Base(op),
        part_size_(Base::ready_ih() + Base::ready_hh() + sizes.gates + Base::packed_peephole()),
        division_(op, sizes.tiled, larger(1, kPartsBytes / (part_size_ * int64_t(sizeof(T))))),
        arena_(op.workspace) {
    weight_ih_ = take<T>(recomputes() ? Base::ready_ih() : 0);
    weight_hh_ = take<T>(recomputes() ? Base::ready_hh() : 0);
    const int64_t turned_ih = Base::turned_size(ih, sizes.gates), turned_hh = Base::turned_size(hh, sizes.gates);
    packed_ = take<T>(sizes.tiled ? larger(division_.parts * Base::ready_scratch(), larger(turned_ih, turned_hh)) : 0);
    turned_ih_ = take<T>(Base::tiles_x() ? turned_ih * kTileNumbers / 9 : turned_ih);
    turned_hh_ = take<T>(Base::tiles_h() ? turned_hh * kTileNumbers / 9 : turned_hh);
    bias_ = take<T>(sizes.gates);
    peephole_ = take<T>(Base::packed_peephole());
    x_ = take<T>(division_.slots * x_size());
    h_ = take<T>(division_.slots * h_size());
    gates_ = take<T>(division_.slots * Base::gate_size());
    grad_h_ = take<T>(division_.slots * sizes.positions * grad_pitch());
    grad_c_ = take<T>(division_.slots * sizes.positions * sizes.padded_hidden);
    parts_ = take<T>(division_.parts * part_size_);
    scratch_ = Base::take_scratch(arena_, division_.parts);
  }
  int64_t workspace() const { return arena_.used(); }

  void run() const {
    if (recomputes()) Base::ready_weights(weight_ih_, weight_hh_, packed_, division_.parts);
    ready_turned(turned_ih_, op.weight_ih, ih, Base::tiles_x());
    ready_turned(turned_hh_, op.weight_hh, hh, Base::tiles_h());
    Base::pack_bias(bias_);
    Base::pack_peephole(peephole_);
    memset(h_, 0, size_t(division_.slots * h_size()) * sizeof(T));
    memset(gates_, 0, size_t(division_.slots * Base::gate_size()) * sizeof(T));
    memset(parts_, 0, size_t(division_.parts * part_size_) * sizeof(T));
    if (division_.by_element) {
      each_band(op, division_, [&](int64_t part, int64_t batch, int64_t top, int64_t bottom) {
        begin(part, batch, top, bottom);
        for (int64_t time = op.time - 1; time >= 0; --time) {
          pad(part, time, batch, top, bottom);
          turn_gates(part, part, time, batch, top, bottom);
          send_back(part, part, time, batch, top, bottom);
        }
        end(part, batch, top, bottom);
      });
    } else {
      each_band(op, division_,
                [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { begin(batch, batch, top, bottom); });
      for (int64_t time = op.time - 1; time >= 0; --time) {
        each_band(op, division_,
                  [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { pad(batch, time, batch, top, bottom); });
        each_band(op, division_, [&](int64_t part, int64_t batch, int64_t top, int64_t bottom) {
          turn_gates(part, batch, time, batch, top, bottom);
        });
        each_band(op, division_, [&](int64_t part, int64_t batch, int64_t top, int64_t bottom) {
          send_back(part, batch, time, batch, top, bottom);
        });
      }
      each_band(op, division_,
                [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { end(batch, batch, top, bottom); });
    }
    store_parameters();
  }

 private:
  template <class Kind>
  Kind* take(int64_t count) {
    return arena_.template take<Kind>(count);
  }
  void ready_turned(T* to, const wmk_view& weight, const Convolution& by, bool tiles) const {
    if (tiles) return Base::turn_weight_to_tiles(to, packed_, weight, by);
    Base::turn_weight(to, weight, by);
  }
  bool recomputes() const { return !op.gates.data; }
  int64_t x_size() const { return sizes.x_rows * sizes.x_columns * op.input; }
  int64_t h_size() const { return sizes.h_rows * sizes.h_columns * op.hidden; }
  int64_t grad_pitch() const { return hh.blocks * hh.vectors * lanes; }
  PaddedMap<T> x_map(int64_t slot) const { return {x_ + slot * x_size(), sizes.x_columns, op.input}; }
  PaddedMap<T> h_map(int64_t slot) const { return {h_ + slot * h_size(), sizes.h_columns, op.hidden}; }
  PaddedMap<T> gate_map(int64_t slot) const {
    return {gates_ + slot * Base::gate_size(), Base::gate_columns(), sizes.gates};
  }
  T* grad_h(int64_t slot, int64_t position) const {
    return grad_h_ + (slot * sizes.positions + position) * grad_pitch();
  }
  T* grad_c(int64_t slot, int64_t position) const {
    return grad_c_ + (slot * sizes.positions + position) * sizes.padded_hidden;
  }
  // The pieces of a part.
  T* sums_ih(int64_t part) const { return parts_ + part * part_size_; }
  T* sums_hh(int64_t part) const { return sums_ih(part) + Base::ready_ih(); }
  T* sums_bias(int64_t part) const { return sums_hh(part) + Base::ready_hh(); }
  T* sums_peephole(int64_t part) const { return sums_bias(part) + sizes.gates; }

  // What comes back into the last step.
  void begin(int64_t slot, int64_t batch, int64_t top, int64_t bottom) const {
    const int64_t first = top * op.width, count = (bottom - top) * op.width;
    memset(grad_h(slot, first), 0, size_t(count * grad_pitch()) * sizeof(T));
    memset(grad_c(slot, first), 0, size_t(count * sizes.padded_hidden) * sizeof(T));
    if (op.grad_hn.data)
      Base::template read_state<S>(grad_h(slot, first), grad_pitch(), op.grad_hn, batch, top, bottom);
    if (op.grad_cn.data)
      Base::template read_state<T>(grad_c(slot, first), sizes.padded_hidden, op.grad_cn, batch, top, bottom);
  }

  // x of this step and h of the one before, with zeros around them.
  void pad(int64_t slot, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    Base::pad_x(x_map(slot), time, batch, sizes.x_rows * top / op.height, sizes.x_rows * bottom / op.height);
    if (!Base::recurs(time, batch)) return;
    if (time == 0) return Base::read_h_first(h_map(slot), batch, top, bottom);
    const S* from = (const S*)op.out.data + ((time - 1) * op.batch + batch) * sizes.positions * op.hidden;
    for (int64_t y = top; y < bottom; ++y)
      Base::read_positions(h_map(slot).at(y + sizes.h_top, sizes.h_left), op.hidden, from + y * op.width * op.hidden, 1,
                           op.hidden, op.hidden, op.width);
  }

  // Into the gradients of the gates' sums.
  void turn_gates(int64_t part, int64_t slot, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    const PaddedMap<T> x = x_map(slot), h = h_map(slot), gates = gate_map(slot);
    const bool recurs = Base::recurs(time, batch);
    const auto turn = [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
      T* to = gates.at(y + halo.top, column + halo.left) + b * block;
      turn_segment(sums, to, part, slot, time, batch, b, y * op.width + column, width);
    };
    if (recomputes()) {
      return Base::sum_gates(Base::scratch_of(scratch_, part), x, weight_ih_, recurs ? &h : nullptr, weight_hh_, bias_,
                             top, bottom, turn);
    }
    alignas(64) T sums[kSegment * block];
    for (int64_t b = 0; b < sizes.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t column = 0; column < op.width; column += kSegment) {
          const int64_t width = smaller(kSegment, op.width - column);
          read_gates(sums, time, batch, b, y * op.width + column, width);
          turn(sums, b, y, column, width);
        }
  }
  void read_gates(T* to, int64_t time, int64_t batch, int64_t b, int64_t position, int64_t count) const {
    const int64_t some = smaller(lanes, op.hidden - b * lanes), pitch = kGates * op.hidden;
    const T* from = (const T*)op.gates.data + ((time * op.batch + batch) * sizes.positions + position) * pitch;
    from += b * lanes;
    for (int64_t p = 0; p < count; ++p, from += pitch)
      for (int64_t gate = 0; gate < kGates; ++gate, to += lanes) store(to, load_part<T>(from + gate * op.hidden, some));
  }

  // `sums` holds the gates, or their sums where they are computed again.
  void turn_segment(const T* sums, T* to, int64_t part, int64_t slot, int64_t time, int64_t batch, int64_t b,
                    int64_t position, int64_t count) const {
    const int64_t channel = b * lanes, some = smaller(lanes, op.hidden - channel);
    const bool fresh = Base::resets(time, batch);
    alignas(64) T grad_out[kSegment * lanes], before[kSegment * lanes];
    read_block<S>(grad_out, op.grad_out, 1, time, batch, channel, some, position, count);
    if (time > 0) {
      read_cells(before, time - 1, batch, channel, some, position, count);
    } else {
      read_block<T>(before, op.c0, 0, batch, 0, channel, some, position, count);
    }
    const T* cells = (const T*)op.cells.data + place(time, batch, position) + channel;
    T* grad_h_here = grad_h(slot, position) + channel;
    T* grad_c_here = grad_c(slot, position) + channel;
    const int64_t padded = sizes.padded_hidden;
    const int64_t per_place = op.peephole_varies ? 3 * padded : 0;
    const T* peephole = peephole_ + position * per_place + channel;
    T* grad_peephole = sums_peephole(part) + position * per_place + channel;
    const Vector<T> one = Vector<T>{} + 1;
    Vector<T> sum_i{}, sum_f{}, sum_g{}, sum_o{}, peep_i{}, peep_f{}, peep_o{};
    for (int64_t p = 0; p < count; ++p, sums += block, to += sizes.gates) {
      Vector<T> i = load(sums), f = load(sums + lanes), g = load(sums + 2 * lanes), o = load(sums + 3 * lanes);
      const Vector<T> c = load_part<T>(cells + p * op.hidden, some);
      const Vector<T> c_prev = fresh ? Vector<T>{} : load(before + p * lanes);
      Vector<T> w_i{}, w_f{}, w_o{};
      if (op.peephole.data) {
        const T* weights = peephole + p * per_place;
        w_i = load(weights), w_f = load(weights + padded), w_o = load(weights + 2 * padded);
      }
      if (recomputes()) {
        i = sigmoid(i + w_i * c_prev), f = sigmoid(f + w_f * c_prev), g = tanh(g), o = sigmoid(o + w_o * c);
      }
      const Vector<T> squashed = tanh(c);
      const Vector<T> into_h = load(grad_out + p * lanes) + load(grad_h_here + p * grad_pitch());
      const Vector<T> into_o = into_h * squashed * o * (one - o);
      const Vector<T> into_c = load(grad_c_here + p * padded) + into_h * o * (one - squashed * squashed) + into_o * w_o;
      const Vector<T> into_i = into_c * g * i * (one - i), into_f = into_c * c_prev * f * (one - f);
      const Vector<T> into_g = into_c * i * (one - g * g);
      store(grad_c_here + p * padded, fresh ? Vector<T>{} : into_c * f + into_i * w_i + into_f * w_f);
      store(to, into_i), store(to + lanes, into_f), store(to + 2 * lanes, into_g), store(to + 3 * lanes, into_o);
      sum_i += into_i, sum_f += into_f, sum_g += into_g, sum_o += into_o;
      if (!op.peephole.data) continue;
      peep_i += into_i * c_prev, peep_f += into_f * c_prev, peep_o += into_o * c;
      if (op.peephole_varies) {
        add_peephole(grad_peephole + p * per_place, peep_i, peep_f, peep_o);
        peep_i = peep_f = peep_o = Vector<T>{};
      }
    }
    T* bias = sums_bias(part) + b * block;
    store(bias, load(bias) + sum_i), store(bias + lanes, load(bias + lanes) + sum_f);
    store(bias + 2 * lanes, load(bias + 2 * lanes) + sum_g), store(bias + 3 * lanes, load(bias + 3 * lanes) + sum_o);
    if (op.peephole.data && !op.peephole_varies) add_peephole(grad_peephole, peep_i, peep_f, peep_o);
  }
  void add_peephole(T* to, Vector<T> i, Vector<T> f, Vector<T> o) const {
    const int64_t padded = sizes.padded_hidden;
    store(to, load(to) + i), store(to + padded, load(to + padded) + f),
        store(to + 2 * padded, load(to + 2 * padded) + o);
  }
  // Where a position's channels begin in what the forward pass kept.
  int64_t place(int64_t time, int64_t batch, int64_t position) const {
    return ((time * op.batch + batch) * sizes.positions + position) * op.hidden;
  }
  void read_cells(T* to, int64_t time, int64_t batch, int64_t channel, int64_t some, int64_t position,
                  int64_t count) const {
    const T* from = (const T*)op.cells.data + place(time, batch, position) + channel;
    for (int64_t p = 0; p < count; ++p) store(to + p * lanes, load_part<T>(from + p * op.hidden, some));
  }
  // One block of channels of a tensor [.., .., channels, positions] whose channels are its dimension `axis` + 1; zeros
  // where it is absent.
  template <class From>
  void read_block(T* to, const wmk_view& view, int64_t axis, int64_t first, int64_t second, int64_t channel,
                  int64_t some, int64_t position, int64_t count) const {
    if (!view.data || some < lanes) memset(to, 0, size_t(count * lanes) * sizeof(T));
    if (!view.data) return;
    const int64_t* stride = view.stride + axis;
    const From* from = (const From*)view.data + first * view.stride[0] + (axis ? second * view.stride[1] : 0);
    Base::read_positions(to, lanes, from + channel * stride[1] + position * stride[2], stride[1], stride[2], some,
                         count);
  }

  // The gates' gradients to h of the step before, to x, and to the weights.
  void send_back(int64_t part, int64_t slot, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    const PaddedMap<T> gates = gate_map(slot);
    const typename Base::Scratch scratch = Base::scratch_of(scratch_, part);
    if (Base::recurs(time, batch)) {
      send_to_h(scratch, gates, slot, top, bottom);
    } else {
      memset(grad_h(slot, top * op.width), 0, size_t((bottom - top) * op.width * grad_pitch()) * sizeof(T));
    }
    send_to_x(scratch, gates, time, batch, top, bottom);
    add_weight_gradients(scratch, gates, part, slot, Base::recurs(time, batch), top, bottom);
  }
  void send_to_h(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t slot, int64_t top,
                 int64_t bottom) const {
    const int64_t pitch = hh.vectors * lanes;
    if (Base::tiles_h()) {
      return Base::send_tiles(scratch, gates, hh, turned_hh_, top, bottom, op.width,
                              [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
                                T* to = grad_h(slot, y * op.width + column) + b * pitch;
                                for (int64_t p = 0; p < width; ++p)
                                  memcpy(to + p * grad_pitch(), sums + p * pitch, size_t(pitch) * sizeof(T));
                              });
    }
    for (int64_t b = 0; b < hh.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t count = Base::input_terms(scratch.terms, gates, hh, turned_hh_, b, y, 0);
        sum_terms(int(hh.vectors), grad_h(slot, y * op.width) + b * pitch, grad_pitch(), (const T*)nullptr,
                  scratch.terms, count, 0, op.width);
      }
  }
  void send_to_x(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t time, int64_t batch,
                 int64_t top, int64_t bottom) const {
    const int64_t pitch = ih.vectors * lanes, together = Base::tiles_x() ? 2 : 1, share = op.x_height / together;
    top = share * top / op.height * together, bottom = share * bottom / op.height * together;
    S* map = (S*)op.grad_x.data + (time * op.batch + batch) * op.x_height * op.x_width * op.input;
    const auto write = [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t count, int64_t stride) {
      const int64_t channel = b * pitch;
      S* to = map + (y * op.x_width + column) * op.input + channel;
      for (int64_t p = 0; p < count; ++p, sums += pitch, to += stride * op.input)
        for (int64_t c = 0; c < pitch && channel + c < op.input; c += lanes)
          store_part<T>(to + c, load(sums + c), smaller(lanes, op.input - channel - c));
    };
    if (Base::tiles_x()) {
      return Base::send_tiles(scratch, gates, ih, turned_ih_, top, bottom, op.x_width,
                              [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
                                write(sums, b, y, column, width, 1);
                              });
    }
    alignas(64) T sums[kSegment * block];
    for (int64_t b = 0; b < ih.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t phase = 0; phase < smaller(ih.stride_width, op.x_width); ++phase) {
          const int64_t count = Base::input_terms(scratch.terms, gates, ih, turned_ih_, b, y, phase);
          const int64_t columns = divide_up(op.x_width - phase, ih.stride_width);
          for (int64_t column = 0; column < columns; column += kSegment) {
            const int64_t width = smaller(kSegment, columns - column);
            sum_terms(int(ih.vectors), sums, pitch, (const T*)nullptr, scratch.terms, count, column, width);
            write(sums, b, y, phase + column * ih.stride_width, width, ih.stride_width);
          }
        }
  }
  void add_weight_gradients(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, int64_t part,
                            int64_t slot, bool recurs, int64_t top, int64_t bottom) const {
    if (sizes.tiled) {
      Base::add_tiles(sums_ih(part), scratch, x_map(slot), gates, ih, top, bottom);
      if (recurs) Base::add_tiles(sums_hh(part), scratch, h_map(slot), gates, hh, top, bottom);
      return;
    }
    const int64_t rows = larger(1, kChunkBytes / (op.width * sizes.gates * int64_t(sizeof(T))));
    for (int64_t y = top; y < bottom; y += rows) {
      const int64_t end = smaller(bottom, y + rows);
      Base::add_weight_gradient(sums_ih(part), x_map(slot), gates, ih, y, end);
      if (recurs) Base::add_weight_gradient(sums_hh(part), h_map(slot), gates, hh, y, end);
    }
  }

  // What leaves the first step.
  void end(int64_t slot, int64_t batch, int64_t top, int64_t bottom) const {
    for (int64_t position = top * op.width; position < bottom * op.width; ++position) {
      const int64_t start = (batch * sizes.positions + position) * op.hidden;
      for (int64_t c = 0; c < op.hidden; c += lanes) {
        const int64_t some = smaller(lanes, op.hidden - c);
        if (op.grad_h0.data) store_part<T>((S*)op.grad_h0.data + start + c, load(grad_h(slot, position) + c), some);
        if (op.grad_c0.data) store_part<T>((T*)op.grad_c0.data + start + c, load(grad_c(slot, position) + c), some);
      }
    }
  }

  void store_parameters() const {
    Base::store_weight_gradient(op.grad_weight_ih, sums_ih(0), division_.parts, part_size_, ih);
    Base::store_weight_gradient(op.grad_weight_hh, sums_hh(0), division_.parts, part_size_, hh);
    const auto total = [&](const T* sums) {
      T sum = 0;
      for (int64_t part = 0; part < division_.parts; ++part) sum += sums[part * part_size_];
      return sum;
    };
    for (int64_t out = 0; op.grad_bias.data && out < kGates * op.hidden; ++out) {
      const int64_t gate = out / op.hidden, c = out % op.hidden;
      ((T*)op.grad_bias.data)[out] = total(sums_bias(0) + c / lanes * block + gate * lanes + c % lanes);
    }
    const int64_t places = Base::peephole_places();
    for (int64_t row = 0; op.grad_peephole.data && row < 3 * op.hidden; ++row)
      for (int64_t place = 0; place < places; ++place) {
        const T* sums = sums_peephole(0) + (place * 3 + row / op.hidden) * sizes.padded_hidden + row % op.hidden;
        ((T*)op.grad_peephole.data)[row * places + place] = total(sums);
      }
  }

  int64_t part_size_;
  Division division_;
  Arena arena_;
  T *weight_ih_, *weight_hh_, *packed_;  // packed as in the forward pass, where gates are computed again
  T *turned_ih_, *turned_hh_;
  T *bias_, *peephole_;
  T *x_, *h_, *gates_;   // [slots] padded maps
  T *grad_h_, *grad_c_;  // [slots][positions][padded channels]
  T* parts_;             // [parts][weight_ih, weight_hh, bias, peephole]
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
