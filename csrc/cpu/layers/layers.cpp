// Chains of layers, on the CPU.
//
// A step of a small recurrent network on a few dozen rows is a hundred operators of some microseconds each, of which a
// few are arithmetic. Here one call runs all layers of all steps. Rows are independent, so a tile of them keeps its
// activations in a scratch of some 100 KB, in the second-level cache. Weights are packed once per call, transposed into
// panels of two vectors: a product broadcasts activations, as in gemm_microkernel.h. With 32 rows per tile, a weight
// that is read serves 32 multiply-adds.
#include "cpu/layers/layers.h"

#include <stdlib.h>

#include "cpu/common/gemm_microkernel.h"
#include "cpu/common/load_store.h"
#include "cpu/common/parallel.h"
#include "cpu/dispatch/isa.h"

namespace wmk::WMK_ISA {
namespace {

constexpr int kVectors = 2;  // of a panel
constexpr int64_t kPanel = kVectors * kLanes<float>, kTileRows = 32;
static_assert(kLayerColumns % kPanel == 0, "a panel's columns are in the scratch");

static int64_t panels(const Layer& layer) { return layer.kind == kLinear ? ceil_div(layer.outputs, kPanel) : 0; }
static int64_t packed_size(const Layer& layer) { return panels(layer) * kPanel * (layer.inputs + 1); }

// Per panel: biases, then a row of weights for each input.
static void pack(const Layer& layer, float* to) {
  for (int64_t first = 0; first < panels(layer) * kPanel; first += kPanel) {
    const int64_t count = min(kPanel, layer.outputs - first);
    for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count && layer.bias ? layer.bias[first + i] : 0;
    to += kPanel;
    for (int64_t k = 0; k < layer.inputs; ++k, to += kPanel)
      for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count ? layer.weight[(first + i) * layer.inputs + k] : 0;
  }
}

template <class Function>
WMK_INLINE void map(float* to, const float* from, int64_t size, const Function& function) {
  for (int64_t i = 0; i < size; i += kLanes<float>) {
    const int count = int(min(kLanes<float>, size - i));
    scatter<float>(to + i, 1, count, function(gather<float>(from + i, 1, count), i, count));
  }
}

WMK_INLINE float sum(FloatVector values) {
  float total = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) total += values[lane];
  return total;
}

static void normalise(float* to, const float* from, const Layer& layer) {
  const int64_t size = layer.inputs, whole = size / kLanes<float> * kLanes<float>;
  FloatVector totals{};
  float rest = 0;
  for (int64_t i = 0; i < whole; i += kLanes<float>) totals += load(from + i);
  for (int64_t i = whole; i < size; ++i) rest += from[i];
  const float mean = (sum(totals) + rest) / float(size);
  FloatVector squares{};
  rest = 0;
  for (int64_t i = 0; i < whole; i += kLanes<float>) {
    const FloatVector distance = load(from + i) - mean;
    squares += distance * distance;
  }
  for (int64_t i = whole; i < size; ++i) rest += (from[i] - mean) * (from[i] - mean);
  const float scale = 1 / __builtin_sqrtf((sum(squares) + rest) / float(size) + float(layer.factor));
  map(to, from, size, [&](FloatVector x, int64_t i, int count) {
    return (x - mean) * scale * gather<float>(layer.weight + i, 1, count) + gather<float>(layer.bias + i, 1, count);
  });
}

static void convolve(float* to, const float* newest, float* window, const Layer& layer) {
  const int64_t channels = layer.inputs, taps = layer.outputs;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const float* weight = layer.weight + channel * taps;
    float total = (layer.bias ? layer.bias[channel] : 0) + newest[channel] * weight[taps - 1];
    for (int64_t tap = taps - 2; tap >= 0; --tap) total += window[tap * channels + channel] * weight[tap];
    to[channel] = total;
  }
  if (taps == 1) return;
  for (int64_t i = 0; i < (taps - 2) * channels; ++i) window[i] = window[i + channels];
  for (int64_t i = 0; i < channels; ++i) window[(taps - 2) * channels + i] = newest[i];
}

