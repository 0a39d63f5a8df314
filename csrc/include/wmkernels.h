// The C API of wmkernels: what Python hands to a kernel, and nothing of torch.
//
// Each op takes one plain structure whose members are all eight bytes wide, so that Python passes it as a flat tuple of
// integers (bindings.cpp exports the layout and wmkernels/native_call.py checks its own copy against it at import).
//
// Conventions, for every op:
//   - A pointer is null where the tensor is absent; then its strides are ignored.
//   - Strides count elements, not bytes, may be zero (an expanded tensor) or negative, and all offsets are 64-bit.
//   - Outputs are allocated by the caller, are never expanded, and may not alias each other or an input, except where
//     a member says so. An output that is present is written whole, whatever it held before.
//   - "state dtype" is float64 when `dtype` is float64, else float32. Parameters and states are in the state dtype.
//   - `workspace` is scratch of at least the size that the op's *_workspace function answers, 64-byte aligned on a CPU
//     and 256-byte aligned on a GPU; its contents are undefined before and after.
//   - On a GPU nothing is allocated and nothing synchronises; everything is enqueued on `stream` of `device`.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wmk_dtype { WMK_FLOAT32 = 0, WMK_FLOAT64 = 1, WMK_BFLOAT16 = 2, WMK_FLOAT16 = 3 };

// What a kernel answers. WMK_OK is 0; bindings.cpp turns the others into Python exceptions.
enum wmk_status {
  WMK_OK = 0,
  WMK_NULL_POINTER = 1,   // a required pointer is null although the tensor has elements
  WMK_BAD_SEQUENCES = 2,  // cu_seqlens does not rise from 0 to time (checked on the CPU only)
  WMK_BAD_INDEX = 3,      // state_batch_indices names a state that does not exist (checked on the CPU only)
  WMK_UNSUPPORTED = 4,    // a dtype or size that this kernel was not built for
  WMK_NO_MEMORY = 5,
  WMK_CUDA_ERROR = 1000,  // plus the cudaError_t
};

// A tensor of up to four dimensions; unused strides are 0.
typedef struct wmk_view {
  void* data;
  int64_t stride[4];
} wmk_view;

// ---------------------------------------------------------------------------------------------------------------------
// Selective scan (Gu & Dao 2023, algorithm 2):
//   step_t = delta_t + delta_bias, through softplus if asked for         one number a channel
//   h_t    = exp(step_t A) h_{t-1} + step_t u_t B_t                      `state` numbers a channel
//   y_t    = C_t . h_t + D u_t
//   out_t  = y_t silu(z_t)
//
// Chunks: the state at the start of every `chunk` steps is kept in chunk_states for the backward pass. Slot of chunk k
// of batch element b: b * ceil(time / chunk) + k. Packed, slot of chunk k of sequence s: cu_seqlens[s] / chunk + s + k,
// which never collides; there are time / chunk + sequences slots, and those no chunk falls on are left unwritten.
// Chunks of a packed sequence count from its own start.
// ---------------------------------------------------------------------------------------------------------------------
typedef struct wmk_selective_scan {
  // sizes
  int64_t batch, channels, state, time;
  int64_t groups;          // of B and C where they vary: channel c reads group c / (channels / groups)
  int64_t sequences;       // initial and last states: batch, or the number of packed sequences
  int64_t chunk;           // steps between two saved states
  int64_t dtype;           // wmk_dtype of u, delta, z, out, of B and C where they vary, and of their gradients
  int64_t delta_softplus;  // 0 or 1
  int64_t B_varies;        // 1: B is [batch, groups, state, time] in `dtype`; 0: [channels, state] in the state dtype
  int64_t C_varies;        // likewise
  // where and how
  int64_t threads;  // CPU: how many to use, at least 1
  int64_t device;   // GPU: its index
  int64_t stream;   // GPU: a cudaStream_t
  void* workspace;
  // inputs
  wmk_view u;              // [batch, channels, time]
  wmk_view delta;          // [batch, channels, time], step size before bias and softplus
  wmk_view A;              // [channels, state], state dtype
  wmk_view B;              // see B_varies
  wmk_view C;              // see C_varies
  wmk_view D;              // [channels], state dtype, optional
  wmk_view z;              // [batch, channels, time], gate before silu, optional
  wmk_view delta_bias;     // [channels], state dtype, optional
  wmk_view initial_state;  // [sequences, channels, state], state dtype, optional (zero)
  wmk_view reset;          // [batch, time], bytes 0 or 1, optional: 1 forgets the state before this step
  wmk_view cu_seqlens;     // [sequences + 1], int64, contiguous, optional: batch is then 1
  // forward outputs
  wmk_view out;         // [batch, channels, time], `dtype`
  wmk_view last_state;  // [sequences, channels, state], state dtype, contiguous
  wmk_view
      chunk_states;  // [slots, channels, state], state dtype, contiguous; forward: optional output, backward: input
  // backward inputs
  wmk_view grad_out;         // [batch, channels, time], `dtype`
  wmk_view grad_last_state;  // [sequences, channels, state], state dtype, optional (zero)
  // backward outputs, each optional except as said; a gradient has the dtype and shape of its input
  wmk_view grad_u;
  wmk_view grad_delta;
  wmk_view grad_A;              // [channels, state], state dtype, contiguous
  wmk_view grad_B;              // [batch, groups, state, time], `dtype`; or [channels, state], state dtype, contiguous
  wmk_view grad_C;              // likewise
  wmk_view grad_D;              // [channels], contiguous; null where D is
  wmk_view grad_z;              // null where z is
  wmk_view grad_delta_bias;     // [channels], contiguous; null where delta_bias is
  wmk_view grad_initial_state;  // [sequences, channels, state], state dtype, contiguous
} wmk_selective_scan;

