// The bookkeeping behind races.h, and the functions that code compiled under -fsanitize=thread calls.
//
// A byte remembers its last write and the reads since. Nothing older matters: what is ordered after the last write is
// ordered after all that the last write was ordered after. Between two barriers of the block, threads of two warps are
// never ordered, so of the reads one warp's lanes are kept, and one thread of any other warp.
#include "races.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <string>

#include "cuda_emulator.h"

namespace cuda_emulator {
namespace races {

namespace {

constexpr unsigned kNobody = 0xffffffffu;

Block* running = nullptr;
unsigned running_thread = 0;
uint32_t last_number = 0;  // of epochs and blocks together

// Memory for bytes' records is used again without being cleared: no later block has the epochs in it.
struct Spare {
  size_t bytes;
  Byte* known;
};
std::vector<Spare> spares;

void probe() {}
const char* program_start() {
  static const char* const start = [] {
    Dl_info found;
    return dladdr(reinterpret_cast<void*>(&probe), &found) ? static_cast<const char*>(found.dli_fbase) : nullptr;
  }();
  return start;
}
uint32_t place_of(const void* address) {
  return static_cast<uint32_t>(static_cast<const char*>(address) - program_start());
}

// The source line of a place, and those that it was inlined into, by the tool that comes with the compiler.
std::string source_of(uint32_t place) {
  // a program of fixed addresses is looked up by them
  const bool fixed = reinterpret_cast<const ElfW(Ehdr)*>(program_start())->e_type == ET_EXEC;
  const uintptr_t inside = place - 1 + (fixed ? reinterpret_cast<uintptr_t>(program_start()) : 0);  // of the call
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 1);
  std::string found;
  if (length > 0) {
    program[length] = 0;
    char call[64];
    snprintf(call, sizeof(call), "' -C -f -i -p 0x%zx 2>/dev/null", static_cast<size_t>(inside));
    if (FILE* lines = popen((std::string("addr2line -e '") + program + call).c_str(), "r")) {
      char line[1024];
      while (fgets(line, sizeof(line), lines)) found += std::string("\n    ") + std::string(line, strcspn(line, "\n"));
      pclose(lines);
    }
  }
  if (!found.empty()) return found;
  char text[64];
  snprintf(text, sizeof(text), "\n    offset 0x%x of the program", place);
  return text;
}

std::string text_of_thread(unsigned thread) {
  const unsigned x = thread % block_size.x, y = thread / block_size.x % block_size.y;
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," +
         std::to_string(thread / block_size.x / block_size.y) + ")";
}

}  // namespace

struct Byte {
  uint32_t write_epoch, write_clock, write_place;
  uint32_t copy_of;  // the block whose asynchronous copy is under way here, or 0
  uint16_t writer;
  bool atomic;          // the last write was
  uint8_t read_warp;    // whose lanes are kept below
  uint32_t read_epoch;  // of the reads since the last write; others do not count
  uint32_t read_lanes;
  uint32_t other_reader, other_place;  // of another warp
  uint32_t read_clock[32], read_place[32];
};

Block::Block(unsigned threads) : threads_(threads), clocks_(static_cast<size_t>(threads) * 32) {
  number_ = ++last_number;
  epoch_ = ++last_number;
  for (unsigned i = 0; i < threads; ++i) clocks_[i * 32 + i % 32] = 1;
}

Block::~Block() {
  for (const Region& region : regions_) spares.push_back({region.bytes, region.known});
}

void Block::add(const char* name, const void* memory, size_t bytes) {
  Byte* known = nullptr;
  for (size_t i = 0; i < spares.size() && known == nullptr; ++i) {
    if (spares[i].bytes != bytes) continue;
    known = spares[i].known;
    spares.erase(spares.begin() + static_cast<std::ptrdiff_t>(i));
  }
  if (known == nullptr) known = static_cast<Byte*>(calloc(bytes + 1, sizeof(Byte)));
  if (known == nullptr) fail("out of memory");
  regions_.push_back({name, static_cast<const char*>(memory), bytes, known});
}

const Block::Region* Block::region(const void* address) const {
  for (const Region& region : regions_) {
    const std::ptrdiff_t offset = static_cast<const char*>(address) - region.memory;
    if (offset >= 0 && static_cast<size_t>(offset) < region.bytes) return &region;
  }
  return nullptr;
}

void Block::block_barrier() { epoch_ = ++last_number; }

void Block::warp_barrier(unsigned first_thread, unsigned mask) {
  uint32_t all[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    for (unsigned of = 0; of < 32; ++of) all[of] = std::max(all[of], knows(first_thread + i, of));
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    uint32_t* clocks = &clocks_[(first_thread + i) * 32];
    memcpy(clocks, all, sizeof(all));
    ++clocks[i];
  }
}

uint32_t Block::knows(unsigned thread, unsigned of) const { return clocks_[thread * 32 + of]; }

// Whether an access of this epoch, at this time of thread `before`, lies ahead of all that `thread` does now.
bool Block::ordered(unsigned before, uint32_t clock, unsigned thread) const {
  if (before == thread) return true;
  return before / 32 == thread / 32 && knows(thread, before % 32) >= clock;
}

void Block::check(const Region& region, Byte& byte, const Touch& now, size_t bytes, Access kind) const {
  if (byte.copy_of == number_) {
    report(region, byte, now, bytes,
           {byte.writer, "copies there asynchronously, and has not waited", byte.write_place});
  }
  const bool both_atomic = kind == Access::kAtomic && byte.atomic;
  if (byte.write_epoch == epoch_ && !both_atomic && !ordered(byte.writer, byte.write_clock, now.thread)) {
    report(region, byte, now, bytes, {byte.writer, "wrote there", byte.write_place});
  }
  if (kind == Access::kRead || byte.read_epoch != epoch_) return;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned reader = byte.read_warp * 32u + lane;
    if ((byte.read_lanes >> lane & 1u) && !ordered(reader, byte.read_clock[lane], now.thread)) {
      report(region, byte, now, bytes, {reader, "read there", byte.read_place[lane]});
    }
  }
  if (byte.other_reader != kNobody) {  // if this thread's own, lanes of another warp were there too
    report(region, byte, now, bytes, {byte.other_reader, "read there", byte.other_place});
  }
}

