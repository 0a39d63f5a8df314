// The ConvLSTM's cell update, forward and backward, on a GPU.
//
// A thread takes four adjacent channels of one position (one if unaligned) and moves each value once, 8 or 16 bytes at
// a time. Bytes per cell with 16-bit maps: 26 forward, 16 more to keep the gates, 44 backward. Bound by memory, which
// hides five accurate exponentials per cell.
//
// At a reset, the hidden convolution and the old cell are not read, so NaN cannot cross. Backward, gradients
// across a reset are not read, or are zero.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

constexpr int kUpdateThreads = 256;

template <typename T, int COUNT>
struct Cells {
  T value[COUNT];
};

template <typename T, int DTYPE, int COUNT>
__device__ __forceinline__ Cells<T, COUNT> load_cells(const wmk_view& view, int64_t offset) {
  Cells<T, COUNT> cells;
  if constexpr (COUNT == 4) {
    const char* group = static_cast<const char*>(view.data) + offset * element_size(DTYPE);
    const Vec4<T> vec = unpack(reinterpret_cast<const unsigned char*>(group), DTYPE, T(0));
#pragma unroll
    for (int i = 0; i < 4; ++i) cells.value[i] = vec.value[i];
  } else {
    cells.value[0] = load_element<T>(view.data, DTYPE, offset);
  }
  return cells;
}

template <typename T, int DTYPE, int COUNT>
__device__ __forceinline__ void store_cells(const wmk_view& view, int64_t offset, const Cells<T, COUNT>& cells) {
  if constexpr (COUNT == 1) {
    store_element<T>(view.data, DTYPE, offset, cells.value[0]);
  } else if constexpr (DTYPE == WMK_BFLOAT16 || DTYPE == WMK_FLOAT16) {
    Packed4x16 pair;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = static_cast<float>(cells.value[2 * i]), high = static_cast<float>(cells.value[2 * i + 1]);
      pair.word[i] = DTYPE == WMK_BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
    }
    *reinterpret_cast<Packed4x16*>(static_cast<uint16_t*>(view.data) + offset) = pair;
  } else {
    Vec4<T> vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) vec.value[i] = cells.value[i];
    *reinterpret_cast<Vec4<T>*>(static_cast<T*>(view.data) + offset) = vec;
  }
}

template <typename T, int DTYPE, int COUNT>
struct CellCoord {
  static constexpr int kState = sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32;
  using Group = Cells<T, COUNT>;

  int64_t cell, row, position, channel;  // row = batch * positions + position
  bool exists, reset;

  __device__ __forceinline__ explicit CellCoord(const wmk_conv_lstm_update& p) {
    const int64_t groups = p.hidden / COUNT, index = static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x;
    exists = index < p.batch * p.positions * groups;
    row = index / groups;
    channel = index % groups * COUNT;
    cell = row * p.hidden + channel;
    position = row % p.positions;
    reset = exists && flag(p.reset, p);
  }

  __device__ __forceinline__ bool flag(const wmk_view& flags, const wmk_conv_lstm_update& p) const {
    return flags.data != nullptr && static_cast<const uint8_t*>(flags.data)[row / p.positions * flags.stride[0]] != 0;
  }
  __device__ __forceinline__ int64_t gate(const wmk_conv_lstm_update& p, int gate_index) const {
    return (4 * row + gate_index) * p.hidden + channel;
  }
  __device__ __forceinline__ Group state(const wmk_view& view) const {
    return view.data == nullptr ? zero() : load_cells<T, kState, COUNT>(view, cell);
  }
  __device__ __forceinline__ Group c_prev(const wmk_conv_lstm_update& p) const {
    return reset ? zero() : state(p.c_prev);
  }
  __device__ __forceinline__ Group peephole(const wmk_conv_lstm_update& p, int gate_index) const {
    if (p.peephole.data == nullptr) return zero();
    const int64_t positions = p.peephole_varies ? p.positions : 1;
    return load_cells<T, kState, COUNT>(
        p.peephole, (gate_index * positions + (p.peephole_varies ? position : 0)) * p.hidden + channel);
  }
  static __device__ __forceinline__ Group zero() {
    Group group;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) group.value[i] = T(0);
    return group;
  }
  __device__ __forceinline__ Group preactivation(const wmk_conv_lstm_update& p, int gate_index) const {
    Group total = load_cells<T, DTYPE, COUNT>(p.gates_x, gate(p, gate_index));
    if (p.gates_h.data != nullptr && !reset) {
      const Group addend = load_cells<T, DTYPE, COUNT>(p.gates_h, gate(p, gate_index));
#pragma unroll
      for (int i = 0; i < COUNT; ++i) total.value[i] += addend.value[i];
    }
    if (p.bias.data != nullptr) {
      const Group addend = load_cells<T, kState, COUNT>(p.bias, gate_index * p.hidden + channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) total.value[i] += addend.value[i];
    }
    return total;
  }
};

template <typename T, int DTYPE, int COUNT>
struct Gates {
  Cells<T, COUNT> i, f, g, o, c;

