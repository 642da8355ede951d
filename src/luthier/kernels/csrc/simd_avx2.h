// AVX2 + FMA + F16C.
#pragma once
#include <immintrin.h>

namespace lt {
namespace LT_NAMESPACE {

using vf = __m256;
using vm = __m256;
struct vi {
  __m256i v;
};
constexpr int VL = 8;

LT_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LT_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
LT_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
LT_INLINE vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
LT_INLINE void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
LT_INLINE vf load_bf16(const std::uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
LT_INLINE vf load_f16(const std::uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
LT_INLINE float f16(std::uint16_t bits) { return _cvtsh_ss(bits); }
LT_INLINE vi widen_u8(const void* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
LT_INLINE vi widen_i8(const void* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
LT_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
LT_INLINE vf zero() { return _mm256_setzero_ps(); }
LT_INLINE vi iset1(int x) { return {_mm256_set1_epi32(x)}; }
LT_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LT_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
LT_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
LT_INLINE vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
LT_INLINE vm less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
LT_INLINE vm is_nan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
LT_INLINE vf choose(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
LT_INLINE bool any(vm m) { return _mm256_movemask_ps(m) != 0; }
LT_INLINE float sum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Neighbours meet in ever more lanes: 21 operations in place of 8 sums.
LT_INLINE vf sums(const vf (&v)[VL]) {
  vf halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const vf *w = v + 4 * i, a = _mm256_unpacklo_ps(w[0], w[1]) + _mm256_unpackhi_ps(w[0], w[1]);
    const vf b = _mm256_unpacklo_ps(w[2], w[3]) + _mm256_unpackhi_ps(w[2], w[3]);
    halves[i] = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  }
  return _mm256_permute2f128_ps(halves[0], halves[1], 0x20) + _mm256_permute2f128_ps(halves[0], halves[1], 0x31);
}
LT_INLINE float largest(vf v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
LT_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a.v); }
LT_INLINE vi to_int(vf a) { return {_mm256_cvtps_epi32(a)}; }
LT_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a.v); }
LT_INLINE vi iadd(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
LT_INLINE vi iand(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
LT_INLINE vi ior(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int n>
LT_INLINE vi shl(vi a) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
LT_INLINE vi shr(vi a) {
  return {_mm256_srli_epi32(a.v, n)};
}
LT_INLINE vi shr_by(vi a, int n) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
LT_INLINE vi shr_lanes(vi a) { return {_mm256_srlv_epi32(a.v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))}; }
// Rows i and i + 4 share a register from the start, so only shuffles inside halves remain.
template <int R = 8>
LT_INLINE void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t ldd) {
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    __m256 r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128 low = i < R ? _mm_loadu_ps(src + i * ld + h) : _mm_setzero_ps();
      const __m128 high = i + 4 < R ? _mm_loadu_ps(src + (i + 4) * ld + h) : _mm_setzero_ps();
      r[i] = _mm256_set_m128(high, low);
    }
    const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    _mm256_storeu_ps(dst + h * ldd, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(dst + (h + 1) * ldd, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(dst + (h + 2) * ldd, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(dst + (h + 3) * ldd, _mm256_shuffle_ps(b, d, 0xee));
  }
}

}  // namespace LT_NAMESPACE
}  // namespace lt
