#pragma once

#include "cpu/selective_scan/selective_scan_backward.h"

namespace wmk::WMK_ISA {

constexpr int64_t kSumSteps = 32;  // per reduction

// For one chunk of a tile.
template <class T>
struct BackwardScratch {
  T *A2, *B_table, *C_table, *first_state;                                             // [pitch][lane]
  T *step, *input, *u, *slope, *output, *gate, *grad_output, *grad_input, *grad_step;  // [time][lane]
  T *B, *C;                                                                            // [time][pitch]
  T *states, *decays, *zeros;
  char* reset;
  const char** lines;  // of the next tile
  int64_t max_lines;
  int64_t bytes;

  BackwardScratch(const ScanShape<T>& shape, int64_t chunk_steps, Arena arena) {
    int64_t rows = chunk_steps * shape.lanes;
    T** const tables[] = {&A2, &B_table, &C_table, &first_state};
    for (T** table : tables) *table = arena.take<T>(shape.pitch * shape.lanes);
    T** const tiles[] = {&step, &input, &u, &slope, &output, &gate, &grad_output, &grad_input, &grad_step};
    for (T** tile : tiles) *tile = arena.take<T>(rows);
    int64_t projection = max(chunk_steps, kSumSteps) * shape.pitch;
    B = arena.take<T>(projection);
    C = arena.take<T>(projection);
    states = arena.take<T>((rows + shape.lanes) * kBlockStates<T>);
    decays = arena.take<T>(rows * kBlockStates<T>);
    zeros = arena.take<T>(shape.lanes * kBlockStates<T>);
    reset = arena.take<char>(chunk_steps);
    max_lines = 10 * chunk_steps;
    lines = arena.take<const char*>(max_lines + chunk_steps);
    bytes = arena.used();
  }
};

// Prologue: step, its slope in delta, input, dy; `gate` = dz / y.
template <class T>
static void prologue(const wmk_selective_scan& scan, const BackwardScratch<T>& s, const TileCoord& at) {
  constexpr int lanes = kLanes<T>;
  load_tile_at(s.u, scan.u, scan.dtype, at);
  load_tile_at(s.step, scan.delta, scan.dtype, at);
  load_tile_at(s.grad_output, scan.grad_out, scan.dtype, at);
  if (scan.z.data) load_tile_at(s.gate, scan.z, scan.dtype, at);
  Vector<T> bias = load_parameter<T>(scan.delta_bias, at.channel, at.rows);
  Vector<T> skip = load_parameter<T>(scan.D, at.channel, at.rows);
  for (int64_t t = 0; t < at.steps * lanes; t += lanes) {
    Vector<T> step = load(s.step + t) + bias, u = load(s.u + t);
    if (scan.delta_softplus) {
      Vector<T> slope;
      step = softplus(step, slope);
      store(s.slope + t, slope);
    }
    store(s.step + t, step);
    store(s.input + t, step * u);
    store(s.grad_input + t, Vector<T>{});
    store(s.grad_step + t, Vector<T>{});
    if (scan.z.data) {
      Vector<T> z = load(s.gate + t), gate = sigmoid(z), grad = load(s.grad_output + t);
      store(s.output + t, skip * u);
      store(s.gate + t, grad * gate * (z * (1 - gate) + 1));
      store(s.grad_output + t, grad * gate * z);
    }
  }
}

// Epilogue: gradients of u, delta and z; contributions [lane] to dD and dbias.
template <class T>
static void epilogue(const wmk_selective_scan& scan, const BackwardScratch<T>& s, const TileCoord& at, T* sum_D,
                     T* sum_bias) {
  constexpr int lanes = kLanes<T>;
  constexpr T log_2 = T(0.693147180559945309417);
  Vector<T> skip = load_parameter<T>(scan.D, at.channel, at.rows);
  Vector<T> grad_D = load(sum_D), grad_bias = load(sum_bias);
  for (int64_t t = (at.steps - 1) * lanes; t >= 0; t -= lanes) {
    Vector<T> u = load(s.u + t), grad_output = load(s.grad_output + t), grad_input = load(s.grad_input + t);
    Vector<T> grad_delta = load(s.grad_step + t) * log_2 + grad_input * u;
    if (scan.delta_softplus) grad_delta *= load(s.slope + t);
    grad_D += grad_output * u;
    grad_bias += grad_delta;
    store(s.grad_step + t, grad_delta);
    store(s.grad_input + t, grad_input * load(s.step + t) + skip * grad_output);
    if (scan.z.data) store(s.gate + t, load(s.gate + t) * load(s.output + t));
  }
  store(sum_D, grad_D);
  store(sum_bias, grad_bias);
  if (scan.grad_u.data) store_tile_at(s.grad_input, scan.grad_u, scan.dtype, at);
  if (scan.grad_delta.data) store_tile_at(s.grad_step, scan.grad_delta, scan.dtype, at);
  if (scan.grad_z.data) store_tile_at(s.gate, scan.grad_z, scan.dtype, at);
}

}  // namespace wmk::WMK_ISA
