// A map's gradient at p sums gate gradients at q = (p + padding - k dilation) / stride over the taps k with integer q.
// With a stride, columns p fall into phases, each with its own taps and contiguous q.
#pragma once

#include "cpu/conv_lstm/conv_lstm.h"

namespace wmk::WMK_ISA {

struct Convolution {
  int64_t channels, height, width;  // of its input: elements per position; kernel
  int64_t stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
  int64_t vectors, blocks;  // of the input's channels

  Convolution(int64_t input_channels, int64_t kernel_height, int64_t kernel_width, int64_t lanes)
      : channels(input_channels), height(kernel_height), width(kernel_width) {
    stride_height = stride_width = dilation_height = dilation_width = 1;
    pad_top = height / 2, pad_left = width / 2;
    const int64_t count = ceil_div(channels, lanes);
    vectors = count % 2 == 0 ? 2 : count % 3 == 0 ? 3 : count == 1 ? 1 : 2;
    blocks = ceil_div(count, vectors);
  }
  int64_t taps() const { return height * width; }
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Zeros around a gate map.
struct Halo {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  // For a convolution from `rows` x `columns`.
  void cover(const Convolution& to, int64_t rows, int64_t columns, int64_t height, int64_t width) {
    top = max(top, -floor_div(to.pad_top - (to.height - 1) * to.dilation_height, to.stride_height));
    left = max(left, -floor_div(to.pad_left - (to.width - 1) * to.dilation_width, to.stride_width));
    bottom = max(bottom, floor_div(rows - 1 + to.pad_top, to.stride_height) - (height - 1));
    right = max(right, floor_div(columns - 1 + to.pad_left, to.stride_width) - (width - 1));
  }
};

template <class T, class S>
class Gradients : public ConvLSTM<T, S> {
 public:
  using Base = ConvLSTM<T, S>;
  using Base::block;
  using Base::lanes;
  using Base::op;
  using Base::sizes;

  explicit Gradients(const wmk_conv_lstm& arguments)
      : Base(arguments),
        ih(op.input, op.ih_height, op.ih_width, lanes),
        hh(op.hidden, op.hh_height, op.hh_width, lanes) {
    ih.stride_height = op.stride_height, ih.stride_width = op.stride_width;
    ih.dilation_height = op.dilation_height, ih.dilation_width = op.dilation_width;
    ih.pad_top = op.pad_top, ih.pad_left = op.pad_left;
    halo.cover(ih, op.x_height, op.x_width, op.height, op.width);
    halo.cover(hh, op.height, op.width, op.height, op.width);
  }

  Convolution ih, hh;
  Halo halo;

  int64_t gate_columns() const { return op.width + halo.left + halo.right; }
  int64_t gate_size() const { return (op.height + halo.top + halo.bottom) * gate_columns() * sizes.gates; }

  // x's map must have even sides, too.
  bool tiles_h() const { return sizes.tiled; }
  bool tiles_x() const { return sizes.tiled && op.x_height % 2 == 0 && op.x_width % 2 == 0; }

  // [4 * hidden, channels, kernel], flipped and transposed: [blocks][taps, last first][gates][vectors].
  static int64_t flipped_size(const Convolution& by, int64_t gates) {
    return by.blocks * by.taps() * gates * by.vectors * lanes;
  }
  void flip_weight(T* to, const wmk_view& weight, const Convolution& by) const {
    const int64_t* stride = weight.stride;
    const int64_t pitch = by.vectors * lanes;
    memset(to, 0, size_t(flipped_size(by, sizes.gates)) * sizeof(T));
    for (int64_t gate = 0; gate < kGates; ++gate)
      for (int64_t c = 0; c < op.hidden; ++c) {
        const S* from = (const S*)weight.data + (gate * op.hidden + c) * stride[0];
        T* row = to + (c / lanes * block + gate * lanes + c % lanes) * pitch;
        for (int64_t b = 0; b < by.blocks; ++b)
          for (int64_t tap = 0; tap < by.taps(); ++tap, row += sizes.gates * pitch) {
            const int64_t y = by.height - 1 - tap / by.width, x = by.width - 1 - tap % by.width;
            const S* column = from + b * pitch * stride[1] + y * stride[2] + x * stride[3];
            const int64_t valid = min(pitch, by.channels - b * pitch);
            for (int64_t ci = 0; ci < valid; ++ci) row[ci] = widen_one<T>(column[ci * stride[1]]);
          }
      }
  }

