// Runs the CPU kernels under sanitizers with random sizes, dtypes and options (scripts/sanitize.sh).
//
// Results must agree between contiguous tensors on one thread and random layouts on several, without NaN.
#include <stdio.h>

#include <functional>
#include <map>
#include <string>

#include "buffers.h"

namespace {

using Shape = std::vector<int64_t>;
using Tensors = std::map<std::string, std::unique_ptr<Buffer>>;

[[noreturn]] void fail(const std::string& what, uint64_t seed) {
  fprintf(stderr, "%s (%s, seed %llu)\n", what.c_str(), wmk_cpu_isa(), (unsigned long long)seed);
  exit(1);
}

// Tensors of one call. Values depend on seed and name, not on the layout.
class Call {
 public:
  Call(uint64_t seed, bool plain) : seed_(seed), plain_(plain), random_(seed * 2 + 1) {}

  bool plain() const { return plain_; }
  Layout layout(bool input) {
    if (plain_) return Layout::contiguous;
    return Layout(below(random_, input && expands_ ? 5 : 4));
  }
  // Without expanded layouts, both runs have the same input values.
  void expand(bool expands) { expands_ = expands; }

  wmk_view input(const std::string& name, int64_t kind, Shape shape, double low = -1, double high = 1) {
    auto buffer = std::make_unique<Buffer>(kind, shape, layout(true), random_);
    Random values(seed_ ^ std::hash<std::string>()(name));
    std::uniform_real_distribution<double> uniform(low, high);
    for (int64_t i = 0; i < buffer->items(); ++i) buffer->write(i, uniform(values));
    return keep(name, std::move(buffer));
  }
  wmk_view flags(const std::string& name, Shape shape) {
    auto buffer = std::make_unique<Buffer>(kBytes, shape, layout(true), random_);
    Random values(seed_ ^ std::hash<std::string>()(name));
    for (int64_t i = 0; i < buffer->items(); ++i) buffer->write(i, below(values, 5) == 0);
    return keep(name, std::move(buffer));
  }
  wmk_view integers(const std::string& name, const std::vector<int64_t>& numbers) {
    auto buffer = std::make_unique<Buffer>(kInt64, Shape{int64_t(numbers.size())}, Layout::contiguous, random_);
    for (size_t i = 0; i < numbers.size(); ++i) buffer->write(int64_t(i), double(numbers[i]));
    return keep(name, std::move(buffer));
  }
  wmk_view output(const std::string& name, int64_t kind, Shape shape, bool contiguous = false) {
    auto buffer = std::make_unique<Buffer>(kind, shape, contiguous ? Layout::contiguous : layout(false), random_);
    results_.push_back(name);
    return keep(name, std::move(buffer));
  }
  const Buffer& operator[](const std::string& name) const { return *tensors_.at(name); }
  const std::vector<std::string>& results() const { return results_; }

 private:
  wmk_view keep(const std::string& name, std::unique_ptr<Buffer> buffer) {
    wmk_view view = buffer->view();
    tensors_[name] = std::move(buffer);
    return view;
  }

