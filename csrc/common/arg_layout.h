// The structures' members as tables, for bindings.
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
static_assert(sizeof(void*) == kWord, "a pointer is one word");

struct Layout {
  const char* name;
  const Member* members;
  size_t count, size;
  size_t workspace;  // offset; `size` if absent
};

template <size_t count>
constexpr size_t offset_of_workspace(const Member (&members)[count], size_t size) {
  for (const Member& member : members)
    if (std::string_view(member.name) == "workspace") return member.offset;
  return size;
}

template <class Arguments>
struct LayoutOf;

#define WMK_MEMBER(name) {#name, offsetof(Type, name), sizeof(Type::name)},
#define WMK_INT(name) WMK_MEMBER(name)
#define WMK_POINTER(name) WMK_MEMBER(name)
#define WMK_VIEW(name) WMK_MEMBER(name)
#define WMK_STRUCT(name)        \
  template <>                   \
  struct LayoutOf<wmk_##name> { \
    using Type = wmk_##name;    \
    static constexpr Member members[] = {
#define WMK_STRUCT_END(name)                                                                        \
  }                                                                                                 \
  ;                                                                                                 \
  static constexpr Layout layout = {#name, members, sizeof(members) / sizeof(Member), sizeof(Type), \
                                    offset_of_workspace(members, sizeof(Type))};                    \
  }                                                                                                 \
  ;
#include "common/ops.h"
#undef WMK_MEMBER

}  // namespace wmk