  // GEMM terms of row y, columns phase, phase + stride, ...
  int64_t input_terms(GemmTerm<T>* terms, const PaddedMap<T>& gates, const Convolution& by, const T* flipped,
                      int64_t block_number, int64_t y, int64_t phase) const {
    const int64_t pitch = by.vectors * lanes;
    int64_t count = 0;
    for (int64_t tap_row = 0; tap_row < by.height; ++tap_row) {
      const int64_t row = y + by.pad_top - (by.height - 1 - tap_row) * by.dilation_height;
      if (row - floor_div(row, by.stride_height) * by.stride_height != 0) continue;
      const int64_t at_row = floor_div(row, by.stride_height) + halo.top;
      for (int64_t tap = 0; tap < by.width; ++tap) {
        const int64_t column = phase + by.pad_left - (by.width - 1 - tap) * by.dilation_width;
        const int64_t at_column = floor_div(column, by.stride_width);
        if (column != at_column * by.stride_width) continue;
        const T* right = flipped + ((block_number * by.height + tap_row) * by.width + tap) * sizes.gates * pitch;
        count = Base::append(terms, count, {gates.at(at_row, at_column + halo.left), sizes.gates, right, sizes.gates},
                             pitch);
      }
    }
    return count;
  }

  // `scratch` holds the untransformed weights.
  void flip_weight_to_tiles(T* to, T* scratch, const wmk_view& weight, const Convolution& by) const {
    const int64_t pitch = by.vectors * lanes, size = sizes.gates * pitch;
    flip_weight(scratch, weight, by);
    for (int64_t b = 0; b < by.blocks; ++b)
      winograd_weight_transform(to + b * kTileElements * size, scratch + b * 9 * size, sizes.gates, pitch);
  }
  // Calls use(sums, block, row, column, count) with the gradient [count][vectors].
  template <class Use>
  void backpropagate_tiles(const typename Base::Scratch& scratch, const PaddedMap<T>& gates, const Convolution& by,
                           const T* weight, int64_t top, int64_t bottom, int64_t width, const Use& use) const {
    const int64_t pitch = by.vectors * lanes, size = sizes.gates * pitch;
    alignas(64) T sums[2 * kSegmentPositions * block];
    alignas(64) const T zeros[block] = {};
    Base::for_each_group(top, bottom, width, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
      Base::winograd_input_transforms(scratch.elements, sizes.gates, gates, row + by.pad_top - 2 + halo.top, rows,
                                      column + by.pad_left - 2 + halo.left, columns);
      for (int64_t b = 0; b < by.blocks; ++b) {
        for (int64_t k = 0; k < kTileElements; ++k) {
          const GemmTerm<T> term = {scratch.elements + k * Base::transform_stride(sizes.gates), sizes.gates,
                                    weight + (b * kTileElements + k) * size, sizes.gates};
          gemm_accumulate(int(by.vectors), scratch.products + k * Base::transform_stride(pitch), pitch,
                          (const T*)nullptr, &term, 1, 0, rows * columns);
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c)
            winograd_output_transform(sums + 2 * c * pitch, kSegmentPositions * pitch, pitch,
                                      scratch.products + (r * columns + c) * pitch, Base::transform_stride(pitch),
                                      zeros, pitch);
          use(sums, b, row + 2 * r, column, 2 * columns);
          use(sums + kSegmentPositions * pitch, b, row + 2 * r + 1, column, 2 * columns);
        }
      }
    });
  }

