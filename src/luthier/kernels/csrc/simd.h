// Vectors of the instruction set that the including *_isa.cpp file is compiled for. All in namespace lt::LT_NAMESPACE.
//
//   VL                      floats in a vector: 4 (portable, neon), 8 (avx2), 16 (avx512)
//   vf, vi                  VL floats; VL 32-bit integers
//   load(p) store(p, v)     any alignment;  load_n(p, n) store_n(p, v, n): the first n < VL lanes, the rest zero / untouched
//   load_bf16(p) load_f16(p)  VL 16-bit floats, widened;  f16(bits): one
//   widen_u8(p) widen_i8(p) VL bytes to vi
//   set1(x) zero()          vf;  iset1(x) vi
//   + - * /                 on vf;  fma(a, b, c) = a b + c, rounded once except in the portable build
//   vmax(a, b) vmin(a, b)   the second operand if either is NaN;  vabs(a)
//   less(a, b) is_nan(a)    masks vm;  choose(m, a, b): a where m, else b;  any(m)
//   sum(v) largest(v)       across lanes, in a fixed order;  sums(v): lane i sum(v[i]), of VL vectors, in another order
//   to_float(vi) to_int(vf) to_int rounds to nearest even
//   as_float(vi)            the same bits
//   iadd iand ior, shl<n>(vi) shr<n>(vi)   shr is logical;  shr_by(vi, n) for n known at run time
//   shr_lanes(vi)           lane j shifted right by j
//   transpose<R>(src, ld, dst, ldd)  dst[j * ldd + i] = src[i * ld + j] for i < R, j < VL, zero in the lanes from R to VL;
//                           in rising j, so that ldd may be R. R = VL where it is not given.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define LT_INLINE static inline __attribute__((always_inline))
#define LT_INLINE_MEMBER inline __attribute__((always_inline))
// Makes the compiler hold v in a register at this point, whatever it thinks of reordering.
#if defined(LT_ISA_AVX512)
#define LT_KEEP(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define LT_KEEP(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define LT_KEEP(v) __asm__("" : "+w"(v))
#else
#define LT_KEEP(v) (void)(v)
#endif

#if defined(LT_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(LT_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(LT_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif
