// Products in fixed point: codes and activations are 16-bit integers, multiplied and added in pairs without error.
#pragma once
#include "decode.h"
#include "fixed_pairs.h"
#include "formats.h"

namespace lt {
namespace LT_NAMESPACE {

typedef std::int16_t h16 __attribute__((vector_size(32)));
typedef std::int32_t i8 __attribute__((vector_size(32)));
typedef float f8 __attribute__((vector_size(32)));
typedef std::uint8_t b16 __attribute__((vector_size(16)));
typedef std::int8_t s16 __attribute__((vector_size(16)));

template <class V>
LT_INLINE void read(const void* p, V& out) {
  std::memcpy(&out, p, sizeof out);
}

// 16 bytes as 16 words.
LT_INLINE void words_at(const void* p, h16& out) {
  b16 bytes;
  read(p, bytes);
  out = __builtin_convertvector(bytes, h16);
}

// sum[j] += a[2 j] b[2 j] + a[2 j + 1] b[2 j + 1], in whatever order of lanes the processor has.
LT_INLINE void add_products(const h16& a, const h16& b, i8& sum) {
#if defined(LT_ISA_AVX512) || defined(LT_ISA_AVX2)
  sum += i8(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif defined(LT_ISA_NEON)
  int16x8_t x[2], y[2];
  int32x4_t s[2];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  std::memcpy(s, &sum, sizeof s);
  for (int h = 0; h < 2; ++h) s[h] = vmlal_high_s16(vmlal_s16(s[h], vget_low_s16(x[h]), vget_low_s16(y[h])), x[h], y[h]);
  std::memcpy(&sum, s, sizeof s);
#else
  for (int j = 0; j < 8; ++j) sum[j] += std::int32_t(a[2 * j]) * b[2 * j] + std::int32_t(a[2 * j + 1]) * b[2 * j + 1];
#endif
}

// total += scale * part + shift
LT_INLINE void add_scaled(const i8& part, float scale, float shift, f8& total) {
#if defined(LT_ISA_AVX512) || defined(LT_ISA_AVX2)
  const __m256 moved = _mm256_add_ps(__m256(total), _mm256_set1_ps(shift));
  total = f8(_mm256_fmadd_ps(_mm256_cvtepi32_ps(__m256i(part)), _mm256_set1_ps(scale), moved));
#else
  total += __builtin_convertvector(part, f8) * scale + shift;
#endif
}

// codes(format, place, group, emit): the q of 32 weights, as emit(words, 0) and emit(words, 16).
template <class Emit>
LT_INLINE void nibbles_to_words(const std::uint8_t* p, Emit&& emit) {
  h16 bytes;
  words_at(p, bytes);
  emit(bytes & 15, 0);
  emit(bytes >> 4, 16);
}

// 16 in the words whose bit of `bits` is set.
LT_INLINE void fifth_words(std::uint32_t bits, h16& out) {
  const h16 places = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, std::int16_t(-32768)};
  const std::int16_t all = std::int16_t(bits);
  const h16 spread = {all, all, all, all, all, all, all, all, all, all, all, all, all, all, all, all};
  out = ((spread & places) != 0) & 16;
}

template <class Emit>
LT_INLINE void five_bit_words(const std::uint8_t* high, const std::uint8_t* low, Emit&& emit) {
  std::uint32_t bits;
  std::memcpy(&bits, high, sizeof bits);
  nibbles_to_words(low, [&](const h16& q, int i) __attribute__((always_inline)) {
    h16 fifth;
    fifth_words(bits >> i, fifth);
    emit(q | fifth, i);
  });
}

template <class Emit>
LT_INLINE void codes(const Q4_0&, const std::uint8_t* p, int, Emit&& emit) { nibbles_to_words(p + 2, emit); }
template <class Emit>
LT_INLINE void codes(const Q4_1&, const std::uint8_t* p, int, Emit&& emit) { nibbles_to_words(p + 4, emit); }
template <class Emit>
LT_INLINE void codes(const Q5_0&, const std::uint8_t* p, int, Emit&& emit) { five_bit_words(p + 2, p + 6, emit); }
template <class Emit>
LT_INLINE void codes(const Q5_1&, const std::uint8_t* p, int, Emit&& emit) { five_bit_words(p + 4, p + 8, emit); }
template <class Emit>
LT_INLINE void codes(const Q8_0&, const std::uint8_t* p, int, Emit&& emit) {
  for (int i = 0; i < 32; i += 16) {
    s16 bytes;
    read(p + 2 + i, bytes);
    emit(__builtin_convertvector(bytes, h16), i);
  }
}
// Odd groups are the high nibbles in place, 16 times too large, which the scale of gguf_formats.h takes back.
template <class Emit>
LT_INLINE void codes(const Q4_K&, const std::uint8_t* p, int group, Emit&& emit) {
  const std::int16_t mask = group % 2 ? 0xf0 : 0x0f;
  for (int i = 0; i < 32; i += 16) {
    h16 bytes;
    words_at(p + 16 + group / 2 * 32 + i, bytes);
    emit(bytes & mask, i);
  }
}
template <class Emit>
LT_INLINE void codes(const Q5_K&, const std::uint8_t* p, int group, Emit&& emit) {
  for (int i = 0; i < 32; i += 16) {
    h16 low, high;
    words_at(p + 48 + group / 2 * 32 + i, low);
    words_at(p + 16 + i, high);
    emit((low >> std::int16_t(group % 2 * 4) & 15) | (high << 4 >> std::int16_t(group) & 16), i);
  }
}

LT_INLINE float lanes_of(const f8& total) {
  return ((total[0] + total[4]) + (total[1] + total[5])) + ((total[2] + total[6]) + (total[3] + total[7]));
}

// Scale and shift of 32 weights meet the sum of x in each lane, before they are added: alone they would be large and cancel.
template <class Format>
LT_INLINE float dot(const Format& format, const FixedToken& x, std::int64_t row, std::int64_t cols) {
  constexpr int kGroups = Format::kUnit / kBlock;
  f8 total[2] = {};
  std::int64_t b = 0;
  float paired = 0;
#if defined(LT_ISA_AVX512)
  if constexpr (kInPairs<Format>) {
    b = cols / kBlock / 2 * 2;
    paired = paired_dot(format, x, row, b);
  }
#endif
  for (std::int64_t k = b * kBlock; k < cols; k += Format::kUnit) {
    const std::uint8_t* place = format.place(row, k);
    float scale[kGroups], shift[kGroups];
    format.scales(place, scale, shift);
    fetch_ahead<kGroups * Format::kBlockBytes>(place);
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g, ++b) {
      i8 part = {};
      codes(format, place, g, [&](const h16& q, int i) __attribute__((always_inline)) {
        h16 values;
        read(x.sixteen(b, i), values);
        add_products(q, values, part);
      });
      add_scaled(part, scale[g] * x.scale(b), Format::kShifted ? shift[g] * x.sum(b) : 0.0f, total[g % 2]);
    }
  }
  total[0] += total[1];
  return paired + lanes_of(total[0]);
}

// Two scales for 32 weights, codes from -32.
LT_INLINE float dot(const Q6_K& format, const FixedToken& x, std::int64_t row, std::int64_t cols) {
  f8 total[2] = {};
  std::int64_t b = 0;
  for (std::int64_t k = 0; k < cols; k += 256) {
    const std::uint8_t* p = format.place(row, k);
    const float d = half_at(p + 208);
    fetch_ahead<210>(p);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, ++b) {
      const int half = g / 4, quarter = g % 4;
      const std::uint8_t *low = p + 64 * half + 32 * (quarter % 2), *high = p + 128 + 32 * half;
      const auto* scales = reinterpret_cast<const std::int8_t*>(p + 192) + 8 * half + 2 * quarter;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        h16 nibbles, top, values;
        words_at(low + 16 * i, nibbles);
        words_at(high + 16 * i, top);
        read(x.sixteen(b, 16 * i), values);
        const h16 q = ((nibbles >> std::int16_t(quarter / 2 * 4) & 15) | (top >> std::int16_t(2 * quarter) << 4 & 48)) - 32;
        i8 part = {};
        add_products(q, values, part);
        add_scaled(part, d * float(scales[i]) * x.scale(b), 0.0f, total[i]);
      }
    }
  }
  total[0] += total[1];
  return lanes_of(total[0]);
}

}  // namespace LT_NAMESPACE
}  // namespace lt
