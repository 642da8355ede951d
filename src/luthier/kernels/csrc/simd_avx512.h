// AVX-512 F, BW, VL, DQ.
#pragma once
#include <immintrin.h>

namespace lt {
namespace LT_NAMESPACE {

using vf = __m512;
struct vm {
  __mmask16 v;
};
struct vi {
  __m512i v;
};
constexpr int VL = 16;

LT_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1u); }
LT_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
LT_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
LT_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
LT_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
LT_INLINE vf load_bf16(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
LT_INLINE vf load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
LT_INLINE float f16(std::uint16_t bits) { return _cvtsh_ss(bits); }
LT_INLINE vi widen_u8(const void* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
LT_INLINE vi widen_i8(const void* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
LT_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
LT_INLINE vf zero() { return _mm512_setzero_ps(); }
LT_INLINE vi iset1(int x) { return {_mm512_set1_epi32(x)}; }
LT_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LT_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
LT_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
LT_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
LT_INLINE vm less(vf a, vf b) { return {_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)}; }
LT_INLINE vm is_nan(vf a) { return {_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q)}; }
LT_INLINE vf choose(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m.v, b, a); }
LT_INLINE bool any(vm m) { return m.v != 0; }
LT_INLINE float sum(vf v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Neighbours meet in ever more lanes: 45 operations in place of 16 sums.
LT_INLINE vf sums(const vf (&v)[VL]) {
  vf quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf *w = v + 4 * i, a = _mm512_unpacklo_ps(w[0], w[1]) + _mm512_unpackhi_ps(w[0], w[1]);
    const vf b = _mm512_unpacklo_ps(w[2], w[3]) + _mm512_unpackhi_ps(w[2], w[3]);
    quarters[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  }
  const vf low = _mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88) + _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd);
  const vf high = _mm512_shuffle_f32x4(quarters[2], quarters[3], 0x88) + _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}
LT_INLINE float largest(vf v) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
LT_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a.v); }
LT_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a)}; }
LT_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a.v); }
LT_INLINE vi iadd(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
LT_INLINE vi iand(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
LT_INLINE vi ior(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n>
LT_INLINE vi shl(vi a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
LT_INLINE vi shr(vi a) {
  return {_mm512_srli_epi32(a.v, n)};
}
LT_INLINE vi shr_by(vi a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
LT_INLINE vi shr_lanes(vi a) {
  return {_mm512_srlv_epi32(a.v, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))};
}
// Rows i, i + 4, i + 8 and i + 12 share a register from the start, so only shuffles inside quarters remain.
template <int R = 16>
LT_INLINE void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t ldd) {
  const auto quarter = [&](int row, int col) { return row < R ? _mm_loadu_ps(src + row * ld + col) : _mm_setzero_ps(); };
#pragma GCC unroll 4
  for (int h = 0; h < 16; h += 4) {
    __m512 r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_castps128_ps512(quarter(i, h));
      r[i] = _mm512_insertf32x4(r[i], quarter(i + 4, h), 1);
      r[i] = _mm512_insertf32x4(r[i], quarter(i + 8, h), 2);
      r[i] = _mm512_insertf32x4(r[i], quarter(i + 12, h), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    _mm512_storeu_ps(dst + h * ldd, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(dst + (h + 1) * ldd, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_storeu_ps(dst + (h + 2) * ldd, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(dst + (h + 3) * ldd, _mm512_shuffle_ps(b, d, 0xee));
  }
}

}  // namespace LT_NAMESPACE
}  // namespace lt
