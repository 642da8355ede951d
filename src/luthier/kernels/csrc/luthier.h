// The C ABI: status codes and what every family of kernels shares. Entries never throw.
#pragma once
#include <cstdint>
#include <new>

#define LT_API extern "C" __attribute__((visibility("default")))

enum lt_status : int {
  LT_OK = 0,
  LT_BAD_ARGUMENT = 1,  // a size or pointer that the binding should have refused
  LT_NO_MEMORY = 2,
  LT_FAILED = 3,        // an exception of another kind than want of memory
};

// LT_GUARD({ body }) as the last statement of an entry: no exception leaves it.
#define LT_GUARD(...)               \
  try {                             \
    __VA_ARGS__                     \
    return LT_OK;                   \
  } catch (const std::bad_alloc&) { \
    return LT_NO_MEMORY;            \
  } catch (...) {                   \
    return LT_FAILED;               \
  }

// Whether one of these pointers is null.
template <class... P>
bool lt_missing(const P*... pointers) {
  return (... || (pointers == nullptr));
}

// Raised whenever an entry's signature changes; the loader refuses another number.
constexpr int kAbiVersion = 7;

LT_API int lt_abi_version();
// 0 portable, 1 avx2, 2 avx512, 3 neon; -1 when LUTHIER_ISA cannot be obeyed.
LT_API int lt_isa();
// What runs parallel work: 0 own threads, 1 the OpenMP runtime that the process had loaded already.
LT_API int lt_thread_backend();
