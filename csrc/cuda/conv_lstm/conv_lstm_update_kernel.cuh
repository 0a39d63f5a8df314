// The ConvLSTM's update of the cells, forward and backward, on a GPU: all that a step does beside its convolutions.
//
// The convolutions leave four numbers a cell, the sums of the input and of the hidden convolution apart, channels last.
// A thread takes the cells of four neighbouring channels at one place (of one, where channels or addresses are no
// multiples of four), reads each number once, in groups of 8 or 16 bytes, and writes each result once. So the kernel is
// bound by memory: with 16-bit maps 26 bytes a cell forward, 16 more to keep the gates, and 44 backward. The five
// exponentials of a cell are evaluated in full precision, which hides behind those bytes.
//
// A reset needs no pass of its own: a convolution of zeros is zero, so where a sequence starts the hidden convolution's
// sum is not read, nor is the old cell, and NaN in either cannot cross. Backwards, what would flow to h and c before
// the reset is not read or written as zero.
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
    const Quad<T> quad = unpack(reinterpret_cast<const unsigned char*>(group), DTYPE, T(0));
#pragma unroll
    for (int i = 0; i < 4; ++i) cells.value[i] = quad.value[i];
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
    Pair pair;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = static_cast<float>(cells.value[2 * i]), high = static_cast<float>(cells.value[2 * i + 1]);
      pair.word[i] = DTYPE == WMK_BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
    }
    *reinterpret_cast<Pair*>(static_cast<uint16_t*>(view.data) + offset) = pair;
  } else {
    Quad<T> quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.value[i] = cells.value[i];
    *reinterpret_cast<Quad<T>*>(static_cast<T*>(view.data) + offset) = quad;
  }
}

// A thread's cells: which they are, and what both directions read of them.
template <typename T, int DTYPE, int COUNT>
struct Place {
  static constexpr int kState = sizeof(T) == 8 ? WMK_FLOAT64 : WMK_FLOAT32;
  using Group = Cells<T, COUNT>;

  int64_t cell, row, position, channel;  // first cell of the thread, its row = batch * positions + position
  bool exists, forgets;

  __device__ __forceinline__ explicit Place(const wmk_conv_lstm_update& p) {
    const int64_t groups = p.hidden / COUNT, index = static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x;
    exists = index < p.batch * p.positions * groups;
    row = index / groups;
    channel = index % groups * COUNT;
    cell = row * p.hidden + channel;
    position = row % p.positions;
    forgets = exists && flag(p.reset, p);
  }

  __device__ __forceinline__ bool flag(const wmk_view& flags, const wmk_conv_lstm_update& p) const {
    return flags.data != nullptr && static_cast<const uint8_t*>(flags.data)[row / p.positions * flags.stride[0]] != 0;
  }
  __device__ __forceinline__ int64_t gate(const wmk_conv_lstm_update& p, int number) const {
    return (4 * row + number) * p.hidden + channel;
  }
  __device__ __forceinline__ Group state(const wmk_view& view) const {
    return view.data == nullptr ? zero() : load_cells<T, kState, COUNT>(view, cell);
  }
  __device__ __forceinline__ Group before(const wmk_conv_lstm_update& p) const {
    return forgets ? zero() : state(p.c_before);
  }
  __device__ __forceinline__ Group peephole(const wmk_conv_lstm_update& p, int number) const {
    if (p.peephole.data == nullptr) return zero();
    const int64_t places = p.peephole_varies ? p.positions : 1;
    return load_cells<T, kState, COUNT>(p.peephole,
                                        (number * places + (p.peephole_varies ? position : 0)) * p.hidden + channel);
  }
  static __device__ __forceinline__ Group zero() {
    Group group;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) group.value[i] = T(0);
    return group;
  }
  // What the convolutions and the bias give a gate.
  __device__ __forceinline__ Group sum(const wmk_conv_lstm_update& p, int number) const {
    Group total = load_cells<T, DTYPE, COUNT>(p.from_x, gate(p, number));
    if (p.from_h.data != nullptr && !forgets) {
      const Group other = load_cells<T, DTYPE, COUNT>(p.from_h, gate(p, number));
#pragma unroll
      for (int i = 0; i < COUNT; ++i) total.value[i] += other.value[i];
    }
    if (p.bias.data != nullptr) {
      const Group other = load_cells<T, kState, COUNT>(p.bias, number * p.hidden + channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) total.value[i] += other.value[i];
    }
    return total;
  }
};

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

// The gates i, f, g, o after their nonlinearities and the new cell.
template <typename T, int DTYPE, int COUNT>
struct Gates {
  Cells<T, COUNT> i, f, g, o, c;

