// The compiler's vector extension serves AVX-512, AVX2 and 128 bits (SSE2, NEON) from one source, with intrinsics where
// it lacks an operation. The level's namespace keeps the linker from merging inline functions across levels.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wmk::WMK_ISA {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WMK_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WMK_AVX2 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define WMK_INLINE static inline __attribute__((always_inline))

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits32Vector __attribute__((vector_size(kVectorBytes)));  // defined overflow
typedef uint64_t Bits64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));  // lanes of a FloatVector

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef FloatVector type;
  typedef Int32Vector integers;
};
template <>
struct VectorOf<double> {
  typedef DoubleVector type;
  typedef Int64Vector integers;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
WMK_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // folded by the compiler; 0 + x would lose -0
}
template <class T>
WMK_INLINE Vector<T> load(const T* from) {
  Vector<T> value;
  memcpy(&value, from, sizeof(value));
  return value;
}
template <class T, class V>
WMK_INLINE void store(T* to, V value) {
  static_assert(sizeof(V) == kVectorBytes, "a whole vector");
  memcpy(to, &value, sizeof(value));
}

// Keeps a NaN value: the comparison is false. x86 has both as one instruction, which GCC does not make of a selection.
#if defined(WMK_AVX512)
#define WMK_X86(operation) _mm512_##operation
#elif defined(WMK_AVX2)
#define WMK_X86(operation) _mm256_##operation
#elif defined(__x86_64__)
#define WMK_X86(operation) _mm_##operation
#endif
#if defined(WMK_X86)
WMK_INLINE FloatVector vmax(FloatVector value, FloatVector bound) { return WMK_X86(max_ps)(bound, value); }
WMK_INLINE FloatVector vmin(FloatVector value, FloatVector bound) { return WMK_X86(min_ps)(bound, value); }
WMK_INLINE DoubleVector vmax(DoubleVector value, DoubleVector bound) { return WMK_X86(max_pd)(bound, value); }
WMK_INLINE DoubleVector vmin(DoubleVector value, DoubleVector bound) { return WMK_X86(min_pd)(bound, value); }
#else
template <class V>
WMK_INLINE V vmax(V value, V bound) {
  return value < bound ? bound : value;
}
template <class V>
WMK_INLINE V vmin(V value, V bound) {
  return value > bound ? bound : value;
}
#endif
WMK_INLINE FloatVector absolute(FloatVector x) { return (FloatVector)((Int32Vector)x & 0x7fffffff); }
WMK_INLINE DoubleVector absolute(DoubleVector x) { return (DoubleVector)((Int64Vector)x & 0x7fffffffffffffff); }

template <class V>
WMK_INLINE auto lane_sum(V value) {
  auto sum = value[0];
  for (int lane = 1; lane < int(sizeof(V) / sizeof(sum)); ++lane) sum += value[lane];
  return sum;
}

// (2^f - 1) / f for f in [-1/2, 1/2], minimax in the relative error of 2^f. 2^0 == 1 exactly: a zero step keeps the
// state bit for bit. Errors before rounding: 9.1e-8 (float), 3.4e-18 (double).
WMK_INLINE FloatVector exp2m1_over_x(FloatVector f) {
  FloatVector p = broadcast(0x1.5bba08p-10f);
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b754p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  return p * f + 0x1.62e42ap-1f;
}
WMK_INLINE DoubleVector exp2m1_over_x(DoubleVector f) {
  DoubleVector p = broadcast(0x1.e79b77255f290p-32);
  p = p * f + 0x1.e61b532951705p-28;
  p = p * f + 0x1.b5267d0e9891dp-24;
  p = p * f + 0x1.62bfc79afc64fp-20;
  p = p * f + 0x1.ffcbfba967b73p-17;
  p = p * f + 0x1.4309130ed9db4p-13;
  p = p * f + 0x1.5d87fe78cd730p-10;
  p = p * f + 0x1.3b2ab6fba0113p-7;
  p = p * f + 0x1.c6b08d7049fe8p-5;
  p = p * f + 0x1.ebfbdff82c5a4p-3;
  return p * f + 0x1.62e42fefa39efp-1;
}

