// What the machine can do: multiply-adds in registers, and bytes read from memory.
#pragma once
#include <cstdint>

namespace lt {

struct ProbeTable {
  // Runs `steps` rounds of independent multiply-adds; returns the flops done and keeps the sum observable through `sink`.
  double (*fma)(std::int64_t steps, float* sink);
  // Reads count floats.
  void (*read)(const float* data, std::int64_t count, float* sink);
};

}  // namespace lt