  __device__ __forceinline__ Gates() = default;
  __device__ __forceinline__ Gates(const wmk_conv_lstm_update& p, const Place<T, DTYPE, COUNT>& place,
                                   const Cells<T, COUNT>& before) {
    i = place.sum(p, 0), f = place.sum(p, 1), g = place.sum(p, 2), o = place.sum(p, 3);
    const Cells<T, COUNT> w_i = place.peephole(p, 0), w_f = place.peephole(p, 1), w_o = place.peephole(p, 2);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      i.value[k] = sigmoid(i.value[k] + w_i.value[k] * before.value[k], true);
      f.value[k] = sigmoid(f.value[k] + w_f.value[k] * before.value[k], true);
      g.value[k] = hyperbolic_tangent(g.value[k]);
      c.value[k] = f.value[k] * before.value[k] + i.value[k] * g.value[k];
      o.value[k] = sigmoid(o.value[k] + w_o.value[k] * c.value[k], true);
    }
  }
};

template <typename T, int DTYPE, int COUNT>
__global__ void __launch_bounds__(kUpdateThreads)
    conv_lstm_update_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_update p) {
  const Place<T, DTYPE, COUNT> place(p);
  if (!place.exists) return;
  const Gates<T, DTYPE, COUNT> gates(p, place, place.before(p));
  Cells<T, COUNT> h;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) h.value[k] = gates.o.value[k] * hyperbolic_tangent(gates.c.value[k]);
  constexpr int kState = Place<T, DTYPE, COUNT>::kState;
  store_cells<T, DTYPE, COUNT>(p.h, place.cell, h);
  store_cells<T, kState, COUNT>(p.c, place.cell, gates.c);
  if (p.gates.data != nullptr) {
    store_cells<T, kState, COUNT>(p.gates, place.gate(p, 0), gates.i);
    store_cells<T, kState, COUNT>(p.gates, place.gate(p, 1), gates.f);
    store_cells<T, kState, COUNT>(p.gates, place.gate(p, 2), gates.g);
    store_cells<T, kState, COUNT>(p.gates, place.gate(p, 3), gates.o);
  }
}

template <typename T, int DTYPE, int COUNT>
__global__ void __launch_bounds__(kUpdateThreads)
    conv_lstm_update_backward_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_update p) {
  using Group = Cells<T, COUNT>;
  constexpr int kState = Place<T, DTYPE, COUNT>::kState;
  const Place<T, DTYPE, COUNT> place(p);
  if (!place.exists) return;
  const Group before = place.before(p);
  Gates<T, DTYPE, COUNT> gates;
  if (p.gates.data != nullptr) {
    gates.i = load_cells<T, kState, COUNT>(p.gates, place.gate(p, 0));
    gates.f = load_cells<T, kState, COUNT>(p.gates, place.gate(p, 1));
    gates.g = load_cells<T, kState, COUNT>(p.gates, place.gate(p, 2));
    gates.o = load_cells<T, kState, COUNT>(p.gates, place.gate(p, 3));
  } else {
    gates = Gates<T, DTYPE, COUNT>(p, place, before);
  }
  gates.c = place.state(p.c);
  Group grad_h = place.zero();
  if (p.grad_out.data != nullptr) grad_h = load_cells<T, DTYPE, COUNT>(p.grad_out, place.cell);
  if (p.grad_h.data != nullptr && !place.flag(p.reset_after, p)) {
    const Group later = load_cells<T, DTYPE, COUNT>(p.grad_h, place.cell);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) grad_h.value[k] += later.value[k];
  }
  Group grad_c = place.state(p.grad_c), grad_i, grad_f, grad_g, grad_o;
  const Group w_i = place.peephole(p, 0), w_f = place.peephole(p, 1), w_o = place.peephole(p, 2);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const T i = gates.i.value[k], f = gates.f.value[k], g = gates.g.value[k], o = gates.o.value[k];
    const T bent = hyperbolic_tangent(gates.c.value[k]), dh = grad_h.value[k];
    grad_o.value[k] = dh * bent * o * (T(1) - o);
    const T dc = grad_c.value[k] + dh * o * (T(1) - bent * bent) + w_o.value[k] * grad_o.value[k];
    grad_i.value[k] = dc * g * i * (T(1) - i);
    grad_f.value[k] = dc * before.value[k] * f * (T(1) - f);
    grad_g.value[k] = dc * i * (T(1) - g * g);
    const T earlier = dc * f + w_i.value[k] * grad_i.value[k] + w_f.value[k] * grad_f.value[k];
    grad_c.value[k] = place.forgets ? T(0) : earlier;
  }
  store_cells<T, kState, COUNT>(p.grad_c, place.cell, grad_c);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, place.gate(p, 0), grad_i);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, place.gate(p, 1), grad_f);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, place.gate(p, 2), grad_g);
  store_cells<T, DTYPE, COUNT>(p.grad_gates, place.gate(p, 3), grad_o);
  if (p.grad_peephole.data == nullptr) return;
  const Group* const sums[3] = {&grad_i, &grad_f, &grad_o};
#pragma unroll
  for (int number = 0; number < 3; ++number) {
    const int64_t offset = number * p.batch * p.positions * p.hidden + place.cell;
    Group total = load_cells<T, kState, COUNT>(p.grad_peephole, offset);
    const Group& seen = number == 2 ? gates.c : before;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) total.value[k] += sums[number]->value[k] * seen.value[k];
    store_cells<T, kState, COUNT>(p.grad_peephole, offset, total);
  }
}

}  // namespace wmk
