// The ConvLSTM over all steps in one persistent kernel, forward, on a GPU: for maps bound by launch latency.
//
// A block takes 16 hidden channels and 16 or 32 positions. Hidden weights stay in shared memory, in tensor-core order,
// cells in registers. A step reads the previous h from the level-2 cache, multiplies, updates, writes h and waits at a
// grid barrier: bound by latency, with hidden / 16 sequential products per tap.
//
// A warp's 16 columns are four gates of four channels: a thread has one channel's gates in two rows.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace wmk {

constexpr int kPersistentThreads = 128, kPersistentChannels = 16;
// Per tap and 16 input channels: 16 rows of 64 columns, 16 bits each.
constexpr int64_t kPersistentTapBytes = 16 * 4 * kPersistentChannels * 2;

struct PositionCoord {
  int64_t row, batch;
  int64_t y, x;
  bool exists;
};

// TILES: of 16 positions.
template <int DTYPE, int TILES>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    conv_lstm_persistent_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_persistent p) {
  WMK_SHARED_MEMORY(memory);
  uint4* weights = reinterpret_cast<uint4*>(memory);
  const int64_t channel_tiles = p.hidden / kPersistentChannels, channel_tile = blockIdx.x % channel_tiles,
                first_row = blockIdx.x / channel_tiles * 16 * TILES;
  const int64_t positions = p.height * p.width, rows = p.batch * positions, taps = p.hh_height * p.hh_width;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t channel = channel_tile * kPersistentChannels + warp * 4 + lane % 4;
  {
    const uint4* packed =
        static_cast<const uint4*>(p.weights.data) + channel_tile * taps * channel_tiles * kPersistentThreads;
    // no barrier: each thread reads back only its own copies
    for (int64_t i = thread; i < taps * channel_tiles * kPersistentThreads; i += kPersistentThreads)
      weights[i] = packed[i];
  }
  PositionCoord coords[TILES][2];
  float cells[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PositionCoord& coord = coords[m][half];
      coord.row = first_row + 16 * m + 8 * half + lane / 4;
      coord.exists = coord.row < rows;
      coord.batch = coord.row / positions;
      coord.y = coord.row % positions / p.width;
      coord.x = coord.row % p.width;
      const bool has_initial = coord.exists && p.c0.data != nullptr;
      cells[m][half] = has_initial ? static_cast<const float*>(p.c0.data)[coord.row * p.hidden + channel] : 0.0f;
    }
  }
  const auto parameter = [&](const wmk_view& view, int64_t offset) {
    return view.data == nullptr ? 0.0f : static_cast<const float*>(view.data)[offset];
  };
  float bias[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) bias[gate] = parameter(p.bias, gate * p.hidden + channel);

  for (int64_t time = 0; time < p.time; ++time) {
    float input_sums[TILES][2][4];  // in flight during the grid barrier
    bool has_state[TILES][2];       // not reset
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PositionCoord& coord = coords[m][half];
        has_state[m][half] = coord.exists;
        if (coord.exists && p.reset.data != nullptr) {
          const int64_t offset = time * p.reset.stride[0] + coord.batch * p.reset.stride[1];
          has_state[m][half] = static_cast<const uint8_t*>(p.reset.data)[offset] == 0;
        }
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t offset = ((time * rows + coord.row) * 4 + gate) * p.hidden + channel;
          input_sums[m][half][gate] = coord.exists ? load_element<float>(p.gates_x.data, DTYPE, offset) : 0.0f;
        }
      }
    }
    if (time > 0) grid_barrier(static_cast<uint32_t*>(p.barrier_counter.data), static_cast<uint32_t>(time * gridDim.x));
    const uint16_t* h_prev = static_cast<const uint16_t*>(p.h0.data);
    if (time > 0) h_prev = static_cast<const uint16_t*>(p.out.data) + (time - 1) * rows * p.hidden;

    float sums[TILES][2][4] = {};  // (i, f) and (g, o), two rows each
    for (int64_t tap = 0; h_prev != nullptr && tap < taps; ++tap) {
      const uint16_t* neighbours[TILES][2];
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const PositionCoord& coord = coords[m][half];
          const int64_t dy = tap / p.hh_width - p.hh_height / 2, dx = tap % p.hh_width - p.hh_width / 2;
          const int64_t y = coord.y + dy, x = coord.x + dx;
          const bool inside = has_state[m][half] && y >= 0 && y < p.height && x >= 0 && x < p.width;
          const int64_t offset = (coord.row + dy * p.width + dx) * p.hidden + 2 * (lane % 4);
          neighbours[m][half] = inside ? h_prev + offset : nullptr;
        }
      }
#pragma unroll 4
      for (int64_t block = 0; block < channel_tiles; ++block) {
        const uint4 b = weights[(tap * channel_tiles + block) * kPersistentThreads + thread];
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          uint32_t a[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint16_t* h_row = neighbours[m][half];
            a[half] = h_row == nullptr ? 0u : load_cg(h_row + 16 * block);
            a[2 + half] = h_row == nullptr ? 0u : load_cg(h_row + 16 * block + 8);
          }
          mma_m16n8k16<DTYPE>(sums[m][0], a, b.x, b.y);
          mma_m16n8k16<DTYPE>(sums[m][1], a, b.z, b.w);
        }
      }
    }

#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PositionCoord& coord = coords[m][half];
        if (!coord.exists) continue;
        const int64_t cell = coord.row * p.hidden + channel, plane = p.hidden * (p.peephole_varies ? positions : 1);
        const int64_t weight = (p.peephole_varies ? coord.row % positions : 0) * p.hidden + channel;
        const float old = has_state[m][half] ? cells[m][half] : 0.0f;
        float gates[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          gates[gate] = input_sums[m][half][gate] + sums[m][gate / 2][2 * half + gate % 2] + bias[gate];
        }
        gates[0] = sigmoid(gates[0] + peephole_term(parameter(p.peephole, weight), old), true);
        gates[1] = sigmoid(gates[1] + peephole_term(parameter(p.peephole, weight + plane), old), true);
        gates[2] = tanh_accurate(gates[2]);
        const float c = gates[1] * old + gates[0] * gates[2];
        gates[3] = sigmoid(gates[3] + peephole_term(parameter(p.peephole, weight + 2 * plane), c), true);
        cells[m][half] = c;
        const int64_t now = time * rows * p.hidden;
        store_element<float>(p.out.data, DTYPE, now + cell, gates[3] * tanh_accurate(c));
        if (p.cells.data != nullptr) static_cast<float*>(p.cells.data)[now + cell] = c;
        if (time + 1 == p.time) static_cast<float*>(p.cn.data)[cell] = c;
        if (p.gates.data == nullptr) continue;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t offset = ((time * rows + coord.row) * 4 + gate) * p.hidden + channel;
          static_cast<float*>(p.gates.data)[offset] = gates[gate];
        }
      }
    }
  }
}

}  // namespace wmk