void Block::remember(Byte& byte, const Touch& now, Access kind) const {
  const unsigned lane = now.thread % 32, warp = now.thread / 32;
  if (kind == Access::kRead) {
    if (byte.read_epoch != epoch_) {
      byte.read_epoch = epoch_;
      byte.read_warp = static_cast<uint8_t>(warp);
      byte.read_lanes = 0;
      byte.other_reader = kNobody;
    }
    if (byte.read_warp == warp) {
      byte.read_lanes |= 1u << lane;
      byte.read_clock[lane] = knows(now.thread, lane);
      byte.read_place[lane] = now.place;
    } else if (byte.other_reader == kNobody) {
      byte.other_reader = now.thread;
      byte.other_place = now.place;
    }
    return;
  }
  byte.read_epoch = 0;
  byte.write_epoch = epoch_;
  byte.write_clock = knows(now.thread, lane);
  byte.write_place = now.place;
  byte.writer = static_cast<uint16_t>(now.thread);
  byte.atomic = kind == Access::kAtomic;
}

void Block::access(unsigned thread, const void* address, size_t bytes, Access kind, const void* place) {
  const Region* const found = region(address);
  if (found == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - found->memory);
  const char* const does = kind == Access::kRead ? "reads" : kind == Access::kWrite ? "writes" : "changes atomically";
  const Touch now{thread, does, place_of(place)};
  for (size_t i = offset; i < std::min(offset + bytes, found->bytes); ++i) {
    check(*found, found->known[i], now, bytes, kind);
    remember(found->known[i], now, kind);
  }
}

void Block::copy_begins(unsigned thread, const void* shared, size_t bytes, const void* place) {
  access(thread, shared, bytes, Access::kWrite, place);
  const Region* const found = region(shared);
  if (found == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - found->memory);
  for (size_t i = offset; i < std::min(offset + bytes, found->bytes); ++i) found->known[i].copy_of = number_;
}

void Block::copy_ends(unsigned thread, const void* shared, size_t bytes) {
  const Region* const found = region(shared);
  if (found == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - found->memory);
  for (size_t i = offset; i < std::min(offset + bytes, found->bytes); ++i) {
    Byte& byte = found->known[i];
    byte.copy_of = 0;
    remember(byte, {thread, "", byte.write_place}, Access::kWrite);
  }
}

void Block::report(const Region& region, const Byte& byte, const Touch& now, size_t bytes, const Touch& before) const {
  const std::string at = std::to_string(&byte - region.known) + " of " + region.name;
  const bool warp = before.thread / 32 == now.thread / 32;
  std::string message = std::string("a race: this thread ") + now.did + " " + std::to_string(bytes) +
                        " bytes, with byte " + at + source_of(now.place) + "\n  thread " +
                        text_of_thread(before.thread) + " " + before.did + source_of(before.place) +
                        "\n  and no __syncthreads" + (warp ? " or __syncwarp of both" : "") + " lies between";
  running = nullptr;
  fail(message);
}

void enter(Block* block, unsigned thread) {
  running = block;
  running_thread = thread;
}

namespace {

inline void touch(const void* address, size_t bytes, Access kind, const void* place) {
  if (running != nullptr) running->access(running_thread, address, bytes, kind, place);
}

}  // namespace
}  // namespace races
}  // namespace cuda_emulator

// What the compiler calls before an access; the names are its own.
#define CUDA_EMULATOR_SEEN(name, kind, bytes)                                                                     \
  extern "C" void name(void* address) {                                                                           \
    cuda_emulator::races::touch(address, bytes, cuda_emulator::races::Access::kind, __builtin_return_address(0)); \
  }
#define CUDA_EMULATOR_SEEN_SIZE(bytes)                           \
  CUDA_EMULATOR_SEEN(__tsan_read##bytes, kRead, bytes)           \
  CUDA_EMULATOR_SEEN(__tsan_write##bytes, kWrite, bytes)         \
  CUDA_EMULATOR_SEEN(__tsan_unaligned_read##bytes, kRead, bytes) \
  CUDA_EMULATOR_SEEN(__tsan_unaligned_write##bytes, kWrite, bytes)
CUDA_EMULATOR_SEEN_SIZE(1)
CUDA_EMULATOR_SEEN_SIZE(2)
CUDA_EMULATOR_SEEN_SIZE(4)
CUDA_EMULATOR_SEEN_SIZE(8)
CUDA_EMULATOR_SEEN_SIZE(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  cuda_emulator::races::touch(address, bytes, cuda_emulator::races::Access::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  cuda_emulator::races::touch(address, bytes, cuda_emulator::races::Access::kWrite, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
