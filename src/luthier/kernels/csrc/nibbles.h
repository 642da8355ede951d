// A table of 16 floats looked up by the 32 nibbles of 16 bytes, the high nibble of a byte first; exact to the bit.
// look_up(bytes, emit) calls emit(v, i) with the values of nibbles i ... i + VL - 1.
#pragma once
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

#if defined(LT_ISA_AVX512)

// One permutation of 16 lanes is the whole table.
struct NibbleTable {
  __m512 table;
  explicit NibbleTable(const float* code) : table(_mm512_loadu_ps(code)) {}
  template <class Emit>
  LT_INLINE_MEMBER void look_up(const std::uint8_t* p, Emit&& emit) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
    emit(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low)), table), 0);
    emit(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low)), table), 16);
  }
};

#elif defined(LT_ISA_AVX2)

// Four byte shuffles give the four bytes of 32 floats, two rounds of interleaving put them together. The indices are
// arranged beforehand so that interleaving, which works inside halves of a register, leaves the values in order.
struct NibbleTable {
  __m256i bytes_of[4];
  explicit NibbleTable(const float* code) {
    alignas(16) std::uint8_t split[4][16];
    for (int i = 0; i < 16; ++i) {
      std::uint8_t raw[4];
      std::memcpy(raw, code + i, 4);
      for (int b = 0; b < 4; ++b) split[b][i] = raw[b];
    }
    for (int b = 0; b < 4; ++b) bytes_of[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(split[b])));
  }
  template <class Emit>
  LT_INLINE_MEMBER void look_up(const std::uint8_t* p, Emit&& emit) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
    const __m128 first = _mm_castsi128_ps(_mm_unpacklo_epi8(high, low)), last = _mm_castsi128_ps(_mm_unpackhi_epi8(high, low));
    const __m128i even = _mm_castps_si128(_mm_shuffle_ps(first, last, 0x88)), odd = _mm_castps_si128(_mm_shuffle_ps(first, last, 0xdd));
    const __m256i index = _mm256_set_m128i(odd, even);
    const __m256i b0 = _mm256_shuffle_epi8(bytes_of[0], index), b1 = _mm256_shuffle_epi8(bytes_of[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(bytes_of[2], index), b3 = _mm256_shuffle_epi8(bytes_of[3], index);
    const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    emit(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)), 0);
    emit(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0)), 8);
    emit(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)), 16);
    emit(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1)), 24);
  }
};

#elif defined(LT_ISA_NEON)

// As on AVX2: byte tables, then interleaving, here in order by itself.
struct NibbleTable {
  uint8x16_t bytes_of[4];
  explicit NibbleTable(const float* code) {
    std::uint8_t split[4][16];
    for (int i = 0; i < 16; ++i) {
      std::uint8_t raw[4];
      std::memcpy(raw, code + i, 4);
      for (int b = 0; b < 4; ++b) split[b][i] = raw[b];
    }
    for (int b = 0; b < 4; ++b) bytes_of[b] = vld1q_u8(split[b]);
  }
  template <class Emit>
  LT_INLINE_MEMBER void sixteen(uint8x16_t index, int at, Emit&& emit) const {
    const uint8x16x2_t low = vzipq_u8(vqtbl1q_u8(bytes_of[0], index), vqtbl1q_u8(bytes_of[1], index));
    const uint8x16x2_t high = vzipq_u8(vqtbl1q_u8(bytes_of[2], index), vqtbl1q_u8(bytes_of[3], index));
    const uint16x8x2_t front = vzipq_u16(vreinterpretq_u16_u8(low.val[0]), vreinterpretq_u16_u8(high.val[0]));
    const uint16x8x2_t back = vzipq_u16(vreinterpretq_u16_u8(low.val[1]), vreinterpretq_u16_u8(high.val[1]));
    emit(vreinterpretq_f32_u16(front.val[0]), at);
    emit(vreinterpretq_f32_u16(front.val[1]), at + 4);
    emit(vreinterpretq_f32_u16(back.val[0]), at + 8);
    emit(vreinterpretq_f32_u16(back.val[1]), at + 12);
  }
  template <class Emit>
  LT_INLINE_MEMBER void look_up(const std::uint8_t* p, Emit&& emit) const {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint8x16x2_t index = vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
    sixteen(index.val[0], 0, emit);
    sixteen(index.val[1], 16, emit);
  }
};

#else

struct NibbleTable {
  const float* code;
  explicit NibbleTable(const float* values) : code(values) {}
  template <class Emit>
  LT_INLINE_MEMBER void look_up(const std::uint8_t* p, Emit&& emit) const {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      emit(vf{code[p[i] >> 4], code[p[i] & 15], code[p[i + 1] >> 4], code[p[i + 1] & 15]}, 2 * i);
    }
  }
};

#endif

}  // namespace LT_NAMESPACE
}  // namespace lt
