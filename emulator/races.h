// Races in shared memory: two threads of a block touch the same byte, one of them writes, and no barrier lies between.
//
// Whether a barrier lies between is decided by what the program guarantees, not by the order in which the fibers
// happened to run: __syncthreads puts everything before it ahead of everything after it, __syncwarp does so for the
// lanes of its mask, and nothing else does. Shuffles and votes do not: the CUDA programming guide says that they imply
// no memory barrier. So one run shows every race between the accesses that it makes, under any order of the threads.
//
// Accesses are seen through the calls that the compiler places under -fsanitize=thread; races.cpp answers them in the
// place of the thread sanitizer, which knows nothing of fibers and of barriers like these. A program built without
// CUDA_EMULATOR_RACES holds nothing of this.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace cuda_emulator {
namespace races {

enum class Access { kRead, kWrite, kAtomic };

#ifdef CUDA_EMULATOR_RACES

struct ShadowByte;

// What is known of a block's shared memory, and of what its threads know of each other.
class Block {
 public:
  explicit Block(unsigned threads);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void add(const char* name, const void* memory, size_t bytes);
  void block_barrier();
  void warp_barrier(unsigned first_thread, unsigned mask);
  // `place`: a return address in the code that asked for it.
  void access(unsigned thread, const void* address, size_t bytes, Access kind, const void* pc);
  // An asynchronous copy owns what it writes until its thread has waited for it.
  void copy_begins(unsigned thread, const void* shared, size_t bytes, const void* pc);
  void copy_ends(unsigned thread, const void* shared, size_t bytes);

 private:
  struct Region {
    const char* name;
    const char* memory;
    size_t bytes;
    ShadowByte* shadow;
  };
  // One access, for the report.
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
  uint32_t id_;                   // of the block
  uint32_t epoch_;                // one between two barriers of the block; no other block has it
  std::vector<uint32_t> clocks_;  // [threads, 32]: up to where a thread knows each lane of its warp
  std::vector<Region> regions_;
};

// The thread that runs from now on; null: none does.
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
