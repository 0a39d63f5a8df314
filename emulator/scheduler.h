#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fiber.h"
#include "races.h"

namespace cuda_emulator {

struct Block;

struct AsyncCopy {
  void* destination;
  size_t bytes;
  int group;
  unsigned char data[16];
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  unsigned index = 0;                // in the block
  const char* waiting_in = nullptr;  // null: runnable
  SourceLocation location{"", 0};
  bool ended = false;
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
};

// Double-buffered: lanes may read old values while the next ones gather.
struct SyncPoint {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  SourceLocation location{"", 0};
  int phase = 0;
  uint64_t values[2][32];
};

struct Warp {
  unsigned ended = 0;
  std::vector<std::unique_ptr<SyncPoint>> sync_points;
};

struct SharedArray {
  const void* key;
  void* memory;
  int64_t bytes;
};

struct Block {
  explicit Block(unsigned threads) : races(threads) {}
  dim3 index;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned alive = 0;
  unsigned char* shared = nullptr;
  std::vector<SharedArray> arrays;
  unsigned arrived = 0, votes = 0;
  SourceLocation barrier{"", 0};
  int result = 0;
  races::Block races;
};

struct Launch {
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int64_t shared_bytes = 0;
  unsigned threads = 0;
  std::vector<Fiber*> ready, spinning;
  std::vector<std::unique_ptr<Block>> blocks;
};

extern Launch launch_state;
extern Fiber* current;  // null in the scheduler

std::string text_of(SourceLocation location);
std::string text_of(dim3 index);
bool same(SourceLocation a, SourceLocation b);

void suspend();
void wait_in(const char* what, SourceLocation location);
void wake(Fiber* fiber);

}  // namespace cuda_emulator
