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
        for (int t = 0; t < TT; ++t) acc[r][t][i / VL % kChains] = fma(v, load(x + t * kBlock + i), acc[r][t][i / VL % kChains]);
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
    x = p.inner + token * kBlock;
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

void multiply(const FewProduct& p) {
  with_format(*p.matrix, [&](const auto& format) {
    std::int64_t token = 0;
    for (; token + 4 <= p.T; token += 4) all_rows<4, 2>(format, p, token);
    if (p.T - token >= 2) all_rows<2, 2>(format, p, token), token += 2;
    if (p.T - token >= 1) all_rows<1, 1>(format, p, token);
  });
}

}  // namespace

LT_DEFINE_TABLE(FewTable, few) = {&multiply};

}  // namespace LT_NAMESPACE
}  // namespace lt
