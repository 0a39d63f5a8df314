#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace wmk::WMK_ISA {

// Subnormals become zero in its scope: a decaying impulse ends in subnormals, many times slower.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushSubnormals() = default;
#endif
};

// Calls work(item, thread). One thread opens no parallel region: a forked process has lost its OpenMP pool.
template <class Work>
static void parallel_for(int64_t items, [[maybe_unused]] int64_t threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
    int team = int(threads < items ? threads : items);
#pragma omp parallel num_threads(team)
    {
      FlushSubnormals flush;
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < items; ++item) work(item, int64_t(omp_get_thread_num()));
    }
    return;
  }
#endif
  FlushSubnormals flush;
  for (int64_t item = 0; item < items; ++item) work(item, int64_t(0));
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Allocates from a workspace; given null, only measures. Allocations are three cache lines apart: addresses with equal
// low 12 bits share a cache set.
class Arena {
 public:
  explicit Arena(void* memory) : begin_((char*)memory) {}
  template <class T>
  T* take(int64_t count) {
    char* allocation = begin_ ? begin_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64) + 192;
    return (T*)allocation;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

}  // namespace wmk::WMK_ISA
