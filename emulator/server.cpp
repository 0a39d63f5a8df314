// Calls this program's functions by name for client.py: requests on standard input, replies on standard output, in
// native 64-bit words.
//
// Each tensor gets memory of its exact extent; gaps between its elements are 0xFF and checked after the call. Above
// 256 MiB of extent it is an untouched mapping, whose gaps are not checked.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda_emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr int64_t kSparseBytes = int64_t{1} << 28;
constexpr int kDimensions = 4;

int reply_pipe = -1;

void receive(void* data, size_t bytes) {
  if (bytes != 0 && fread(data, 1, bytes, stdin) != bytes) _exit(0);  // the client has ended
}
int64_t receive_word() {
  int64_t word;
  receive(&word, sizeof(word));
  return word;
}
std::string receive_text() {
  std::string text(static_cast<size_t>(receive_word()), '\0');
  receive(&text[0], text.size());
  return text;
}
void reply(const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes != 0) {
    const ssize_t written = write(reply_pipe, from, bytes);
    if (written <= 0) _exit(0);
    from += written;
    bytes -= static_cast<size_t>(written);
  }
}
void reply_word(int64_t word) { reply(&word, sizeof(word)); }
void reply_text(const std::string& text) {
  reply_word(static_cast<int64_t>(text.size()));
  reply(text.data(), text.size());
}

class Tensor {
 public:
  void receive_tensor() {
    item_ = receive_word();
    const int64_t residue = receive_word();  // modulo 256: alignment selects code paths
    for (int64_t& size : size_) size = receive_word();
    for (int64_t& stride : stride_) stride = receive_word();
    int64_t low = 0, high = 0;
    elements_ = 1;
    for (int i = 0; i < kDimensions; ++i) {
      elements_ *= size_[i];
      (stride_[i] < 0 ? low : high) += (size_[i] - 1) * stride_[i];
    }
    bytes_ = elements_ == 0 ? 0 : (high - low + 1) * item_;
    if (elements_ == 0) low = 0;
    lead_ = ((residue + low * item_) % 256 + 256) % 256;
    allocate();
    data_ = base_ + lead_ - low * item_;
    initial_.resize(static_cast<size_t>(elements_ * item_));
    receive(initial_.data(), initial_.size());
    for_each_element([this](int64_t at, char* element) { memcpy(element, &initial_[at], item_); });
  }

  // Whether it changed, then its elements.
  void reply_tensor() {
    std::vector<char> now(initial_.size());
    for_each_element([this, &now](int64_t at, const char* element) { memcpy(&now[at], element, item_); });
    const bool changed = memcmp(now.data(), initial_.data(), now.size()) != 0;
    reply_word(changed);
    if (changed) reply(now.data(), now.size());
  }

  bool gaps_overwritten() {
    if (sparse_) return false;
    for_each_element([this](int64_t, char* element) { memset(element, 0xFF, item_); });
    const char* start = base_ + lead_;
    return std::any_of(start, start + bytes_, [](char byte) { return byte != '\xff'; });
  }

  void release() {
    if (sparse_) {
      munmap(base_, static_cast<size_t>(lead_ + bytes_));
    } else {
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(base_, lead_);
#endif
      free(base_);
    }
  }

  char* data() const { return data_; }

 private:
  void allocate() {
    const size_t total = static_cast<size_t>(lead_ + bytes_);
    sparse_ = bytes_ > kSparseBytes;
    if (sparse_) {
      void* memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) cuda_emulator::fail("no address space for a sparse tensor");
      base_ = static_cast<char*>(memory);
      return;
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, total) != 0) cuda_emulator::fail("out of memory");
    base_ = static_cast<char*>(memory);
    memset(base_, 0xFF, total);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(base_, lead_);
#endif
  }

  // visit(packed offset, address), last index fastest.
  template <typename Visit>
  void for_each_element(Visit visit) {
    int64_t index[kDimensions] = {};
    for (int64_t at = 0; at < elements_; ++at) {
      int64_t offset = 0;
      for (int i = 0; i < kDimensions; ++i) offset += index[i] * stride_[i];
      visit(at * item_, data_ + offset * item_);
      for (int i = kDimensions - 1; i >= 0 && ++index[i] == size_[i]; --i) index[i] = 0;
    }
  }

  int64_t item_ = 0, elements_ = 0, bytes_ = 0, lead_ = 0;
  int64_t size_[kDimensions] = {}, stride_[kDimensions] = {};
  bool sparse_ = false;
  char* base_ = nullptr;
  char* data_ = nullptr;
  std::vector<char> initial_;
};

using Function = int64_t (*)(const int64_t*);
using IntFunction = int (*)(const int64_t*);

void serve_call() {
  const std::string name = receive_text();
  const bool returns_int = receive_word() != 0;
  cuda_emulator::settings.seed = static_cast<uint64_t>(receive_word());
  cuda_emulator::settings.multiprocessors = static_cast<int>(receive_word());
  cuda_emulator::settings.disabled_barrier = receive_text();
  std::vector<Tensor> tensors(static_cast<size_t>(receive_word()));
  for (Tensor& tensor : tensors) tensor.receive_tensor();
  std::vector<int64_t> words(static_cast<size_t>(receive_word()));
  for (int64_t& word : words) {
    const int64_t tensor = receive_word();
    word = receive_word();
    if (tensor >= 0) word = reinterpret_cast<int64_t>(tensors[static_cast<size_t>(tensor)].data());
  }

  void* function = dlsym(RTLD_DEFAULT, name.c_str());
  if (function == nullptr) cuda_emulator::fail("the program has no function " + name);
  cuda_emulator::record = {};
  const int64_t result = returns_int ? reinterpret_cast<IntFunction>(function)(words.data())
                                     : reinterpret_cast<Function>(function)(words.data());
  reply_word(result);
  reply_word(cuda_emulator::record.blocks);
  reply_word(cuda_emulator::record.switches);
  reply_word(static_cast<int64_t>(cuda_emulator::record.kernels.size()));
  for (const std::string& kernel : cuda_emulator::record.kernels) reply_text(kernel);
  reply_word(static_cast<int64_t>(cuda_emulator::record.barriers.size()));
  for (const cuda_emulator::SourceLocation& barrier : cuda_emulator::record.barriers) {
    reply_text(cuda_emulator::short_text(barrier));
  }
  for (Tensor& tensor : tensors) tensor.reply_tensor();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].gaps_overwritten())
      cuda_emulator::fail("memory between the elements of tensor " + std::to_string(i) + " was written");
    tensors[i].release();
  }
  reply_word(0);  // complete
}

}  // namespace

int main() {
  reply_pipe = dup(STDOUT_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);  // kernels must not write to replies
  for (;;) serve_call();
}