// One step of the same recurrence. state_out may be state_in itself (the in-place update).
typedef struct wmk_selective_step {
  int64_t batch, channels, state, groups;
  int64_t states;       // rows of state_in: batch, or the size of the cache that indices point into
  int64_t dtype;        // of u, delta, z, out, B, C
  int64_t state_dtype;  // of state_in and state_out: float32, float64, or a 16-bit type; the arithmetic is in fp32/64
  int64_t delta_softplus;  // 0 or 1
  int64_t threads, device, stream;
  wmk_view state_in;    // [states, channels, state]
  wmk_view state_out;   // [states, channels, state]; the same memory as state_in, or none of it
  wmk_view u;           // [batch, channels]
  wmk_view delta;       // [batch, channels]
  wmk_view A;           // [channels, state], float32 or float64
  wmk_view B;           // [batch, groups, state]
  wmk_view C;           // [batch, groups, state]
  wmk_view D;           // [channels], float32 or float64, optional
  wmk_view z;           // [batch, channels], optional
  wmk_view delta_bias;  // [channels], float32 or float64, optional
  wmk_view reset;       // [batch], bytes 0 or 1, optional
  wmk_view indices;  // [batch], int64, optional: row of the state of each batch element; below 0: leave alone, out = 0
  wmk_view out;      // [batch, channels]
} wmk_selective_step;

// Linear scan: h_t = gates_t h_{t-1} + tokens_t; reverse: h_t = gates_t h_{t+1} + tokens_t, from the end.
// Forward in time, reset[t] drops h_{t-1}. In reverse, reset[t] keeps h_t from reaching t-1; reset[0] zeroes
// last_state.
typedef struct wmk_linear_scan {
  int64_t batch, channels, time;
  int64_t dtype;    // of gates, tokens, out and their gradients
  int64_t reverse;  // 0 or 1
  int64_t threads, device, stream;
  void* workspace;
  wmk_view gates;          // [batch, channels, time]
  wmk_view tokens;         // [batch, channels, time]
  wmk_view initial_state;  // [batch, channels], state dtype, optional (zero); in reverse it stands at t = time
  wmk_view reset;          // [batch, time], bytes 0 or 1, optional
  wmk_view out;            // [batch, channels, time]; forward: output, backward: input
  wmk_view last_state;     // [batch, channels], state dtype, contiguous
  // backward
  wmk_view grad_out;         // [batch, channels, time]
  wmk_view grad_last_state;  // [batch, channels], state dtype, optional (zero)
  wmk_view grad_gates;
  wmk_view grad_tokens;
  wmk_view grad_initial_state;  // [batch, channels], state dtype, contiguous, optional
} wmk_linear_scan;

