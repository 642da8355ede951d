// How each kind of storage becomes float32: one small struct a format. `block(row, col, emit)` decodes the 32 weights
// of a row from a column that is a multiple of 32, and calls emit(v, i) with the vectors of weights col + i ... in rising
// order. `where(row, col)` is the address it reads from. `some(row, col, count, out)` decodes any stretch, one by one where blocks do not fit; only dense and NF4
// matrices have rows that are no multiple of 32.
#pragma once
#include "linear.h"
#include "nibbles.h"
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

struct DenseF32 {
  const float* data;
  std::int64_t stride;
  explicit DenseF32(const lt_matrix& m) : data(static_cast<const float*>(m.data)), stride(m.transposed ? m.rows : m.cols) {}
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const float* p = data + row * stride + col;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(load(p + i), i);
  }
  LT_INLINE_MEMBER const void* where(std::int64_t row, std::int64_t col) const { return data + row * stride + col; }
  void some(std::int64_t row, std::int64_t col, std::int64_t count, float* out) const {
    std::memcpy(out, data + row * stride + col, sizeof(float) * std::size_t(count));
  }
};

template <bool kBrain>
struct Dense16 {
  const std::uint16_t* data;
  std::int64_t stride;
  explicit Dense16(const lt_matrix& m) : data(static_cast<const std::uint16_t*>(m.data)), stride(m.transposed ? m.rows : m.cols) {}
  LT_INLINE_MEMBER const void* where(std::int64_t row, std::int64_t col) const { return data + row * stride + col; }
  LT_INLINE_MEMBER vf widen(const std::uint16_t* p) const { return kBrain ? load_bf16(p) : load_f16(p); }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint16_t* p = data + row * stride + col;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(widen(p + i), i);
  }
  void some(std::int64_t row, std::int64_t col, std::int64_t count, float* out) const {
    const std::uint16_t* p = data + row * stride + col;
    std::int64_t i = 0;
    for (; i + VL <= count; i += VL) store(out + i, widen(p + i));
    std::uint16_t rest[VL] = {};
    for (std::int64_t j = i; j < count; ++j) rest[j - i] = p[j];
    if (i < count) store_n(out + i, widen(rest), int(count - i));
  }
};

struct Nf4 {
  const lt_matrix& m;
  const std::uint8_t* data;
  NibbleTable table;
  explicit Nf4(const lt_matrix& matrix) : m(matrix), data(static_cast<const std::uint8_t*>(matrix.data)), table(matrix.code) {}
  LT_INLINE_MEMBER const void* where(std::int64_t row, std::int64_t col) const { return data + (row * m.cols + col) / 2; }
  LT_INLINE_MEMBER float scale(std::int64_t flat) const {
    const std::int64_t i = flat / 64;
    return m.absmax != nullptr ? m.absmax[i] : m.nested_map[m.absmax_bytes[i]] * m.nested_absmax[i / 256] + m.offset;
  }
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::int64_t flat = row * m.cols + col;
    if (flat % 32 != 0) return crooked(flat, emit);
    const vf s = set1(scale(flat));
    table.look_up(data + flat / 2, [&](vf v, int i) { emit(v * s, i); });
  }
  // Rows that do not begin at a multiple of 32: the weights one by one.
  template <class Emit>
  void crooked(std::int64_t flat, Emit&& emit) const {
    float out[kBlock];
    one_by_one(flat, kBlock, out);
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(load(out + i), i);
  }
  void one_by_one(std::int64_t flat, std::int64_t count, float* out) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = flat + i;
      const int nibble = at % 2 == 0 ? data[at / 2] >> 4 : data[at / 2] & 15;
      out[i] = m.code[nibble] * scale(at);
    }
  }
  void some(std::int64_t row, std::int64_t col, std::int64_t count, float* out) const { one_by_one(row * m.cols + col, count, out); }
};

// GGUF: rows of blocks, kWeights weights in kBytes bytes.
template <int kWeights, int kBytes>
struct Gguf {
  const std::uint8_t* data;
  std::int64_t row_bytes;
  explicit Gguf(const lt_matrix& m) : data(static_cast<const std::uint8_t*>(m.data)), row_bytes(m.cols / kWeights * kBytes) {}
  LT_INLINE_MEMBER const void* where(std::int64_t row, std::int64_t col) const { return at(row, col); }
  void some(std::int64_t, std::int64_t, std::int64_t, float*) const {}  // rows are whole blocks: never asked for
  LT_INLINE_MEMBER const std::uint8_t* at(std::int64_t row, std::int64_t col) const {
    return data + row * row_bytes + col / kWeights * kBytes;
  }
};

