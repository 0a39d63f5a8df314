// ConvLSTM, forward, on the CPU.
//
// The gates of a row segment and channel block are summed in registers (gemm_microkernel.h) and update their cells from
// L1; only the backward pass needs them written. A position costs 4 hidden (input kernel_ih + hidden kernel_hh)
// multiply-adds, which bound the kernel, and five exponentials per element of h. Zero-padded copies of x and h serve
// any stride, dilation and layout. 3 x 3 kernels on maps with even sides use winograd.h: 4/9 of the multiply-adds.
#include "cpu/conv_lstm/conv_lstm.h"

namespace wmk::WMK_ISA {
namespace {

template <class T, class S>
class Forward : ConvLSTM<T, S> {
  using Base = ConvLSTM<T, S>;
  using Base::block;
  using Base::lanes;
  using Base::op;
  using Base::sizes;

 public:
  explicit Forward(const wmk_conv_lstm& arguments)
      : Base(arguments), partition_(op, sizes.tiled, op.threads), arena_(op.workspace) {
    weight_ih_ = arena_.template take<T>(Base::weights_size_ih());
    weight_hh_ = arena_.template take<T>(Base::weights_size_hh());
    packed_ = arena_.template take<T>(partition_.workers * Base::pack_scratch_size());
    bias_ = arena_.template take<T>(sizes.gates);
    peephole_ = arena_.template take<T>(Base::packed_peephole());
    cell_ = arena_.template take<T>(partition_.buffers * sizes.positions * sizes.padded_hidden);
    x_ = arena_.template take<T>(2 * partition_.buffers * x_size());
    h_ = arena_.template take<T>(2 * partition_.buffers * h_size());
    scratch_ = Base::take_scratch(arena_, partition_.workers);
  }
  int64_t workspace() const { return arena_.used(); }

