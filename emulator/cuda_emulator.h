// CUDA C++ on a CPU, for tests: replaces nvcc's headers (README.md).
//
// Every thread is a fiber that runs until it waits, spins or ends; a seed selects the order. Shared memory has its
// exact size, for the address sanitizer, and starts as NaN (0xFF).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __constant__ static const
#define __restrict__ __restrict
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};
using uint3 = dim3;

namespace cuda_emulator {

extern dim3 thread_index, block_index, block_size, grid_size;

struct Settings {
  uint64_t seed = 0;             // thread order; 0: forward; 1: reverse; others: shuffled
  int multiprocessors = 4;       // reported to kernels
  std::string disabled_barrier;  // "file:line" of a barrier to skip
};
extern Settings settings;

struct SourceLocation {
  const char* file;
  int line;
};

// Events since clear().
struct Record {
  std::vector<std::string> kernels;      // in launch order
  std::vector<SourceLocation> barriers;  // passed
  int64_t blocks = 0;
  int64_t switches = 0;
};
extern Record record;

std::string short_text(SourceLocation location);

// Last parameters of a function that records its caller.
#define CUDA_EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Prints the error with kernel, block and thread; ends the process.
[[noreturn]] void fail(const std::string& message);

// Runs body(context) per thread, with up to 99 KB of shared memory per block.
void run(const char* kernel, dim3 grid, dim3 block, int64_t shared_bytes, void (*body)(void*), void* context);

unsigned char* dynamic_shared_memory();
void* static_shared_memory(const void* key, const char* name, size_t bytes, size_t alignment);

void yield();

enum class Vote { kNone, kAny, kAll, kCount };
int block_barrier(Vote vote, bool predicate, SourceLocation location);

// Waits for all lanes of `mask`; returns their values (up to eight bytes each), undefined outside the mask, valid until
// the lane's next collective.
const uint64_t* warp_collective(const char* name, unsigned mask, uint64_t value, SourceLocation location);
void warp_barrier(unsigned mask, SourceLocation location);
unsigned lane();

void note_atomic(const void* address, size_t bytes);

// cp.async: the destination is undefined until the wait.
void copy_async(void* shared, const void* global, size_t bytes, CUDA_EMULATOR_CALLER);
void copy_async_commit();
void copy_async_wait_all();
void copy_async_wait_group(int under_way);  // may stay in flight

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
           const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> parameters;
  } call{kernel, {arguments...}};
  const auto body = [](void* context) {
    const Call* made = static_cast<const Call*>(context);
    std::apply(made->kernel, made->parameters);
  };
  run(name, grid, block, shared_bytes, body, &call);
  return 0;
}

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a warp exchanges values of up to 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

// `source` must be in the mask.
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, SourceLocation location) {
  const uint64_t* values = warp_collective(name, mask, to_word(value), location);
  if (!(mask >> source & 1u)) {
    fail(std::string(name) + " reads lane " + std::to_string(source) + ", which is not in its mask");
  }
  return from_word<T>(values[source]);
}

template <typename T, typename Combine>
T reduce(const char* name, unsigned mask, T value, SourceLocation location, Combine combine) {
  const uint64_t* values = warp_collective(name, mask, to_word(value), location);
  bool first = true;
  T result{};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    result = first ? from_word<T>(values[i]) : combine(result, from_word<T>(values[i]));
    first = false;
  }
  return result;
}

}  // namespace cuda_emulator

#define threadIdx cuda_emulator::thread_index
#define blockIdx cuda_emulator::block_index
#define blockDim cuda_emulator::block_size
#define gridDim cuda_emulator::grid_size
constexpr int warpSize = 32;

