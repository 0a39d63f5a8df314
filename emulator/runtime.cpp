// The scheduler. If all running threads spin without progress, another block starts, so that grid barriers get their
// resident blocks.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <memory>
#include <random>

#include "scheduler.h"

namespace cuda_emulator {

dim3 thread_index, block_index, block_size, grid_size;
Settings settings;
Record record;
Launch launch_state;
Fiber* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int64_t kSharedLimit = 99 * 1024;  // sm_120's limit, for static and dynamic shared memory together
constexpr int64_t kStaticSharedLimit = 48 * 1024;
constexpr int kMaxIdlePasses = 2000;  // then spinning counts as endless

Context scheduler;
std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber*> idle_fibers;
std::mt19937_64 random_numbers;

uint64_t random_below(uint64_t count) { return random_numbers() % count; }

void fiber_main();

void* allocate_poisoned(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max<size_t>(alignment, 16), bytes) != 0) fail("out of memory");
  memset(memory, 0xFF, bytes);
  return memory;
}

void start_block(int64_t number) {
  Launch& launch = launch_state;
  launch.blocks.push_back(std::make_unique<Block>(launch.threads));
  Block* block = launch.blocks.back().get();
  const int64_t column = number / grid_size.x;
  block->index = dim3(static_cast<unsigned>(number % grid_size.x), static_cast<unsigned>(column % grid_size.y),
                      static_cast<unsigned>(column / grid_size.y));
  block->warps.resize((launch.threads + 31) / 32);
  block->alive = launch.threads;
  // the largest alignment that an instruction requires
  block->shared = static_cast<unsigned char*>(allocate_poisoned(static_cast<size_t>(launch.shared_bytes), 1024));
  block->races.add("dynamic shared memory", block->shared, static_cast<size_t>(launch.shared_bytes));
  for (unsigned i = 0; i < launch.threads; ++i) {
    if (idle_fibers.empty()) {
      all_fibers.push_back(std::make_unique<Fiber>());
      all_fibers.back()->context.allocate(kStackBytes);
      idle_fibers.push_back(all_fibers.back().get());
    }
    Fiber* fiber = idle_fibers.back();
    idle_fibers.pop_back();
    fiber->block = block;
    fiber->index = i;
    fiber->waiting_in = nullptr;
    fiber->ended = false;
    fiber->copies.clear();
    fiber->copy_group = 0;
    fiber->context.begin(fiber_main);
    block->fibers.push_back(fiber);
    launch.ready.push_back(fiber);
  }
  ++record.blocks;
}

void end_block(Block* block) {
  free(block->shared);
  for (const SharedArray& array : block->arrays) free(array.memory);
  idle_fibers.insert(idle_fibers.end(), block->fibers.rbegin(), block->fibers.rend());
  auto& blocks = launch_state.blocks;
  blocks.erase(std::find_if(blocks.begin(), blocks.end(), [block](const auto& b) { return b.get() == block; }));
}

void end_thread(Fiber* fiber) {
  Block* block = fiber->block;
  fiber->ended = true;
  --block->alive;
  Warp& warp = block->warps[fiber->index / 32];
  warp.ended |= 1u << (fiber->index % 32);
  if (block->arrived != 0) {
    fail("this thread has ended, and others wait for it in __syncthreads at " + text_of(block->barrier));
  }
  for (const auto& sync : warp.sync_points) {
    if (sync->arrived != 0 && (sync->mask & warp.ended) != 0) {
      fail(std::string("this thread has ended, and others wait for it in ") + sync->name + " at " +
           text_of(sync->location));
    }
  }
}

__attribute__((no_sanitize_address)) void fiber_main() {
  current->context.finish_switch();
  launch_state.body(launch_state.argument);
  end_thread(current);
  current->context.switch_to(scheduler, true);
  abort();
}

[[noreturn]] void report_deadlock() {
  std::string message = "no thread can go on";
  for (const auto& block : launch_state.blocks) {
    std::vector<std::pair<const Fiber*, int>> kinds;
    for (const Fiber* fiber : block->fibers) {
      if (fiber->ended || fiber->waiting_in == nullptr) continue;
      auto kind = std::find_if(kinds.begin(), kinds.end(), [fiber](const auto& k) {
        return k.first->waiting_in == fiber->waiting_in && same(k.first->location, fiber->location);
      });
      if (kind == kinds.end()) {
        kinds.emplace_back(fiber, 1);
      } else {
        ++kind->second;
      }
    }
    for (const auto& [fiber, count] : kinds) {
      message += "\n  block " + text_of(block->index) + ": " + std::to_string(count) + " threads wait in " +
                 fiber->waiting_in + " at " + text_of(fiber->location) + ", first thread " +
                 std::to_string(fiber->index);
    }
    const unsigned ended = launch_state.threads - block->alive;
    if (ended) message += "\n  block " + text_of(block->index) + ": " + std::to_string(ended) + " threads have ended";
  }
  current = nullptr;
  fail(message);
}