// ConvLSTM (Shi et al. 2015, equation 3), gates in the order i, f, g, o:
//   a_t = weight_ih * x_t + weight_hh * h_{t-1} + bias                   4 `hidden` numbers a position of the map
//   i = sigmoid(a_i + w_i c_{t-1}), f = sigmoid(a_f + w_f c_{t-1}), g = tanh(a_g)
//   c_t = f c_{t-1} + i g,  o = sigmoid(a_o + w_o c_t),  h_t = o tanh(c_t), rounded to `dtype` before it recurs
// A map's rows are merged: position = row * width + column. x is padded with zeros by the kernel: above by pad_top
// rows, to the left by pad_left columns, below and to the right by what the map's size asks for.
typedef struct wmk_conv_lstm {
  // sizes
  int64_t time, batch, input, hidden;  // steps, elements, channels of x, channels of h
  int64_t x_height, x_width;           // of x
  int64_t height, width;               // of the states and the outputs: positions = height * width
  int64_t ih_height, ih_width;         // kernel of the input convolution
  int64_t hh_height, hh_width;         // kernel of the hidden convolution, odd; that convolution keeps the map's size
  int64_t stride_height, stride_width, pad_top, pad_left, dilation_height, dilation_width;  // of the input convolution
  int64_t peephole_varies;                                                                  // 1: from place to place
  int64_t dtype;  // of x, the weights, h, out, and of their gradients
  // where and how
  int64_t threads, device, stream;
  void* workspace;
  // inputs
  wmk_view x;          // [time, batch, input, x_height * x_width]
  wmk_view weight_ih;  // [4 * hidden, input, ih_height, ih_width]
  wmk_view weight_hh;  // [4 * hidden, hidden, hh_height, hh_width]
  wmk_view bias;       // [4 * hidden], state dtype, optional
  wmk_view peephole;   // [3, hidden, positions] or, where it does not vary, [3, hidden, 1]; state dtype, optional
  wmk_view h0;         // [batch, hidden, positions], optional (zero): before the first step
  wmk_view c0;         // [batch, hidden, positions], state dtype, optional (zero)
  wmk_view reset;      // [time, batch], bytes 0 or 1, optional: 1 makes h and c zero before this step
  // forward outputs, contiguous
  wmk_view out;    // [time, batch, positions, hidden]: every h; backward: input
  wmk_view hn;     // [batch, positions, hidden]: the last of out; optional on the CPU
  wmk_view cn;     // [batch, positions, hidden], state dtype
  wmk_view cells;  // [time, batch, positions, hidden], state dtype: every c; forward: optional, backward: input
  wmk_view gates;  // [time, batch, positions, 4 * hidden], state dtype, after their nonlinearities; optional: without
                   // them the backward pass computes them again
  // backward inputs, each optional (zero)
  wmk_view grad_out;  // [time, batch, hidden, positions]
  wmk_view grad_hn;   // [batch, hidden, positions]
  wmk_view grad_cn;   // [batch, hidden, positions], state dtype
  // backward outputs, contiguous, each null where its input is, and otherwise present
  wmk_view grad_x;          // [time, batch, x_height * x_width, input]
  wmk_view grad_weight_ih;  // [4 * hidden, input, ih_height, ih_width]
  wmk_view grad_weight_hh;  // [4 * hidden, hidden, hh_height, hh_width]
  wmk_view grad_bias;       // [4 * hidden], state dtype
  wmk_view grad_peephole;   // [3, hidden, positions or 1], state dtype
  wmk_view grad_h0;         // [batch, positions, hidden]
  wmk_view grad_c0;         // [batch, positions, hidden], state dtype
} wmk_conv_lstm;

// One step's update of the cells on a GPU, between its convolutions: the ConvLSTM above without weight_ih and
// weight_hh, whose convolutions of x_t and h_{t-1} come in. All maps are contiguous, channels last, positions merged.
typedef struct wmk_conv_lstm_update {
  int64_t batch, positions, hidden;
  int64_t peephole_varies;  // 1: from place to place
  int64_t dtype;            // of the convolutions' sums, h, and their gradients
  int64_t device, stream;
  wmk_view gates_x;   // [batch, positions, 4 * hidden]: weight_ih * x_t; backward: optional beside gates
  wmk_view gates_h;   // [batch, positions, 4 * hidden]: weight_hh * h_{t-1}, optional (zero); not read where reset is 1
  wmk_view bias;      // [4 * hidden], state dtype, optional
  wmk_view peephole;  // [3, positions or 1, hidden], state dtype, optional
  wmk_view c_prev;    // [batch, positions, hidden], state dtype, optional (zero); not read where reset is 1
  wmk_view reset;     // [batch], bytes 0 or 1, optional
  // forward outputs
  wmk_view h;      // [batch, positions, hidden]
  wmk_view c;      // [batch, positions, hidden], state dtype; may be c_prev; backward: input
  wmk_view gates;  // [batch, positions, 4 * hidden], state dtype, optional; backward: input, optional beside gates_x
  // backward inputs
  wmk_view reset_after;  // [batch]: reset of the next step, optional
  wmk_view grad_out;     // [batch, positions, hidden], optional (zero)
  wmk_view grad_h;       // likewise, what the next step sends back; not read where reset_after is 1
  // backward outputs
  wmk_view grad_c;         // [batch, positions, hidden], state dtype: of the new cell; becomes that of c_prev
  wmk_view grad_gates;     // [batch, positions, 4 * hidden]: of the sums
  wmk_view grad_peephole;  // [3, batch, positions, hidden], state dtype, optional: is added to
} wmk_conv_lstm_update;

