// Dot products of stored rows with a few tokens. Bound by the bytes of W for one token, by arithmetic for many.
#include "few.h"

#include "dispatch.h"
#include "formats.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// TT tokens times R rows: a block of x is read once for R rows. Together at most eight accumulators.
template <int TT, int R, class Format>
void dots(const Format& format, const FewProduct& p, std::int64_t row, std::int64_t token) {
  constexpr int kChains = 8 / (TT * R) < kBlock / VL ? 8 / (TT * R) : kBlock / VL;
  static_assert(kChains >= 1);
  const std::int64_t K = p.matrix->cols, whole = K / kBlock * kBlock, step = p.T * kBlock;
  vf acc[R][TT][kChains];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) acc[r][t][c] = zero();
    }
  }
  const float* x = p.x + token * kBlock;
  float rest[kBlock];
  const auto add_rest = [&](int r) {
    for (int i = 0; i < kBlock; i += VL) {
#pragma GCC unroll 4
      for (int t = 0; t < TT; ++t) acc[r][t][0] = fma(load(rest + i), load(x + t * kBlock + i), acc[r][t][0]);
    }
  };
  for (std::int64_t k = 0; k < whole; k += kBlock, x += step) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      format.block(row + r, k, [&](vf v, int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) {
          vf& chain = acc[r][t][i / VL % kChains];
          chain = fma(v, load(x + t * kBlock + i), chain);
        }
      });
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    x = p.x + token * kBlock + whole / kBlock * step;
    if (whole < K) {
      std::memset(rest, 0, sizeof rest);
      format.some(row + r, whole, K - whole, rest);
      add_rest(r);
    }
    x = p.rank > 0 ? p.inner + token * kBlock : nullptr;
    for (std::int64_t c = 0; c < p.rank; c += kBlock, x += step) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, p.low + (row + r) * p.rank + c, sizeof(float) * std::size_t(p.rank - c < kBlock ? p.rank - c : kBlock));
      add_rest(r);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) acc[r][t][0] = acc[r][t][0] + acc[r][t][c];
      p.y[(token + t) * p.ldy + row + r] = sum(acc[r][t][0]) + (p.bias == nullptr ? 0.0f : p.bias[row + r]);
    }
  }
}

template <int TT, int R, class Format>
void all_rows(const Format& format, const FewProduct& p, std::int64_t token) {
  std::int64_t row = p.row;
  const std::int64_t end = p.row + p.rows;
  for (; row + R <= end; row += R) dots<TT, R>(format, p, row, token);
  for (; row < end; ++row) dots<TT, 1>(format, p, row, token);
}

// Rows follow one another in memory, but a processor prefetches within a page only: so far ahead of what is read.
constexpr int kAheadBytes = 2048;

template <int kBytes>
LT_INLINE void fetch_ahead(const void* from) {
  const char* p = static_cast<const char*>(from) + kAheadBytes;
#pragma GCC unroll 4
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b, 0, 3);
}

// One token and rows of whole units: codes are multiplied with x as they are, and what 32 of them have in common, scale and
// shift, comes in once, the shift with the sum of x. Both meet in each lane before they are added to the total: where x has a
// mean, they are large and nearly cancel, and totals of each alone would round off what is left.
template <class Format>
void scaled_dot(const Format& format, const FewProduct& p, std::int64_t row, std::int64_t token) {
  constexpr int kGroups = Format::kUnit / kBlock;
  const std::int64_t step = p.T * kBlock;
  const float *x = p.x + token * kBlock, *sums = p.sums + token * (p.matrix->cols / kBlock);
  vf total[2] = {zero(), zero()};
  for (std::int64_t k = 0; k < p.matrix->cols; k += Format::kUnit) {
    const auto place = format.place(row, k);
    float scale[kGroups], shift[kGroups];
    format.scales(place, scale, shift);
    fetch_ahead<kGroups * Format::kBlockBytes>(format.where(row, k));
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g, x += step) {
      vf part = zero();
      format.codes(place, g, [&](vf q, int i) __attribute__((always_inline)) { part = fma(q, load(x + i), part); });
      if constexpr (Format::kShifted) {
        total[g % 2] = total[g % 2] + fma(part, set1(scale[g]), set1(shift[g] * sums[g]));
      } else {
        total[g % 2] = fma(part, set1(scale[g]), total[g % 2]);
      }
    }
    sums += kGroups;
  }
  const float* inner = p.rank > 0 ? p.inner + token * kBlock : nullptr;
  for (std::int64_t c = 0; c < p.rank; c += kBlock, inner += step) {
    float rest[kBlock] = {};
    std::memcpy(rest, p.low + row * p.rank + c, sizeof(float) * std::size_t(p.rank - c < kBlock ? p.rank - c : kBlock));
    for (int i = 0; i < kBlock; i += VL) total[0] = fma(load(rest + i), load(inner + i), total[0]);
  }
  p.y[token * p.ldy + row] = sum(total[0] + total[1]) + (p.bias == nullptr ? 0.0f : p.bias[row]);
}

// Whether codes and shift may be multiplied apart: with Inf in x, or sums beyond float, their difference would be NaN.
template <class Format>
bool divisible(const FewProduct& p, std::int64_t token) {
  if (p.matrix->cols % Format::kUnit != 0) return false;
  if constexpr (!Format::kShifted) return true;
  const std::int64_t blocks = p.matrix->cols / kBlock;
  float nothing = 0;
  for (std::int64_t b = 0; b < blocks; ++b) nothing += p.sums[token * blocks + b] * 0.0f;
  return nothing == 0.0f;
}

template <class Format>
void one_token(const Format& format, const FewProduct& p, std::int64_t token) {
  if constexpr (Format::kUnit > 0) {
    if (divisible<Format>(p, token)) {
      for (std::int64_t row = p.row; row < p.row + p.rows; ++row) scaled_dot(format, p, row, token);
      return;
    }
  }
  all_rows<1, 1>(format, p, token);
}

void multiply(const FewProduct& p) {
  with_format(*p.matrix, [&](const auto& format) {
    std::int64_t token = 0;
    for (; token + 4 <= p.T; token += 4) all_rows<4, 2>(format, p, token);
    if (p.T - token >= 2) all_rows<2, 2>(format, p, token), token += 2;
    if (p.T - token >= 1) one_token(format, p, token);
  });
}

}  // namespace

LT_DEFINE_TABLE(FewTable, few) = {VL, &multiply};

}  // namespace LT_NAMESPACE
}  // namespace lt
