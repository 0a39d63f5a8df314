// Kernels for the emulator's tests; `plant` selects an error.
#include "cuda_emulator.h"

namespace {

enum Plant {
  kNothing,
  kMissingBarrier,
  kGlobalOutOfBounds,
  kSharedOutOfBounds,
  kUninitialised,
  kEarlyExit,
  kTwoBarriers,
  kAbsentLane,
  kForeignLane,
  kMissingWait,
  kMisaligned,
  kGap,
  kEndless,
  kNarrowOffset,
  kTooMuchShared,
};

constexpr int kBlock = 64;

// Reverses each run of kBlock numbers, `stride` apart.
template <typename T>
__global__ void __launch_bounds__(kBlock) reverse_kernel(T* numbers, int64_t stride, int plant) {
  CUDA_EMULATOR_SHARED(memory);
  T* shared = reinterpret_cast<T*>(memory);
  const int me = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock;
  if (plant == kEarlyExit && me == 5) return;
  if (plant != kUninitialised || me != 7)
    shared[plant == kSharedOutOfBounds ? me + 1 : me] = numbers[(first + me) * stride];
  if (plant == kTwoBarriers && me < 32) {
    __syncthreads();
  } else if (plant != kMissingBarrier) {
    __syncthreads();
  }
  const int64_t to = first + me + (plant == kGlobalOutOfBounds ? 1 : 0);
  numbers[to * stride + (plant == kGap && me == 9 ? 1 : 0)] = shared[kBlock - 1 - me];
}

// Shuffles, shared memory, then blocks in turn.
__global__ void sum_kernel(const float* numbers, float* sums, int* turn, int plant) {
  CUDA_EMULATOR_SHARED_ARRAY(float, of_warp, [32]);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float value = numbers[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x];
  if (plant == kAbsentLane && lane == 3) return;
  const unsigned mask = plant == kForeignLane ? (lane < 16 ? 0x0000ffffu : 0xffff0000u) : 0xffffffffu;
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(mask, value, delta);
  if (lane == 0) of_warp[warp] = value;
  if (plant == kMissingBarrier) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  value = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) value += of_warp[i];
  const int mine = static_cast<int>(blockIdx.x) + (plant == kEndless ? 1 : 0);
  while (*static_cast<volatile int*>(turn) != mine) __nanosleep(20);
  sums[blockIdx.x] = value + (blockIdx.x == 0 ? 0.0f : sums[blockIdx.x - 1]);
  __threadfence();
  atomicAdd(turn, 1);
}

__global__ void rotate_kernel(float* numbers, int plant) {
  CUDA_EMULATOR_SHARED_ARRAY(float, slots, [32]);
  slots[threadIdx.x] = numbers[threadIdx.x];
  if (plant != kMissingBarrier) __syncwarp();
  numbers[threadIdx.x] = slots[(threadIdx.x + 1) % 32];
}

// 16 bytes per thread.
__global__ void copy_kernel(const float* from, float* to, int plant) {
  CUDA_EMULATOR_SHARED(memory);
  float* mine = reinterpret_cast<float*>(memory) + 4 * threadIdx.x;
  cuda_emulator::copy_async(mine, from + 4 * threadIdx.x + (plant == kMisaligned ? 1 : 0), 16);
  if (plant != kMissingWait) cuda_emulator::copy_async_wait_all();
  *reinterpret_cast<float4*>(to + 4 * threadIdx.x) = *reinterpret_cast<const float4*>(mine);
}

// `stride` may exceed 2^31 elements.
__global__ void scale_kernel(float* numbers, int64_t stride, int plant) {
  const int me = static_cast<int>(threadIdx.x);
  const int64_t offset = plant == kNarrowOffset ? static_cast<int>(stride) * me : stride * me;
  numbers[offset] *= 2;
}

// `answers`: [collectives, 32].
__global__ void collectives_kernel(const int* numbers, int* answers) {
  const int lane = static_cast<int>(threadIdx.x), mine = numbers[lane];
  const unsigned all = 0xffffffffu, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const int found[] = {
      __shfl_sync(all, mine, 5),         __shfl_sync(half, mine, 3, 16), __shfl_up_sync(all, mine, 2),
      __shfl_down_sync(all, mine, 3, 8), __shfl_xor_sync(all, mine, 9),  static_cast<int>(__ballot_sync(all, mine > 0)),
      __any_sync(half, mine > 90),       __all_sync(half, mine > -200),  __reduce_add_sync(all, mine),
      __reduce_max_sync(half, mine),     __syncthreads_count(mine > 0),  __syncthreads_or(mine > 1000),
      __syncthreads_and(mine > -1000),
  };
  int row = 0;
  for (const int answer : found) answers[32 * row++ + lane] = answer;
}

int plant_of(const int64_t* words, int at) { return static_cast<int>(words[at]); }
template <typename T>
T* pointer(int64_t word) {
  return reinterpret_cast<T*>(word);
}

}  // namespace

// words: numbers, count, stride, double, plant
extern "C" int sample_reverse(const int64_t* words) {
  const unsigned blocks = static_cast<unsigned>(words[1] / kBlock);
  if (words[3]) {
    return CUDA_EMULATOR_LAUNCH(reverse_kernel<double>, blocks, kBlock, kBlock * 8, pointer<double>(words[0]), words[2],
                                plant_of(words, 4));
  }
  return CUDA_EMULATOR_LAUNCH(reverse_kernel<float>, blocks, kBlock, kBlock * 4, pointer<float>(words[0]), words[2],
                              plant_of(words, 4));
}

// words: numbers, count, sums, turn, plant
extern "C" int sample_sum(const int64_t* words) {
  const int64_t dynamic = plant_of(words, 4) == kTooMuchShared ? 99 * 1024 : 0;
  return CUDA_EMULATOR_LAUNCH(sum_kernel, static_cast<unsigned>(words[1] / kBlock), kBlock, dynamic,
                              pointer<float>(words[0]), pointer<float>(words[2]), pointer<int>(words[3]),
                              plant_of(words, 4));
}

// words: numbers, plant
extern "C" int sample_rotate(const int64_t* words) {
  return CUDA_EMULATOR_LAUNCH(rotate_kernel, 1, 32, 0, pointer<float>(words[0]), plant_of(words, 1));
}

// words: from, to, plant
extern "C" int sample_copy(const int64_t* words) {
  return CUDA_EMULATOR_LAUNCH(copy_kernel, 1, 32, 32 * 16, pointer<float>(words[0]), pointer<float>(words[1]),
                              plant_of(words, 2));
}

// words: numbers, count, stride, plant
extern "C" int sample_scale(const int64_t* words) {
  return CUDA_EMULATOR_LAUNCH(scale_kernel, 1, static_cast<unsigned>(words[1]), 0, pointer<float>(words[0]), words[2],
                              plant_of(words, 3));
}

// words: numbers, answers
extern "C" int sample_collectives(const int64_t* words) {
  return CUDA_EMULATOR_LAUNCH(collectives_kernel, 1, 32, 0, pointer<int>(words[0]), pointer<int>(words[1]));
}

extern "C" int sample_multiprocessors(const int64_t*) { return cuda_emulator::settings.multiprocessors; }