Fiber* take_next() {
  std::vector<Fiber*>& ready = launch_state.ready;
  size_t at = 0;
  if (settings.seed == 1) {
    at = ready.size() - 1;
  } else if (settings.seed > 1) {
    at = random_below(ready.size());
  }
  Fiber* fiber = ready[at];
  if (settings.seed > 1) {
    ready[at] = ready.back();
    ready.pop_back();
  } else {
    ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(at));
  }
  return fiber;
}

void resume(Fiber* fiber) {
  current = fiber;
  const unsigned i = fiber->index;
  thread_index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
  block_index = fiber->block->index;
  ++record.switches;
  races::enter(&fiber->block->races, fiber->index);
  scheduler.switch_to(fiber->context);
  races::enter(nullptr, 0);
  current = nullptr;
  if (fiber->ended && fiber->block->alive == 0) end_block(fiber->block);
}

}  // namespace

std::string text_of(SourceLocation location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}
std::string text_of(dim3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}
bool same(SourceLocation a, SourceLocation b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

void suspend() { current->context.switch_to(scheduler); }

void wait_in(const char* what, SourceLocation location) {
  current->waiting_in = what;
  current->location = location;
  suspend();
}

void wake(Fiber* fiber) {
  fiber->waiting_in = nullptr;
  launch_state.ready.push_back(fiber);
}

std::string short_text(SourceLocation location) {
  const char* slash = strrchr(location.file, '/');
  return std::string(slash == nullptr ? location.file : slash + 1) + ":" + std::to_string(location.line);
}

void fail(const std::string& message) {
  std::string message_start = std::string("cuda emulator: kernel ") + launch_state.kernel;
  if (current != nullptr) message_start += ", block " + text_of(block_index) + ", thread " + text_of(thread_index);
  fprintf(stderr, "%s (seed %llu): %s\n", message_start.c_str(), static_cast<unsigned long long>(settings.seed),
          message.c_str());
  fflush(stderr);
  _exit(86);
}

[[noreturn]] static void fail_on_shared_memory(int64_t bytes, int64_t limit) {
  fail(std::to_string(bytes) + " bytes of shared memory, a block has at most " + std::to_string(limit));
}

void run(const char* kernel, dim3 grid, dim3 block, int64_t shared_bytes, void (*body)(void*), void* argument) {
  Launch& launch = launch_state;
  launch.kernel = kernel;
  launch.body = body;
  launch.argument = argument;
  launch.shared_bytes = shared_bytes;
  grid_size = grid;
  block_size = block;
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024) fail("a block of " + std::to_string(threads) + " threads");
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid of " + text_of(grid));
  if (shared_bytes < 0 || shared_bytes > kSharedLimit) {
    fail_on_shared_memory(shared_bytes, kSharedLimit);
  }
  launch.threads = static_cast<unsigned>(threads);
  record.kernels.emplace_back(kernel);
  random_numbers.seed(settings.seed);

  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (int64_t i = 0; i < blocks; ++i) order[static_cast<size_t>(i)] = settings.seed == 1 ? blocks - 1 - i : i;
  if (settings.seed > 1) std::shuffle(order.begin(), order.end(), random_numbers);
  size_t resident_blocks = settings.seed > 1 ? 1 + random_below(4) : 1, started = 0;
  int idle_passes = 0;
  for (;;) {
    while (launch.blocks.size() < resident_blocks && started < order.size()) start_block(order[started++]);
    if (launch.blocks.empty()) break;
    if (launch.ready.empty()) {
      if (launch.spinning.empty()) report_deadlock();
      launch.ready.swap(launch.spinning);
      if (++idle_passes > kMaxIdlePasses) report_deadlock();
      // the thread order alone can make the first passes idle
      if (idle_passes > 2 && started < order.size()) {
        ++resident_blocks;
        idle_passes = 0;
      }
      continue;
    }
    Fiber* fiber = take_next();
    resume(fiber);
    if (launch.spinning.empty() || launch.spinning.back() != fiber) idle_passes = 0;
  }
}

unsigned char* dynamic_shared_memory() { return current->block->shared; }

void* static_shared_memory(const void* key, const char* name, size_t bytes, size_t alignment) {
  std::vector<SharedArray>& arrays = current->block->arrays;
  for (const SharedArray& array : arrays) {
    if (array.key == key) return array.memory;
  }
  int64_t total = static_cast<int64_t>(bytes);
  for (const SharedArray& array : arrays) total += array.bytes;
  if (total > kStaticSharedLimit) fail_on_shared_memory(total, kStaticSharedLimit);
  total += launch_state.shared_bytes;
  if (total > kSharedLimit) fail_on_shared_memory(total, kSharedLimit);
  arrays.push_back({key, allocate_poisoned(bytes, alignment), static_cast<int64_t>(bytes)});
  current->block->races.add(name, arrays.back().memory, bytes);
  return arrays.back().memory;
}

void yield() {
  current->waiting_in = "a spin-wait";
  launch_state.spinning.push_back(current);
  suspend();
  current->waiting_in = nullptr;
}

}  // namespace cuda_emulator
