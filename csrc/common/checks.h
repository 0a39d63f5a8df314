#pragma once

#include <initializer_list>

#include "include/wmkernels.h"

namespace wmk {

inline bool is_dtype(int64_t dtype) { return dtype >= WMK_FLOAT32 && dtype <= WMK_FLOAT16; }

inline bool has_groups(int64_t channels, int64_t groups) { return groups >= 1 && channels % groups == 0; }

inline bool any_missing(std::initializer_list<const wmk_view*> views) {
  for (const wmk_view* view : views)
    if (!view->data) return true;
  return false;
}

inline bool is_aligned(const wmk_view& view, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether ``cu_seqlens`` rises from 0 to time, for a batch of one; without it, a sequence is a row of the batch.
template <class Op>
int check_sequences(const Op& op) {
  const int64_t* bounds = static_cast<const int64_t*>(op.cu_seqlens.data);
  if (!bounds) return op.sequences == op.batch ? WMK_OK : WMK_UNSUPPORTED;
  if (op.batch != 1) return WMK_UNSUPPORTED;
  if (bounds[0] != 0 || bounds[op.sequences] != op.time) return WMK_BAD_SEQUENCES;
  for (int64_t i = 0; i < op.sequences; ++i)
    if (bounds[i + 1] < bounds[i]) return WMK_BAD_SEQUENCES;
  return WMK_OK;
}

}  // namespace wmk