  uint64_t seed_;
  bool plain_, expands_ = false;
  Random random_;
  Tensors tensors_;
  std::vector<std::string> results_;
};

double tolerance(int64_t kind) {
  if (kind == WMK_FLOAT64) return 1e-11;
  if (kind == WMK_FLOAT32) return 1e-4;
  return kind == WMK_BFLOAT16 ? 0.02 : 0.003;
}

void compare(const Call& one, const Call& other, bool expanded, const std::string& op, uint64_t seed) {
  for (const std::string& name : one.results()) {
    const Buffer &a = one[name], &b = other[name];
    double scale = 1;
    for (int64_t i = 0; i < a.items(); ++i) scale = fmax(scale, fabs(a.read(i)));
    for (int64_t i = 0; i < a.items(); ++i) {
      double x = a.read(i), y = b.read(i);
      if (isnan(x) || isnan(y)) fail(op + ": " + name + " holds NaN", seed);
      if (!expanded && fabs(x - y) > tolerance(a.kind()) * scale) fail(op + ": " + name + " depends on layout", seed);
    }
  }
}

void expect_ok(int status, const std::string& op, uint64_t seed) {
  if (status != WMK_OK) fail(op + " answered " + std::to_string(status), seed);
}

void selective_scan(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_selective_scan scan = {};
  const bool packed = below(random, 3) == 0;
  scan.batch = packed ? 1 : one_of(random, {0, 1, 1, 2, 3});
  scan.channels = one_of(random, {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 70});
  scan.state = one_of(random, {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 64, 65, 100, 256});
  scan.time = one_of(random, {0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130});
  if (scan.state > 32 && scan.time > 33) scan.time = 33;
  if (below(random, 12) == 0) {  // parallel over time, or over states
    scan.batch = 1, scan.channels = one_of(random, {1, 2, 17}), scan.time = 1200 + below(random, 900);
    scan.state = one_of(random, {3, 16, 20, 32, 48});
  }
  scan.groups = scan.channels % 2 == 0 ? one_of(random, {1, 2, scan.channels}) : one_of(random, {1, scan.channels});
  scan.chunk = one_of(random, {1, 2, 3, 5, 8, 16, 64, 1000});
  scan.dtype = below(random, 4);
  scan.delta_softplus = below(random, 2);
  scan.B_varies = below(random, 3) > 0;
  scan.C_varies = below(random, 3) > 0;
  const int64_t threads = 1 + below(random, 3);
  scan.threads = call.plain() ? 1 : threads;
  const int64_t state_kind = scan.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  std::vector<int64_t> bounds = {0};
  if (packed) {
    for (int64_t left = below(random, 5); left > 0; --left) {
      const int64_t length = below(random, scan.time / 2 + 1);
      bounds.push_back(bounds.back() + length > scan.time ? scan.time : bounds.back() + length);
    }
    bounds.push_back(scan.time);
  }
  scan.sequences = packed ? int64_t(bounds.size()) - 1 : scan.batch;
  const int64_t slots =
      packed ? scan.time / scan.chunk + scan.sequences : scan.batch * ((scan.time + scan.chunk - 1) / scan.chunk);
  const Shape activation = {scan.batch, scan.channels, scan.time}, parameter = {scan.channels, scan.state};
  const Shape varying = {scan.batch, scan.groups, scan.state, scan.time};
  const Shape states = {scan.sequences, scan.channels, scan.state};
  const bool has_D = below(random, 2), has_z = below(random, 2), has_bias = below(random, 2);
  const bool has_initial = below(random, 2), has_reset = below(random, 2);
  auto projection = [&](const char* name, bool varies) {
    return varies ? call.input(name, scan.dtype, varying) : call.input(name, state_kind, parameter);
  };
  scan.u = call.input("u", scan.dtype, activation);
  scan.delta = call.input("delta", scan.dtype, activation, 0.01, 0.4);
  scan.A = call.input("A", state_kind, parameter, -2, 0);
  scan.B = projection("B", scan.B_varies);
  scan.C = projection("C", scan.C_varies);
  if (has_D) scan.D = call.input("D", state_kind, {scan.channels});
  if (has_z) scan.z = call.input("z", scan.dtype, activation);
  if (has_bias) scan.delta_bias = call.input("delta_bias", state_kind, {scan.channels}, 0, 0.1);
  if (has_initial) scan.initial_state = call.input("initial_state", state_kind, states);
  if (has_reset) scan.reset = call.flags("reset", {scan.batch, scan.time});
  if (packed) scan.cu_seqlens = call.integers("cu_seqlens", bounds);
  scan.out = call.output("out", scan.dtype, activation);
  scan.last_state = call.output("last_state", state_kind, states, true);
  {
    Workspace scratch(wmk_cpu_selective_scan_forward_workspace(&scan));
    scan.workspace = scratch.data();
    expect_ok(wmk_cpu_selective_scan_forward(&scan), "selective_scan_forward without states", seed);
  }
  Buffer chunk_states(state_kind, {slots, scan.channels, scan.state}, Layout::contiguous, random);
  scan.chunk_states = chunk_states.view();
  {
    Workspace scratch(wmk_cpu_selective_scan_forward_workspace(&scan));
    scan.workspace = scratch.data();
    expect_ok(wmk_cpu_selective_scan_forward(&scan), "selective_scan_forward", seed);
  }
  // Gradients are optional.
  const int64_t wanted = below(random, 2) ? -1 : int64_t(random());
  auto gradient = [&](int bit, const char* name, int64_t kind, Shape shape, bool contiguous) {
    return wanted >> bit & 1 ? call.output(name, kind, shape, contiguous) : wmk_view{};
  };
  scan.grad_out = call.input("grad_out", scan.dtype, activation);
  if (below(random, 2)) scan.grad_last_state = call.input("grad_last_state", state_kind, states);
  scan.grad_u = gradient(0, "grad_u", scan.dtype, activation, false);
  scan.grad_delta = gradient(1, "grad_delta", scan.dtype, activation, false);
  scan.grad_A = gradient(2, "grad_A", state_kind, parameter, true);
  scan.grad_B = scan.B_varies ? gradient(3, "grad_B", scan.dtype, varying, false)
                              : gradient(3, "grad_B", state_kind, parameter, true);
  scan.grad_C = scan.C_varies ? gradient(4, "grad_C", scan.dtype, varying, false)
                              : gradient(4, "grad_C", state_kind, parameter, true);
  if (has_D) scan.grad_D = gradient(5, "grad_D", state_kind, {scan.channels}, true);
  if (has_z) scan.grad_z = gradient(6, "grad_z", scan.dtype, activation, false);
  if (has_bias) scan.grad_delta_bias = gradient(7, "grad_delta_bias", state_kind, {scan.channels}, true);
  if (has_initial) scan.grad_initial_state = gradient(8, "grad_initial_state", state_kind, states, true);
  Workspace scratch(wmk_cpu_selective_scan_backward_workspace(&scan));
  scan.workspace = scratch.data();
  expect_ok(wmk_cpu_selective_scan_backward(&scan), "selective_scan_backward", seed);
}

void selective_step(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_selective_step step = {};
  step.batch = one_of(random, {0, 1, 2, 5});
  step.channels = one_of(random, {1, 3, 8, 15, 16, 17, 33, 64, 70});
  step.state = one_of(random, {1, 2, 3, 5, 8, 15, 16, 17, 32, 64, 100, 256});
  step.groups = step.channels % 2 == 0 ? one_of(random, {1, 2, step.channels}) : one_of(random, {1, step.channels});
  step.dtype = below(random, 4);
  step.delta_softplus = below(random, 2);
  const int64_t threads = 1 + below(random, 3);
  step.threads = call.plain() ? 1 : threads;
  const int64_t parameter = step.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  step.state_dtype = below(random, 2) ? parameter : step.dtype;
  const bool indexed = below(random, 2) && step.batch > 0, in_place = below(random, 2) || indexed;
  step.states = indexed ? step.batch + below(random, 3) : step.batch;
  const Shape states = {step.states, step.channels, step.state}, activation = {step.batch, step.channels};
  const Shape projection = {step.batch, step.groups, step.state};
  // Read and written.
  step.state_in = call.output("state", step.state_dtype, states);
  Buffer& held = const_cast<Buffer&>(call["state"]);
  Random values(seed + 1);
  for (int64_t i = 0; i < held.items(); ++i) held.write(i, double(below(values, 1000)) / 1000 - 0.5);
  step.state_out = in_place ? step.state_in : call.output("new_state", step.state_dtype, states);
  step.u = call.input("u", step.dtype, activation);
  step.delta = call.input("delta", step.dtype, activation, 0.01, 0.4);
  step.A = call.input("A", parameter, {step.channels, step.state}, -2, 0);
  step.B = call.input("B", step.dtype, projection);
  step.C = call.input("C", step.dtype, projection);
  if (below(random, 2)) step.D = call.input("D", parameter, {step.channels});
  if (below(random, 2)) step.z = call.input("z", step.dtype, activation);
  if (below(random, 2)) step.delta_bias = call.input("delta_bias", parameter, {step.channels});
  if (below(random, 2)) step.reset = call.flags("reset", {step.batch});
  if (indexed) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < step.batch; ++i) rows.push_back(below(random, 4) ? step.states - 1 - i : -1 - i);
    step.indices = call.integers("indices", rows);
  }
  step.out = call.output("out", step.dtype, activation);
  expect_ok(wmk_cpu_selective_step(&step), "selective_step", seed);
}

