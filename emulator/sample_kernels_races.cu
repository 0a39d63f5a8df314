// Kernels for the race detector's tests; `plant` selects the race.
#include "cuda_emulator.h"

namespace {

enum Plant {
  kNothing,
  kShuffleForBarrier,
  kVoteForBarrier,
  kOtherHalf,
  kThirdReader,
  kReadThenWrite,
  kSameValue,
  kCopyWithoutBarrier,
  kBarrierBeforeWait,
  kWriteUnderCopy,
  kPlainReadOfAtomic,
  kOneBarrierShort,
};

// Two warps; `answers` keeps accesses from being optimised away.
__global__ void cases_kernel(const float* numbers, float* answers, int plant) {
  CUDA_EMULATOR_SHARED(memory);
  CUDA_EMULATOR_SHARED_ARRAY(float, slots, [64]);
  CUDA_EMULATOR_SHARED_ARRAY(unsigned char, flags, [64]);
  CUDA_EMULATOR_SHARED_ARRAY(int, counter, [1]);
  const int me = static_cast<int>(threadIdx.x), lane = me % 32, warp = me / 32;
  const unsigned all = 0xffffffffu, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  float found = 0;

  // Adjacent bytes of different threads; a thread's own accesses.
  flags[me] = static_cast<unsigned char>(me);
  slots[me] = numbers[me];
  slots[me] += static_cast<float>(flags[me]);

  if (plant == kShuffleForBarrier) {
    found += __shfl_xor_sync(all, found, 1);
  } else if (plant == kVoteForBarrier) {
    found += static_cast<float>(__any_sync(all, me > 100));
  } else {
    __syncwarp();
  }
  found += slots[me ^ 1];

  __syncwarp();
  slots[me] = found;
  __syncwarp(half);
  found += slots[plant == kOtherHalf ? me ^ 16 : me ^ 8];
  __syncwarp();

  // Lanes 0 to 2 read; lane 3 writes after their __syncwarp (planted: without lane 2).
  if (lane < 3) found += slots[32 * warp + 5];
  if (lane < 2 || lane == 3 || (lane == 2 && plant != kThirdReader)) {
    __syncwarp(plant == kThirdReader ? 0xbu : 0xfu);
  }
  if (lane == 3) slots[32 * warp + 5] = 1.0f;

  // Between warps.
  __syncthreads();
  found += slots[7];
  if (plant == kReadThenWrite) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (me == 40) slots[7] = found;
  __syncthreads();
  if (plant == kSameValue ? lane == 0 : me == 0) slots[0] = 3.0f;

  // Private until the wait, shared after the next barrier.
  float* copied = reinterpret_cast<float*>(memory);
  cuda_emulator::copy_async(copied + 4 * me, numbers + 4 * me, 16);
  if (plant == kWriteUnderCopy) copied[4 * me] = 0.0f;
  if (plant == kBarrierBeforeWait) __syncthreads();
  cuda_emulator::copy_async_wait_all();
  found += copied[4 * me];
  if (plant != kCopyWithoutBarrier && plant != kBarrierBeforeWait) __syncthreads();
  found += copied[4 * (me ^ 33)];

  // Atomics race only with plain accesses.
  if (me == 0) counter[0] = 0;
  __syncthreads();
  atomicAdd(&counter[0], me);
  if (plant != kPlainReadOfAtomic) __syncthreads();
  found += static_cast<float>(counter[0]);

  // A buffer refilled per pass needs two barriers.
  for (int round = 0; round < 3; ++round) {
    __syncthreads();
    slots[me] = static_cast<float>(round);
    __syncthreads();
    found += slots[63 - me];
    if (plant == kOneBarrierShort && round == 0) slots[me] = 5.0f;
  }
  answers[me] = found;
}

}  // namespace

// words: numbers (256), answers (64), plant
extern "C" int sample_races(const int64_t* words) {
  return CUDA_EMULATOR_LAUNCH(cases_kernel, 1, 64, 64 * 16, reinterpret_cast<const float*>(words[0]),
                              reinterpret_cast<float*>(words[1]), static_cast<int>(words[2]));
}
