// Vectors of four that any compiler with GNU vector extensions maps to what the machine has; no intrinsics.
#pragma once

namespace lt {
namespace LT_NAMESPACE {

typedef float vf __attribute__((vector_size(16)));
typedef std::int32_t raw_int __attribute__((vector_size(16)));
typedef std::uint32_t raw_unsigned __attribute__((vector_size(16)));
struct vm {
  raw_int v;
};
struct vi {
  raw_int v;
};
constexpr int VL = 4;

LT_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LT_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
LT_INLINE vf load_n(const float* p, int n) {
  vf v = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LT_INLINE void store_n(float* p, vf v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
LT_INLINE vf set1(float x) { return vf{x, x, x, x}; }
LT_INLINE vf zero() { return vf{0, 0, 0, 0}; }
LT_INLINE vi iset1(int x) { return {raw_int{x, x, x, x}}; }
LT_INLINE vf as_float(vi a) { return (vf)a.v; }
LT_INLINE vf load_bf16(const std::uint16_t* p) {
  return as_float({(raw_int)(raw_unsigned{p[0], p[1], p[2], p[3]} << 16)});
}
// Exact for every pattern. Subnormal halves go by their integer, for the processor may be set to read subnormals as zero.
LT_INLINE float f16(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7fffu, sign = std::uint32_t(bits & 0x8000u) << 16;
  if (magnitude < 0x0400u) return (sign ? -0x1p-24f : 0x1p-24f) * float(magnitude);
  const std::uint32_t rebased = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const std::uint32_t wide = rebased | sign;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
LT_INLINE vf load_f16(const std::uint16_t* p) { return vf{f16(p[0]), f16(p[1]), f16(p[2]), f16(p[3])}; }
LT_INLINE vi widen_u8(const void* p) {
  const auto* b = static_cast<const std::uint8_t*>(p);
  return {raw_int{b[0], b[1], b[2], b[3]}};
}
LT_INLINE vi widen_i8(const void* p) {
  const auto* b = static_cast<const std::int8_t*>(p);
  return {raw_int{b[0], b[1], b[2], b[3]}};
}
LT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
LT_INLINE vm less(vf a, vf b) { return {a < b}; }
LT_INLINE vm is_nan(vf a) { return {a != a}; }
LT_INLINE vf choose(vm m, vf a, vf b) { return (vf)((m.v & (raw_int)a) | (~m.v & (raw_int)b)); }
LT_INLINE vf vmax(vf a, vf b) { return choose({a > b}, a, b); }
LT_INLINE vf vmin(vf a, vf b) { return choose({a < b}, a, b); }
LT_INLINE vf vabs(vf a) { return (vf)((raw_int)a & 0x7fffffff); }
LT_INLINE bool any(vm m) { return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0; }
LT_INLINE float sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
LT_INLINE vf sums(const vf (&v)[VL]) {
  float all[VL];
  for (int i = 0; i < VL; ++i) all[i] = sum(v[i]);
  return load(all);
}
LT_INLINE float largest(vf v) {
  const vf w = vmax(v, vf{v[2], v[3], v[0], v[1]});
  return w[0] > w[1] ? w[0] : w[1];
}
LT_INLINE vf to_float(vi a) { return __builtin_convertvector(a.v, vf); }
LT_INLINE vi to_int(vf a) {
  raw_int r;
  for (int i = 0; i < 4; ++i) r[i] = std::int32_t(std::nearbyint(a[i]));
  return {r};
}
LT_INLINE vi iadd(vi a, vi b) { return {(raw_int)((raw_unsigned)a.v + (raw_unsigned)b.v)}; }
LT_INLINE vi iand(vi a, vi b) { return {a.v & b.v}; }
LT_INLINE vi ior(vi a, vi b) { return {a.v | b.v}; }
template <int n>
LT_INLINE vi shl(vi a) {
  return {(raw_int)((raw_unsigned)a.v << n)};
}
template <int n>
LT_INLINE vi shr(vi a) {
  return {(raw_int)((raw_unsigned)a.v >> n)};
}
LT_INLINE vi shr_by(vi a, int n) { return {(raw_int)((raw_unsigned)a.v >> std::uint32_t(n))}; }
LT_INLINE vi shr_lanes(vi a) { return {(raw_int)((raw_unsigned)a.v >> raw_unsigned{0, 1, 2, 3})}; }
template <int R = 4>
LT_INLINE void transpose(const float* src, std::int64_t ld, float* dst, std::int64_t ldd) {
  static_assert(R == VL);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store(dst + j * ldd, vf{src[j], src[ld + j], src[2 * ld + j], src[3 * ld + j]});
}

}  // namespace LT_NAMESPACE
}  // namespace lt
