// Vector loads and stores, converted to and from the arithmetic type: rounded to nearest even; NaN stays NaN.
#pragma once

#include "cpu/simd/vector.h"
#include "include/wmkernels.h"

namespace wmk::WMK_ISA {

WMK_INLINE int64_t bytes_of(int64_t dtype) { return dtype == WMK_FLOAT64 ? 8 : dtype == WMK_FLOAT32 ? 4 : 2; }

WMK_INLINE FloatVector load_as(const float* from, float) { return load(from); }
WMK_INLINE DoubleVector load_as(const double* from, double) { return load(from); }
WMK_INLINE void store_as(float* to, FloatVector value) { store(to, value); }
WMK_INLINE void store_as(double* to, DoubleVector value) { store(to, value); }

WMK_INLINE HalfVector load_halves(const void* from) {
  HalfVector bits;
  memcpy(&bits, from, sizeof(bits));
  return bits;
}
WMK_INLINE Bits32Vector widen(HalfVector bits) { return __builtin_convertvector(bits, Bits32Vector); }
WMK_INLINE HalfVector narrow(Bits32Vector bits) { return __builtin_convertvector(bits, HalfVector); }

WMK_INLINE FloatVector load_as(const BFloat16* from, float) { return (FloatVector)(widen(load_halves(from)) << 16); }
WMK_INLINE void store_as(BFloat16* to, FloatVector value) {
  Bits32Vector bits = (Bits32Vector)value;
  Bits32Vector rounded = bits + 0x7fff + ((bits >> 16) & 1);
  rounded = value != value ? bits | 0x400000 : rounded;
  HalfVector halves = narrow((rounded >> 16) & 0xffff);
  memcpy(to, &halves, sizeof(halves));
}

WMK_INLINE FloatVector load_as(const Float16* from, float) {
#if defined(WMK_AVX512)
  return _mm512_cvtph_ps((__m256i)load_halves(from));
#elif defined(WMK_AVX2)
  return _mm256_cvtph_ps((__m128i)load_halves(from));
#else
  // Exact for subnormals even with flush-to-zero: a subtraction of normal numbers.
  Bits32Vector bits = widen(load_halves(from));
  Bits32Vector magnitude = (bits & 0x7fff) << 13;
  Bits32Vector exponent = magnitude & (0x1f << 23);
  Bits32Vector normal = magnitude + (112 << 23);
  FloatVector small = (FloatVector)(magnitude + (113 << 23)) - 0x1p-14f;
  Bits32Vector result = exponent == 0 ? (Bits32Vector)small : normal;
  result = exponent == (0x1f << 23) ? normal + (112 << 23) : result;
  return (FloatVector)(result | ((bits & 0x8000) << 16));
#endif
}
WMK_INLINE void store_as(Float16* to, FloatVector value) {
#if defined(WMK_AVX512)
  __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(WMK_AVX2)
  __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#else
  Bits32Vector bits = (Bits32Vector)value;
  Bits32Vector magnitude = bits & 0x7fffffff;
  Bits32Vector normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Bits32Vector small = (Bits32Vector)((FloatVector)magnitude + 0.5f) - 0x3f000000;
  Bits32Vector result = magnitude < (113 << 23) ? small : normal;
  result = magnitude >= 0x477ff000 ? Bits32Vector{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Bits32Vector{} + 0x7e00 : result;
  HalfVector halves = narrow(result | ((bits >> 16) & 0x8000));
#endif
  memcpy(to, &halves, sizeof(halves));
}

// `count` elements at a stride; the rest is zero.
template <class T, class S>
WMK_INLINE Vector<T> gather(const S* from, int64_t stride, int count) {
  if (stride == 1 && count == kLanes<T>) return load_as(from, T(0));
  S gathered[kLanes<T>] = {};
  for (int i = 0; i < count; ++i) gathered[i] = from[i * stride];
  return load_as(gathered, T(0));
}
template <class T, class S>
WMK_INLINE void scatter(S* to, int64_t stride, int count, Vector<T> values) {
  if (stride == 1 && count == kLanes<T>) return store_as(to, values);
  S scattered[kLanes<T>];
  store_as(scattered, values);
  for (int i = 0; i < count; ++i) to[i * stride] = scattered[i];
}

// Calls work with a value of the arithmetic type and one of the storage type.
template <class Work>
WMK_INLINE auto with_types(int64_t dtype, const Work& work) {
  switch (dtype) {
    case WMK_FLOAT64:
      return work(double(), double());
    case WMK_BFLOAT16:
      return work(float(), BFloat16());
    case WMK_FLOAT16:
      return work(float(), Float16());
    default:
      return work(float(), float());
  }
}

}  // namespace wmk::WMK_ISA