void linear_scan(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_linear_scan scan = {};
  scan.batch = one_of(random, {0, 1, 2, 3});
  scan.channels = one_of(random, {1, 2, 7, 8, 15, 16, 17, 33, 64, 70});
  scan.time = one_of(random, {0, 1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 130, 2000});
  scan.dtype = below(random, 4);
  scan.reverse = below(random, 2);
  const int64_t threads = 1 + below(random, 3);
  scan.threads = call.plain() ? 1 : threads;
  const int64_t state_kind = scan.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  const Shape activation = {scan.batch, scan.channels, scan.time}, states = {scan.batch, scan.channels};
  const bool has_initial = below(random, 2);
  scan.gates = call.input("gates", scan.dtype, activation);
  scan.tokens = call.input("tokens", scan.dtype, activation);
  if (has_initial) scan.initial_state = call.input("initial_state", state_kind, states);
  if (below(random, 2)) scan.reset = call.flags("reset", {scan.batch, scan.time});
  scan.out = call.output("out", scan.dtype, activation);
  scan.last_state = call.output("last_state", state_kind, states, true);
  {
    Workspace scratch(wmk_cpu_linear_scan_forward_workspace(&scan));
    scan.workspace = scratch.data();
    expect_ok(wmk_cpu_linear_scan_forward(&scan), "linear_scan_forward", seed);
  }
  scan.grad_out = call.input("grad_out", scan.dtype, activation);
  if (below(random, 2)) scan.grad_last_state = call.input("grad_last_state", state_kind, states);
  scan.grad_gates = call.output("grad_gates", scan.dtype, activation);
  scan.grad_tokens = call.output("grad_tokens", scan.dtype, activation);
  if (has_initial && below(random, 2))
    scan.grad_initial_state = call.output("grad_initial_state", state_kind, states, true);
  Workspace scratch(wmk_cpu_linear_scan_backward_workspace(&scan));
  scan.workspace = scratch.data();
  expect_ok(wmk_cpu_linear_scan_backward(&scan), "linear_scan_backward", seed);
}

