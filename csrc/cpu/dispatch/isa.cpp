// Picks the instruction-set level of the CPU kernels at run time.

#include "cpu/dispatch/isa.h"

#include <atomic>
#include <cstring>

#ifdef WMK_HAVE_V4
WMK_DECLARE_LEVEL(v4)
#endif
#ifdef WMK_HAVE_V3
WMK_DECLARE_LEVEL(v3)
#endif
#ifdef WMK_HAVE_NEON
WMK_DECLARE_LEVEL(neon)
#endif
#ifdef WMK_HAVE_PORTABLE
WMK_DECLARE_LEVEL(portable)
#endif

namespace wmk {
namespace {

#if defined(__x86_64__)
bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
// F16C and MOVBE have no name here on every compiler, but no machine has AVX2 and FMA without them.
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif
[[maybe_unused]] bool always() { return true; }

#define WMK_LEVEL(level, runs_here)          \
  {#level,                                   \
   runs_here,                                \
   level::selective_scan_forward_workspace,  \
   level::selective_scan_backward_workspace, \
   level::selective_scan_forward,            \
   level::selective_scan_backward,           \
   level::selective_step,                    \
   level::linear_scan_forward_workspace,     \
   level::linear_scan_backward_workspace,    \
   level::linear_scan_forward,               \
   level::linear_scan_backward,              \
   level::conv_lstm_forward_workspace,       \
   level::conv_lstm_backward_workspace,      \
   level::conv_lstm_forward,                 \
   level::conv_lstm_backward,                \
   level::multiply_adds}

// Best first. The last one runs on every machine that the build is for.
const Level kLevels[] = {
#if defined(WMK_HAVE_V4) && defined(__x86_64__)
    WMK_LEVEL(v4, has_v4),
#endif
#if defined(WMK_HAVE_V3) && defined(__x86_64__)
    WMK_LEVEL(v3, has_v3),
#endif
#ifdef WMK_HAVE_NEON
    WMK_LEVEL(neon, always),
#endif
#ifdef WMK_HAVE_PORTABLE
    WMK_LEVEL(portable, always),
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

// The names of the levels this machine runs, comma-separated.
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

int64_t wmk_cpu_multiply_adds(int64_t rounds) { return wmk::level().multiply_adds(rounds); }

const char* wmk_cpu_isa(void) { return wmk::level().name; }

int wmk_cpu_set_isa(const char* name) {
  for (const wmk::Level& candidate : wmk::kLevels) {
    if (strcmp(candidate.name, name) != 0 || !candidate.runs_here()) continue;
    wmk::chosen().store(&candidate, std::memory_order_relaxed);
    return WMK_OK;
  }
  return WMK_UNSUPPORTED;
}
