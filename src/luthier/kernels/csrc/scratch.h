// Buffers that are kept between calls. Not for *_isa.cpp files, which get pointers.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#include "luthier.h"

namespace lt {

// One 64-byte aligned buffer for each thread and Tag. It grows to the largest request and stays until the thread ends.
template <class Tag>
class Scratch {
 public:
  template <class T>
  static T* get(std::size_t count) {
    static thread_local Buffer buffer;
    return static_cast<T*>(buffer.reserve(count * sizeof(T)));
  }

 private:
  struct Buffer {
    void* data = nullptr;
    std::size_t size = 0;
    ~Buffer() { std::free(data); }
    void* reserve(std::size_t bytes) {
      if (bytes <= size) return data;
      std::free(data);
      size = 0;
      const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, rounded);
      if (data == nullptr) throw std::bad_alloc();
      size = rounded;
      return data;
    }
  };
};

}  // namespace lt
