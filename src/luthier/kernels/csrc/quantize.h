// Quantisers: NF4 as bitsandbytes stores it, and GGUF blocks as llama.cpp reads them.
#pragma once
#include <cstdint>

namespace lt {

enum FloatType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

struct QuantizeTable {
  // `count` elements, whole blocks of 64 but perhaps for the last. A block that is not finite gets absmax NaN.
  void (*nf4)(const void* weight, int type, std::int64_t count, std::uint8_t* codes, float* absmax);
  // `blocks` blocks of 32 elements into their bytes. A block that is not finite gets scale NaN and zeros.
  void (*q4_0)(const void* weight, int type, std::int64_t blocks, std::uint8_t* out);
  void (*q4_1)(const void* weight, int type, std::int64_t blocks, std::uint8_t* out);
  void (*q8_0)(const void* weight, int type, std::int64_t blocks, std::uint8_t* out);
};

// The same for super-blocks of 256, whose scales are searched.
struct KQuantsTable {
  void (*q4_k)(const void* weight, int type, std::int64_t blocks, std::uint8_t* out);
  void (*q6_k)(const void* weight, int type, std::int64_t blocks, std::uint8_t* out);
};

}  // namespace lt
