// The peak rate of multiply-adds, for benchmarks: twelve independent chains hide the latency of two units of four to
// five cycles. The best matrix products reach about 5/6 of it.
#include "cpu/dispatch/isa.h"
#include "cpu/simd/vector.h"

namespace wmk::WMK_ISA {

int64_t multiply_adds(int64_t iterations) {
  constexpr int chains = 12;
  volatile float factor_value = 0.999f, addend_value = 0.001f;  // opaque to the compiler
  FloatVector factor = broadcast<float>(factor_value), addend = broadcast<float>(addend_value), value[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) value[i] = broadcast(float(i));
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) value[i] = value[i] * factor + addend;
  }
  FloatVector sum = value[0];
#pragma GCC unroll 12
  for (int i = 1; i < chains; ++i) sum += value[i];
  volatile float sink = sum[0];
  (void)sink;
  return iterations * chains * kLanes<float>;
}

}  // namespace wmk::WMK_ISA
