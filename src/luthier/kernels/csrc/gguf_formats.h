// The block formats of GGUF, laid out as in llama.cpp's ggml-common.h; formats.h says what a format consists of.
#pragma once
#include "linear.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

constexpr int kBlock = 32;

// Reads a little-endian half from any address.
LT_INLINE float half_at(const std::uint8_t* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return f16(bits);
}

// Rows of blocks, kWeights weights in kBytes bytes. A unit is one block.
template <int kWeights, int kBytes>
struct Gguf {
  static constexpr int kUnit = kWeights, kBlockBytes = kBytes * 32 / kWeights;
  static constexpr bool kShifted = true;
  const std::uint8_t* data;
  std::int64_t row_bytes;
  explicit Gguf(const lt_matrix& m) : data(static_cast<const std::uint8_t*>(m.data)), row_bytes(m.cols / kWeights * kBytes) {}
  LT_INLINE_MEMBER const void* where(std::int64_t row, std::int64_t col) const { return place(row, col); }
  void some(std::int64_t, std::int64_t, std::int64_t, float*) const {}  // rows are whole blocks: never asked for
  LT_INLINE_MEMBER const std::uint8_t* place(std::int64_t row, std::int64_t col) const {
    return data + row * row_bytes + col / kWeights * kBytes;
  }
};

// 16 bytes, low nibbles first: vectors of integers 0..15, to emit(vi, i).
template <class Emit>
LT_INLINE void halves_of_bytes(const std::uint8_t* p, Emit&& emit) {
  const vi low = iset1(15);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += VL) {
    const vi bytes = widen_u8(p + i);
    emit(iand(bytes, low), i);
    emit(shr<4>(bytes), i + 16);
  }
}

// 16 where bit `first + lane` of `bits` is set, else 0.
LT_INLINE vi fifth_bits(std::uint32_t bits, int first) {
  return iand(shl<4>(shr_lanes(iset1(int(bits >> first)))), iset1(16));
}

// 16 bytes of nibbles at `low`, 4 of fifth bits at `high`: integers 0..31 as floats.
template <class Emit>
LT_INLINE void five_bits(const std::uint8_t* high, const std::uint8_t* low, Emit&& emit) {
  std::uint32_t bits;
  std::memcpy(&bits, high, sizeof bits);
  halves_of_bytes(low, [&](vi q, int i) { emit(to_float(ior(q, fifth_bits(bits, i))), i); });
}

struct Q4_0 : Gguf<32, 18> {  // d, 16 bytes: d (q - 8)
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    scale[0] = half_at(p);
    shift[0] = -8 * scale[0];
  }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int, Emit&& emit) const {
    halves_of_bytes(p + 2, [&](vi q, int i) { emit(to_float(q), i); });
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const vf d = set1(half_at(p)), eight = set1(8.0f);
    codes(p, 0, [&](vf q, int i) { emit((q - eight) * d, i); });
  }
};

struct Q4_1 : Gguf<32, 20> {  // d, m, 16 bytes: d q + m
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    scale[0] = half_at(p);
    shift[0] = half_at(p + 2);
  }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int, Emit&& emit) const {
    halves_of_bytes(p + 4, [&](vi q, int i) { emit(to_float(q), i); });
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const vf d = set1(half_at(p)), least = set1(half_at(p + 2));
    codes(p, 0, [&](vf q, int i) { emit(q * d + least, i); });
  }
};

struct Q5_0 : Gguf<32, 22> {  // d, 4 bytes of fifth bits, 16 bytes: d (q - 16)
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    scale[0] = half_at(p);
    shift[0] = -16 * scale[0];
  }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int, Emit&& emit) const {
    five_bits(p + 2, p + 6, emit);
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const vf d = set1(half_at(p)), sixteen = set1(16.0f);
    codes(p, 0, [&](vf q, int i) { emit((q - sixteen) * d, i); });
  }
};

struct Q5_1 : Gguf<32, 24> {  // d, m, 4 bytes of fifth bits, 16 bytes: d q + m
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    scale[0] = half_at(p);
    shift[0] = half_at(p + 2);
  }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int, Emit&& emit) const {
    five_bits(p + 4, p + 8, emit);
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const vf d = set1(half_at(p)), least = set1(half_at(p + 2));
    codes(p, 0, [&](vf q, int i) { emit(q * d + least, i); });
  }
};

struct Q8_0 : Gguf<32, 34> {  // d, 32 signed bytes: d q
  using Gguf::Gguf;
  static constexpr bool kShifted = false;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float*) const { scale[0] = half_at(p); }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int, Emit&& emit) const {
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(to_float(widen_i8(p + 2 + i)), i);
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const vf d = set1(half_at(p));
    codes(p, 0, [&](vf q, int i) { emit(q * d, i); });
  }
};