// The ConvLSTM over all of time in one launch on a GPU, forward, whose blocks wait for each other after every step: for
// maps of which every block is on the chip at once. 16-bit dtypes, hidden a multiple of 16. Maps as above.
typedef struct wmk_conv_lstm_persistent {
  int64_t time, batch, height, width, hidden;
  int64_t hh_height, hh_width;
  int64_t peephole_varies;
  int64_t dtype;
  int64_t tiles;  // a block has so many tiles of 16 places: 1 or 2
  int64_t device, stream;
  wmk_view gates_x;  // [time, batch * positions, 4 * hidden]: weight_ih * x
  wmk_view
      weights;  // weight_hh in the order of the tensor cores (wmkernels/conv_lstm/cuda_persistent.py), 16-byte aligned
  wmk_view bias;      // [4 * hidden], fp32, optional
  wmk_view peephole;  // [3, positions or 1, hidden], fp32, optional
  wmk_view h0;        // [batch * positions, hidden], optional (zero)
  wmk_view c0;        // likewise, fp32; may be cn
  wmk_view reset;     // [time, batch], bytes 0 or 1, optional
  // outputs
  wmk_view barrier_counter;  // one 32-bit number, zero before
  wmk_view out;              // [time, batch * positions, hidden]
  wmk_view cn;               // [batch * positions, hidden], fp32
  wmk_view cells;            // [time, batch * positions, hidden], fp32, optional
  wmk_view gates;            // [time, batch * positions, 4 * hidden], fp32, optional
} wmk_conv_lstm_persistent;

// CPU. Each answers a wmk_status; each *_workspace answers bytes.
int64_t wmk_cpu_selective_scan_forward_workspace(const wmk_selective_scan*);
int64_t wmk_cpu_selective_scan_backward_workspace(const wmk_selective_scan*);
int wmk_cpu_selective_scan_forward(const wmk_selective_scan*);
int wmk_cpu_selective_scan_backward(const wmk_selective_scan*);
int wmk_cpu_selective_step(const wmk_selective_step*);
int64_t wmk_cpu_linear_scan_forward_workspace(const wmk_linear_scan*);
int64_t wmk_cpu_linear_scan_backward_workspace(const wmk_linear_scan*);
int wmk_cpu_linear_scan_forward(const wmk_linear_scan*);
int wmk_cpu_linear_scan_backward(const wmk_linear_scan*);
int64_t wmk_cpu_conv_lstm_forward_workspace(const wmk_conv_lstm*);
int64_t wmk_cpu_conv_lstm_backward_workspace(const wmk_conv_lstm*);
int wmk_cpu_conv_lstm_forward(const wmk_conv_lstm*);
int wmk_cpu_conv_lstm_backward(const wmk_conv_lstm*);

// The instruction-set levels that this build holds and this machine runs, best first, comma-separated; the one in use;
// and a way to force one (answers 0, or WMK_UNSUPPORTED).
const char* wmk_cpu_isa_available(void);
const char* wmk_cpu_isa(void);
int wmk_cpu_set_isa(const char* name);

// Performs fp32 multiply-adds on registers, on the calling thread, and answers how many: for measuring the machine.
int64_t wmk_cpu_multiply_adds(int64_t rounds);

// CUDA: the same entry points. A build without CUDA has none of them.
int64_t wmk_cuda_selective_scan_forward_workspace(const wmk_selective_scan*);
int64_t wmk_cuda_selective_scan_backward_workspace(const wmk_selective_scan*);
int wmk_cuda_selective_scan_forward(const wmk_selective_scan*);
int wmk_cuda_selective_scan_backward(const wmk_selective_scan*);
int wmk_cuda_selective_step(const wmk_selective_step*);
int64_t wmk_cuda_linear_scan_forward_workspace(const wmk_linear_scan*);
int64_t wmk_cuda_linear_scan_backward_workspace(const wmk_linear_scan*);
int wmk_cuda_linear_scan_forward(const wmk_linear_scan*);
int wmk_cuda_linear_scan_backward(const wmk_linear_scan*);
int wmk_cuda_conv_lstm_update_forward(const wmk_conv_lstm_update*);
int wmk_cuda_conv_lstm_update_backward(const wmk_conv_lstm_update*);
int wmk_cuda_conv_lstm_persistent(const wmk_conv_lstm_persistent*);

// "" when the driver and the current GPU can run this build's kernels, else the reason why not. Never throws.
const char* wmk_cuda_unavailable_reason(int64_t device);

#ifdef __cplusplus
}
#endif
