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

}  // namespace wmk