void gated_delta_rule(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_gated_delta_rule op = {};
  const bool packed = below(random, 3) == 0;
  op.batch = packed ? 1 : one_of(random, {0, 1, 1, 2});
  op.heads = one_of(random, {1, 2, 3});
  op.d_k = one_of(random, {1, 2, 7, 16, 17, 31, 64, 70});
  op.d_v = one_of(random, {1, 3, 8, 15, 16, 33, 48, 65});
  op.time = one_of(random, {0, 1, 2, 5, 7, 8, 16, 17, 31, 33, 70});
  op.chunk = one_of(random, {1, 2, 5, 8, 16, 32, 37, 100});
  op.dtype = below(random, 4);
  const double scale = 0.3;
  memcpy(&op.scale, &scale, sizeof(scale));
  const int64_t threads = 1 + below(random, 3);
  op.threads = call.plain() ? 1 : threads;
  const int64_t held = op.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  std::vector<int64_t> bounds = {0};
  if (packed) {
    for (int64_t left = below(random, 4); left > 0; --left) {
      const int64_t length = below(random, op.time / 2 + 1);
      bounds.push_back(bounds.back() + length > op.time ? op.time : bounds.back() + length);
    }
    bounds.push_back(op.time);
  }
  op.sequences = packed ? int64_t(bounds.size()) - 1 : op.batch;
  const int64_t rows = packed ? op.time / op.chunk + op.sequences : op.batch * ((op.time + op.chunk - 1) / op.chunk);
  const Shape keys = {op.batch, op.heads, op.d_k, op.time}, values = {op.batch, op.heads, op.d_v, op.time};
  const Shape gates = {op.batch, op.heads, op.time}, states = {op.sequences, op.heads, op.d_k, op.d_v};
  const bool has_initial = below(random, 2);
  const double largest = 1 / sqrt(double(op.d_k));
  op.q = call.input("q", op.dtype, keys);
  op.k = call.input("k", op.dtype, keys, -largest, largest);
  op.v = call.input("v", op.dtype, values);
  op.gate = call.input("gate", held, gates, -2, 0);
  op.beta = call.input("beta", held, gates, 0, 1);
  if (has_initial) op.initial_state = call.input("initial_state", held, states);
  if (below(random, 2)) op.reset = call.flags("reset", {op.batch, op.time});
  if (packed) op.cu_seqlens = call.integers("cu_seqlens", bounds);
  op.out = call.output("out", op.dtype, values);
  op.last_state = call.output("last_state", held, states, true);
  {
    Workspace scratch(wmk_cpu_gated_delta_rule_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_gated_delta_rule_forward(&op), "gated_delta_rule_forward without states", seed);
  }
  Buffer chunk_states(held, {rows, op.heads, op.d_k, op.d_v}, Layout::contiguous, random);
  Buffer residuals(held, {op.batch, op.heads, op.time, op.d_v}, Layout::contiguous, random);
  op.chunk_states = chunk_states.view(), op.residuals = residuals.view();
  {
    Workspace scratch(wmk_cpu_gated_delta_rule_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_gated_delta_rule_forward(&op), "gated_delta_rule_forward", seed);
  }
  op.grad_out = call.input("grad_out", op.dtype, values);
  if (below(random, 2)) op.grad_last_state = call.input("grad_last_state", held, states);
  op.grad_q = call.output("grad_q", op.dtype, keys);
  op.grad_k = call.output("grad_k", op.dtype, keys);
  op.grad_v = call.output("grad_v", op.dtype, values);
  op.grad_gate = call.output("grad_gate", held, gates);
  op.grad_beta = call.output("grad_beta", held, gates);
  if (has_initial && below(random, 2)) op.grad_initial_state = call.output("grad_initial_state", held, states, true);
  Workspace scratch(wmk_cpu_gated_delta_rule_backward_workspace(&op));
  op.workspace = scratch.data();
  expect_ok(wmk_cpu_gated_delta_rule_backward(&op), "gated_delta_rule_backward", seed);
}

