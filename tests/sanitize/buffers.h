// Heap tensors of exactly a view's bytes, with NaN in gaps: the sanitizer finds accesses outside, NaN reads of gaps.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "include/wmkernels.h"

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t bound) { return int64_t(random() % uint64_t(bound)); }
inline int64_t one_of(Random& random, const std::vector<int64_t>& values) {
  return values[size_t(below(random, int64_t(values.size())))];
}

// Not in wmkernels.h.
enum { kBytes = 100, kInt64 = 101 };

inline int64_t item_size(int64_t kind) {
  if (kind == WMK_FLOAT64 || kind == kInt64) return 8;
  if (kind == WMK_FLOAT32) return 4;
  return kind == kBytes ? 1 : 2;
}

enum class Layout { contiguous, permuted, gaps, backwards, expanded };

class Buffer {
 public:
  // 0xFF bytes are NaN.
  Buffer(int64_t kind, std::vector<int64_t> shape, Layout layout, Random& random)
      : kind_(kind), shape_(std::move(shape)), strides_(shape_.size()) {
    std::vector<size_t> order(shape_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
    if (layout != Layout::contiguous)
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(below(random, int64_t(i)))]);
    int64_t next = 1, last = 0, first = 0;
    for (size_t dim : order) {
      int64_t size = shape_[dim], stride = layout == Layout::gaps ? next * (1 + below(random, 3)) : next;
      if (layout == Layout::expanded && below(random, 2) == 0) {
        strides_[dim] = 0;
        continue;
      }
      bool turned = layout == Layout::backwards && below(random, 2) == 0;
      strides_[dim] = turned ? -stride : stride;
      if (size > 0) (turned ? first : last) += (size - 1) * stride;
      next = stride * (size > 0 ? size : 1);
    }
    items_ = 1;
    for (int64_t size : shape_) items_ *= size;
    bytes_ = items_ == 0 ? 0 : (first + last + 1) * item_size(kind_);
    memory_.reset(bytes_ ? new char[size_t(bytes_)] : nullptr);
    if (bytes_) memset(memory_.get(), 0xFF, size_t(bytes_));
    start_ = memory_.get() + (bytes_ ? first * item_size(kind_) : 0);
  }

  bool present() const { return bytes_ > 0; }
  int64_t items() const { return items_; }
  int64_t kind() const { return kind_; }
  const std::vector<int64_t>& shape() const { return shape_; }

  wmk_view view() const {
    wmk_view view = {};
    if (!present()) return view;
    view.data = start_;
    for (size_t i = 0; i < strides_.size(); ++i) view.stride[i] = strides_[i];
    return view;
  }

  // Row-major.
  char* at(int64_t number) const {
    char* place = start_;
    for (size_t i = shape_.size(); i-- > 0;) {
      place += (number % shape_[i]) * strides_[i] * item_size(kind_);
      number /= shape_[i];
    }
    return place;
  }

  double read(int64_t number) const {
    const char* place = at(number);
    if (kind_ == WMK_FLOAT64) return load<double>(place);
    if (kind_ == WMK_FLOAT32) return load<float>(place);
    if (kind_ == kBytes) return load<uint8_t>(place);
    if (kind_ == kInt64) return double(load<int64_t>(place));
    uint32_t bits = load<uint16_t>(place);
    if (kind_ == WMK_BFLOAT16) return from_bits(bits << 16);
    int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
    if (exponent == 31) return NAN;
    double magnitude = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return bits >> 15 ? -magnitude : magnitude;
  }

  void write(int64_t number, double value) {
    char* place = at(number);
    if (kind_ == WMK_FLOAT64) return store<double>(place, value);
    if (kind_ == WMK_FLOAT32) return store<float>(place, float(value));
    if (kind_ == kBytes) return store<uint8_t>(place, uint8_t(value));
    if (kind_ == kInt64) return store<int64_t>(place, int64_t(value));
    if (kind_ == WMK_BFLOAT16) return store<uint16_t>(place, uint16_t(to_bits(float(value)) >> 16));
    // float16, truncated, without subnormals.
    int exponent = 0;
    double fraction = frexp(fabs(value), &exponent);
    uint16_t bits = 0;
    if (exponent > -14 && fraction > 0) bits = uint16_t((exponent + 14) << 10 | (int(fraction * 2048) & 1023));
    store<uint16_t>(place, uint16_t(bits | (value < 0 ? 0x8000 : 0)));
  }

 private:
  template <class T>
  static T load(const char* place) {
    T value;
    memcpy(&value, place, sizeof(T));
    return value;
  }
  template <class T>
  static void store(char* place, T value) {
    memcpy(place, &value, sizeof(T));
  }
  static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
  }

  int64_t kind_, items_ = 0, bytes_ = 0;
  std::vector<int64_t> shape_, strides_;
  std::unique_ptr<char[]> memory_;
  char* start_ = nullptr;
};

// Exact size, 64-byte aligned, full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes > 0 && posix_memalign(&memory_, 64, size_t(bytes)) != 0) abort();
    if (memory_) memset(memory_, 0xFF, size_t(bytes));
    // Never null, even without scratch.
    if (!memory_ && posix_memalign(&memory_, 64, 64) != 0) abort();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(memory_); }
  void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
};
