// The pretended card's memory: the host's, counted in blocks as CUDA's allocator rounds them, and able to run out.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>

namespace pretended {

inline const c10::Device CARD(c10::DeviceType::CUDA, 0);
constexpr int64_t BLOCK_BYTES = 512;

class Memory final : public c10::Allocator {
 public:
  // Never destroyed: tensors that outlive main() are still given back to it.
  static Memory& get() {
    static Memory& memory = *new Memory();
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, CARD};
    const int64_t size = (int64_t(bytes) + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES;
    fail_where_asked_to();
    const int64_t room = std::min(limit.load(), cap.load());
    if (allocated + size > room) {
      ++failures;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes; ", allocated.load(),
          " of ", room, " are allocated (a pretended card)");
    }
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, BLOCK_BYTES, size) == 0, "the host's memory is full");
    allocated += size;
    if (allocated > peak) peak = allocated.load();
    return {pointer, new Block{pointer, size}, &give_back, CARD};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // The allocation that is so many further on fails, once: as memory that ran out, or as a library says it.
  void fail_after(int64_t allocations, std::string message) {
    message_ = std::move(message);
    left_ = allocations;
  }

  std::atomic<int64_t> allocated{0};
  std::atomic<int64_t> peak{0};
  std::atomic<int64_t> limit{int64_t(1) << 60};  // what there is
  std::atomic<int64_t> cap{int64_t(1) << 60};    // what this process may have of it
  std::atomic<int64_t> workspace{0};             // that a convolution takes while it runs
  std::atomic<int64_t> failures{0};
  std::atomic<int64_t> allocations{0};

 private:
  struct Block {
    void* pointer;
    int64_t bytes;
  };

  static void give_back(void* context) {
    if (context == nullptr) return;
    auto* block = static_cast<Block*>(context);
    get().allocated -= block->bytes;
    std::free(block->pointer);
    delete block;
  }

  void fail_where_asked_to() {
    ++allocations;
    if (left_ == 0 || --left_ > 0) return;
    ++failures;
    TORCH_CHECK_WITH(OutOfMemoryError, !message_.empty(), "CUDA out of memory (asked for, on a pretended card)");
    TORCH_CHECK(false, message_);
  }

  std::atomic<int64_t> left_{0};
  std::string message_;
};

// Host memory that copies to and from the card need not wait for.
class PinnedMemory final : public c10::Allocator {
 public:
  static PinnedMemory& get() {
    static PinnedMemory& memory = *new PinnedMemory();
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, BLOCK_BYTES, bytes ? bytes : 1) == 0, "the host's memory is full");
    std::lock_guard<std::mutex> lock(mutex_);
    pointers_.insert(pointer);
    return {pointer, pointer, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Whether this is where a pinned tensor begins.
  bool holds(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return pointers_.count(pointer) > 0;
  }

 private:
  static void give_back(void* pointer) {
    std::lock_guard<std::mutex> lock(get().mutex_);
    get().pointers_.erase(pointer);
    std::free(pointer);
  }

  std::mutex mutex_;
  std::unordered_set<const void*> pointers_;
};

}  // namespace pretended