void place_memory(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_place_memory op = {};
  const bool packed = below(random, 3) == 0, delta = below(random, 2);
  op.batch = packed ? 1 : one_of(random, {0, 1, 1, 2});
  op.time = one_of(random, {0, 1, 2, 3, 15, 16, 17, 33});
  op.places = one_of(random, {1, 2, 5, 9, 16, 25});
  op.groups = one_of(random, {1, 1, 2, 3});
  op.channels = op.groups * one_of(random, {1, 3, 8, 15, 16, 17, 33});
  op.frequencies = one_of(random, {1, 2, 7, 16, 17, 40});
  op.dtype = below(random, 4);
  const int64_t threads = 1 + below(random, 3);
  op.threads = call.plain() ? 1 : threads;
  const int64_t held = op.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32, rows = 2 * op.frequencies;
  std::vector<int64_t> bounds = {0};
  if (packed) {
    for (int64_t left = below(random, 4); left > 0; --left) {
      const int64_t length = below(random, op.time / 2 + 1);
      bounds.push_back(bounds.back() + length > op.time ? op.time : bounds.back() + length);
    }
    bounds.push_back(op.time);
  }
  op.sequences = packed ? int64_t(bounds.size()) - 1 : op.batch;
  const Shape values = {op.batch, op.time, op.places, op.channels}, phases = {op.batch, op.time, op.groups, rows};
  const Shape gates = {op.batch, op.time, op.places, op.groups}, first = {op.sequences, op.groups, rows};
  const Shape states = {op.sequences, op.groups, rows, op.channels / op.groups}, keys = {op.places, rows};
  const bool has_gate = below(random, 2), has_initial = below(random, 2), has_first = below(random, 2);
  const double largest = 0.5 / sqrt(double(op.places * op.frequencies));
  op.values = call.input("values", op.dtype, values);
  op.phase = call.input("phase", held, phases, -0.7, 0.7);
  op.keys = call.input("keys", held, keys, -largest, largest);
  if (delta) op.inverse = call.input("inverse", held, {op.places, op.places}, -0.1, 0.1);
  if (has_gate) op.gate = call.input("gate", held, gates, 0, 1);
  if (has_initial) op.initial_state = call.input("initial_state", held, states);
  if (has_first) op.initial_phase = call.input("initial_phase", held, first, -0.7, 0.7);
  if (below(random, 2)) op.reset = call.flags("reset", {op.batch, op.time});
  if (packed) op.cu_seqlens = call.integers("cu_seqlens", bounds);
  op.out = call.output("out", op.dtype, values);
  op.last_state = call.output("last_state", held, states, true);
  Buffer residual(held, values, Layout::contiguous, random);
  if (delta) op.residual = residual.view();
  {
    Workspace scratch(wmk_cpu_place_memory_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_place_memory_forward(&op), "place_memory_forward", seed);
  }
  if (below(random, 2)) op.grad_out = call.input("grad_out", op.dtype, values);
  if (below(random, 2)) op.grad_last_state = call.input("grad_last_state", held, states);
  op.grad_values = call.output("grad_values", op.dtype, values, true);
  if (below(random, 2)) op.grad_phase = call.output("grad_phase", held, phases, true);
  if (below(random, 2)) op.grad_keys = call.output("grad_keys", held, keys, true);
  if (delta && below(random, 2)) op.grad_inverse = call.output("grad_inverse", held, {op.places, op.places}, true);
  if (has_gate && below(random, 2)) op.grad_gate = call.output("grad_gate", held, gates, true);
  if (has_initial && below(random, 2)) op.grad_initial_state = call.output("grad_initial_state", held, states, true);
  if (has_first && below(random, 2)) op.grad_initial_phase = call.output("grad_initial_phase", held, first, true);
  Workspace scratch(wmk_cpu_place_memory_backward_workspace(&op));
  op.workspace = scratch.data();
  expect_ok(wmk_cpu_place_memory_backward(&op), "place_memory_backward", seed);
}