static void rotate(float* columns, double* angles, const Layer& layer) {
  constexpr double turn = 6.283185307179586476925286766559;
  for (int64_t i = 0; i < layer.inputs; i += 2) {
    double angle = __builtin_fmod(angles[i / 2] + double(layer.weight[i / 2]), turn);
    angle += angle < 0 ? turn : 0;
    angles[i / 2] = angle;
    const float cosine = __builtin_cosf(float(angle)), sine = __builtin_sinf(float(angle));
    for (int projection = 0; projection < 2; ++projection) {
      float* pair = columns + projection * layer.inputs + i;
      const float real = pair[0], imaginary = pair[1];
      pair[0] = real * cosine + imaginary * sine;
      pair[1] = imaginary * cosine - real * sine;
    }
  }
}

// A channel's states fill the lanes, as in selective_step.cpp.
static void scan(float* to, const float* from, const float* steps, const float* B, float* states, const Layer& layer) {
  const int64_t size = layer.outputs, per_group = layer.inputs / layer.groups, set = layer.groups * size;
  for (int64_t first = 0; first < layer.inputs; first += kLanes<float>) {
    const int channels = int(min(kLanes<float>, layer.inputs - first));
    const FloatVector step = softplus(gather<float>(steps + first, 1, channels));
    const FloatVector input = step * gather<float>(from + first, 1, channels), scaled = step * kLog2e<float>;
    for (int lane = 0; lane < channels; ++lane) {
      const int64_t channel = first + lane;
      const float *A = layer.weight + channel * size, *B_group = B + channel / per_group * size, *C = B_group + set;
      float* state = states + channel * size;
      FloatVector products{};
      for (int64_t n = 0; n < size; n += kLanes<float>) {
        const int count = int(min(kLanes<float>, size - n));
        const FloatVector decay = exp2(scaled[lane] * gather<float>(A + n, 1, count));
        const FloatVector h =
            decay * gather<float>(state + n, 1, count) + input[lane] * gather<float>(B_group + n, 1, count);
        scatter<float>(state + n, 1, count, h);
        products += h * gather<float>(C + n, 1, count);
      }
      to[channel] = sum(products) + layer.bias[channel] * from[channel];
    }
  }
}

static void softmax(float* to, const float* from, const Layer& layer) {
  const int64_t classes = layer.outputs;
  for (int64_t first = 0; first < layer.inputs; first += classes) {
    float most = from[first];
    for (int64_t i = 1; i < classes; ++i) most = from[first + i] > most ? from[first + i] : most;
    for (int64_t i = 0; i < classes; ++i) to[first + i] = from[first + i] - most;
  }
  map(to, to, layer.inputs, [](FloatVector x, int64_t, int) { return exp_nonpositive(x); });
  for (int64_t first = 0; first < layer.inputs; first += classes) {
    float total = 0;
    for (int64_t i = 0; i < classes; ++i) total += to[first + i];
    const float scale = float(layer.factor) / total;
    for (int64_t i = 0; i < classes; ++i) to[first + i] = to[first + i] * scale + float(layer.addend);
  }
}

// Inverts the cumulative sum; NaN gives class 0.
static void sample(float* to, const float* from, const float* uniform, const Layer& layer) {
  const int64_t classes = layer.outputs;
  for (int64_t first = 0; first < layer.inputs; first += classes, ++uniform) {
    double total = 0, partial = 0;
    for (int64_t i = 0; i < classes; ++i) total += from[first + i];
    const float point = *uniform * float(total);
    int64_t index = 0;
    for (int64_t i = 0; i < classes; ++i) {
      partial += from[first + i];
      index += float(partial) <= point;
    }
    index = min(index, classes - 1);
    for (int64_t i = 0; i < classes; ++i) to[first + i] = i == index;
  }
}

class Tile {
 public:
  Tile(const LayerChain& chain, float* const* packed, float* scratch, int64_t first)
      : chain_(chain), packed_(packed), scratch_(scratch), first_(first), rows_(min(kTileRows, chain.rows - first)) {}

  void run() const {
    run(0, chain_.ends[0], 0);
    for (int64_t step = 0; step < chain_.steps; ++step) {
      const bool given = step < chain_.given;
      run(chain_.ends[given ? 1 : 0], chain_.ends[given ? 2 : 1], step);
      run(chain_.ends[2], chain_.ends[3], step);
    }
    run(chain_.ends[3], chain_.count, chain_.steps);
  }

