// Guard pages around PyTorch's CPU tensors: an access outside one, or after its end of life, is a segmentation fault.
//
// Preloaded, it takes over PyTorch's allocations (posix_memalign with an alignment of 64 or more) while a mode is set.
// A block is [size][guard][data ...][guard], in pages; the data touch the later guard (mode 1) or the earlier (mode 2).
// Address space is never used twice, so that freed memory stays inaccessible.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { kPage = 4096 };
static const size_t kArena = (size_t)1 << 42, kLargest = (size_t)1 << 30;

static atomic_int mode;
static atomic_uintptr_t next_block;
static atomic_long guarded;
static uintptr_t arena;
static int (*real_posix_memalign)(void**, size_t, size_t);
static void (*real_free)(void*);

void guard_pages(int new_mode) { mode = new_mode; }
long guard_pages_count(void) { return guarded; }

__attribute__((constructor)) static void initialise(void) {
  real_posix_memalign = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  real_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  void* memory = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  arena = memory == MAP_FAILED ? 0 : (uintptr_t)memory;
  next_block = arena;
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  if (!mode || !arena || alignment < 64 || size == 0 || size > kLargest)
    return real_posix_memalign(out, alignment, size);
  size_t bytes = (size + kPage - 1) / kPage * kPage;
  uintptr_t block = atomic_fetch_add(&next_block, bytes + 3 * kPage);
  if (block + bytes + 3 * kPage > arena + kArena) return ENOMEM;
  uintptr_t data = block + 2 * kPage;
  if (mprotect((void*)block, kPage, PROT_READ | PROT_WRITE)) return ENOMEM;
  if (mprotect((void*)data, bytes, PROT_READ | PROT_WRITE)) return ENOMEM;
  *(size_t*)block = bytes;
  *out = (void*)(mode == 1 ? data + bytes - size : data);
  atomic_fetch_add(&guarded, 1);
  return 0;
}

void free(void* pointer) {
  uintptr_t address = (uintptr_t)pointer;
  if (!arena || address < arena || address >= arena + kArena) {
    if (real_free) real_free(pointer);
    return;
  }
  uintptr_t block = address / kPage * kPage - 2 * kPage;
  size_t bytes = *(size_t*)block + 2 * kPage;
  madvise((void*)block, bytes, MADV_DONTNEED);
  mprotect((void*)block, bytes, PROT_NONE);
}
