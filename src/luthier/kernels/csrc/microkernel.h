// The inner product of a sliver of activations with a panel of the matrix, held in registers: one template for every
// instruction set. A step is `NV` loads, `R` broadcasts and R * NV multiply-adds; unrolled four times it runs at the
// machine's peak (docs/kernels.md), so none of it is assembly.
//
// A sliver is [depth][R], a panel [depth][NV * VL].
#pragma once
#include "linear.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {

#if defined(LT_ISA_AVX512)
constexpr int kRows = 14;  // 28 accumulators, 2 for the panel; activations are broadcast from memory
#elif defined(LT_ISA_AVX2)
constexpr int kRows = 6;  // 12 accumulators, 2 for the panel, 2 for broadcasts
#elif defined(LT_ISA_NEON)
constexpr int kRows = 12;  // 24 accumulators, 2 for the panel
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * VL;
#if defined(LT_ISA_AVX512)
constexpr int kDepth = 768;  // a panel of 96 KB comes from the second-level cache fast enough; tiles end less often
#else
constexpr int kDepth = 320;  // a panel of 320 x 16 floats and a sliver of 320 x 6 fill most of a 32 KB first-level cache
#endif

template <int R, int NV>
LT_INLINE void steps(vf (&acc)[R][NV], const float* a, const float* b, std::int64_t depth) {
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < depth; ++k) {
    vf column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = load(b + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const vf row = set1(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(row, column[j], acc[i][j]);
    }
    __builtin_prefetch(a + R * depth);  // the next sliver, which lies behind this one: 2 % of the whole
    a += R;
    b += kColumns;
  }
}

// Adds the bias or what c holds, and stores; full vectors and a last one of `left` lanes.
template <int R, int NV>
LT_INLINE void finish(const vf (&acc)[R][NV], const Product& p) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int left = p.columns - j * VL;
    if (left >= VL) {
      const vf bias = p.bias == nullptr ? zero() : load(p.bias + j * VL);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        float* c = p.c + i * p.ldc + j * VL;
        store(c, acc[i][j] + (p.accumulate ? load(c) : bias));
      }
    } else if (left > 0) {
      const vf bias = p.bias == nullptr ? zero() : load_n(p.bias + j * VL, left);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        float* c = p.c + i * p.ldc + j * VL;
        store_n(c, acc[i][j] + (p.accumulate ? load_n(c, left) : bias), left);
      }
    }
  }
}

// NV vectors of the panel's columns: all, or the first alone where the others hold nothing.
template <int R, int NV>
void tile_of(const Product& p) {
  vf acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = zero();
    if (p.accumulate) {
      for (int j = 0; j < NV * VL; j += 16) __builtin_prefetch(p.c + i * p.ldc + j, 1);
    }
  }
  steps<R, NV>(acc, p.sliver, p.panel, p.depth);
  if (p.low_depth > 0) steps<R, NV>(acc, p.low_sliver, p.low_panel, p.low_depth);
  finish<R, NV>(acc, p);
}

template <int R>
LT_INLINE void choose_tile(const Product& p) {
  if (p.rows == R) return p.columns <= VL ? tile_of<R, 1>(p) : tile_of<R, kVectors>(p);
  if constexpr (R > 1) choose_tile<R - 1>(p);
}

}  // namespace LT_NAMESPACE
}  // namespace lt