void conv_lstm(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_conv_lstm op = {};
  op.time = one_of(random, {1, 2, 3});
  op.batch = one_of(random, {1, 2, 3});
  op.input = one_of(random, {1, 2, 3, 8, 17, 35});
  op.hidden = one_of(random, {1, 2, 3, 5, 8, 16, 17, 33});
  op.x_height = one_of(random, {1, 2, 3, 5, 8});
  op.x_width = one_of(random, {1, 2, 4, 7, 15, 70});
  op.ih_height = 1 + below(random, 4), op.ih_width = 1 + below(random, 4);
  op.hh_height = one_of(random, {1, 3, 5}), op.hh_width = one_of(random, {1, 3, 5});
  op.stride_height = 1 + below(random, 3), op.stride_width = 1 + below(random, 3);
  op.dilation_height = 1 + below(random, 2), op.dilation_width = 1 + below(random, 3);
  op.pad_top = below(random, 4), op.pad_left = below(random, 4);
  op.height = 1 + (op.x_height - 1) / op.stride_height, op.width = 1 + (op.x_width - 1) / op.stride_width;
  if (below(random, 3) == 0) op.height = 1 + below(random, op.height);
  op.dtype = below(random, 4);
  const int64_t threads = 1 + below(random, 3);
  op.threads = call.plain() ? 1 : threads;
  const int64_t state = op.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  const int64_t positions = op.height * op.width, pixels = op.x_height * op.x_width;
  const Shape maps = {op.batch, op.hidden, positions}, kept = {op.batch, positions, op.hidden};
  const Shape weight_ih = {4 * op.hidden, op.input, op.ih_height, op.ih_width};
  const Shape weight_hh = {4 * op.hidden, op.hidden, op.hh_height, op.hh_width};
  op.x = call.input("x", op.dtype, {op.time, op.batch, op.input, pixels});
  op.weight_ih = call.input("weight_ih", op.dtype, weight_ih, -0.3, 0.3);
  op.weight_hh = call.input("weight_hh", op.dtype, weight_hh, -0.2, 0.2);
  if (below(random, 2)) op.bias = call.input("bias", state, {4 * op.hidden});
  const int64_t peephole = below(random, 3);
  op.peephole_varies = peephole == 2;
  const Shape places = {3, op.hidden, peephole == 2 ? positions : 1};
  if (peephole) op.peephole = call.input("peephole", state, places);
  const bool has_h = below(random, 2), has_c = below(random, 2), keeps_gates = below(random, 2);
  if (has_h) op.h0 = call.input("h0", op.dtype, maps);
  if (has_c) op.c0 = call.input("c0", state, maps);
  if (below(random, 2)) op.reset = call.flags("reset", {op.time, op.batch});
  const Shape every = {op.time, op.batch, positions, op.hidden};
  op.out = call.output("out", op.dtype, every, true);
  op.hn = call.output("hn", op.dtype, kept, true);
  op.cn = call.output("cn", state, kept, true);
  op.cells = call.output("cells", state, every, true);
  if (keeps_gates) op.gates = call.output("gates", state, {op.time, op.batch, positions, 4 * op.hidden}, true);
  {
    Workspace scratch(wmk_cpu_conv_lstm_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_conv_lstm_forward(&op), "conv_lstm_forward", seed);
  }
  if (below(random, 4)) op.grad_out = call.input("grad_out", op.dtype, {op.time, op.batch, op.hidden, positions});
  if (below(random, 2)) op.grad_hn = call.input("grad_hn", op.dtype, maps);
  if (below(random, 2)) op.grad_cn = call.input("grad_cn", state, maps);
  op.grad_x = call.output("grad_x", op.dtype, {op.time, op.batch, pixels, op.input}, true);
  op.grad_weight_ih = call.output("grad_weight_ih", op.dtype, weight_ih, true);
  op.grad_weight_hh = call.output("grad_weight_hh", op.dtype, weight_hh, true);
  if (op.bias.data) op.grad_bias = call.output("grad_bias", state, {4 * op.hidden}, true);
  if (peephole) op.grad_peephole = call.output("grad_peephole", state, places, true);
  if (has_h) op.grad_h0 = call.output("grad_h0", op.dtype, kept, true);
  if (has_c) op.grad_c0 = call.output("grad_c0", state, kept, true);
  Workspace scratch(wmk_cpu_conv_lstm_backward_workspace(&op));
  op.workspace = scratch.data();
  expect_ok(wmk_cpu_conv_lstm_backward(&op), "conv_lstm_backward", seed);
}