  __device__ __forceinline__ Gates() = default;
  __device__ __forceinline__ Gates(const wmk_conv_lstm_update& p, const CellCoord<T, DTYPE, COUNT>& coord,
                                   const Cells<T, COUNT>& c_prev) {
    i = coord.preactivation(p, 0), f = coord.preactivation(p, 1), g = coord.preactivation(p, 2),
    o = coord.preactivation(p, 3);
    const Cells<T, COUNT> w_i = coord.peephole(p, 0), w_f = coord.peephole(p, 1), w_o = coord.peephole(p, 2);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      i.value[k] = sigmoid(i.value[k] + peephole_term(w_i.value[k], c_prev.value[k]), true);
      f.value[k] = sigmoid(f.value[k] + peephole_term(w_f.value[k], c_prev.value[k]), true);
      g.value[k] = tanh_accurate(g.value[k]);
      c.value[k] = f.value[k] * c_prev.value[k] + i.value[k] * g.value[k];
      o.value[k] = sigmoid(o.value[k] + peephole_term(w_o.value[k], c.value[k]), true);
    }
  }
};

template <typename T, int DTYPE, int COUNT>
__global__ void __launch_bounds__(kUpdateThreads)
    conv_lstm_update_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_update p) {
  const CellCoord<T, DTYPE, COUNT> coord(p);
  if (!coord.exists) return;
  const Gates<T, DTYPE, COUNT> gates(p, coord, coord.c_prev(p));
  Cells<T, COUNT> h;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) h.value[k] = gates.o.value[k] * tanh_accurate(gates.c.value[k]);
  constexpr int kState = CellCoord<T, DTYPE, COUNT>::kState;
  store_cells<T, DTYPE, COUNT>(p.h, coord.cell, h);
  store_cells<T, kState, COUNT>(p.c, coord.cell, gates.c);
  if (p.gates.data != nullptr) {
    store_cells<T, kState, COUNT>(p.gates, coord.gate(p, 0), gates.i);
    store_cells<T, kState, COUNT>(p.gates, coord.gate(p, 1), gates.f);
    store_cells<T, kState, COUNT>(p.gates, coord.gate(p, 2), gates.g);
    store_cells<T, kState, COUNT>(p.gates, coord.gate(p, 3), gates.o);
  }
}

template <typename T, int DTYPE, int COUNT>
__global__ void __launch_bounds__(kUpdateThreads)
    conv_lstm_update_backward_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_update p) {
  using Group = Cells<T, COUNT>;
  constexpr int kState = CellCoord<T, DTYPE, COUNT>::kState;
  const CellCoord<T, DTYPE, COUNT> coord(p);
  if (!coord.exists) return;
  const Group c_prev = coord.c_prev(p);
  Gates<T, DTYPE, COUNT> gates;
  if (p.gates.data != nullptr) {
    gates.i = load_cells<T, kState, COUNT>(p.gates, coord.gate(p, 0));
    gates.f = load_cells<T, kState, COUNT>(p.gates, coord.gate(p, 1));
    gates.g = load_cells<T, kState, COUNT>(p.gates, coord.gate(p, 2));
    gates.o = load_cells<T, kState, COUNT>(p.gates, coord.gate(p, 3));
  } else {
    gates = Gates<T, DTYPE, COUNT>(p, coord, c_prev);
  }
  gates.c = coord.state(p.c);
  Group grad_h = coord.zero();
  if (p.grad_out.data != nullptr) grad_h = load_cells<T, DTYPE, COUNT>(p.grad_out, coord.cell);
  if (p.grad_h.data != nullptr && !coord.flag(p.reset_after, p)) {
    const Group dh_next = load_cells<T, DTYPE, COUNT>(p.grad_h, coord.cell);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) grad_h.value[k] += dh_next.value[k];
  }
  Group grad_c = coord.state(p.grad_c), grad_i, grad_f, grad_g, grad_o;
  const Group w_i = coord.peephole(p, 0), w_f = coord.peephole(p, 1), w_o = coord.peephole(p, 2);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const T i = gates.i.value[k], f = gates.f.value[k], g = gates.g.value[k], o = gates.o.value[k];
    const T tanh_c = tanh_accurate(gates.c.value[k]), dh = grad_h.value[k];
    grad_o.value[k] = dh * tanh_c * o * (T(1) - o);
    const T dc = grad_c.value[k] + dh * o * (T(1) - tanh_c * tanh_c) + peephole_term(w_o.value[k], grad_o.value[k]);
    grad_i.value[k] = dc * g * i * (T(1) - i);
    grad_f.value[k] = dc * c_prev.value[k] * f * (T(1) - f);
    grad_g.value[k] = dc * i * (T(1) - g * g);
    const T dc_prev =
        dc * f + peephole_term(w_i.value[k], grad_i.value[k]) + peephole_term(w_f.value[k], grad_f.value[k]);
    grad_c.value[k] = coord.reset ? T(0) : dc_prev;
  }
  store_cells<T, kState, COUNT>(p.grad_c, coord.cell, grad_c);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, coord.gate(p, 0), grad_i);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, coord.gate(p, 1), grad_f);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, coord.gate(p, 2), grad_g);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, coord.gate(p, 3), grad_o);
  if (p.grad_peephole.data == nullptr) return;
  const Group* const sums[3] = {&grad_i, &grad_f, &grad_o};
#pragma unroll
  for (int gate_index = 0; gate_index < 3; ++gate_index) {
    const int64_t offset = gate_index * p.batch * p.positions * p.hidden + coord.cell;
    Group total = load_cells<T, kState, COUNT>(p.grad_peephole, offset);
    const Group& peephole_input = gate_index == 2 ? gates.c : c_prev;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) total.value[k] += sums[gate_index]->value[k] * peephole_input.value[k];
    store_cells<T, kState, COUNT>(p.grad_peephole, offset, total);
  }
}

}  // namespace wmk
