// The ConvLSTM over all of time in one kernel, forward, on a GPU: for maps so small that launches are all there is.
//
// A block takes 16 hidden channels and 16 or 32 places of the map, and keeps what does not change over time: its
// part of the hidden weights in shared memory, in the order in which the tensor cores want them, and its cells in
// registers. A step reads every neighbour's h of the step before from the level-2 cache, multiplies, updates and writes
// its own h; then all blocks wait for each other. The input convolution has been made before, for all steps at once.
//
// A warp's 16 columns are the four gates of four channels, so ordered that a thread's sums are the gates of one channel
// in two rows: the update needs no exchange. The sums stay in float32, only that of the input convolution comes in 16
// bits.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace wmk {

constexpr int kMapThreads = 128, kMapChannels = 16;
// Bytes of shared memory for one tap of 16 input channels: 16 rows of 64 columns.
constexpr int64_t kMapStepBytes = 16 * 4 * kMapChannels * 2;

// A place of the map in the hands of a thread.
struct MapPlace {
  int64_t row, batch;
  int64_t y, x;
  bool exists;
};

__device__ __forceinline__ float hyperbolic_tangent_of(float x) { return tanhf(x); }

// TILES: of 16 places each.
template <int DTYPE, int TILES>
__global__ void __launch_bounds__(kMapThreads, 1) conv_lstm_map_kernel(const WMK_GRID_CONSTANT wmk_conv_lstm_map p) {
  WMK_SHARED_MEMORY(memory);
  uint4* weights = reinterpret_cast<uint4*>(memory);
  const int64_t slices = p.hidden / kMapChannels, slice = blockIdx.x % slices, first = blockIdx.x / slices * 16 * TILES;
  const int64_t positions = p.height * p.width, rows = p.batch * positions, taps = p.hh_height * p.hh_width;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t channel = slice * kMapChannels + warp * 4 + lane % 4;
  {
    const uint4* packed = static_cast<const uint4*>(p.weights.data) + slice * taps * slices * kMapThreads;
    // what a thread copies, it alone reads
    for (int64_t i = thread; i < taps * slices * kMapThreads; i += kMapThreads) weights[i] = packed[i];
  }
  MapPlace places[TILES][2];
  float cells[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      MapPlace& place = places[m][half];
      place.row = first + 16 * m + 8 * half + lane / 4;
      place.exists = place.row < rows;
      place.batch = place.row / positions;
      place.y = place.row % positions / p.width;
      place.x = place.row % p.width;
      const bool given = place.exists && p.c_first.data != nullptr;
      cells[m][half] = given ? static_cast<const float*>(p.c_first.data)[place.row * p.hidden + channel] : 0.0f;
    }
  }
  const auto parameter = [&](const wmk_view& view, int64_t offset) {
    return view.data == nullptr ? 0.0f : static_cast<const float*>(view.data)[offset];
  };
  float bias[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) bias[gate] = parameter(p.bias, gate * p.hidden + channel);

  for (int64_t time = 0; time < p.time; ++time) {
    float own[TILES][2][4];  // the input convolution's sums, on their way while the blocks wait for each other
    bool kept[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const MapPlace& place = places[m][half];
        kept[m][half] = place.exists;
        if (place.exists && p.reset.data != nullptr) {
          const int64_t flag = time * p.reset.stride[0] + place.batch * p.reset.stride[1];
          kept[m][half] = static_cast<const uint8_t*>(p.reset.data)[flag] == 0;
        }
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t offset = ((time * rows + place.row) * 4 + gate) * p.hidden + channel;
          own[m][half][gate] = place.exists ? load_element<float>(p.from_x.data, DTYPE, offset) : 0.0f;
        }
      }
    }
    if (time > 0) grid_barrier(static_cast<uint32_t*>(p.arrived.data), static_cast<uint32_t>(time * gridDim.x));
    const uint16_t* before = static_cast<const uint16_t*>(p.h_first.data);
    if (time > 0) before = static_cast<const uint16_t*>(p.out.data) + (time - 1) * rows * p.hidden;

    float sums[TILES][2][4] = {};  // of gates (i, f) and of (g, o): two rows each
    for (int64_t tap = 0; before != nullptr && tap < taps; ++tap) {
      const uint16_t* neighbours[TILES][2];
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const MapPlace& place = places[m][half];
          const int64_t down = tap / p.hh_width - p.hh_height / 2, right = tap % p.hh_width - p.hh_width / 2;
          const int64_t y = place.y + down, x = place.x + right;
          const bool there = kept[m][half] && y >= 0 && y < p.height && x >= 0 && x < p.width;
          const int64_t offset = (place.row + down * p.width + right) * p.hidden + 2 * (lane % 4);
          neighbours[m][half] = there ? before + offset : nullptr;
        }
      }
#pragma unroll 4
      for (int64_t block = 0; block < slices; ++block) {
        const uint4 right = weights[(tap * slices + block) * kMapThreads + thread];
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          uint32_t left[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint16_t* from = neighbours[m][half];
            left[half] = from == nullptr ? 0u : load_fresh(from + 16 * block);
            left[2 + half] = from == nullptr ? 0u : load_fresh(from + 16 * block + 8);
          }
          multiply_matrices<DTYPE>(sums[m][0], left, right.x, right.y);
          multiply_matrices<DTYPE>(sums[m][1], left, right.z, right.w);
        }
      }
    }

#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const MapPlace& place = places[m][half];
        if (!place.exists) continue;
        const int64_t cell = place.row * p.hidden + channel, plane = p.hidden * (p.peephole_varies ? positions : 1);
        const int64_t weight = (p.peephole_varies ? place.row % positions : 0) * p.hidden + channel;
        const float old = kept[m][half] ? cells[m][half] : 0.0f;
        float gates[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          gates[gate] = own[m][half][gate] + sums[m][gate / 2][2 * half + gate % 2] + bias[gate];
        }
        gates[0] = sigmoid(gates[0] + parameter(p.peephole, weight) * old, true);
        gates[1] = sigmoid(gates[1] + parameter(p.peephole, weight + plane) * old, true);
        gates[2] = hyperbolic_tangent_of(gates[2]);
        const float c = gates[1] * old + gates[0] * gates[2];
        gates[3] = sigmoid(gates[3] + parameter(p.peephole, weight + 2 * plane) * c, true);
        cells[m][half] = c;
        const int64_t now = time * rows * p.hidden;
        store_element<float>(p.out.data, DTYPE, now + cell, gates[3] * hyperbolic_tangent_of(c));
        if (p.cells.data != nullptr) static_cast<float*>(p.cells.data)[now + cell] = c;
        if (time + 1 == p.time) static_cast<float*>(p.c_last.data)[cell] = c;
        if (p.gates.data == nullptr) continue;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t offset = ((time * rows + place.row) * 4 + gate) * p.hidden + channel;
          static_cast<float*>(p.gates.data)[offset] = gates[gate];
        }
      }
    }
  }
}

}  // namespace wmk
