// The structures of wmkernels.h, member by member: how Python learns where an argument goes.
//
// C++ cannot list the members of a structure itself. Where a list is used, it is asserted to be the whole one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "include/wmkernels.h"

namespace wmk {

struct Member {
  const char* name;
  size_t offset, size;
};

constexpr size_t kWord = sizeof(int64_t);

// Whether the members listed are all there are, in their order, with nothing between them.
template <size_t count>
constexpr bool covers(const Member (&members)[count], size_t size) {
  size_t end = 0;
  for (const Member& member : members) {
    if (member.offset != end || member.size % kWord != 0) return false;
    end += member.size;
  }
  return end == size;
}

// A structure, without its type.
struct Layout {
  const char* op;
  const Member* members;
  size_t count, size;
  size_t workspace;  // where that member is; `size` where there is none
};

template <class Arguments>
struct Op;

#define WMK_MEMBER(name) \
  Member { #name, offsetof(Type, name), sizeof(Type::name) }

template <>
struct Op<wmk_selective_scan> {
  using Type = wmk_selective_scan;
  static constexpr const char* name = "selective_scan";
  static constexpr Member members[] = {
      WMK_MEMBER(batch),
      WMK_MEMBER(channels),
      WMK_MEMBER(state),
      WMK_MEMBER(time),
      WMK_MEMBER(groups),
      WMK_MEMBER(sequences),
      WMK_MEMBER(chunk),
      WMK_MEMBER(dtype),
      WMK_MEMBER(delta_softplus),
      WMK_MEMBER(B_varies),
      WMK_MEMBER(C_varies),
      WMK_MEMBER(threads),
      WMK_MEMBER(device),
      WMK_MEMBER(stream),
      WMK_MEMBER(workspace),
      WMK_MEMBER(u),
      WMK_MEMBER(delta),
      WMK_MEMBER(A),
      WMK_MEMBER(B),
      WMK_MEMBER(C),
      WMK_MEMBER(D),
      WMK_MEMBER(z),
      WMK_MEMBER(delta_bias),
      WMK_MEMBER(initial_state),
      WMK_MEMBER(reset),
      WMK_MEMBER(cu_seqlens),
      WMK_MEMBER(out),
      WMK_MEMBER(last_state),
      WMK_MEMBER(chunk_states),
      WMK_MEMBER(grad_out),
      WMK_MEMBER(grad_last_state),
      WMK_MEMBER(grad_u),
      WMK_MEMBER(grad_delta),
      WMK_MEMBER(grad_A),
      WMK_MEMBER(grad_B),
      WMK_MEMBER(grad_C),
      WMK_MEMBER(grad_D),
      WMK_MEMBER(grad_z),
      WMK_MEMBER(grad_delta_bias),
      WMK_MEMBER(grad_initial_state),
  };
};

template <>
struct Op<wmk_selective_step> {
  using Type = wmk_selective_step;
  static constexpr const char* name = "selective_step";
  static constexpr Member members[] = {
      WMK_MEMBER(batch),      WMK_MEMBER(channels), WMK_MEMBER(state),       WMK_MEMBER(groups),
      WMK_MEMBER(states),     WMK_MEMBER(dtype),    WMK_MEMBER(state_dtype), WMK_MEMBER(delta_softplus),
      WMK_MEMBER(threads),    WMK_MEMBER(device),   WMK_MEMBER(stream),      WMK_MEMBER(state_in),
      WMK_MEMBER(state_out),  WMK_MEMBER(u),        WMK_MEMBER(delta),       WMK_MEMBER(A),
      WMK_MEMBER(B),          WMK_MEMBER(C),        WMK_MEMBER(D),           WMK_MEMBER(z),
      WMK_MEMBER(delta_bias), WMK_MEMBER(reset),    WMK_MEMBER(indices),     WMK_MEMBER(out),
  };
};

template <>
struct Op<wmk_linear_scan> {
  using Type = wmk_linear_scan;
  static constexpr const char* name = "linear_scan";
  static constexpr Member members[] = {
      WMK_MEMBER(batch),           WMK_MEMBER(channels),   WMK_MEMBER(time),        WMK_MEMBER(dtype),
      WMK_MEMBER(reverse),         WMK_MEMBER(threads),    WMK_MEMBER(device),      WMK_MEMBER(stream),
      WMK_MEMBER(workspace),       WMK_MEMBER(gates),      WMK_MEMBER(tokens),      WMK_MEMBER(initial_state),
      WMK_MEMBER(reset),           WMK_MEMBER(out),        WMK_MEMBER(last_state),  WMK_MEMBER(grad_out),
      WMK_MEMBER(grad_last_state), WMK_MEMBER(grad_gates), WMK_MEMBER(grad_tokens), WMK_MEMBER(grad_initial_state),
  };
};

template <>
struct Op<wmk_conv_lstm> {
  using Type = wmk_conv_lstm;
  static constexpr const char* name = "conv_lstm";
  static constexpr Member members[] = {
      WMK_MEMBER(time),
      WMK_MEMBER(batch),
      WMK_MEMBER(input),
      WMK_MEMBER(hidden),
      WMK_MEMBER(x_height),
      WMK_MEMBER(x_width),
      WMK_MEMBER(height),
      WMK_MEMBER(width),
      WMK_MEMBER(ih_height),
      WMK_MEMBER(ih_width),
      WMK_MEMBER(hh_height),
      WMK_MEMBER(hh_width),
      WMK_MEMBER(stride_height),
      WMK_MEMBER(stride_width),
      WMK_MEMBER(pad_top),
      WMK_MEMBER(pad_left),
      WMK_MEMBER(dilation_height),
      WMK_MEMBER(dilation_width),
      WMK_MEMBER(peephole_varies),
      WMK_MEMBER(dtype),
      WMK_MEMBER(threads),
      WMK_MEMBER(device),
      WMK_MEMBER(stream),
      WMK_MEMBER(workspace),
      WMK_MEMBER(x),
      WMK_MEMBER(weight_ih),
      WMK_MEMBER(weight_hh),
      WMK_MEMBER(bias),
      WMK_MEMBER(peephole),
      WMK_MEMBER(h0),
      WMK_MEMBER(c0),
      WMK_MEMBER(reset),
      WMK_MEMBER(out),
      WMK_MEMBER(hn),
      WMK_MEMBER(cn),
      WMK_MEMBER(cells),
      WMK_MEMBER(gates),
      WMK_MEMBER(grad_out),
      WMK_MEMBER(grad_hn),
      WMK_MEMBER(grad_cn),
      WMK_MEMBER(grad_x),
      WMK_MEMBER(grad_weight_ih),
      WMK_MEMBER(grad_weight_hh),
      WMK_MEMBER(grad_bias),
      WMK_MEMBER(grad_peephole),
      WMK_MEMBER(grad_h0),
      WMK_MEMBER(grad_c0),
  };
};

template <>
struct Op<wmk_conv_lstm_update> {
  using Type = wmk_conv_lstm_update;
  static constexpr const char* name = "conv_lstm_update";
  static constexpr Member members[] = {
      WMK_MEMBER(batch),       WMK_MEMBER(positions),
      WMK_MEMBER(hidden),      WMK_MEMBER(peephole_varies),
      WMK_MEMBER(dtype),       WMK_MEMBER(device),
      WMK_MEMBER(stream),      WMK_MEMBER(gates_x),
      WMK_MEMBER(gates_h),     WMK_MEMBER(bias),
      WMK_MEMBER(peephole),    WMK_MEMBER(c_prev),
      WMK_MEMBER(reset),       WMK_MEMBER(h),
      WMK_MEMBER(c),           WMK_MEMBER(gates),
      WMK_MEMBER(reset_after), WMK_MEMBER(grad_out),
      WMK_MEMBER(grad_h),      WMK_MEMBER(grad_c),
      WMK_MEMBER(grad_gates),  WMK_MEMBER(grad_peephole),
  };
};

template <>
struct Op<wmk_conv_lstm_persistent> {
  using Type = wmk_conv_lstm_persistent;
  static constexpr const char* name = "conv_lstm_persistent";
  static constexpr Member members[] = {
      WMK_MEMBER(time),    WMK_MEMBER(batch),     WMK_MEMBER(height),   WMK_MEMBER(width),
      WMK_MEMBER(hidden),  WMK_MEMBER(hh_height), WMK_MEMBER(hh_width), WMK_MEMBER(peephole_varies),
      WMK_MEMBER(dtype),   WMK_MEMBER(tiles),     WMK_MEMBER(device),   WMK_MEMBER(stream),
      WMK_MEMBER(gates_x), WMK_MEMBER(weights),   WMK_MEMBER(bias),     WMK_MEMBER(peephole),
      WMK_MEMBER(h0),      WMK_MEMBER(c0),        WMK_MEMBER(reset),    WMK_MEMBER(barrier_counter),
      WMK_MEMBER(out),     WMK_MEMBER(cn),        WMK_MEMBER(cells),    WMK_MEMBER(gates),
  };
};

#undef WMK_MEMBER

template <size_t count>
constexpr size_t offset_of_workspace(const Member (&members)[count], size_t size) {
  for (const Member& member : members)
    if (std::string_view(member.name) == "workspace") return member.offset;
  return size;
}

template <class Arguments>
constexpr Layout make_layout() {
  constexpr auto& members = Op<Arguments>::members;
  static_assert(covers(members, sizeof(Arguments)), "the list of members and wmkernels.h differ");
  return {Op<Arguments>::name, members, sizeof(members) / sizeof(Member), sizeof(Arguments),
          offset_of_workspace(members, sizeof(Arguments))};
}

template <class Arguments>
constexpr Layout kLayout = make_layout<Arguments>();

}  // namespace wmk
