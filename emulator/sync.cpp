// A waiting thread suspends; the last to arrive wakes the others.
#include <string.h>

#include <algorithm>

#include "scheduler.h"

namespace cuda_emulator {

namespace {

bool disabled_barrier(SourceLocation location) {
  return !settings.disabled_barrier.empty() && settings.disabled_barrier == short_text(location);
}
void record_barrier(SourceLocation location) {
  for (const SourceLocation& known : record.barriers) {
    if (known.file == location.file && known.line == location.line) return;
  }
  record.barriers.push_back(location);
}

}  // namespace

int block_barrier(Vote vote, bool predicate, SourceLocation location) {
  if (vote == Vote::kNone && disabled_barrier(location)) return 0;
  Block* block = current->block;
  const unsigned threads = launch_state.threads;
  if (block->alive != threads) {
    fail("__syncthreads at " + text_of(location) + ", but " + std::to_string(threads - block->alive) +
         " threads of the block have ended");
  }
  if (block->arrived == 0) {
    block->barrier = location;
    block->votes = 0;
  } else if (!same(block->barrier, location)) {
    fail("__syncthreads at " + text_of(location) + ", while others of the block wait in the one at " +
         text_of(block->barrier));
  }
  ++block->arrived;
  block->votes += predicate ? 1 : 0;
  if (block->arrived < threads) {
    wait_in("__syncthreads", location);
  } else {
    block->arrived = 0;
    block->races.block_barrier();
    record_barrier(location);
    const int votes = static_cast<int>(block->votes);
    block->result = vote == Vote::kAny ? votes != 0 : vote == Vote::kAll ? votes == static_cast<int>(threads) : votes;
    for (Fiber* fiber : block->fibers) wake(fiber);
    suspend();  // another thread may continue first
  }
  return block->result;
}

unsigned lane() { return current->index % 32; }

const uint64_t* warp_collective(const char* name, unsigned mask, uint64_t value, SourceLocation location) {
  Fiber* fiber = current;
  const unsigned first = fiber->index / 32 * 32, lane_bit = 1u << lane();
  Warp& warp = fiber->block->warps[fiber->index / 32];
  const unsigned width = std::min(32u, launch_state.threads - first);
  const unsigned exist = width == 32 ? 0xffffffffu : (1u << width) - 1;
  const auto call = [&] { return std::string(name) + " at " + text_of(location); };
  if ((mask & lane_bit) == 0) fail(call() + ": the calling lane is not in its mask");
  if ((mask & ~exist) != 0) fail(call() + ": its mask names lanes that the block does not have");
  if ((mask & warp.ended) != 0) fail(call() + ": its mask names a lane that has ended");

  SyncPoint* sync = nullptr;
  for (const auto& known : warp.sync_points) {
    if (known->mask == mask) sync = known.get();
  }
  if (sync == nullptr) {
    warp.sync_points.push_back(std::make_unique<SyncPoint>());
    sync = warp.sync_points.back().get();
    sync->mask = mask;
  }
  if (sync->arrived == 0) {
    sync->name = name;
    sync->location = location;
  } else if (strcmp(sync->name, name) != 0 || !same(sync->location, location)) {
    fail(call() + ": other lanes of its mask wait in " + sync->name + " at " + text_of(sync->location));
  }
  const int phase = sync->phase;
  sync->arrived |= lane_bit;
  sync->values[phase][lane()] = value;
  if (sync->arrived != mask) {
    wait_in(name, location);
  } else {
    sync->arrived = 0;
    sync->phase = 1 - phase;
    if (strcmp(name, "__syncwarp") == 0) fiber->block->races.warp_barrier(first, mask);
    for (unsigned i = 0; i < width; ++i) {
      if (mask >> i & 1u) wake(fiber->block->fibers[first + i]);
    }
    suspend();
  }
  return sync->values[phase];
}

void warp_barrier(unsigned mask, SourceLocation location) {
  if (disabled_barrier(location)) return;
  record_barrier(location);
  warp_collective("__syncwarp", mask, 0, location);
}

void note_atomic(const void* address, size_t bytes) {
  current->block->races.access(current->index, address, bytes, races::Access::kAtomic, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, size_t bytes, const char* file, int line) {
  AsyncCopy copy;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  const uintptr_t both = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (both % bytes != 0) {
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes at " + text_of({file, line}) +
         " is not aligned to them");
  }
  copy.destination = shared;
  copy.bytes = bytes;
  copy.group = current->copy_group;
  memcpy(copy.data, global, bytes);
  current->block->races.copy_begins(current->index, shared, bytes, __builtin_return_address(0));
  memset(shared, 0xFF, bytes);
  current->copies.push_back(copy);
}

void copy_async_commit() { ++current->copy_group; }

namespace {

void end_copies(int group) {
  std::vector<AsyncCopy>& copies = current->copies;
  size_t kept_count = 0;
  for (const AsyncCopy& copy : copies) {
    if (copy.group <= group) {
      memcpy(copy.destination, copy.data, copy.bytes);
      current->block->races.copy_ends(current->index, copy.destination, copy.bytes);
    } else {
      copies[kept_count++] = copy;
    }
  }
  copies.resize(kept_count);
}

}  // namespace

void copy_async_wait_all() { end_copies(current->copy_group); }
void copy_async_wait_group(int under_way) { end_copies(current->copy_group - 1 - under_way); }

}  // namespace cuda_emulator
