// Dot products of stored rows with a few tokens. Bound by the bytes of W for one token, by arithmetic for many.
#include "few.h"

#include "dispatch.h"
#include "formats.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// Rows that are decoded at once: with four tokens each, as many sums as the registers hold beside what they are made of.
#if defined(LT_ISA_AVX512) || defined(LT_ISA_NEON)
constexpr int kMostRows = 4;
#else
constexpr int kMostRows = 2;
#endif

// Chains of one sum, so that at least eight go on at once.
template <int TT, int R>
constexpr int chains() {
  return TT * R >= 8 ? 1 : 8 / (TT * R) < kBlock / VL ? 8 / (TT * R) : kBlock / VL;
}

// Adds up the lanes of each sum and the bias.
template <int TT, int R, int kChains>
LT_INLINE void finish(const vf (&acc)[R][TT][kChains], const FewProduct& p, std::int64_t row, std::int64_t token) {
  float found[TT][R];
  if constexpr (TT * R == VL) {
    vf all[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) all[i] = acc[i % R][i / R][0];
    store(found[0], sums(all));
  } else {
    for (int t = 0; t < TT; ++t) {
      for (int r = 0; r < R; ++r) found[t][r] = sum(acc[r][t][0]);
    }
  }
  for (int t = 0; t < TT; ++t) {
    float* y = p.y + (token + t) * p.ldy + row;
    for (int r = 0; r < R; ++r) y[r] = found[t][r] + (p.bias == nullptr ? 0.0f : p.bias[row + r]);
  }
}

// TT tokens of one group times R rows: a block of x is read once for R rows. `format` has the rows from its row `own` on.
template <int TT, int R, class Format>
void dots(const Format& format, std::int64_t own, const FewProduct& p, std::int64_t row, std::int64_t token) {
  constexpr int kChains = chains<TT, R>();
  const std::int64_t K = p.matrix->cols, whole = K / kBlock * kBlock, blocks = (K + kBlock - 1) / kBlock;
  vf acc[R][TT][kChains];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) acc[r][t][c] = zero();
    }
  }
  const float* x = p.x + few_place(token, p.T, 0, blocks);
  const std::int64_t step = few_place(token, p.T, 1, blocks) - few_place(token, p.T, 0, blocks);
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
      format.block(own + r, k, [&](vf v, int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) {
          vf& chain = acc[r][t][i / VL % kChains];
          chain = fma(v, load(x + t * kBlock + i), chain);
        }
      });
    }
  }
  const float* const last = x;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    x = last;
    if (whole < K) {
      std::memset(rest, 0, sizeof rest);
      format.some(own + r, whole, K - whole, rest);
      add_rest(r);
    }
    x = p.rank > 0 ? p.inner + few_place(token, p.T, 0, (p.rank + kBlock - 1) / kBlock) : nullptr;
    for (std::int64_t c = 0; c < p.rank; c += kBlock, x += step) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, p.low + (row + r) * p.rank + c, sizeof(float) * std::size_t(p.rank - c < kBlock ? p.rank - c : kBlock));
      add_rest(r);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) acc[r][t][0] = acc[r][t][0] + acc[r][t][c];
    }
  }
  finish<TT, R>(acc, p, row, token);
}

// TT tokens, R rows at a time.
template <int TT, int R, class Format>
void all_rows(const Format& format, const FewProduct& p, std::int64_t token) {
  std::int64_t row = p.row;
  const std::int64_t end = p.row + p.rows;
  for (; row + R <= end; row += R) dots<TT, R>(format, row, p, row, token);
  for (; row < end; ++row) dots<TT, 1>(format, row, p, row, token);
}

// R rows, all tokens.
template <int R>
void all_tokens(const DenseF32& decoded, const FewProduct& p, std::int64_t row) {
  std::int64_t token = 0;
  for (; token + kFewGroup <= p.T; token += kFewGroup) dots<kFewGroup, R>(decoded, 0, p, row, token);
  if (p.T - token >= 2) dots<2, R>(decoded, 0, p, row, token), token += 2;
  if (p.T - token >= 1) dots<1, R>(decoded, 0, p, row, token);
}

// Rows follow one another in memory, but a processor prefetches within a page only: so far ahead of what is read.
constexpr int kAheadBytes = 2048;

template <int kBytes>
LT_INLINE void fetch_ahead(const void* from) {
  const char* p = static_cast<const char*>(from) + kAheadBytes;
#pragma GCC unroll 4
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b, 0, 3);
}

// Rows decoded once for all groups of tokens.
template <class Format>
void decoded_rows(const Format& format, const FewProduct& p) {
  const std::int64_t K = p.matrix->cols, whole = K / kBlock * kBlock, end = p.row + p.rows;
  lt_matrix rows = {};
  rows.data = p.decoded;
  rows.cols = K;
  for (std::int64_t row = p.row; row < end; row += kMostRows) {
    const std::int64_t here = end - row < kMostRows ? end - row : kMostRows;
    for (std::int64_t r = 0; r < here; ++r) {
      float* out = p.decoded + r * K;
      for (std::int64_t k = 0; k < whole; k += kBlock) {
        fetch_ahead<Format::kBlockBytes>(format.where(row + r, k));
        format.block(row + r, k, [&](vf v, int i) __attribute__((always_inline)) { store(out + k + i, v); });
      }
      if (whole < K) format.some(row + r, whole, K - whole, out + whole);
    }
    const DenseF32 decoded(rows);
    if (here == kMostRows) {
      all_tokens<kMostRows>(decoded, p, row);
    } else {
      for (std::int64_t r = 0; r < here; ++r) {
        rows.data = p.decoded + r * K;
        all_tokens<1>(DenseF32(rows), p, row + r);
      }
    }
  }
}

// One token and rows of whole units: codes are multiplied with x as they are, and what 32 of them have in common, scale and
// shift, comes in once, the shift with the sum of x. Both meet in each lane before they are added to the total: where x has a
// mean, they are large and nearly cancel, and totals of each alone would round off what is left.
template <class Format>
void scaled_dot(const Format& format, const FewProduct& p, std::int64_t row, std::int64_t token) {
  constexpr int kGroups = Format::kUnit / kBlock;
  const std::int64_t blocks = p.matrix->cols / kBlock;
  const std::int64_t step = few_place(token, p.T, 1, blocks) - few_place(token, p.T, 0, blocks);
  const float *x = p.x + few_place(token, p.T, 0, blocks), *sums = p.sums + token * blocks;
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
  const float* inner = p.rank > 0 ? p.inner + few_place(token, p.T, 0, (p.rank + kBlock - 1) / kBlock) : nullptr;
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
    if (p.T > kFewGroup) return decoded_rows(format, p);
    std::int64_t token = 0;
    if (p.T == kFewGroup) return all_rows<kFewGroup, 2>(format, p, 0);
    if (p.T >= 2) all_rows<2, 2>(format, p, 0), token = 2;
    if (p.T > token) one_token(format, p, token);
  });
}

}  // namespace

LT_DEFINE_TABLE(FewTable, few) = {VL, kMostRows, &multiply};

}  // namespace LT_NAMESPACE
}  // namespace lt