void ssd_scan(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_ssd_scan op = {};
  const bool packed = below(random, 3) == 0;
  op.batch = packed ? 1 : one_of(random, {0, 1, 1, 2});
  op.groups = one_of(random, {1, 1, 2});
  op.heads = op.groups * one_of(random, {1, 2, 3, 7, 13});
  op.d = one_of(random, {1, 3, 8, 15, 16, 33, 64});
  op.n = one_of(random, {1, 2, 7, 16, 17, 31, 70});
  op.time = one_of(random, {0, 1, 2, 5, 7, 8, 16, 17, 31, 33, 70, 200});
  op.chunk = one_of(random, {1, 2, 5, 8, 16, 32, 37, 64, 100});
  op.kept_interval = op.chunk * one_of(random, {1, 1, 2, 3});
  op.dtype = below(random, 4);
  const int64_t threads = 1 + below(random, 3);
  op.threads = call.plain() ? 1 : threads;
  const int64_t held = op.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  std::vector<int64_t> bounds = {0};
  if (packed) {
    for (int64_t left = below(random, 4); left > 0; --left) {
      const int64_t length = below(random, op.time / 2 + 1);
      bounds.push_back(bounds.back() + length > op.time ? op.time : bounds.back() + length);
    }
    bounds.push_back(op.time);
  }
  op.sequences = packed ? int64_t(bounds.size()) - 1 : op.batch;
  const int64_t rows = packed ? op.time / op.kept_interval + op.sequences
                              : op.batch * ((op.time + op.kept_interval - 1) / op.kept_interval);
  const Shape activation = {op.batch, op.time, op.heads, op.d}, projection = {op.batch, op.time, op.groups, op.n};
  const Shape steps = {op.batch, op.time, op.heads}, states = {op.sequences, op.heads, op.d, op.n};
  const bool has_own = below(random, 2), has_D = below(random, 2), has_z = below(random, 2);
  const bool has_initial = below(random, 2);
  op.x = call.input("x", op.dtype, activation);
  op.gate = call.input("gate", held, steps, -2, 0);
  op.weight = call.input("weight", held, steps, 0, 1);
  op.B = call.input("B", op.dtype, projection);
  op.C = call.input("C", op.dtype, projection);
  if (has_own) op.own_weight = call.input("own_weight", held, steps, 0, 1);
  if (has_D) op.D = call.input("D", held, {op.heads, op.d});
  if (has_z) op.z = call.input("z", op.dtype, activation);
  if (has_initial) op.initial_state = call.input("initial_state", held, states);
  if (below(random, 2)) op.reset = call.flags("reset", {op.batch, op.time});
  if (packed) op.cu_seqlens = call.integers("cu_seqlens", bounds);
  op.out = call.output("out", op.dtype, activation);
  op.last_state = call.output("last_state", held, states, true);
  {
    Workspace scratch(wmk_cpu_ssd_scan_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_ssd_scan_forward(&op), "ssd_scan_forward without states", seed);
  }
  Buffer chunk_states(held, {rows, op.heads, op.n, op.d}, Layout::contiguous, random);
  op.chunk_states = chunk_states.view();
  {
    Workspace scratch(wmk_cpu_ssd_scan_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_ssd_scan_forward(&op), "ssd_scan_forward", seed);
  }
  op.grad_out = call.input("grad_out", op.dtype, activation);
  if (below(random, 2)) op.grad_last_state = call.input("grad_last_state", held, states);
  op.grad_x = call.output("grad_x", op.dtype, activation);
  for (auto [name, view] : {std::pair{"grad_gate", &op.grad_gate}, {"grad_weight", &op.grad_weight}})
    *view = call.output(name, held, steps);
  op.grad_B = call.output("grad_B", op.dtype, projection);
  op.grad_C = call.output("grad_C", op.dtype, projection);
  if (has_own) op.grad_own_weight = call.output("grad_own_weight", held, steps);
  if (has_D) op.grad_D = call.output("grad_D", held, {op.heads, op.d}, true);
  if (has_z) op.grad_z = call.output("grad_z", op.dtype, activation);
  if (has_initial && below(random, 2)) op.grad_initial_state = call.output("grad_initial_state", held, states, true);
  Workspace scratch(wmk_cpu_ssd_scan_backward_workspace(&op));
  op.workspace = scratch.data();
  expect_ok(wmk_cpu_ssd_scan_backward(&op), "ssd_scan_backward", seed);
}