// 16 bytes, low nibbles first: vectors of integers 0..15 in order, to emit(vi, i).
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

struct Q4_0 : Gguf<32, 18> {  // d, 16 bytes: d (q - 8)
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const vf d = set1(half_at(p)), eight = set1(8.0f);
    halves_of_bytes(p + 2, [&](vi q, int i) { emit((to_float(q) - eight) * d, i); });
  }
};

struct Q4_1 : Gguf<32, 20> {  // d, m, 16 bytes: d q + m
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const vf d = set1(half_at(p)), least = set1(half_at(p + 2));
    halves_of_bytes(p + 4, [&](vi q, int i) { emit(to_float(q) * d + least, i); });
  }
};

struct Q5_0 : Gguf<32, 22> {  // d, 4 bytes of fifth bits, 16 bytes: d (q - 16)
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const vf d = set1(half_at(p)), sixteen = set1(16.0f);
    std::uint32_t high;
    std::memcpy(&high, p + 2, sizeof high);
    halves_of_bytes(p + 6, [&](vi q, int i) { emit((to_float(ior(q, fifth_bits(high, i))) - sixteen) * d, i); });
  }
};

struct Q5_1 : Gguf<32, 24> {  // d, m, 4 bytes of fifth bits, 16 bytes: d q + m
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const vf d = set1(half_at(p)), least = set1(half_at(p + 2));
    std::uint32_t high;
    std::memcpy(&high, p + 4, sizeof high);
    halves_of_bytes(p + 8, [&](vi q, int i) { emit(to_float(ior(q, fifth_bits(high, i))) * d + least, i); });
  }
};

struct Q8_0 : Gguf<32, 34> {  // d, 32 signed bytes: d q
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const vf d = set1(half_at(p));
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(to_float(widen_i8(p + 2 + i)) * d, i);
  }
};

// The six-bit scale and minimum of the 32 weights `group` (0..7) of a superblock of 256.
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
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const int group = int(col % 256 / 32);
    float scale, minimum;
    scale_and_minimum(p + 4, group, scale, minimum);
    // Odd groups are the high nibbles: masked in place, and divided by 16, exactly, in the scale.
    const vf d = set1(half_at(p) * scale * (group % 2 ? 0.0625f : 1.0f)), least = set1(half_at(p + 2) * minimum);
    const vi mask = iset1(group % 2 ? 0xf0 : 0x0f);
    const std::uint8_t* q = p + 16 + group / 2 * 32;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) emit(to_float(iand(widen_u8(q + i), mask)) * d - least, i);
  }
};

struct Q5_K : Gguf<256, 176> {  // d, dmin, 12 bytes of scales, 32 of fifth bits, 128 bytes: d scale q - dmin minimum
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
    const int group = int(col % 256 / 32);
    float scale, minimum;
    scale_and_minimum(p + 4, group, scale, minimum);
    const vf d = set1(half_at(p) * scale), least = set1(half_at(p + 2) * minimum);
    const std::uint8_t *high = p + 16, *q = p + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) {
      const vi low = iand(shr_by(widen_u8(q + i), shift), iset1(15));
      const vi fifth = iand(shr_by(shl<4>(widen_u8(high + i)), group), iset1(16));
      emit(to_float(ior(low, fifth)) * d - least, i);
    }
  }
};

struct Q6_K : Gguf<256, 210> {  // 128 bytes of low nibbles, 64 of two high bits, 16 signed scales of 16 weights, d: d scale (q - 32)
  using Gguf::Gguf;
  template <class Emit>
  LT_INLINE_MEMBER void block(std::int64_t row, std::int64_t col, Emit&& emit) const {
    const std::uint8_t* p = at(row, col);
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

// Calls fn(format) with the format of the matrix's kind.
template <class Fn>
LT_INLINE void with_format(const lt_matrix& m, Fn&& fn) {
  switch (m.kind) {
    case LT_F32: return fn(DenseF32(m));
    case LT_BF16: return fn(Dense16<true>(m));
    case LT_F16: return fn(Dense16<false>(m));
    case LT_NF4: return fn(Nf4(m));
    case LT_Q4_0: return fn(Q4_0(m));
    case LT_Q4_1: return fn(Q4_1(m));
    case LT_Q5_0: return fn(Q5_0(m));
    case LT_Q5_1: return fn(Q5_1(m));
    case LT_Q8_0: return fn(Q8_0(m));
    case LT_Q4_K: return fn(Q4_K(m));
    case LT_Q5_K: return fn(Q5_K(m));
    case LT_Q6_K: return fn(Q6_K(m));
    default: return;
  }
}

}  // namespace LT_NAMESPACE
}  // namespace lt
