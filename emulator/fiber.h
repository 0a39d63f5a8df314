// Fibers: stacks that pass control to each other, registered with the address sanitizer.
//
// A switch saves six registers and the floating-point modes on x86-64, a few ns; elsewhere (or with
// CUDA_EMULATOR_UCONTEXT) swapcontext also gets the signal mask, some hundred ns.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
#define CUDA_EMULATOR_UCONTEXT
#endif

#ifdef CUDA_EMULATOR_UCONTEXT
#include <ucontext.h>
#else
extern "C" void cuda_emulator_switch(void** save_here, void* resume);
asm(R"(
.text
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");
#endif

namespace cuda_emulator {

class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Above an unmapped page: overflow faults.
  void allocate(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory =
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
      throw std::runtime_error("no stack for a fiber");
    bottom_ = static_cast<char*>(memory) + page;
    size_ = bytes;
  }

  // The next switch here starts `entry`, which must not return.
  void begin(void (*entry)()) {
#ifdef CUDA_EMULATOR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    uint64_t* top = reinterpret_cast<uint64_t*>(bottom_ + size_) - 1;
    *top = 0;  // return address: aligns the stack as after a call
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    *--top = 0x0000037f00001f80u;  // default control words: x87, SSE
    pointer_ = top;
#endif
  }

  // `last`: nothing switches back.
  __attribute__((no_sanitize_address)) void switch_to(Context& next, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    next.previous_ = this;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.bottom_, next.size_);
#else
    (void)last;
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    cuda_emulator_switch(&pointer_, next.pointer_);
#endif
    finish_switch();
  }

  // `entry` calls this first.
  __attribute__((no_sanitize_address)) void finish_switch() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (previous_->bottom_ == nullptr) {  // the process's own stack
      previous_->bottom_ = static_cast<char*>(const_cast<void*>(bottom));
      previous_->size_ = size;
    }
    fake_stack_ = nullptr;
#endif
  }

 private:
  char* bottom_ = nullptr;
  size_t size_ = 0;
#ifdef CUDA_EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* pointer_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  Context* previous_ = nullptr;
#endif
};

}  // namespace cuda_emulator