// Returns 0: errors end the process.
#define CUDA_EMULATOR_LAUNCH(kernel, grid, block, shared_bytes, ...) \
  cuda_emulator::launch(#kernel, (kernel), (grid), (block), (shared_bytes), ##__VA_ARGS__)

// Dynamic shared memory.
#define CUDA_EMULATOR_SHARED(name) unsigned char* const name = cuda_emulator::dynamic_shared_memory()
#define CUDA_EMULATOR_SHARED_ARRAY(type, name, dimensions) \
  static const char name##_key = 0;                        \
  typedef type name##_array dimensions;                    \
  name##_array& name = *static_cast<name##_array*>(        \
      cuda_emulator::static_shared_memory(&name##_key, #name, sizeof(name##_array), alignof(type)))

inline void __syncthreads(CUDA_EMULATOR_CALLER) {
  cuda_emulator::block_barrier(cuda_emulator::Vote::kNone, false, {file, line});
}
inline int __syncthreads_or(int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::block_barrier(cuda_emulator::Vote::kAny, predicate != 0, {file, line});
}
inline int __syncthreads_and(int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::block_barrier(cuda_emulator::Vote::kAll, predicate != 0, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::block_barrier(cuda_emulator::Vote::kCount, predicate != 0, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATOR_CALLER) {
  cuda_emulator::warp_barrier(mask, {file, line});
}
// One fiber runs at a time: memory is consistent.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuda_emulator::yield(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATOR_CALLER) {
  const int lane = static_cast<int>(cuda_emulator::lane());
  return cuda_emulator::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) + (source & (width - 1)),
                                {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATOR_CALLER) {
  const int lane = static_cast<int>(cuda_emulator::lane()), source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source,
                                {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATOR_CALLER) {
  const int lane = static_cast<int>(cuda_emulator::lane()), source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                                {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_EMULATOR_CALLER) {
  // source in a later segment: own value; in an earlier one: that lane's
  const int lane = static_cast<int>(cuda_emulator::lane()), source = lane ^ lanes;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source,
                                {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  const unsigned mine = predicate ? 1u << cuda_emulator::lane() : 0u;
  return cuda_emulator::reduce("__ballot_sync", mask, mine, {file, line}, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

#define CUDA_EMULATOR_REDUCTION(name, combine)                                                           \
  template <typename T>                                                                                  \
  T name(unsigned mask, T value, CUDA_EMULATOR_CALLER) {                                                 \
    static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "the hardware reduces 32-bit integers"); \
    return cuda_emulator::reduce(#name, mask, value, {file, line}, combine);                             \
  }
CUDA_EMULATOR_REDUCTION(__reduce_add_sync, std::plus<T>())
CUDA_EMULATOR_REDUCTION(__reduce_and_sync, std::bit_and<T>())
CUDA_EMULATOR_REDUCTION(__reduce_or_sync, std::bit_or<T>())
CUDA_EMULATOR_REDUCTION(__reduce_xor_sync, std::bit_xor<T>())
CUDA_EMULATOR_REDUCTION(__reduce_min_sync, [](T a, T b) { return b < a ? b : a; })
CUDA_EMULATOR_REDUCTION(__reduce_max_sync, [](T a, T b) { return a < b ? b : a; })
#undef CUDA_EMULATOR_REDUCTION

// Not instrumented: atomics do not race with each other.
#define CUDA_EMULATOR_ATOMIC __attribute__((noinline, no_sanitize("thread")))

template <typename T, typename U>
CUDA_EMULATOR_ATOMIC T atomicAdd(T* address, U value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = old + static_cast<T>(value);
  return old;
}
template <typename T, typename U>
CUDA_EMULATOR_ATOMIC T atomicExch(T* address, U value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = static_cast<T>(value);
  return old;
}
template <typename T, typename U>
CUDA_EMULATOR_ATOMIC T atomicMax(T* address, U value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = std::max(old, static_cast<T>(value));
  return old;
}
template <typename T, typename U>
CUDA_EMULATOR_ATOMIC T atomicMin(T* address, U value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = std::min(old, static_cast<T>(value));
  return old;
}
template <typename T, typename U>
CUDA_EMULATOR_ATOMIC T atomicOr(T* address, U value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = old | static_cast<T>(value);
  return old;
}
template <typename T, typename U, typename V>
CUDA_EMULATOR_ATOMIC T atomicCAS(T* address, U expected, V value) {
  cuda_emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  if (old == static_cast<T>(expected)) *address = static_cast<T>(value);
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }

inline unsigned __float_as_uint(float x) { return cuda_emulator::from_word<unsigned>(cuda_emulator::to_word(x)); }
inline int __float_as_int(float x) { return cuda_emulator::from_word<int>(cuda_emulator::to_word(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::from_word<float>(cuda_emulator::to_word(x)); }
inline float __int_as_float(int x) { return cuda_emulator::from_word<float>(cuda_emulator::to_word(x)); }
inline long long __double_as_longlong(double x) { return static_cast<long long>(cuda_emulator::to_word(x)); }
inline double __longlong_as_double(long long x) { return cuda_emulator::from_word<double>(cuda_emulator::to_word(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32); }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// Aligned as on the GPU.
#define CUDA_EMULATOR_VECTOR(name, type)                                                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_EMULATOR_VECTOR(float, float)
CUDA_EMULATOR_VECTOR(double, double)
CUDA_EMULATOR_VECTOR(int, int)
CUDA_EMULATOR_VECTOR(uint, unsigned)
CUDA_EMULATOR_VECTOR(short, short)
CUDA_EMULATOR_VECTOR(ushort, unsigned short)
CUDA_EMULATOR_VECTOR(longlong, long long)
#undef CUDA_EMULATOR_VECTOR