// Splits t into nearest integer (`power`) and remainder.
#if defined(WMK_AVX512)
// vreduce gives 0 for infinities: 2^-inf = 0 and 2^inf = inf without a clamp. t - f would be fused with t's product.
WMK_INLINE FloatVector split_exponent(FloatVector t, FloatVector& power) {
  power = _mm512_roundscale_ps(t, 0);
  return _mm512_reduce_ps(t, 0);
}
WMK_INLINE DoubleVector split_exponent(DoubleVector t, DoubleVector& power) {
  power = _mm512_roundscale_pd(t, 0);
  return _mm512_reduce_pd(t, 0);
}
WMK_INLINE FloatVector scale_exp2(FloatVector f, FloatVector power) {
  return _mm512_scalef_ps(exp2m1_over_x(f) * f + 1, power);
}
WMK_INLINE DoubleVector scale_exp2(DoubleVector f, DoubleVector power) {
  return _mm512_scalef_pd(exp2m1_over_x(f) * f + 1, power);
}
#else
// Adding 1.5 * 2^23 leaves the rounded integer in the low bits. The power is one too small and the polynomial doubled,
// so large results do not overflow. Results below the smallest normal become zero.
WMK_INLINE FloatVector split_exponent(FloatVector t, FloatVector& power) {
  t = vmin(vmax(t, broadcast(-126.f)), broadcast(129.f));
  power = t + 0x1.8p23f;
  return t - (power - 0x1.8p23f);
}
WMK_INLINE DoubleVector split_exponent(DoubleVector t, DoubleVector& power) {
  t = vmin(vmax(t, broadcast(-1022.)), broadcast(1025.));
  power = t + 0x1.8p52;
  return t - (power - 0x1.8p52);
}
WMK_INLINE FloatVector scale_exp2(FloatVector f, FloatVector power) {
  return (exp2m1_over_x(f) * (f + f) + 2) * (FloatVector)(((Bits32Vector)power << 23) + (126u << 23));
}
WMK_INLINE DoubleVector scale_exp2(DoubleVector f, DoubleVector power) {
  return (exp2m1_over_x(f) * (f + f) + 2) * (DoubleVector)(((Bits64Vector)power << 52) + (uint64_t(1022) << 52));
}
#endif

// Rounding t costs a relative error of |t| half-ulps.
template <class V>
WMK_INLINE V exp2(V t) {
  V power;
  V f = split_exponent(t, power);
  return scale_exp2(f, power);
}

template <class T>
constexpr T kLog2e = T(1.44269504088896340736);
// Rounding errors of x log2(e) (with FMA) and of log2(e).
WMK_INLINE FloatVector log2e_residual(FloatVector x, [[maybe_unused]] FloatVector t) {
#if defined(WMK_AVX512)
  return x * 1.925963033500011e-08f + (FloatVector)_mm512_fmsub_ps(x, broadcast(kLog2e<float>), t);
#elif defined(WMK_AVX2)
  return x * 1.925963033500011e-08f + (FloatVector)_mm256_fmsub_ps(x, broadcast(kLog2e<float>), t);
#else
  return x * 1.925963033500011e-08f;
#endif
}
WMK_INLINE DoubleVector log2e_residual(DoubleVector x, [[maybe_unused]] DoubleVector t) {
#if defined(WMK_AVX512)
  return x * 2.0355273740931033e-17 + (DoubleVector)_mm512_fmsub_pd(x, broadcast(kLog2e<double>), t);
#elif defined(WMK_AVX2)
  return x * 2.0355273740931033e-17 + (DoubleVector)_mm256_fmsub_pd(x, broadcast(kLog2e<double>), t);
#else
  return x * 2.0355273740931033e-17;
#endif
}
WMK_INLINE FloatVector bound_argument(FloatVector x) { return vmax(x, broadcast(-87.4f)); }
WMK_INLINE DoubleVector bound_argument(DoubleVector x) { return vmax(x, broadcast(-708.5)); }

// Accurate to the last bits; clamped near the smallest normal number.
template <class V>
WMK_INLINE V exp_nonpositive(V x) {
  typedef decltype(x[0] + x[0]) T;
  x = bound_argument(x);
  V t = x * kLog2e<T>, power;
  V f = split_exponent(t, power) + log2e_residual(x, t);
  return scale_exp2(f, power);
}

