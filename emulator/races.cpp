// Shadow memory and the hooks of -fsanitize=thread.
//
// A byte keeps its last write and the reads since. Between block barriers, different warps are unordered, so reads of
// one warp's lanes and one thread of another warp suffice.
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

constexpr unsigned kNoThread = 0xffffffffu;

Block* current_block = nullptr;
unsigned current_thread = 0;
uint32_t last_id = 0;

// Shadows to reuse, uncleared: epochs are unique.
struct FreeShadow {
  size_t bytes;
  ShadowByte* shadow;
};
std::vector<FreeShadow> free_shadows;

void address_of_program() {}
const char* program_start() {
  static const char* const start = [] {
    Dl_info program;
    return dladdr(reinterpret_cast<void*>(&address_of_program), &program) ? static_cast<const char*>(program.dli_fbase)
                                                                          : nullptr;
  }();
  return start;
}
uint32_t pc_offset(const void* address) {
  return static_cast<uint32_t>(static_cast<const char*>(address) - program_start());
}

// Source lines of a pc, inlined ones too.
std::string source_lines(uint32_t pc) {
  // programs at fixed addresses need absolute ones
  const bool fixed = reinterpret_cast<const ElfW(Ehdr)*>(program_start())->e_type == ET_EXEC;
  const uintptr_t inside = pc - 1 + (fixed ? reinterpret_cast<uintptr_t>(program_start()) : 0);  // of the call
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 1);
  std::string lines_text;
  if (length > 0) {
    program[length] = 0;
    char call[64];
    snprintf(call, sizeof(call), "' -C -f -i -p 0x%zx 2>/dev/null", static_cast<size_t>(inside));
    if (FILE* lines = popen((std::string("addr2line -e '") + program + call).c_str(), "r")) {
      char line[1024];
      while (fgets(line, sizeof(line), lines))
        lines_text += std::string("\n    ") + std::string(line, strcspn(line, "\n"));
      pclose(lines);
    }
  }
  if (!lines_text.empty()) return lines_text;
  char text[64];
  snprintf(text, sizeof(text), "\n    offset 0x%x of the program", pc);
  return text;
}

std::string text_of_thread(unsigned thread) {
  const unsigned x = thread % block_size.x, y = thread / block_size.x % block_size.y;
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," +
         std::to_string(thread / block_size.x / block_size.y) + ")";
}

}  // namespace

struct ShadowByte {
  uint32_t write_epoch, write_clock, write_pc;
  uint32_t copying_block;  // of a copy in flight, or 0
  uint16_t writer;
  bool atomic;          // the last write
  uint8_t read_warp;    // of read_lanes
  uint32_t read_epoch;  // of reads since the last write
  uint32_t read_lanes;
  uint32_t other_reader, other_pc;  // of another warp
  uint32_t read_clock[32], read_pc[32];
};

Block::Block(unsigned threads) : threads_(threads), clocks_(static_cast<size_t>(threads) * 32) {
  id_ = ++last_id;
  epoch_ = ++last_id;
  for (unsigned i = 0; i < threads; ++i) clocks_[i * 32 + i % 32] = 1;
}

Block::~Block() {
  for (const Region& region : regions_) free_shadows.push_back({region.bytes, region.shadow});
}

void Block::add(const char* name, const void* memory, size_t bytes) {
  ShadowByte* shadow = nullptr;
  for (size_t i = 0; i < free_shadows.size() && shadow == nullptr; ++i) {
    if (free_shadows[i].bytes != bytes) continue;
    shadow = free_shadows[i].shadow;
    free_shadows.erase(free_shadows.begin() + static_cast<std::ptrdiff_t>(i));
  }
  if (shadow == nullptr) shadow = static_cast<ShadowByte*>(calloc(bytes + 1, sizeof(ShadowByte)));
  if (shadow == nullptr) fail("out of memory");
  regions_.push_back({name, static_cast<const char*>(memory), bytes, shadow});
}

const Block::Region* Block::region(const void* address) const {
  for (const Region& region : regions_) {
    const std::ptrdiff_t offset = static_cast<const char*>(address) - region.memory;
    if (offset >= 0 && static_cast<size_t>(offset) < region.bytes) return &region;
  }
  return nullptr;
}

void Block::block_barrier() { epoch_ = ++last_id; }

void Block::warp_barrier(unsigned first_thread, unsigned mask) {
  uint32_t all[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    for (unsigned of = 0; of < 32; ++of) all[of] = std::max(all[of], clock_of(first_thread + i, of));
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    uint32_t* clocks = &clocks_[(first_thread + i) * 32];
    memcpy(clocks, all, sizeof(all));
    ++clocks[i];
  }
}

uint32_t Block::clock_of(unsigned thread, unsigned of) const { return clocks_[thread * 32 + of]; }

// Whether an access of thread `before`, at `clock` in this epoch, happens before the current ones of `thread`.
bool Block::happens_before(unsigned before, uint32_t clock, unsigned thread) const {
  if (before == thread) return true;
  return before / 32 == thread / 32 && clock_of(thread, before % 32) >= clock;
}

