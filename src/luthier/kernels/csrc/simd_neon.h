// AArch64 Advanced SIMD. vf is the compiler's own vector type, so + - * / come with it.
#pragma once
#include <arm_neon.h>

namespace lt {
namespace LT_NAMESPACE {

using vf = float32x4_t;
struct vm {
  uint32x4_t v;
};
struct vi {
  int32x4_t v;
};
constexpr int VL = 4;

LT_INLINE vf load(const float* p) { return vld1q_f32(p); }
LT_INLINE void store(float* p, vf v) { vst1q_f32(p, v); }
LT_INLINE vf load_n(const float* p, int n) {
  float lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
LT_INLINE void store_n(float* p, vf v, int n) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
LT_INLINE vf load_bf16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
LT_INLINE vf load_f16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
LT_INLINE float f16(std::uint16_t bits) {
  __fp16 half;
  std::memcpy(&half, &bits, sizeof half);
  return float(half);
}
LT_INLINE vi widen_u8(const void* p) {
  std::uint32_t raw;
  std::memcpy(&raw, p, sizeof raw);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(raw)))))};
}
LT_INLINE vi widen_i8(const void* p) {
  std::uint32_t raw;
  std::memcpy(&raw, p, sizeof raw);
  return {vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(raw))))};
}
LT_INLINE vf set1(float x) { return vdupq_n_f32(x); }
LT_INLINE vf zero() { return vdupq_n_f32(0.0f); }
LT_INLINE vi iset1(int x) { return {vdupq_n_s32(x)}; }
LT_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
LT_INLINE vm less(vf a, vf b) { return {vcltq_f32(a, b)}; }
LT_INLINE vm is_nan(vf a) { return {vmvnq_u32(vceqq_f32(a, a))}; }
LT_INLINE vf choose(vm m, vf a, vf b) { return vbslq_f32(m.v, a, b); }
LT_INLINE vf vmax(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LT_INLINE vf vmin(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LT_INLINE vf vabs(vf a) { return vabsq_f32(a); }
LT_INLINE bool any(vm m) { return vmaxvq_u32(m.v) != 0; }
LT_INLINE float sum(vf v) { return (vgetq_lane_f32(v, 0) + vgetq_lane_f32(v, 2)) + (vgetq_lane_f32(v, 1) + vgetq_lane_f32(v, 3)); }
LT_INLINE vf sums(const vf (&v)[VL]) {
  float all[VL];
  for (int i = 0; i < VL; ++i) all[i] = sum(v[i]);
  return load(all);
}
LT_INLINE float largest(vf v) {
  const vf w = vmax(v, vextq_f32(v, v, 2));
  return vgetq_lane_f32(w, 0) > vgetq_lane_f32(w, 1) ? vgetq_lane_f32(w, 0) : vgetq_lane_f32(w, 1);
}
LT_INLINE vf to_float(vi a) { return vcvtq_f32_s32(a.v); }
LT_INLINE vi to_int(vf a) { return {vcvtnq_s32_f32(a)}; }
LT_INLINE vf as_float(vi a) { return vreinterpretq_f32_s32(a.v); }
LT_INLINE vi iadd(vi a, vi b) { return {vaddq_s32(a.v, b.v)}; }
LT_INLINE vi iand(vi a, vi b) { return {vandq_s32(a.v, b.v)}; }
LT_INLINE vi ior(vi a, vi b) { return {vorrq_s32(a.v, b.v)}; }
template <int n>
LT_INLINE vi shl(vi a) {
  return {vshlq_n_s32(a.v, n)};
}
template <int n>
LT_INLINE vi shr(vi a) {
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), n))};
}
LT_INLINE vi shr_by(vi a, int n) { return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v), vdupq_n_s32(-n)))}; }
LT_INLINE vi shr_lanes(vi a) {
  const int32x4_t lanes = {0, -1, -2, -3};
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v), lanes))};
}
template <int R = 4>
LT_INLINE void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t ldd) {
  static_assert(R == VL);
  const float32x4x2_t a = vtrnq_f32(vld1q_f32(src), vld1q_f32(src + ld));
  const float32x4x2_t b = vtrnq_f32(vld1q_f32(src + 2 * ld), vld1q_f32(src + 3 * ld));
  vst1q_f32(dst, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
  vst1q_f32(dst + ldd, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
  vst1q_f32(dst + 2 * ldd, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
  vst1q_f32(dst + 3 * ldd, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
}

}  // namespace LT_NAMESPACE
}  // namespace lt
