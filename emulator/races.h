// Races in shared memory: two threads of a block access a byte, one writes, and no barrier orders them.
//
// __syncthreads orders a block's accesses, __syncwarp those of its mask's lanes, shuffles and votes none (CUDA
// programming guide); execution order does not count. The thread sanitizer knows neither fibers nor these barriers.
// Empty without CUDA_EMULATOR_RACES.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace cuda_emulator {
namespace races {

enum class Access { kRead, kWrite, kAtomic };

#ifdef CUDA_EMULATOR_RACES

struct ShadowByte;

class Block {
 public:
  explicit Block(unsigned threads);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void add(const char* name, const void* memory, size_t bytes);
  void block_barrier();
  void warp_barrier(unsigned first_thread, unsigned mask);
  // `pc`: return address.
  void access(unsigned thread, const void* address, size_t bytes, Access kind, const void* pc);
  // Until its thread has waited, a copy owns its destination.
  void copy_begins(unsigned thread, const void* shared, size_t bytes, const void* pc);
  void copy_ends(unsigned thread, const void* shared, size_t bytes);

 private:
  struct Region {
    const char* name;
    const char* memory;
    size_t bytes;
    ShadowByte* shadow;
  };
  struct AccessRecord {
    unsigned thread;
    const char* action;
    uint32_t pc;
  };
  const Region* region(const void* address) const;
  uint32_t clock_of(unsigned thread, unsigned of) const;
  bool happens_before(unsigned before, uint32_t clock, unsigned thread) const;
  void check(const Region& region, ShadowByte& byte, const AccessRecord& now, size_t bytes, Access kind) const;
  void record_access(ShadowByte& byte, const AccessRecord& now, Access kind) const;
  [[noreturn]] void report(const Region& region, const ShadowByte& byte, const AccessRecord& now, size_t bytes,
                           const AccessRecord& before) const;

  unsigned threads_;
  uint32_t id_;
  uint32_t epoch_;                // unique over all blocks
  std::vector<uint32_t> clocks_;  // [threads, 32 lanes]
  std::vector<Region> regions_;
};

// null: no thread runs.
void enter(Block* block, unsigned thread);

#else

class Block {
 public:
  explicit Block(unsigned) {}
  void add(const char*, const void*, size_t) {}
  void block_barrier() {}
  void warp_barrier(unsigned, unsigned) {}
  void access(unsigned, const void*, size_t, Access, const void*) {}
  void copy_begins(unsigned, const void*, size_t, const void*) {}
  void copy_ends(unsigned, const void*, size_t) {}
};
inline void enter(Block*, unsigned) {}

#endif

}  // namespace races
}  // namespace cuda_emulator
