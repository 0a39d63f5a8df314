// Linear scan, h_t = g_t h_{t-1} + x_t, forward and backward, in either direction of time, on a GPU.
//
// A block takes 16 rows (channels) in tiles of 128 steps (fp64: 32). Eight threads share a row: each combines four
// steps to an affine map; three shuffles scan the maps. Backward: dx_t = dout_t + g_{t+1} dx_{t+1}, dg_t = dx_t
// h_{t-1}. With few rows, a local pass and a combine kernel give the segments' initial states.
//
// Three memory accesses per element forward, five backward. Bound by memory; 16-bit data by instruction issue, about 25
// per element.
#pragma once

#include "cuda/common/affine_scan.cuh"
#include "cuda/common/tile.cuh"

namespace wmk {

struct LinearPlan {
  int64_t segment_steps, segments;  // a multiple of kSteps; per row
  void* boundary;                   // [segments, rows]: final state from zero, then (combine kernel) initial state
  void* decay;                      // [segments, rows]
  int32_t* reset;                   // [segments, rows]
};

template <typename T>
struct LinearKernelTraits {
  static constexpr int kRows = 16, kThreads = 128, kLanes = 8;
  static constexpr int kSteps = sizeof(T) == 8 ? 32 : 128;
  static constexpr int kPassSteps = 4 * kLanes;
  static constexpr int kPitch = kSteps + 4;
  using RowTile = Tile<T, kRows, kSteps, kThreads, false>;
};

template <typename T, bool BACKWARD>
struct LinearShared {
  using C = LinearKernelTraits<T>;
  alignas(16) T gates[C::kRows * C::kPitch];                   // backward: then their gradient
  alignas(16) T values[C::kRows * C::kPitch];                  // tokens, then out; backward: grad_out, then grad_tokens
  alignas(16) T outputs[BACKWARD ? C::kRows * C::kPitch : 4];  // forward
  alignas(16) uint32_t resets[C::kSteps / 32];
};

// LOCAL: only each segment's map.
template <typename T, int DTYPE, bool BACKWARD, bool LOCAL>
__global__ void __launch_bounds__(128, BACKWARD&& LOCAL             ? 3
                                       : sizeof(T) == 8 || BACKWARD ? 4
                                                                    : 6)
    linear_scan_kernel(const WMK_GRID_CONSTANT wmk_linear_scan p, const WMK_GRID_CONSTANT LinearPlan plan) {
  using C = LinearKernelTraits<T>;
  using RowTile = typename C::RowTile;
  constexpr int kSteps = C::kSteps, kPitch = C::kPitch, kLanes = C::kLanes;
  constexpr int64_t dtype = DTYPE;
  WMK_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<LinearShared<T, BACKWARD>*>(memory);
  unsigned char* gate_stage = memory + sizeof(LinearShared<T, BACKWARD>);
  unsigned char* value_stage = gate_stage + C::kRows * kSteps * element_size(dtype);
  unsigned char* output_stage = value_stage + C::kRows * kSteps * element_size(dtype);
  const bool needs_outputs = BACKWARD && !LOCAL && p.grad_gates.data != nullptr;

  const int64_t tiles = (p.channels + C::kRows - 1) / C::kRows;
  const int64_t tile = blockIdx.x % tiles, batch = blockIdx.x / tiles % p.batch, segment = blockIdx.x / tiles / p.batch;
  const int64_t first_row = tile * C::kRows;
  const int rows = static_cast<int>(p.channels - first_row < C::kRows ? p.channels - first_row : C::kRows);
  const bool reverse = BACKWARD ? !p.reverse : p.reverse != 0;
  const bool reset_shifted = p.reverse != 0;  // reverse: the flag of step t + 1 resets step t
  const int64_t position = reverse ? plan.segments - 1 - segment : segment;
  const int64_t segment_begin = position * plan.segment_steps;
  const int64_t segment_end = segment_begin + plan.segment_steps < p.time ? segment_begin + plan.segment_steps : p.time;
  if (LOCAL && segment + 1 == plan.segments) return;

  const int lane = static_cast<int>(threadIdx.x) % kLanes, row = static_cast<int>(threadIdx.x) / kLanes;
  const int scan_rank = reverse ? kLanes - 1 - lane : lane;
  const bool exists = row < rows;
  const int64_t channel = first_row + row, row_index = batch * p.channels + channel, row_count = p.batch * p.channels;

  const auto rows_of = [&](const wmk_view& view) {
    char* data = static_cast<char*>(view.data);
    return StridedRows{data + (batch * view.stride[0] + first_row * view.stride[1]) * element_size(dtype),
                       view.stride[1], view.stride[2]};
  };
  const wmk_view &value_view = BACKWARD ? p.grad_out : p.tokens, &out_view = BACKWARD ? p.grad_tokens : p.out;
  const auto reset_at = [&](int64_t time) {
    return static_cast<const uint8_t*>(p.reset.data)[batch * p.reset.stride[0] + time * p.reset.stride[1]] != 0;
  };

  const wmk_view& start = BACKWARD ? p.grad_last_state : p.initial_state;
  T running_state = T(0);
  if (exists && segment > 0 && !LOCAL) {
    running_state = static_cast<const T*>(plan.boundary)[segment * row_count + row_index];
  } else if (exists && segment == 0 && start.data != nullptr) {
    const bool reset = BACKWARD && reset_shifted && p.reset.data != nullptr && p.time > 0 && reset_at(0);
    if (!reset) running_state = static_cast<const T*>(start.data)[batch * start.stride[0] + channel * start.stride[1]];
  }
  AffineMap<T> segment_map = {T(1), running_state, false};

  const auto fetch = [&](int64_t begin, int steps) {
    RowTile::fetch(gate_stage, rows_of(p.gates), begin, dtype, rows, steps);
    RowTile::fetch(value_stage, rows_of(value_view), begin, dtype, rows, steps);
    if (needs_outputs) RowTile::fetch(output_stage, rows_of(p.out), begin, dtype, rows, steps);
  };
  const auto identity = [](T value, int) { return value; };
  const int64_t count = (segment_end - segment_begin + kSteps - 1) / kSteps;
  const auto tile_begin = [&](int64_t i) { return segment_begin + (reverse ? count - 1 - i : i) * kSteps; };
  const auto tile_steps = [&](int64_t begin) {
    return static_cast<int>(segment_end - begin < kSteps ? segment_end - begin : kSteps);
  };
  if (count > 0) fetch(tile_begin(0), tile_steps(tile_begin(0)));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = tile_begin(i);
    const int steps = tile_steps(begin);
    copy_async_wait();
    RowTile::template store<false>(shared.gates, kPitch, gate_stage, rows_of(p.gates).along_time(), dtype, rows, steps,
                                   identity);
    RowTile::template store<false>(shared.values, kPitch, value_stage, rows_of(value_view).along_time(), dtype, rows,
                                   steps, identity);
    if (needs_outputs) {
      RowTile::template store<false>(shared.outputs, kPitch, output_stage, rows_of(p.out).along_time(), dtype, rows,
                                     steps, identity);
    }
    if (threadIdx.x < kSteps) {
      const int64_t time = begin + threadIdx.x + reset_shifted;
      const bool reset =
          p.reset.data != nullptr && static_cast<int>(threadIdx.x) < steps && time < p.time && reset_at(time);
      const uint32_t bits = __ballot_sync(0xffffffffu, reset);
      if (threadIdx.x % 32 == 0) shared.resets[threadIdx.x / 32] = bits;
    }
    __syncthreads();
    if (i + 1 < count) fetch(tile_begin(i + 1), tile_steps(tile_begin(i + 1)));

#pragma unroll
    for (int pass = 0; pass < kSteps / C::kPassSteps; ++pass) {
      const int word = reverse ? kSteps / C::kPassSteps - 1 - pass : pass;
      const int first = word * C::kPassSteps + 4 * lane;
      T* gates = shared.gates + row * kPitch + first;
      T* values = shared.values + row * kPitch + first;
      const uint32_t resets = shared.resets[word] >> (4 * lane) & 15u;
      Vec4<T> g = load_vec4(gates), v = load_vec4(values);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= steps) g.value[j] = T(1);  // identity, as the value is 0
      }
      AffineMap<T> prefix = {T(1), T(0), false};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = reverse ? 3 - j : j;
        // a run-time index would move the vectors to local memory
        const T gate = reverse ? g.value[3 - j] : g.value[j], value = reverse ? v.value[3 - j] : v.value[j];
        const bool reset = resets >> k & 1u;
        const AffineMap<T> step =
            BACKWARD ? AffineMap<T>{gate, reset ? T(0) : gate * value, reset} : AffineMap<T>{gate, value, reset};
        prefix = combine<false>(prefix, step);
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        const int from = static_cast<int>(threadIdx.x) % 32 + (reverse ? distance : -distance);
        const AffineMap<T> previous = shuffle_map(prefix, from & 31);
        if (scan_rank >= distance) prefix = combine<true>(previous, prefix);
      }
      const int neighbour = static_cast<int>(threadIdx.x) % 32 + (reverse ? 1 : -1);
      const AffineMap<T> previous = shuffle_map(prefix, neighbour & 31);
      T state = scan_rank == 0 ? running_state : pass_state(previous, running_state);
      const T last = pass_state(prefix, running_state);
      const int last_thread = static_cast<int>(threadIdx.x) % 32 / kLanes * kLanes + (reverse ? 0 : kLanes - 1);
      running_state = __shfl_sync(0xffffffffu, last, last_thread);
      if constexpr (LOCAL) {
        AffineMap<T> total = prefix;
        total.decay = __shfl_sync(0xffffffffu, prefix.decay, last_thread);
        total.reset = __shfl_sync(0xffffffffu, static_cast<int>(prefix.reset), last_thread) != 0;
        segment_map.decay *= total.decay;
        segment_map.reset = segment_map.reset || total.reset;
      } else {
        Vec4<T> result = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int k = reverse ? 3 - j : j;
          const T gate = reverse ? g.value[3 - j] : g.value[j], value = reverse ? v.value[3 - j] : v.value[j];
          const bool reset = resets >> k & 1u;
          T result_j;
          if (BACKWARD) {
            result_j = value + state;
            state = reset ? T(0) : gate * result_j;
          } else {
            result_j = reset ? value : gate * state + value;
            state = result_j;
          }
          if (reverse) {
            result.value[3 - j] = result_j;
          } else {
            result.value[j] = result_j;
          }
        }
        store_vec4(values, result);
        if (BACKWARD && p.grad_gates.data != nullptr) {
          // Three previous states are this thread's; the fourth is the adjacent thread's, or outside the tile.
          Vec4<T> outputs = load_vec4(shared.outputs + row * kPitch + first);
          const bool inside = p.reverse ? first + 4 < steps : first > 0;
          T edge = T(0);
          if (inside) {
            edge = shared.outputs[row * kPitch + (p.reverse ? first + 4 : first - 1)];
          } else if (exists && first < steps) {
            const int64_t other = p.reverse ? begin + steps : begin - 1;
            if (other >= 0 && other < p.time) {
              edge = load_element<T>(p.out.data, dtype,
                                     batch * p.out.stride[0] + channel * p.out.stride[1] + other * p.out.stride[2]);
            } else if (p.initial_state.data != nullptr) {
              edge = static_cast<const T*>(
                  p.initial_state.data)[batch * p.initial_state.stride[0] + channel * p.initial_state.stride[1]];
            }
          }
          const int last_step = steps - 1 - first;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const T neighbour_state = p.reverse ? (j == 3 || j == last_step ? edge : outputs.value[j < 3 ? j + 1 : 3])
                                                : (j == 0 ? edge : outputs.value[j > 0 ? j - 1 : 0]);
            result.value[j] = resets >> j & 1u ? T(0) : result.value[j] * neighbour_state;
          }
          store_vec4(gates, result);
        }
      }
    }
    __syncthreads();
    if (!LOCAL) {
      if (out_view.data != nullptr) {
        RowTile::write(shared.values, kPitch, rows_of(out_view), begin, dtype, rows, steps);
      }
      if (BACKWARD && p.grad_gates.data != nullptr) {
        RowTile::write(shared.gates, kPitch, rows_of(p.grad_gates), begin, dtype, rows, steps);
      }
      __syncthreads();
    }
  }

  if (!exists || lane != 0) return;
  if (LOCAL) {
    const int64_t offset = segment * row_count + row_index;
    static_cast<T*>(plan.boundary)[offset] = running_state;
    static_cast<T*>(plan.decay)[offset] = segment_map.decay;
    plan.reset[offset] = segment_map.reset;
  } else if (segment + 1 == plan.segments) {
    const wmk_view& end = BACKWARD ? p.grad_initial_state : p.last_state;
    const bool reset = !BACKWARD && reset_shifted && p.reset.data != nullptr && p.time > 0 && reset_at(0);
    if (end.data != nullptr) static_cast<T*>(end.data)[row_index] = reset ? T(0) : running_state;
  }
}

template <typename T>
__global__ void __launch_bounds__(128)
    linear_scan_combine_kernel(const WMK_GRID_CONSTANT LinearPlan plan, const int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (row >= rows) return;
  T* boundary = static_cast<T*>(plan.boundary);
  const T* decay = static_cast<const T*>(plan.decay);
  T state = T(0);
#pragma unroll 4
  for (int64_t segment = 0; segment + 1 < plan.segments; ++segment) {
    const int64_t offset = segment * rows + row;
    const AffineMap<T> map = {decay[offset], boundary[offset], plan.reset[offset] != 0};
    boundary[offset] = state;
    state = pass_state(map, state);
  }
  boundary[(plan.segments - 1) * rows + row] = state;
}

}  // namespace wmk
