// Buffers of one thread, laid out in one block.
#pragma once

#include <cstddef>

namespace titans {

// Hands out aligned pieces of one block; without a block it only counts.
class Arena {
 public:
  explicit Arena(void* block = nullptr) : block_(static_cast<char*>(block)) {}
  template <class T>
  T* take(std::ptrdiff_t count) {
    char* at = block_ + used_;
    used_ += (count * std::ptrdiff_t(sizeof(T)) + 63) / 64 * 64;
    return block_ ? reinterpret_cast<T*>(at) : nullptr;
  }
  std::ptrdiff_t used() const { return used_; }

 private:
  char* block_;
  std::ptrdiff_t used_ = 0;
};

}  // namespace titans
