// What the quantisers of all formats share. For *_isa.cpp files.
#pragma once
#include "quantize.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

// `count` elements as float32: the input itself, or a widened copy in `buffer`.
LT_INLINE const float* widened(const void* weight, int type, std::int64_t offset, int count, float* buffer) {
  if (type == kF32) return static_cast<const float*>(weight) + offset;
  const auto* bits = static_cast<const std::uint16_t*>(weight) + offset;
  int i = 0;
  if (type == kBF16) {
    for (; i + VL <= count; i += VL) store(buffer + i, load_bf16(bits + i));
  } else {
    for (; i + VL <= count; i += VL) store(buffer + i, load_f16(bits + i));
  }
  for (; i < count; ++i) {
    const std::uint32_t wide = std::uint32_t(bits[i]) << 16;
    if (type == kBF16)
      std::memcpy(buffer + i, &wide, sizeof wide);
    else
      buffer[i] = f16(bits[i]);
  }
  return buffer;
}

LT_INLINE bool all_finite(const float* x, int count) {
  float total = 0;  // 0 x is NaN exactly where x is not finite
  vf totals = zero();
  int i = 0;
  for (; i + VL <= count; i += VL) totals = totals + load(x + i) * zero();
  for (; i < count; ++i) total += x[i] * 0.0f;
  return total + sum(totals) == 0.0f;
}

LT_INLINE float absolute(float x) { return __builtin_fabsf(x); }

LT_INLINE float bounded(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

// To the nearest whole number, halves to even; |x| < 2^22.
LT_INLINE float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

// 1 / x, and 0 where that is not finite.
LT_INLINE float reciprocal(float x) {
  const float inverse = 1.0f / x;
  return absolute(inverse) <= 3.402823466e38f ? inverse : 0.0f;
}

// The float16 nearest to x, halves to even; Inf beyond 65504.
LT_INLINE std::uint16_t half_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the half's 2^-24 as the last place
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return std::uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return std::uint16_t(sign | ((bits - 0x38000000u) >> 13));
}

LT_INLINE void put_half(std::uint8_t* out, float x) {
  const std::uint16_t bits = half_bits(x);
  std::memcpy(out, &bits, sizeof bits);
}

template <void (*quantize)(const float*, std::uint8_t*), int elements, int bytes, int scale_at>
void each_block(const void* weight, int type, std::int64_t blocks, std::uint8_t* out) {
  float buffer[elements];
  for (std::int64_t block = 0; block < blocks; ++block, out += bytes) {
    const float* x = widened(weight, type, block * elements, elements, buffer);
    if (all_finite(x, elements)) {
      quantize(x, out);
      continue;
    }
    float zeros[elements] = {};
    quantize(zeros, out);
    put_half(out + scale_at, NAN);
  }
}

}  // namespace LT_NAMESPACE
}  // namespace lt