  // As add_weight_gradient, to [blocks][16][channels][4 vectors].
  void add_tiles(T* sums, const typename Base::Scratch& scratch, const PaddedMap<T>& input, const PaddedMap<T>& gates,
                 const Convolution& by, int64_t top, int64_t bottom) const {
    Base::for_each_group(top, bottom, op.width, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
      Base::winograd_input_transforms(scratch.elements, by.channels, input, row, rows, column, columns);
      for (int64_t b = 0; b < sizes.blocks; ++b) {
        T* to = scratch.products;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c, to += block) {
            const T* from = gates.at(row + 2 * r + halo.top, column + 2 * c + halo.left) + b * block;
            winograd_gradient_transform(to, Base::transform_stride(block), from, gates.row(), sizes.gates, block);
          }
        for (int64_t k = 0; k < kTileElements; ++k) {
          const GemmOperand<T> left = {scratch.elements + k * Base::transform_stride(by.channels), 0, by.channels};
          const GemmOperand<T> right = {scratch.products + k * Base::transform_stride(block), 0, block};
          gemm_accumulate_outer(sums + (b * kTileElements + k) * by.channels * block, left, right, by.channels, 1,
                                rows * columns);
        }
      }
    });
  }

  // sums [blocks][taps][channels][4 vectors] += input^T gate gradients.
  void add_weight_gradient(T* sums, const PaddedMap<T>& input, const PaddedMap<T>& gates, const Convolution& by,
                           int64_t top, int64_t bottom) const {
    // Without dilation, a row's taps are one contiguous run.
    const int64_t run = by.dilation_width == 1 ? by.width : 1;
    for (int64_t b = 0; b < sizes.blocks; ++b) {
      const GemmOperand<T> right = {gates.at(top + halo.top, halo.left) + b * block, gates.row(), sizes.gates};
      for (int64_t ky = 0; ky < by.height; ++ky)
        for (int64_t kx = 0; kx < by.width; kx += run) {
          const T* first = input.at(top * by.stride_height + ky * by.dilation_height, kx * by.dilation_width);
          const GemmOperand<T> left = {first, by.stride_height * input.row(), by.stride_width * by.channels};
          T* to = sums + ((b * by.height + ky) * by.width + kx) * by.channels * block;
          gemm_accumulate_outer(to, left, right, run * by.channels, bottom - top, op.width);
        }
    }
  }

  // Reduces partials, `distance` apart, to [4 * hidden, channels, kernel].
  void store_weight_gradient(const wmk_view& to, const T* sums, int64_t partials, int64_t distance,
                             const Convolution& by) const {
    const int64_t taps = by.taps(), kept = sizes.tiled ? kTileElements : taps;
    parallel_for(kGates * op.hidden, partials, [&](int64_t out, int64_t) {
      const int64_t gate = out / op.hidden, c = out % op.hidden;
      const T* column = sums + c / lanes * kept * by.channels * block + gate * lanes + c % lanes;
      S* row = (S*)to.data + out * by.channels * taps;
      const auto total = [&](int64_t element, int64_t ci) {
        T sum = 0;
        for (int64_t partial = 0; partial < partials; ++partial)
          sum += column[partial * distance + (element * by.channels + ci) * block];
        return sum;
      };
      for (int64_t ci = 0; ci < by.channels; ++ci, row += taps) {
        if (sizes.tiled) {
          T elements[kTileElements], weight[9];
          for (int k = 0; k < kTileElements; ++k) elements[k] = total(k, ci);
          winograd_weight_gradient_transform(weight, elements);
          for (int tap = 0; tap < 9; ++tap) row[tap] = round_one<S>(weight[tap]);
        } else {
          for (int64_t tap = 0; tap < taps; ++tap) row[tap] = round_one<S>(total(tap, ci));
        }
      }
    });
  }
};

}  // namespace wmk::WMK_ISA
