// Functions of vectors that several kernels share, and loops over rows of any width. For *_isa.cpp files.
#pragma once
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

// Past the caches, for results too large to be found there again; p must be aligned to a vector.
LT_INLINE void store_past(float* p, vf v) {
#if defined(LT_ISA_AVX512)
  _mm512_stream_ps(p, v);
#elif defined(LT_ISA_AVX2)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

// Makes what was stored past the caches visible to other threads.
LT_INLINE void settle() {
#if defined(LT_ISA_AVX512) || defined(LT_ISA_AVX2)
  _mm_sfence();
#endif
}

#define LT_MEMBER __attribute__((always_inline)) inline

// Loads and stores of a whole vector, or of the first n lanes at the end of a row. choose: v in these lanes, else `absent`.
struct Whole {
  LT_MEMBER vf choose(vf v, vf) const { return v; }
  LT_MEMBER vf get(const float* p) const { return load(p); }
  LT_MEMBER void put(float* p, vf v) const { store(p, v); }
  LT_MEMBER void put(float* p, vf v, bool past) const { past ? store_past(p, v) : store(p, v); }
};
struct Part {
  int n;
  LT_MEMBER vf choose(vf v, vf absent) const {
    float lanes[VL];
    store(lanes, absent);
    store_n(lanes, v, n);
    return load(lanes);
  }
  LT_MEMBER vf get(const float* p) const { return load_n(p, n); }
  LT_MEMBER void put(float* p, vf v) const { store_n(p, v, n); }
  LT_MEMBER void put(float* p, vf v, bool) const { store_n(p, v, n); }
};

// fn(lanes, i) for i = 0, VL, ... < count; `lanes` is Whole, or Part at a ragged end, where absent lanes read as zero.
template <class Fn>
LT_INLINE void each_vector(std::int64_t count, Fn fn) {
  std::int64_t i = 0;
  for (; i + VL <= count; i += VL) fn(Whole{}, i);
  if (i < count) fn(Part{int(count - i)}, i);
}

// The sum over the lanes of four chains `chain = fn(lanes, i, chain)`, so that one addition need not wait for the last.
template <class Fn>
LT_INLINE float sum_of(std::int64_t count, Fn fn) {
  vf chain[4] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 4 * VL <= count; i += 4 * VL) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) chain[c] = fn(Whole{}, i + c * VL, chain[c]);
  }
  for (; i + VL <= count; i += VL) chain[0] = fn(Whole{}, i, chain[0]);
  if (i < count) chain[1] = fn(Part{int(count - i)}, i, chain[1]);
  return sum((chain[0] + chain[1]) + (chain[2] + chain[3]));
}

// Two such sums over one reading: fn(lanes, i, first, second) adds to both chains.
template <class Fn>
LT_INLINE void sums_of(std::int64_t count, float* first, float* second, Fn fn) {
  vf a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 4 * VL <= count; i += 4 * VL) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) fn(Whole{}, i + c * VL, a[c], b[c]);
  }
  for (; i + VL <= count; i += VL) fn(Whole{}, i, a[0], b[0]);
  if (i < count) fn(Part{int(count - i)}, i, a[1], b[1]);
  *first = sum((a[0] + a[1]) + (a[2] + a[3]));
  *second = sum((b[0] + b[1]) + (b[2] + b[3]));
}

// e^x to 2 ulp where the result is normal; 0 below -87.7, Inf above 88.4; NaN stays NaN.
LT_INLINE vf quick_exp(vf x) {
  x = vmin(set1(89.0f), vmax(set1(-88.0f), x));
  const vi k = to_int(x * set1(1.44269504f));
  const vf n = to_float(k);
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r + set1(1.0f));
  return p * as_float(shl<23>(iadd(k, iset1(127))));
}

// tanh, relative error below 4e-7: a polynomial near zero, exponentials beyond.
LT_INLINE vf vtanh(vf x) {
  const vf square = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const vf near_zero = fma(p * square, x, x);
  const vf magnitude = set1(1.0f) - set1(2.0f) / (quick_exp(vabs(x) * set1(2.0f)) + set1(1.0f));
  const vf far = choose(less(x, zero()), zero() - magnitude, magnitude);
  const vf y = choose(less(vabs(x), set1(0.625f)), near_zero, far);
  return choose(is_nan(x), x, y);
}

}  // namespace LT_NAMESPACE
}  // namespace lt