// The 8 six-bit scales of a superblock, then its 8 minima, one byte each, as floats.
LT_INLINE void scales_and_minima(const std::uint8_t* packed, float* out) {
  std::uint32_t a, b, c, bytes[4];
  std::memcpy(&a, packed, sizeof a);
  std::memcpy(&b, packed + 4, sizeof b);
  std::memcpy(&c, packed + 8, sizeof c);
  bytes[0] = a & 0x3f3f3f3f;
  bytes[1] = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
  bytes[2] = b & 0x3f3f3f3f;
  bytes[3] = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += VL) store(out + i, to_float(widen_u8(reinterpret_cast<const std::uint8_t*>(bytes) + i)));
}

// Those of one group (0..7) of 32 weights.
LT_INLINE void scale_and_minimum(const std::uint8_t* packed, int group, float& scale, float& minimum) {
  if (group < 4) {
    scale = float(packed[group] & 63);
    minimum = float(packed[group + 4] & 63);
  } else {
    scale = float((packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4));
    minimum = float((packed[group + 4] >> 4) | ((packed[group] >> 6) << 4));
  }
}

struct Q4_K : Gguf<256, 144> {  // d, dmin, 12 bytes of scales, 128 bytes: d scale q - dmin minimum
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    float both[16];
    scales_and_minima(p + 4, both);
    const float d = half_at(p), least = -half_at(p + 2);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) scale[g] = d * (g % 2 ? 0.0625f : 1.0f) * both[g];
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) shift[g] = least * both[8 + g];
  }
  // Odd groups are the high nibbles: masked in place, and divided by 16, exactly, in the scale.
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int group, Emit&& emit) const {
    const vi mask = iset1(group % 2 ? 0xf0 : 0x0f);
    const std::uint8_t* q = p + 16 + group / 2 * 32;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(to_float(iand(widen_u8(q + i), mask)), i);
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const int group = int(col % 256 / 32);
    float scale, minimum;
    scale_and_minimum(p + 4, group, scale, minimum);
    const vf d = set1(half_at(p) * scale * (group % 2 ? 0.0625f : 1.0f)), least = set1(half_at(p + 2) * minimum);
    codes(p, group, [&](vf q, int i) { emit(q * d - least, i); });
  }
};

struct Q5_K : Gguf<256, 176> {  // d, dmin, 12 bytes of scales, 32 of fifth bits, 128 bytes: d scale q - dmin minimum
  using Gguf::Gguf;
  LT_INLINE_MEMBER void scales(const std::uint8_t* p, float* scale, float* shift) const {
    float both[16];
    scales_and_minima(p + 4, both);
    const float d = half_at(p), least = -half_at(p + 2);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) scale[g] = d * both[g];
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) shift[g] = least * both[8 + g];
  }
  template <class Emit>
  LT_INLINE_MEMBER void codes(const std::uint8_t* p, int group, Emit&& emit) const {
    const std::uint8_t *high = p + 16, *q = p + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) {
      const vi low = iand(shr_by(widen_u8(q + i), shift), iset1(15));
      const vi fifth = iand(shr_by(shl<4>(widen_u8(high + i)), group), iset1(16));
      emit(to_float(ior(low, fifth)), i);
    }
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const int group = int(col % 256 / 32);
    float scale, minimum;
    scale_and_minimum(p + 4, group, scale, minimum);
    const vf d = set1(half_at(p) * scale), least = set1(half_at(p + 2) * minimum);
    codes(p, group, [&](vf q, int i) { emit(q * d - least, i); });
  }
};

// 128 bytes of low nibbles, 64 of two high bits, 16 signed scales of 16 weights, d: d scale (q - 32)
struct Q6_K : Gguf<256, 210> {
  using Gguf::Gguf;
  static constexpr int kUnit = 0;  // a scale covers 16 weights only
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = place(row, col);
    const int group = int(col % 256 / 32), half = group / 4, quarter = group % 4;
    const std::uint8_t *low = p + 64 * half + 32 * (quarter % 2), *high = p + 128 + 32 * half;
    const auto* scales = reinterpret_cast<const std::int8_t*>(p + 192) + 8 * half + 2 * quarter;
    const float d = half_at(p + 208);
    const vf d0 = set1(d * float(scales[0])), d1 = set1(d * float(scales[1])), middle = set1(32.0f);
    const int shift = quarter / 2 * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) {
      const vi nibble = iand(shr_by(widen_u8(low + i), shift), iset1(15));
      const vi top = iand(shl<4>(shr_by(widen_u8(high + i), 2 * quarter)), iset1(48));
      emit((to_float(ior(nibble, top)) - middle) * (i < 16 ? d0 : d1), i);
    }
  }
};

}  // namespace LT_NAMESPACE
}  // namespace lt