void Block::check(const Region& region, ShadowByte& byte, const AccessRecord& now, size_t bytes, Access kind) const {
  if (byte.copying_block == id_) {
    report(region, byte, now, bytes, {byte.writer, "copies there asynchronously, and has not waited", byte.write_pc});
  }
  const bool both_atomic = kind == Access::kAtomic && byte.atomic;
  if (byte.write_epoch == epoch_ && !both_atomic && !happens_before(byte.writer, byte.write_clock, now.thread)) {
    report(region, byte, now, bytes, {byte.writer, "wrote there", byte.write_pc});
  }
  if (kind == Access::kRead || byte.read_epoch != epoch_) return;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned reader = byte.read_warp * 32u + lane;
    if ((byte.read_lanes >> lane & 1u) && !happens_before(reader, byte.read_clock[lane], now.thread)) {
      report(region, byte, now, bytes, {reader, "read there", byte.read_pc[lane]});
    }
  }
  if (byte.other_reader != kNoThread) {  // even if it is this thread: lanes of another warp read too
    report(region, byte, now, bytes, {byte.other_reader, "read there", byte.other_pc});
  }
}

void Block::record_access(ShadowByte& byte, const AccessRecord& now, Access kind) const {
  const unsigned lane = now.thread % 32, warp = now.thread / 32;
  if (kind == Access::kRead) {
    if (byte.read_epoch != epoch_) {
      byte.read_epoch = epoch_;
      byte.read_warp = static_cast<uint8_t>(warp);
      byte.read_lanes = 0;
      byte.other_reader = kNoThread;
    }
    if (byte.read_warp == warp) {
      byte.read_lanes |= 1u << lane;
      byte.read_clock[lane] = clock_of(now.thread, lane);
      byte.read_pc[lane] = now.pc;
    } else if (byte.other_reader == kNoThread) {
      byte.other_reader = now.thread;
      byte.other_pc = now.pc;
    }
    return;
  }
  byte.read_epoch = 0;
  byte.write_epoch = epoch_;
  byte.write_clock = clock_of(now.thread, lane);
  byte.write_pc = now.pc;
  byte.writer = static_cast<uint16_t>(now.thread);
  byte.atomic = kind == Access::kAtomic;
}

void Block::access(unsigned thread, const void* address, size_t bytes, Access kind, const void* pc) {
  const Region* const hit = region(address);
  if (hit == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - hit->memory);
  const char* const action = kind == Access::kRead ? "reads" : kind == Access::kWrite ? "writes" : "changes atomically";
  const AccessRecord now{thread, action, pc_offset(pc)};
  for (size_t i = offset; i < std::min(offset + bytes, hit->bytes); ++i) {
    check(*hit, hit->shadow[i], now, bytes, kind);
    record_access(hit->shadow[i], now, kind);
  }
}

void Block::copy_begins(unsigned thread, const void* shared, size_t bytes, const void* pc) {
  access(thread, shared, bytes, Access::kWrite, pc);
  const Region* const hit = region(shared);
  if (hit == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - hit->memory);
  for (size_t i = offset; i < std::min(offset + bytes, hit->bytes); ++i) hit->shadow[i].copying_block = id_;
}

void Block::copy_ends(unsigned thread, const void* shared, size_t bytes) {
  const Region* const hit = region(shared);
  if (hit == nullptr) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - hit->memory);
  for (size_t i = offset; i < std::min(offset + bytes, hit->bytes); ++i) {
    ShadowByte& byte = hit->shadow[i];
    byte.copying_block = 0;
    record_access(byte, {thread, "", byte.write_pc}, Access::kWrite);
  }
}

void Block::report(const Region& region, const ShadowByte& byte, const AccessRecord& now, size_t bytes,
                   const AccessRecord& before) const {
  const std::string at = std::to_string(&byte - region.shadow) + " of " + region.name;
  const bool warp = before.thread / 32 == now.thread / 32;
  std::string message = std::string("a race: this thread ") + now.action + " " + std::to_string(bytes) +
                        " bytes, with byte " + at + source_lines(now.pc) + "\n  thread " +
                        text_of_thread(before.thread) + " " + before.action + source_lines(before.pc) +
                        "\n  and no __syncthreads" + (warp ? " or __syncwarp of both" : "") + " lies between";
  current_block = nullptr;
  fail(message);
}

void enter(Block* block, unsigned thread) {
  current_block = block;
  current_thread = thread;
}

namespace {

inline void note_access(const void* address, size_t bytes, Access kind, const void* pc) {
  if (current_block != nullptr) current_block->access(current_thread, address, bytes, kind, pc);
}

}  // namespace
}  // namespace races
}  // namespace cuda_emulator

// Compiled code calls these before an access.
#define CUDA_EMULATOR_TSAN_HOOK(name, kind, bytes)                                        \
  extern "C" void name(void* address) {                                                   \
    cuda_emulator::races::note_access(address, bytes, cuda_emulator::races::Access::kind, \
                                      __builtin_return_address(0));                       \
  }
#define CUDA_EMULATOR_TSAN_HOOKS(bytes)                               \
  CUDA_EMULATOR_TSAN_HOOK(__tsan_read##bytes, kRead, bytes)           \
  CUDA_EMULATOR_TSAN_HOOK(__tsan_write##bytes, kWrite, bytes)         \
  CUDA_EMULATOR_TSAN_HOOK(__tsan_unaligned_read##bytes, kRead, bytes) \
  CUDA_EMULATOR_TSAN_HOOK(__tsan_unaligned_write##bytes, kWrite, bytes)
CUDA_EMULATOR_TSAN_HOOKS(1)
CUDA_EMULATOR_TSAN_HOOKS(2)
CUDA_EMULATOR_TSAN_HOOKS(4)
CUDA_EMULATOR_TSAN_HOOKS(8)
CUDA_EMULATOR_TSAN_HOOKS(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  cuda_emulator::races::note_access(address, bytes, cuda_emulator::races::Access::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  cuda_emulator::races::note_access(address, bytes, cuda_emulator::races::Access::kWrite, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
