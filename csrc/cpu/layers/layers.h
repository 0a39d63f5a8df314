// Chains of layers on rows of floats, without gradient. Python composes them: wmkernels/layers.py.
#pragma once

#include <stdint.h>

namespace wmk {

enum LayerKind : int64_t {
  kLinear,    // target[outputs] = weight [outputs, inputs] * source[inputs] + bias
  kNorm,      // target[inputs] = layer norm of source, epsilon `factor`, weight and bias [inputs]
  kSilu,      // target[inputs] = source * sigmoid(source)
  kMultiply,  // target[inputs] *= source
  kAdd,       // target[inputs] += source
  kConvolve,  // target[inputs] = bias + the last `outputs` sources, oldest first, with weight [inputs, outputs]; the
              // columns from `window` hold all but the newest, and move on
  kRotate,    // source [2, inputs], adjacent pairs as complex numbers, times exp(-i angle), in place; memory holds the
              // angles [inputs / 2] in float64, which grow by weight [inputs / 2] first
  kScan,  // a step of selective_scan.h: target[inputs] from source, step sizes before softplus from `window`, B and C
          // [2, groups, outputs] from `projections`, A = weight [inputs, outputs], D = bias [inputs]; memory holds
          // the states [inputs, outputs]
  kSoftmax,  // target[inputs] = softmax over each `outputs` adjacent sources, times `factor`, plus `addend`
  kSample,  // target[inputs] = one-hot of each `outputs` adjacent sources, probabilities, by a uniform number of memory
  kScale,   // target[inputs] = source * factor + addend
  kLoad,    // target[inputs] = memory
  kStore,   // memory = source[inputs]
  kLayerKinds
};

// `source`, `target`, `window` and `projections` are columns of a row's scratch. Of memory, element i of a row is at
// memory[row * row_stride + step * step_stride + i].
struct Layer {
  int64_t kind, source, target, window, projections, inputs, outputs, groups;
  const float *weight, *bias;  // bias may be null; a linear layer writes its outputs rounded up to kLayerColumns
  double factor, addend;
  float* memory;
  int64_t row_stride, step_stride;
};

constexpr int64_t kLayerColumns = 32;

// Layers [0, ends[0]) run once; then in each step the layers to ends[1], or in the first `given` steps those from
// ends[1] to ends[2], and those to ends[3]; then the others once, as of step `steps`.
struct LayerChain {
  const Layer* layers;
  int64_t count, ends[4];
  int64_t rows, width, steps, given, threads;  // `width`: columns of scratch
};

// Whether all columns are in the scratch and no size is negative; pointers are the caller's.
inline bool is_valid(const LayerChain& chain) {
  if (chain.rows < 0 || chain.width < 0 || chain.steps < 0 || chain.given < 0) return false;
  int64_t before = 0;
  for (const int64_t end : chain.ends) {
    if (end < before || end > chain.count) return false;
    before = end;
  }
  const auto fits = [&](int64_t first, int64_t size) {
    return first >= 0 && size >= 0 && first <= chain.width && size <= chain.width - first;
  };
  for (int64_t i = 0; i < chain.count; ++i) {
    const Layer& layer = chain.layers[i];
    if (layer.kind < 0 || layer.kind >= kLayerKinds || layer.inputs < 0 || layer.outputs < 0) return false;
    int64_t written = layer.inputs;
    if (layer.kind == kLinear) written = (layer.outputs + kLayerColumns - 1) / kLayerColumns * kLayerColumns;
    if (!fits(layer.source, layer.inputs) || !fits(layer.target, written)) return false;
    const bool grouped = layer.kind == kSoftmax || layer.kind == kSample;
    if (grouped && (layer.outputs == 0 || layer.inputs % layer.outputs)) return false;
    if (layer.kind == kConvolve && (layer.outputs == 0 || !fits(layer.window, (layer.outputs - 1) * layer.inputs)))
      return false;
    if (layer.kind == kRotate && (layer.inputs % 2 || !fits(layer.source, 2 * layer.inputs))) return false;
    if (layer.kind == kScan && (layer.groups < 1 || layer.inputs % layer.groups || !fits(layer.window, layer.inputs) ||
                                !fits(layer.projections, 2 * layer.groups * layer.outputs)))
      return false;
    const bool carries = layer.kind == kRotate || layer.kind == kScan;
    const bool remembers = carries || layer.kind == kSample || layer.kind == kLoad || layer.kind == kStore;
    if (remembers && layer.memory == nullptr) return false;
    const bool weighs = carries || layer.kind == kLinear || layer.kind == kNorm || layer.kind == kConvolve;
    const bool shifts = layer.kind == kNorm || layer.kind == kScan;
    if ((weighs && layer.weight == nullptr) || (shifts && layer.bias == nullptr)) return false;
  }
  return true;
}

}  // namespace wmk
