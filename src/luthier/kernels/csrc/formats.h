// How each kind of storage becomes float32: one small struct a format.
//
//   block(row, col, emit)  decodes the 32 weights of a row from a column that is a multiple of 32, and calls emit(v, i) with
//                          the vectors of weights col + i, ...
//   some(row, col, n, out) any stretch, one by one where blocks do not fit; only dense and NF4 rows are not whole blocks
//   where(row, col)        the address it reads from; kBlockBytes: how many bytes hold 32 weights
//
// Formats of kUnit > 0 also give what 32 weights have in common apart: w = scale q + shift, for rows of whole units.
//
//   place(row, col)               of a unit
//   scales(place, scale, shift)   of each 32 weights of the unit; no shift where kShifted is false
//   codes(place, group, emit)     the q of 32 weights, as floats
#pragma once
#include "gguf_formats.h"
#include "linear.h"
#include "nibbles.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

struct DenseF32 {
  static constexpr int kUnit = 0, kBlockBytes = 128;
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
  static constexpr int kUnit = 0, kBlockBytes = 64;
  const std::uint16_t* data;
  std::int64_t stride;
  explicit Dense16(const lt_matrix& m)
      : data(static_cast<const std::uint16_t*>(m.data)), stride(m.transposed ? m.rows : m.cols) {}
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
  static constexpr int kUnit = 64, kBlockBytes = 16;
  static constexpr bool kShifted = false;
  const lt_matrix& m;
  const std::uint8_t* data;
  NibbleTable table;
  explicit Nf4(const lt_matrix& matrix)
      : m(matrix), data(static_cast<const std::uint8_t*>(matrix.data)), table(matrix.code) {}
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
  LT_INLINE_MEMBER std::int64_t place(std::int64_t row, std::int64_t col) const { return row * m.cols + col; }
  LT_INLINE_MEMBER void scales(std::int64_t flat, float* scale_of, float*) const { scale_of[0] = scale_of[1] = scale(flat); }
  template <class Emit>
  LT_INLINE_MEMBER void codes(std::int64_t flat, int group, Emit&& emit) const {
    table.look_up(data + flat / 2 + 16 * group, emit);
  }
  // Rows that do not begin at a multiple of 32: from a whole byte on by the table, with at most two scales.
  template <class Emit>
  void crooked(std::int64_t flat, Emit&& emit) const {
    alignas(64) float out[kBlock];
    if (flat % 2 != 0) {
      any(flat, kBlock, out);
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; i += VL) emit(load(out + i), i);
      return;
    }
    const int left = 64 - int(flat % 64);
    const float s = scale(flat), next = left < kBlock ? scale(flat + left) : s;
    for (int i = 0; i < kBlock; ++i) out[i] = i < left ? s : next;
    table.look_up(data + flat / 2, [&](vf v, int i) { emit(v * load(out + i), i); });
  }
  float one(std::int64_t flat) const {
    const int nibble = flat % 2 == 0 ? data[flat / 2] >> 4 : data[flat / 2] & 15;
    return m.code[nibble] * scale(flat);
  }
  // Any weights from `flat` on: whole bytes by the table, each 32 weights of at most two scales.
  void any(std::int64_t flat, std::int64_t count, float* out) const {
    if (flat % 2 != 0 && count > 0) *out++ = one(flat++), --count;
    for (; count > 0; flat += kBlock, out += kBlock, count -= kBlock) {
      const int here = count < kBlock ? int(count) : kBlock, left = 64 - int(flat % 64), first = here < left ? here : left;
      std::uint8_t bytes[kBlockBytes] = {};
      std::memcpy(bytes, data + flat / 2, std::size_t(here + 1) / 2);
      alignas(64) float values[kBlock];
      table.look_up(bytes, [&](vf v, int i) { store(values + i, v); });
      const float s = scale(flat), next = first < here ? scale(flat + first) : 0.0f;
      for (int i = 0; i < first; ++i) out[i] = values[i] * s;
      for (int i = first; i < here; ++i) out[i] = values[i] * next;
    }
  }
  void some(std::int64_t row, std::int64_t col, std::int64_t count, float* out) const { any(row * m.cols + col, count, out); }
};

// One stretch of a stored row, 32 weights or fewer, in float32.
template <class Format>
LT_INLINE void stretch(const Format& format, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  if (count == kBlock) {
    format.block(row, col, [&](vf v, int i) { store(out + i, v); });
  } else {
    format.some(row, col, count, out);
  }
}

// Asks for the 32 weights from (row, col) to be brought near.
template <class Format>
LT_INLINE void fetch(const Format& format, std::int64_t row, std::int64_t col) {
  const char* p = static_cast<const char*>(format.where(row, col));
  __builtin_prefetch(p, 0, 2);
  if constexpr (Format::kBlockBytes > 64) __builtin_prefetch(p + 64, 0, 2);
}

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