  void run() const {
    Base::pack_weights(weight_ih_, weight_hh_, packed_, partition_.workers);
    Base::pack_bias(bias_);
    Base::pack_peephole(peephole_);
    memset(h_, 0, size_t(2 * partition_.buffers * h_size()) * sizeof(T));
    if (partition_.by_element) {
      parallel_for(partition_.workers, op.threads, [&](int64_t worker, int64_t) {
        for (int64_t batch = op.batch * worker / partition_.workers;
             batch < op.batch * (worker + 1) / partition_.workers; ++batch) {
          begin(worker, batch, 0, op.height);
          for (int64_t time = 0; time < op.time; ++time) step(worker, worker, time, batch, 0, op.height);
          end(worker, batch, 0, op.height);
        }
      });
      return;
    }
    for_each_band(op, partition_,
                  [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { begin(batch, batch, top, bottom); });
    for (int64_t time = 0; time < op.time; ++time) {
      for_each_band(op, partition_, [&](int64_t worker, int64_t batch, int64_t top, int64_t bottom) {
        step(worker, batch, time, batch, top, bottom);
      });
    }
    for_each_band(op, partition_,
                  [&](int64_t, int64_t batch, int64_t top, int64_t bottom) { end(batch, batch, top, bottom); });
  }

 private:
  int64_t x_size() const { return sizes.x_rows * sizes.x_columns * op.input; }
  int64_t h_size() const { return sizes.h_rows * sizes.h_columns * op.hidden; }
  PaddedMap<T> x_map(int64_t buffer, int64_t time) const {
    return {x_ + (2 * buffer + time % 2) * x_size(), sizes.x_columns, op.input};
  }
  PaddedMap<T> h_map(int64_t buffer, int64_t time) const {
    return {h_ + (2 * buffer + time % 2) * h_size(), sizes.h_columns, op.hidden};
  }
  T* cell(int64_t buffer, int64_t position) const {
    return cell_ + (buffer * sizes.positions + position) * sizes.padded_hidden;
  }

  void begin(int64_t buffer, int64_t batch, int64_t top, int64_t bottom) const {
    memset(cell(buffer, top * op.width), 0, size_t((bottom - top) * op.width * sizes.padded_hidden) * sizeof(T));
    if (op.c0.data)
      Base::template read_state<T>(cell(buffer, top * op.width), sizes.padded_hidden, op.c0, batch, top, bottom);
    if (op.h0.data) Base::read_h0(h_map(buffer, 0), batch, top, bottom);
    pad_x_rows(buffer, 0, batch, top, bottom);
  }
  void pad_x_rows(int64_t buffer, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    if (time == op.time) return;
    Base::pad_x(x_map(buffer, time), time, batch, sizes.x_rows * top / op.height, sizes.x_rows * bottom / op.height);
  }

  void step(int64_t worker, int64_t buffer, int64_t time, int64_t batch, int64_t top, int64_t bottom) const {
    const PaddedMap<T> x = x_map(buffer, time), h = h_map(buffer, time), next = h_map(buffer, time + 1);
    const bool recurs = Base::recurs(time, batch), reset = Base::resets(time, batch);
    Base::sum_gates(Base::scratch_of(scratch_, worker), x, weight_ih_, recurs ? &h : nullptr, weight_hh_, bias_, top,
                    bottom, [&](const T* sums, int64_t b, int64_t y, int64_t column, int64_t width) {
                      update(sums, buffer, time, batch, b, y * op.width + column, width,
                             next.at(y + sizes.h_top, column + sizes.h_left) + b * lanes, reset);
                    });
    pad_x_rows(buffer, time + 1, batch, top, bottom);
  }

  void update(const T* sums, int64_t buffer, int64_t time, int64_t batch, int64_t b, int64_t position, int64_t count,
              T* next, bool reset) const {
    const int64_t channel = b * lanes, valid = min(lanes, op.hidden - channel);
    int64_t offset = ((time * op.batch + batch) * sizes.positions + position) * op.hidden + channel;
    S* out = (S*)op.out.data + offset;
    T* cells = op.cells.data ? (T*)op.cells.data + offset : nullptr;
    T* gates = op.gates.data ? (T*)op.gates.data + (offset - channel) * kGates + channel : nullptr;
    T* cell_state = cell(buffer, position) + channel;
    const T* peephole = peephole_ + (op.peephole_varies ? position * 3 * sizes.padded_hidden : 0) + channel;
    for (int64_t p = 0; p < count; ++p, sums += block) {
      Vector<T> i = load(sums), f = load(sums + lanes), g = load(sums + 2 * lanes), o = load(sums + 3 * lanes);
      Vector<T> c = reset ? Vector<T>{} : load(cell_state);
      if (op.peephole.data) {
        i += load(peephole) * c;
        f += load(peephole + sizes.padded_hidden) * c;
      }
      i = sigmoid(i), f = sigmoid(f), g = tanh(g);
      c = f * c + i * g;
      if (op.peephole.data) {
        o += load(peephole + 2 * sizes.padded_hidden) * c;
        if (op.peephole_varies) peephole += 3 * sizes.padded_hidden;
      }
      o = sigmoid(o);
      Vector<T> h = o * tanh(c);
      store(cell_state, c), cell_state += sizes.padded_hidden;
      store_lanes<T>(out, h, valid), out += op.hidden;
      store_lanes<T>(next, round_through<T, S>(h), valid), next += op.hidden;
      if (cells) store_lanes<T>(cells, c, valid), cells += op.hidden;
      if (gates) {
        store_lanes<T>(gates, i, valid);
        store_lanes<T>(gates + op.hidden, f, valid);
        store_lanes<T>(gates + 2 * op.hidden, g, valid);
        store_lanes<T>(gates + 3 * op.hidden, o, valid);
        gates += kGates * op.hidden;
      }
    }
  }

  void end(int64_t buffer, int64_t batch, int64_t top, int64_t bottom) const {
    const int64_t positions = (bottom - top) * op.width;
    const int64_t offset = (batch * sizes.positions + top * op.width) * op.hidden;
    const int64_t last = ((op.time - 1) * op.batch * sizes.positions) * op.hidden + offset;
    if (op.hn.data)
      memcpy((S*)op.hn.data + offset, (const S*)op.out.data + last, size_t(positions * op.hidden) * sizeof(S));
    for (int64_t p = 0; p < positions; ++p) {
      memcpy((T*)op.cn.data + offset + p * op.hidden, cell(buffer, top * op.width + p), size_t(op.hidden) * sizeof(T));
    }
  }

  WorkPartition partition_;
  Arena arena_;
  T *weight_ih_, *weight_hh_, *packed_, *bias_, *peephole_;
  T* cell_;    // [buffers][positions][padded hidden]
  T *x_, *h_;  // [buffers][2]: all bands of a step read one map and fill the other
  typename Base::Scratch scratch_;
};

}  // namespace

int64_t conv_lstm_forward_workspace(const wmk_conv_lstm& op) {
  return with_types(op.dtype, [&](auto arithmetic, auto storage) {
    return Forward<decltype(arithmetic), decltype(storage)>(op).workspace();
  });
}
int conv_lstm_forward(const wmk_conv_lstm& op) {
  with_types(op.dtype, [&](auto arithmetic, auto storage) {
    Forward<decltype(arithmetic), decltype(storage)>(op).run();
    return 0;
  });
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
