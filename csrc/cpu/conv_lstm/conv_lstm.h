// The gate vectors i, f, g, o of a channel block are adjacent: one GEMM tile feeds the cell update. Channels are
// zero-padded to whole vectors.
#pragma once

#include "cpu/common/gemm_microkernel.h"
#include "cpu/common/load_store.h"
#include "cpu/common/tile.h"
#include "cpu/conv_lstm/winograd.h"
#include "cpu/conv_lstm/work_partition.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {

constexpr int64_t kSegmentPositions = 64;               // gates fit L1
constexpr int64_t kGroupTiles = 32;                     // tiles that share one read of the weights
constexpr int64_t kChunkBytes = int64_t(128) << 10;     // of gate gradients per pass over the weight gradient
constexpr int64_t kPartialsBytes = int64_t(256) << 20;  // of all workers' partial weight gradients: limits the workers

// `count` lanes, the rest zero.
template <class T, class S>
WMK_INLINE Vector<T> load_lanes(const S* from, int64_t count) {
  if (count >= kLanes<T>) return load_as(from, T(0));
  S padded[kLanes<T>] = {};
  for (int64_t lane = 0; lane < count; ++lane) padded[lane] = from[lane];
  return load_as(padded, T(0));
}
template <class T, class S>
WMK_INLINE void store_lanes(S* to, Vector<T> value, int64_t count) {
  if (count >= kLanes<T>) return store_as(to, value);
  S padded[kLanes<T>];
  store_as(padded, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

template <class T, class S>
WMK_INLINE T widen_one(S value) {
  if constexpr (sizeof(S) >= 4) {
    return T(value);
  } else {
    return load_lanes<T>(&value, 1)[0];
  }
}
template <class S, class T>
WMK_INLINE S round_one(T value) {
  if constexpr (sizeof(S) >= 4) {
    return S(value);
  } else {
    S rounded;
    store_lanes<T>(&rounded, broadcast(value), 1);
    return rounded;
  }
}

template <class T, class S>
WMK_INLINE Vector<T> round_through(Vector<T> value) {
  if constexpr (sizeof(S) >= 4) {
    return value;
  } else {
    S stored[kLanes<T>];
    store_as(stored, value);
    return load_as(stored, T(0));
  }
}

template <class T>
struct PaddedMap {
  T* data;
  int64_t width, channels;  // padded columns; elements per position
  int64_t row() const { return width * channels; }
  T* at(int64_t y, int64_t x) const { return data + y * row() + x * channels; }
};

struct Sizes {
  int64_t lanes, blocks, gates, padded_hidden;  // blocks of channels; padded elements per position
  int64_t positions;
  int64_t x_rows, x_columns;
  int64_t h_rows, h_columns;
  int64_t h_top, h_left;
  bool tiled;  // both convolutions by winograd.h

  Sizes(const wmk_conv_lstm& op, int64_t vector_lanes) : lanes(vector_lanes) {
    blocks = ceil_div(op.hidden, lanes);
    padded_hidden = blocks * lanes;
    gates = padded_hidden * kGates;
    positions = op.height * op.width;
    x_rows = (op.height - 1) * op.stride_height + (op.ih_height - 1) * op.dilation_height + 1;
    x_columns = (op.width - 1) * op.stride_width + (op.ih_width - 1) * op.dilation_width + 1;
    h_top = op.hh_height / 2, h_left = op.hh_width / 2;
    h_rows = op.height + 2 * h_top, h_columns = op.width + 2 * h_left;
    // Of the map alone, so results do not depend on time or batch.
    tiled = op.ih_height == 3 && op.ih_width == 3 && op.hh_height == 3 && op.hh_width == 3 && op.stride_height == 1 &&
            op.stride_width == 1 && op.dilation_height == 1 && op.dilation_width == 1 && op.height % 2 == 0 &&
            op.width % 2 == 0 && positions >= 2 * kGroupTiles;
  }
};

template <class T, class S>
class ConvLSTM {
 public:
  static constexpr int lanes = kLanes<T>;
  static constexpr int64_t block = int64_t(kGates) * kLanes<T>;  // per position

  explicit ConvLSTM(const wmk_conv_lstm& arguments) : op(arguments), sizes(arguments, lanes) {}

  const wmk_conv_lstm& op;
  const Sizes sizes;

  bool resets(int64_t time, int64_t batch) const {
    return op.reset.data && ((const char*)op.reset.data)[time * op.reset.stride[0] + batch * op.reset.stride[1]];
  }
  bool recurs(int64_t time, int64_t batch) const { return (time > 0 || op.h0.data) && !resets(time, batch); }

  int64_t taps_ih() const { return op.ih_height * op.ih_width; }
  int64_t taps_hh() const { return op.hh_height * op.hh_width; }
  // [blocks][taps][channels][4 vectors].
  int64_t packed_ih() const { return taps_ih() * op.input * sizes.gates; }
  int64_t packed_hh() const { return taps_hh() * op.hidden * sizes.gates; }

  // [4 * hidden, channels, kernel] to [taps][channels][4 vectors].
  void pack_block(T* to, const wmk_view& weight, int64_t channels, int64_t height, int64_t width, int64_t b) const {
    const int64_t* stride = weight.stride;
    const int64_t taps = height * width, length = channels * taps, valid = min(lanes, op.hidden - b * lanes);
    const bool in_a_row = stride[3] == 1 && stride[2] == width && stride[1] == taps;
    if (!in_a_row && valid < lanes) memset(to, 0, size_t(length * block) * sizeof(T));
    for (int64_t gate = 0; gate < kGates; ++gate) {
      const S* from = (const S*)weight.data + (gate * op.hidden + b * lanes) * stride[0];
      if (in_a_row) {
        pack_gate_in_a_row(to + gate * lanes, from, stride[0], channels, taps, int(valid));
        continue;
      }
      for (int64_t ci = 0; ci < channels; ++ci)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const S* source = from + ci * stride[1] + tap / width * stride[2] + tap % width * stride[3];
          T* row = to + (tap * channels + ci) * block + gate * lanes;
          for (int64_t lane = 0; lane < valid; ++lane) row[lane] = widen_one<T>(source[lane * stride[0]]);
        }
    }
  }
  // For contiguous channels and taps.
  static void pack_gate_in_a_row(T* to, const S* from, int64_t lane_stride, int64_t channels, int64_t taps, int valid) {
    alignas(64) T square[lanes * lanes];
    const int64_t length = channels * taps;
    for (int64_t first = 0; first < length; first += lanes) {
      const int64_t count = min(lanes, length - first);
      load_tile(square, lanes, from + first, lane_stride, 1, valid, count);
      int64_t ci = first / taps, tap = first % taps;
      for (int64_t i = 0; i < count; ++i) {
        store(to + (tap * channels + ci) * block, load(square + i * lanes));
        if (++tap == taps) tap = 0, ++ci;
      }
    }
  }
  // [blocks][4 vectors].
  void pack_bias(T* to) const {
    memset(to, 0, size_t(sizes.gates) * sizeof(T));
    if (!op.bias.data) return;
    for (int64_t gate = 0; gate < kGates; ++gate)
      for (int64_t c = 0; c < op.hidden; ++c)
        to[c / lanes * block + gate * lanes + c % lanes] =
            ((const T*)op.bias.data)[(gate * op.hidden + c) * op.bias.stride[0]];
  }
  // [positions or 1][3][padded hidden].
  int64_t peephole_positions() const { return !op.peephole.data ? 0 : op.peephole_varies ? sizes.positions : 1; }
  int64_t packed_peephole() const { return peephole_positions() * 3 * sizes.padded_hidden; }
  void pack_peephole(T* to) const {
    memset(to, 0, size_t(packed_peephole()) * sizeof(T));
    const int64_t* stride = op.peephole.stride;
    for (int64_t position = 0; position < peephole_positions(); ++position)
      for (int64_t gate = 0; gate < 3; ++gate)
        for (int64_t c = 0; c < op.hidden; ++c)
          to[(position * 3 + gate) * sizes.padded_hidden + c] =
              ((const T*)op.peephole.data)[gate * stride[0] + c * stride[1] + position * stride[2]];
  }

  template <class From>
  static void read_positions(T* to, int64_t pitch, const From* from, int64_t channel_stride, int64_t position_stride,
                             int64_t channels, int64_t count) {
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes)
      load_tile(to + c, pitch, from + c * channel_stride, channel_stride, position_stride, lanes, count);
    for (; c < channels; ++c)
      for (int64_t p = 0; p < count; ++p)
        to[p * pitch + c] = widen_one<T>(from[c * channel_stride + p * position_stride]);
  }

  // Rows [top, bottom) of [batch, channels, positions] to channels last.
  template <class From>
  void read_state(T* to, int64_t pitch, const wmk_view& view, int64_t batch, int64_t top, int64_t bottom) const {
    const int64_t* stride = view.stride;
    const From* from = (const From*)view.data + batch * stride[0] + top * op.width * stride[2];
    read_positions(to, pitch, from, stride[1], stride[2], op.hidden, (bottom - top) * op.width);
  }
  void read_h0(const PaddedMap<T>& to, int64_t batch, int64_t top, int64_t bottom) const {
    for (int64_t y = top; y < bottom; ++y)
      read_state<S>(to.at(y + sizes.h_top, sizes.h_left), op.hidden, op.h0, batch, y, y + 1);
  }

  void pad_x(const PaddedMap<T>& to, int64_t time, int64_t batch, int64_t begin, int64_t end) const {
    const S* from = (const S*)op.x.data + time * op.x.stride[0] + batch * op.x.stride[1];
    const int64_t left = min(op.pad_left, sizes.x_columns);
    const int64_t inside = max(0, min(op.x_width, sizes.x_columns - left));
    for (int64_t y = begin; y < end; ++y) {
      const int64_t row = y - op.pad_top;
      T* start = to.at(y, 0);
      if (row < 0 || row >= op.x_height) {
        memset(start, 0, size_t(to.row()) * sizeof(T));
        continue;
      }
      memset(start, 0, size_t(left * op.input) * sizeof(T));
      read_positions(start + left * op.input, op.input, from + row * op.x_width * op.x.stride[3], op.x.stride[2],
                     op.x.stride[3], op.input, inside);
      T* after = start + (left + inside) * op.input;
      memset(after, 0, size_t(start + to.row() - after) * sizeof(T));
    }
  }

  int64_t gate_terms(GemmTerm<T>* terms, int64_t y, int64_t block_number, const PaddedMap<T>& x, const T* weight_ih,
                     const PaddedMap<T>* h, const T* weight_hh) const {
    int64_t count = 0;
    const T* right = weight_ih + block_number * taps_ih() * op.input * block;
    for (int64_t ky = 0; ky < op.ih_height; ++ky)
      for (int64_t kx = 0; kx < op.ih_width; ++kx, right += op.input * block) {
        const T* left = x.at(y * op.stride_height + ky * op.dilation_height, kx * op.dilation_width);
        count = append(terms, count, {left, op.stride_width * op.input, right, op.input}, block);
      }
    if (!h) return count;
    right = weight_hh + block_number * taps_hh() * op.hidden * block;
    for (int64_t ky = 0; ky < op.hh_height; ++ky)
      for (int64_t kx = 0; kx < op.hh_width; ++kx, right += op.hidden * block)
        count = append(terms, count, {h->at(y + ky, kx), op.hidden, right, op.hidden}, block);
    return count;
  }
  int64_t max_terms() const { return taps_ih() + taps_hh(); }

  int64_t weights_size_ih() const { return sizes.tiled ? packed_ih() * kTileElements / 9 : packed_ih(); }
  int64_t weights_size_hh() const { return sizes.tiled ? packed_hh() * kTileElements / 9 : packed_hh(); }
  // `scratch`: pack_scratch_size() elements per thread.
  int64_t pack_scratch_size() const { return sizes.tiled ? 9 * max(op.input, op.hidden) * block : 0; }
  void pack_weights(T* ih, T* hh, T* scratch, int64_t threads) const {
    parallel_for(2 * sizes.blocks, threads, [&](int64_t item, int64_t thread) {
      const int64_t b = item / 2;
      T* packed = scratch + thread * pack_scratch_size();
      if (item % 2 == 0) {
        pack_weight_block(ih + b * (weights_size_ih() / sizes.blocks), packed, op.weight_ih, op.input, op.ih_height,
                          op.ih_width, b);
      } else {
        pack_weight_block(hh + b * (weights_size_hh() / sizes.blocks), packed, op.weight_hh, op.hidden, op.hh_height,
                          op.hh_width, b);
      }
    });
  }
  void pack_weight_block(T* to, T* packed, const wmk_view& weight, int64_t channels, int64_t height, int64_t width,
                         int64_t b) const {
    pack_block(sizes.tiled ? packed : to, weight, channels, height, width, b);
    if (sizes.tiled) winograd_weight_transform(to, packed, channels, block);
  }

  struct Scratch {
    GemmTerm<T>* terms;
    T* elements;  // [16][tiles][channels of x and h, or gates], at transform_stride(channels)
    T* products;  // [16][tiles][4 vectors], the same stride
  };
  // Not a power of two, which would map all 16 elements to a few L1 sets.
  static constexpr int64_t transform_stride(int64_t elements) { return kGroupTiles * elements + lanes; }
  int64_t tile_channels() const { return max(op.input + op.hidden, sizes.gates); }
  Scratch take_scratch(Arena& arena, int64_t workers) const {
    const int64_t elements = sizes.tiled ? kTileElements * transform_stride(tile_channels()) : 0;
    const int64_t products = sizes.tiled ? kTileElements * transform_stride(block) : 0;
    return {arena.take<GemmTerm<T>>(workers * max_terms()), arena.take<T>(workers * elements),
            arena.take<T>(workers * products)};
  }
  Scratch scratch_of(const Scratch& all, int64_t worker) const {
    return {all.terms + worker * max_terms(), all.elements + worker * kTileElements * transform_stride(tile_channels()),
            all.products + worker * kTileElements * transform_stride(block)};
  }

  // Calls use(sums, block, row, column, count) with gate sums [count][4 vectors] per row segment and channel block.
  // Null h: no recurrence.
  template <class Use>
  void sum_gates(const Scratch& scratch, const PaddedMap<T>& x, const T* weight_ih, const PaddedMap<T>* h,
                 const T* weight_hh, const T* bias, int64_t top, int64_t bottom, const Use& use) const {
    alignas(64) T sums[2 * kSegmentPositions * block];
    if (sizes.tiled) {
      for_each_group(top, bottom, op.width, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        sum_gates_of_group(sums, scratch, x, weight_ih, h, weight_hh, bias, row, rows, column, columns, use);
      });
      return;
    }
    for (int64_t b = 0; b < sizes.blocks; ++b)
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t count = gate_terms(scratch.terms, y, b, x, weight_ih, h, weight_hh);
        for (int64_t column = 0; column < op.width; column += kSegmentPositions) {
          const int64_t width = min(kSegmentPositions, op.width - column);
          gemm_accumulate(kGates, sums, block, bias + b * block, scratch.terms, count, column, width);
          use(sums, b, y, column, width);
        }
      }
  }

  // Calls work(row, tile rows, column, tile columns) per at most kGroupTiles tiles.
  template <class Work>
  static void for_each_group(int64_t top, int64_t bottom, int64_t width, const Work& work) {
    const int64_t across = width / 2, down = max(1, kGroupTiles / across);
    for (int64_t y = top; y < bottom; y += 2 * down)
      for (int64_t x = 0; x < across; x += kGroupTiles)
        work(y, min(down, (bottom - y) / 2), 2 * x, min(kGroupTiles, across - x));
  }
  template <class Use>
  void sum_gates_of_group(T* sums, const Scratch& scratch, const PaddedMap<T>& x, const T* weight_ih,
                          const PaddedMap<T>* h, const T* weight_hh, const T* bias, int64_t row, int64_t rows,
                          int64_t column, int64_t columns, const Use& use) const {
    const int64_t channels = op.input + op.hidden;
    winograd_input_transforms(scratch.elements, channels, x, row, rows, column, columns);
    if (h) winograd_input_transforms(scratch.elements + op.input, channels, *h, row, rows, column, columns);
    for (int64_t b = 0; b < sizes.blocks; ++b) {
      for (int64_t k = 0; k < kTileElements; ++k) {
        const T* elements = scratch.elements + k * transform_stride(channels);
        const T* right_ih = weight_ih + (b * kTileElements + k) * op.input * block;
        const T* right_hh = weight_hh + (b * kTileElements + k) * op.hidden * block;
        const GemmTerm<T> terms[] = {{elements, channels, right_ih, op.input},
                                     {elements + op.input, channels, right_hh, op.hidden}};
        gemm_accumulate<T, kGates>(scratch.products + k * transform_stride(block), block, nullptr, terms, h ? 2 : 1, 0,
                                   rows * columns);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
          winograd_output_transform(sums + 2 * c * block, kSegmentPositions * block, block,
                                    scratch.products + (r * columns + c) * block, transform_stride(block),
                                    bias + b * block, block);
        for (int64_t y = row + 2 * r; y < row + 2 * r + 2; ++y) {
          T* row_sums = sums + (y - row - 2 * r) * kSegmentPositions * block;
          if (has_nan(row_sums, 2 * columns * block))
            sum_gates_of_infinities(row_sums, x, h, bias + b * block, b, y, column, 2 * columns);
          use(row_sums, b, y, column, 2 * columns);
        }
      }
    }
  }
  // True for some infinities, too.
  static bool has_nan(const T* values, int64_t count) {
    Vector<T> sums[kGates] = {};  // a number times 0 is 0
    for (int64_t i = 0; i < count; i += block)
      for (int gate = 0; gate < kGates; ++gate) sums[gate] += load(values + i + gate * lanes) * Vector<T>{};
    const Vector<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < lanes; ++lane)
      if (sum[lane] != 0) return true;
    return false;
  }
  // Sums again what is NaN: Winograd's differences of infinities are, where the sum is infinite and the gate finite.
  void sum_gates_of_infinities(T* sums, const PaddedMap<T>& x, const PaddedMap<T>* h, const T* bias, int64_t b,
                               int64_t y, int64_t column, int64_t columns) const {
    const int64_t valid = min(lanes, op.hidden - b * lanes);
    for (int64_t p = 0; p < columns; ++p)
      for (int64_t gate = 0; gate < kGates; ++gate)
        for (int64_t lane = 0; lane < valid; ++lane) {
          T& sum = sums[p * block + gate * lanes + lane];
          if (sum == sum) continue;
          const int64_t out = gate * op.hidden + b * lanes + lane;
          sum = bias[gate * lanes + lane] + convolve(x, op.weight_ih, out, y, column + p, op.input);
          if (h) sum += convolve(*h, op.weight_hh, out, y, column + p, op.hidden);
        }
  }
  // 3 x 3, stride 1, one position; returns early once NaN.
  static T convolve(const PaddedMap<T>& map, const wmk_view& weight, int64_t out, int64_t y, int64_t column,
                    int64_t channels) {
    const S* from = (const S*)weight.data + out * weight.stride[0];
    T sum = 0;
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t ci = 0; ci < channels && sum == sum; ++ci)
        sum += map.at(y + tap / 3, column + tap % 3)[ci] *
               widen_one<T>(from[ci * weight.stride[1] + tap / 3 * weight.stride[2] + tap % 3 * weight.stride[3]]);
    return sum;
  }
  static void winograd_input_transforms(T* to, int64_t channels, const PaddedMap<T>& map, int64_t row, int64_t rows,
                                        int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c, to += channels)
        winograd_input_transform(to, transform_stride(channels), map.at(row + 2 * r, column + 2 * c), map.row(),
                                 map.channels, map.channels);
  }

  // Extends the last term if contiguous.
  static int64_t append(GemmTerm<T>* terms, int64_t count, GemmTerm<T> term, int64_t pitch) {
    if (count > 0) {
      GemmTerm<T>& last = terms[count - 1];
      if (last.left + last.length == term.left && last.right + last.length * pitch == term.right &&
          last.stride == term.stride) {
        last.length += term.length;
        return count;
      }
    }
    terms[count] = term;
    return count + 1;
  }
};

}  // namespace wmk::WMK_ISA