 private:
  void run(int64_t begin, int64_t end, int64_t step) const {
    for (int64_t index = begin; index < end; ++index) {
      const Layer& layer = chain_.layers[index];
      if (layer.kind == kLinear) {
        multiply(layer, packed_[index]);
      } else {
        for (int64_t row = 0; row < rows_; ++row) run_row(layer, row, step);
      }
    }
  }

  void multiply(const Layer& layer, const float* packed) const {
    for (int64_t panel = 0; panel < panels(layer); ++panel) {
      const GemmTerm<float> term = {scratch_ + layer.source, chain_.width, packed + kPanel, layer.inputs};
      gemm_accumulate<float, kVectors>(scratch_ + layer.target + panel * kPanel, chain_.width, packed, &term, 1, 0,
                                       rows_);
      packed += kPanel * (layer.inputs + 1);
    }
  }

  void run_row(const Layer& layer, int64_t row, int64_t step) const {
    float* columns = scratch_ + row * chain_.width;
    const float* from = columns + layer.source;
    float* to = columns + layer.target;
    float* memory =
        layer.memory ? layer.memory + (first_ + row) * layer.row_stride + step * layer.step_stride : nullptr;
    const float factor = float(layer.factor), addend = float(layer.addend);
    switch (layer.kind) {
      case kNorm:
        return normalise(to, from, layer);
      case kSilu:
        return map(to, from, layer.inputs, [](FloatVector x, int64_t, int) { return silu(x); });
      case kMultiply:
        return map(to, from, layer.inputs,
                   [&](FloatVector x, int64_t i, int count) { return x * gather<float>(to + i, 1, count); });
      case kAdd:
        return map(to, from, layer.inputs,
                   [&](FloatVector x, int64_t i, int count) { return x + gather<float>(to + i, 1, count); });
      case kConvolve:
        return convolve(to, from, columns + layer.window, layer);
      case kRotate:
        return rotate(to, reinterpret_cast<double*>(layer.memory) + (first_ + row) * layer.row_stride, layer);
      case kScan:
        return scan(to, from, columns + layer.window, columns + layer.projections, memory, layer);
      case kSoftmax:
        return softmax(to, from, layer);
      case kSample:
        return sample(to, from, memory, layer);
      case kScale:
        return map(to, from, layer.inputs, [&](FloatVector x, int64_t, int) { return x * factor + addend; });
      case kLoad:
        return map(to, memory, layer.inputs, [](FloatVector x, int64_t, int) { return x; });
      case kStore:
        return map(memory, from, layer.inputs, [](FloatVector x, int64_t, int) { return x; });
    }
  }

  const LayerChain& chain_;
  float* const* packed_;
  float* scratch_;
  int64_t first_, rows_;
};

}  // namespace

int run_layers(const LayerChain& chain) {
  const int64_t tiles = ceil_div(chain.rows, kTileRows), threads = max(1, min(chain.threads, tiles));
  int64_t size = threads * kTileRows * chain.width;
  for (int64_t i = 0; i < chain.count; ++i) size += packed_size(chain.layers[i]);
  float* memory = static_cast<float*>(malloc(size_t(max(size, 1)) * sizeof(float)));
  float** packed = static_cast<float**>(malloc(size_t(max(chain.count, 1)) * sizeof(float*)));
  if (memory == nullptr || packed == nullptr) {
    free(memory);
    free(packed);
    return WMK_NO_MEMORY;
  }
  float* next = memory + threads * kTileRows * chain.width;
  for (int64_t i = 0; i < chain.count; ++i) {
    packed[i] = next;
    pack(chain.layers[i], next);
    next += packed_size(chain.layers[i]);
  }
  parallel_for(tiles, threads, [&](int64_t tile, int64_t thread) {
    Tile(chain, packed, memory + thread * kTileRows * chain.width, tile * kTileRows).run();
  });
  free(memory);
  free(packed);
  return WMK_OK;
}

}  // namespace wmk::WMK_ISA