// 2^integer - 1 is exact, which keeps the accuracy of tiny x.
#if defined(WMK_AVX512)
WMK_INLINE FloatVector scale_of(FloatVector power) { return _mm512_scalef_ps(broadcast(1.f), power); }
WMK_INLINE DoubleVector scale_of(DoubleVector power) { return _mm512_scalef_pd(broadcast(1.), power); }
#else
WMK_INLINE FloatVector scale_of(FloatVector power) { return (FloatVector)(((Bits32Vector)power << 23) + (127u << 23)); }
WMK_INLINE DoubleVector scale_of(DoubleVector power) {
  return (DoubleVector)(((Bits64Vector)power << 52) + (uint64_t(1023) << 52));
}
#endif
template <class V>
WMK_INLINE V expm1_nonpositive(V x) {
  typedef decltype(x[0] + x[0]) T;
  x = bound_argument(x);
  V t = x * kLog2e<T>, power;
  V f = split_exponent(t, power) + log2e_residual(x, t);
  V scale = scale_of(power);
  return exp2m1_over_x(f) * f * scale + (scale - 1);
}
// From e^-2|x| - 1, exact for small x.
template <class V>
WMK_INLINE V tanh(V x) {
  V e = expm1_nonpositive(-2 * absolute(x));
  V magnitude = -e / (e + 2);
  return x < 0 ? -magnitude : magnitude;
}

// For e in [0, 1], as 2 atanh(e / (2 + e)): relative accuracy for tiny e, too.
WMK_INLINE FloatVector log1p_of_fraction(FloatVector e) {
  FloatVector w = e / (e + 2);
  FloatVector v = w * w;
  FloatVector q = broadcast(0.24289647f);
  q = q * v + 0.214307123f;
  q = q * v + 0.286166f;
  q = q * v + 0.399988882f;
  q = q * v + 0.666666755f;
  return w * (q * v) + 2 * w;
}
WMK_INLINE DoubleVector log1p_of_fraction(DoubleVector e) {
  DoubleVector w = e / (e + 2);
  DoubleVector v = w * w;
  DoubleVector q = broadcast(0.17009751588442073967);
  q = q * v + 0.083449712358661453182;
  q = q * v + 0.12104945845737354643;
  q = q * v + 0.13301121114126888;
  q = q * v + 0.15386548427680149579;
  q = q * v + 0.18181744476483601916;
  q = q * v + 0.22222223953757741645;
  q = q * v + 0.28571428548115321048;
  q = q * v + 0.40000000000155148543;
  q = q * v + 0.66666666666666309558;
  return w * (q * v) + 2 * w;
}

WMK_INLINE FloatVector least_normal(FloatVector) { return broadcast(0x1p-126f); }
WMK_INLINE DoubleVector least_normal(DoubleVector) { return broadcast(0x1p-1022); }
// x above 20, as in PyTorch. Never zero: a step of zero would turn a decay rate of -inf into NaN.
template <class V>
WMK_INLINE V softplus_from(V x, V e) {
  return x > 20 ? x : vmax(vmax(x, V{}) + log1p_of_fraction(e), least_normal(x));
}
template <class V>
WMK_INLINE V softplus(V x) {
  return softplus_from(x, exp_nonpositive(-absolute(x)));
}
// 1 + e^-x in 13 instructions: adding 1.5 * 2^23 and the exponent's bias leaves the bits of the scale, and x is bounded
// to where they are those of a normal number or of infinity.
WMK_INLINE FloatVector sigmoid_denominator(FloatVector x) {
  constexpr float shift = 0x1.8p23f + 127;
  x = vmax(vmin(x, broadcast(87.f)), broadcast(-88.8f));
  const FloatVector shifted = shift - x * kLog2e<float>;
  const FloatVector f = -x * kLog2e<float> - (shifted - shift) - x * 1.925963033500011e-08f;
  return (exp2m1_over_x(f) * f + 1) * (FloatVector)((Bits32Vector)shifted << 23) + 1;
}
WMK_INLINE DoubleVector sigmoid_denominator(DoubleVector x) {
  constexpr double shift = 0x1.8p52 + 1023;
  x = vmax(vmin(x, broadcast(708.)), broadcast(-710.));
  const DoubleVector shifted = shift - x * kLog2e<double>;
  const DoubleVector f = -x * kLog2e<double> - (shifted - shift) - x * 2.0355273740931033e-17;
  return (exp2m1_over_x(f) * f + 1) * (DoubleVector)((Bits64Vector)shifted << 52) + 1;
}
template <class V>
WMK_INLINE V sigmoid(V x) {
  return 1 / sigmoid_denominator(x);
}
template <class V>
WMK_INLINE V silu(V x) {
  return x / sigmoid_denominator(x);
}
template <class V>
WMK_INLINE V silu_slope(V x) {
  const V s = sigmoid(x);
  return s * (x * (1 - s) + 1);
}
template <class V>
WMK_INLINE V softplus(V x, V& slope) {
  V e = exp_nonpositive(-absolute(x));
  slope = x > 20 ? V{} + 1 : (x < 0 ? e : V{} + 1) / (e + 1);
  return softplus_from(x, e);
}

}  // namespace wmk::WMK_ISA
