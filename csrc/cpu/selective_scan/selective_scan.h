// A tile is one vector of channels of one group over at most `steps` time steps, within one chunk.
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/common/tile.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

template <class T>
struct ScanShape {
  static constexpr int lanes = kLanes<T>;
  int64_t state, pitch;  // pitch: state rounded up to whole vectors, the row length of B and C
  int64_t groups, channels_per_group, tiles_per_group, tiles;
  int64_t steps;  // maximum per tile

  explicit ScanShape(const wmk_selective_scan& scan) {
    state = scan.state;
    pitch = round_up(state, lanes);
    groups = scan.B_varies || scan.C_varies ? scan.groups : 1;
    channels_per_group = scan.channels / groups;
    tiles_per_group = ceil_div(channels_per_group, lanes);
    tiles = tiles_per_group * groups;
    // Tiles of B and C leave room in a 32 KiB cache.
    steps = pitch <= 32 ? 64 : pitch <= 64 ? 32 : 16;
  }
  int64_t channel(int64_t tile) const {
    return tile / tiles_per_group * channels_per_group + tile % tiles_per_group * lanes;
  }
  int rows(int64_t tile) const { return int(min(lanes, channels_per_group - tile % tiles_per_group * lanes)); }
};

struct Sequence {
  int64_t index, batch, begin, end, first_state_row;

  Sequence(const wmk_selective_scan& scan, int64_t sequence) : index(sequence) {
    if (scan.cu_seqlens.data) {
      const int64_t* bounds = (const int64_t*)scan.cu_seqlens.data;
      batch = 0;
      begin = bounds[sequence];
      end = bounds[sequence + 1];
      first_state_row = begin / scan.chunk + sequence;
    } else {
      batch = sequence;
      begin = 0;
      end = scan.time;
      first_state_row = sequence * ceil_div(scan.time, scan.chunk);
    }
  }
};

WMK_INLINE Plane plane_of(const wmk_view& view, int64_t dtype, int64_t batch) {
  return {(char*)view.data + batch * view.stride[0] * bytes_of(dtype), view.stride[1], view.stride[2]};
}
WMK_INLINE Plane plane_of(const wmk_view& view, int64_t dtype, int64_t batch, int64_t group) {
  return {(char*)view.data + (batch * view.stride[0] + group * view.stride[1]) * bytes_of(dtype), view.stride[2],
          view.stride[3]};
}

// [channels, state] to table[state][lane].
template <class T>
static void load_table(T* table, const wmk_view& view, int64_t channel, int rows, int64_t state) {
  load_tile(table, kLanes<T>, (const T*)view.data + channel * view.stride[0], view.stride[0], view.stride[1], rows,
            state);
}
// [channels] to a vector; zero where absent.
template <class T>
static Vector<T> load_parameter(const wmk_view& view, int64_t channel, int rows) {
  Vector<T> values{};
  if (view.data)
    for (int row = 0; row < rows; ++row) values[row] = ((const T*)view.data)[(channel + row) * view.stride[0]];
  return values;
}
// States [first, last) of [rows, channels, state] to table[state][lane].
template <class T>
static void load_state(T* table, const wmk_view& view, int64_t state_row, int64_t channel, int rows, int64_t first,
                       int64_t last) {
  const T* from = (const T*)view.data + state_row * view.stride[0] + channel * view.stride[1] + first * view.stride[2];
  load_tile(table + first * kLanes<T>, kLanes<T>, from, view.stride[1], view.stride[2], rows, last - first);
}
template <class T>
static void store_state(const T* table, const wmk_view& view, int64_t state_row, int64_t channels, int64_t states,
                        int64_t channel, int rows, int64_t first, int64_t last) {
  T* to = (T*)view.data + (state_row * channels + channel) * states + first;
  store_tile(table + first * kLanes<T>, kLanes<T>, to, states, 1, rows, last - first);
}

// With fewer tiles than threads, threads split a tile's states in whole blocks of the inner loop. Blocks' sums are
// added in fixed order: results do not depend on the number of threads. For varying B and C and long sequences.
struct StateSplit {
  static constexpr int64_t kSteps = 512;
  int64_t states, block, blocks, count;

  StateSplit(const wmk_selective_scan& scan, int64_t tiles, int64_t block_states)
      : states(scan.state), block(block_states), blocks(ceil_div(states, block)), count(1) {
    if (scan.time >= kSteps && scan.B_varies && scan.C_varies)
      count = max(1, min(blocks, scan.threads / (tiles * scan.sequences)));
  }
  int64_t first_block(int64_t split) const { return blocks * split / count; }
  int64_t first(int64_t split) const { return min(states, first_block(split) * block); }
  int64_t last(int64_t split) const { return first(split + 1); }
};

struct TileCoord {
  int64_t batch, channel;
  int rows;
  int64_t time, steps;
};

// [batch, channels, time] to [time][lane].
template <class T>
static void load_tile_at(T* to, const wmk_view& view, int64_t dtype, const TileCoord& at) {
  load_plane(to, kLanes<T>, plane_of(view, dtype, at.batch), dtype, at.channel, at.rows, at.time, at.steps);
}
template <class T>
static void store_tile_at(const T* from, const wmk_view& view, int64_t dtype, const TileCoord& at) {
  store_plane(from, kLanes<T>, plane_of(view, dtype, at.batch), dtype, at.channel, at.rows, at.time, at.steps);
}
// States [first, last) of B or C to [time][pitch], in whole vectors.
template <class T>
static void load_projection(T* tile, const ScanShape<T>& shape, const wmk_view& view, int64_t dtype, int64_t batch,
                            int64_t group, int64_t time, int64_t steps, int64_t first, int64_t last) {
  Plane plane = plane_of(view, dtype, batch, group);
  for (int64_t n = first / shape.lanes * shape.lanes; n < last; n += shape.lanes)
    load_plane(tile + n, shape.pitch, plane, dtype, n, int(min(shape.lanes, shape.state - n)), time, steps);
}

// Finite for finite A: infinity times a zero gradient would be NaN.
template <class T>
WMK_INLINE T times_log2e(T A) {
  constexpr T largest = sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__);
  const T product = A * kLog2e<T>;
  if (product > largest && A <= largest) return largest;
  return product < -largest && A >= -largest ? -largest : product;
}

// A number of states as a type, for generic lambdas; read by sizeof.
template <int States>
struct Block {
  char unused[States];
};

// A tile cut at its resets; with `reset`, a span starts from zero.
struct ResetSpans {
  int count = 0;
  int begin[65];
  bool reset[64];

  ResetSpans(const wmk_selective_scan& scan, const Sequence& sequence, int64_t time, int64_t steps) {
    const char* flags = (const char*)scan.reset.data;
    for (int64_t step = 0; step < steps; ++step) {
      bool is_reset = flags && flags[sequence.batch * scan.reset.stride[0] + (time + step) * scan.reset.stride[1]];
      if (step == 0 || is_reset) {
        begin[count] = int(step);
        reset[count++] = is_reset;
      }
    }
    begin[count] = int(steps);
  }
};

}  // namespace wmk::WMK_ISA