void causal_conv1d(uint64_t seed, Call& call) {
  Random random(seed);
  wmk_causal_conv1d op = {};
  const bool packed = below(random, 3) == 0;
  op.batch = packed ? 1 : one_of(random, {0, 1, 1, 3});
  op.channels = one_of(random, {1, 2, 7, 8, 15, 16, 17, 33, 70});
  op.width = one_of(random, {1, 2, 3, 4, 4, 5, 9, 20, 70});
  op.time = one_of(random, {0, 1, 1, 2, 5, 17, 63, 64, 65, 130, 600});
  op.dtype = below(random, 4);
  op.silu = below(random, 2);
  const int64_t threads = 1 + below(random, 3);
  op.threads = call.plain() ? 1 : threads;
  const int64_t held = op.dtype == WMK_FLOAT64 ? WMK_FLOAT64 : WMK_FLOAT32;
  std::vector<int64_t> bounds = {0};
  if (packed) {
    for (int64_t left = below(random, 4); left > 0; --left) {
      const int64_t length = below(random, op.time / 2 + 1);
      bounds.push_back(bounds.back() + length > op.time ? op.time : bounds.back() + length);
    }
    bounds.push_back(op.time);
  }
  op.sequences = packed ? int64_t(bounds.size()) - 1 : op.batch;
  const Shape activation = {op.batch, op.channels, op.time}, states = {op.sequences, op.channels, op.width - 1};
  const Shape taps = {op.channels, op.width};
  const bool has_initial = below(random, 2) && op.width > 1;
  op.x = call.input("x", op.dtype, activation);
  op.weight = call.input("weight", held, taps);
  if (below(random, 2)) op.bias = call.input("bias", held, {op.channels});
  if (has_initial) op.initial_state = call.input("initial_state", held, states);
  if (below(random, 2)) op.reset = call.flags("reset", {op.batch, op.time});
  if (packed) op.cu_seqlens = call.integers("cu_seqlens", bounds);
  op.out = call.output("out", op.dtype, activation);
  op.last_state = call.output("last_state", held, states);
  {
    Workspace scratch(wmk_cpu_causal_conv1d_forward_workspace(&op));
    op.workspace = scratch.data();
    expect_ok(wmk_cpu_causal_conv1d_forward(&op), "causal_conv1d_forward", seed);
  }
  if (op.time == 1 && !packed && op.dtype <= WMK_FLOAT64)
    expect_ok(wmk_cpu_causal_conv1d_step(&op), "causal_conv1d_step", seed);
  op.grad_out = call.input("grad_out", op.dtype, activation);
  if (below(random, 2) && op.width > 1) op.grad_last_state = call.input("grad_last_state", held, states);
  op.grad_x = call.output("grad_x", op.dtype, activation);
  op.grad_weight = call.output("grad_weight", held, taps, true);
  if (op.bias.data) op.grad_bias = call.output("grad_bias", held, {op.channels}, true);
  if (has_initial) op.grad_initial_state = call.output("grad_initial_state", held, states);
  Workspace scratch(wmk_cpu_causal_conv1d_backward_workspace(&op));
  op.workspace = scratch.data();
  expect_ok(wmk_cpu_causal_conv1d_backward(&op), "causal_conv1d_backward", seed);
}

struct Op {
  const char* name;
  void (*run)(uint64_t, Call&);
  uint64_t calls;
};

}  // namespace

int main(int count, char** words) {
  const uint64_t first = count > 1 ? strtoull(words[1], nullptr, 10) : 0;
  const uint64_t times = count > 2 ? strtoull(words[2], nullptr, 10) : 1;
  const Op ops[] = {{"selective_scan", selective_scan, 300},
                    {"selective_step", selective_step, 200},
                    {"linear_scan", linear_scan, 150},
                    {"place_memory", place_memory, 150},
                    {"gated_delta_rule", gated_delta_rule, 100},
                    {"conv_lstm", conv_lstm, 150},
                    {"ssd_scan", ssd_scan, 100},
                    {"causal_conv1d", causal_conv1d, 150}};
  std::string levels = std::string(wmk_cpu_isa_available()) + ",";
  for (size_t start = 0, end; (end = levels.find(',', start)) != std::string::npos; start = end + 1) {
    const std::string level = levels.substr(start, end - start);
    if (level.empty() || wmk_cpu_set_isa(level.c_str()) != WMK_OK) fail("cannot use level " + level, 0);
    for (const Op& op : ops) {
      for (uint64_t seed = first; seed < first + op.calls * times; ++seed) {
        Call plain(seed, true), arranged(seed, false);
        // Expanded inputs have other values, so only bounds and NaN are checked.
        const bool expanded = seed % 3 == 0;
        arranged.expand(expanded);
        op.run(seed, plain);
        op.run(seed, arranged);
        compare(plain, arranged, expanded, op.name, seed);
      }
      printf("%-8s %-16s %llu calls\n", level.c_str(), op.name, (unsigned long long)(op.calls * times));
      fflush(stdout);
    }
  }
  return 0;
}
