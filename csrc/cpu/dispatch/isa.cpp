#include "cpu/dispatch/isa.h"

#include <atomic>
#include <cstring>

#ifdef WMK_HAVE_V4
namespace wmk::v4 {
#include "cpu/dispatch/level_table.inc"
}
#endif
#ifdef WMK_HAVE_V3
namespace wmk::v3 {
#include "cpu/dispatch/level_table.inc"
}
#endif
#ifdef WMK_HAVE_NEON
namespace wmk::neon {
#include "cpu/dispatch/level_table.inc"
}
#endif
#ifdef WMK_HAVE_PORTABLE
namespace wmk::portable {
#include "cpu/dispatch/level_table.inc"
}
#endif

namespace wmk {
namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
// Some compilers cannot test F16C and MOVBE; every machine with AVX2 and FMA has them.
[[maybe_unused]] bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif
[[maybe_unused]] bool always() { return true; }

// Best first; the last always runs.
const Level kLevels[] = {
#if defined(WMK_HAVE_V4) && defined(__x86_64__)
    v4::make_level("v4", has_v4),
#endif
#if defined(WMK_HAVE_V3) && defined(__x86_64__)
    v3::make_level("v3", has_v3),
#endif
#ifdef WMK_HAVE_NEON
    neon::make_level("neon", always),
#endif
#ifdef WMK_HAVE_PORTABLE
    portable::make_level("portable", always),
#endif
};

const Level* best() {
  for (const Level& candidate : kLevels)
    if (candidate.runs_here()) return &candidate;
  return &kLevels[sizeof(kLevels) / sizeof(kLevels[0]) - 1];
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{best()};
  return level;
}

struct Names {
  char text[64] = "";
  Names() {
    for (const Level& level : kLevels) {
      if (!level.runs_here()) continue;
      if (text[0]) strcat(text, ",");
      strcat(text, level.name);
    }
  }
};

}  // namespace

const Level& level() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace wmk

const char* wmk_cpu_isa_available(void) {
  static const wmk::Names names;
  return names.text;
}

int64_t wmk_cpu_multiply_adds(int64_t iterations) { return wmk::level().multiply_adds(iterations); }

const char* wmk_cpu_isa(void) { return wmk::level().name; }

int wmk_cpu_set_isa(const char* name) {
  for (const wmk::Level& candidate : wmk::kLevels) {
    if (strcmp(candidate.name, name) != 0 || !candidate.runs_here()) continue;
    wmk::chosen().store(&candidate, std::memory_order_relaxed);
    return WMK_OK;
  }
  return WMK_UNSUPPORTED;
}
