// Slivers of weights and turning of results for matrices in two factors, compiled once for each instruction set.
#include "factored.h"

#include "dispatch.h"
#include "formats.h"
#include "microkernel.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

constexpr int kLanes = (kRows + VL - 1) / VL * VL;

constexpr int common(int a, int b) { return b == 0 ? a : common(b, a % b); }
constexpr int kGroup = kRows / common(kRows, kBlock) * kBlock;

// `count` floats, and nothing beside them.
LT_INLINE void put_exactly(const float* from, int count, float* to) {
  int i = 0;
  for (; i + VL <= count; i += VL) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load(from + i), count - i);
}

// Formats and sizes come by value: stores of vectors might change whatever is read through a reference.
template <class Format>
void rows_of(Format format, const std::int32_t* rows, const int count, const int ahead, const std::int64_t col,
             const std::int64_t depth, float* sliver) {
  static_assert(kLanes == kRows || kLanes == VL);
  alignas(64) float side[kLanes][kBlock], turned[VL][kLanes];
  for (int i = count; i < kLanes; ++i) std::memset(side[i], 0, sizeof side[i]);
  for (std::int64_t k = 0; k < depth; k += kBlock) {
    const int here = depth - k < kBlock ? int(depth - k) : kBlock;
    for (int i = 0; i < count; ++i) {
      if (i < ahead) fetch(format, rows[count + i], col + k);
      stretch(format, rows[i], col + k, here, side[i]);
    }
    for (int i = 0; i < here; i += VL) {
      float* to = sliver + (k + i) * count;
      // What a full sliver's vectors write too much belongs to later steps, which are written later.
      const bool whole = count == kRows && k + i + VL < depth;
      for (int j = 0; j < kLanes; j += VL) {
        whole ? transpose(&side[j][i], kBlock, to + j, kRows) : transpose(&side[j][i], kBlock, &turned[0][j], kLanes);
      }
      if (whole) continue;
      for (int s = 0; s < VL && i + s < here; ++s) put_exactly(turned[s], count, to + s * count);
    }
  }
}

void sliver_of_rows(const lt_matrix& m, const std::int32_t* rows, int count, std::int64_t listed, std::int64_t col,
                    std::int64_t depth, float* sliver) {
  const int ahead = listed - count < count ? int(listed - count) : count;
  with_format(m, [&](const auto& format) { rows_of(format, rows, count, ahead, col, depth, sliver); });
}

// The steps `first` to `last` of slivers `depth` long.
template <class Format>
void columns_of(Format format, const std::int64_t col, const int count, const std::int64_t row, const std::int64_t depth,
                const std::int64_t first, const std::int64_t last, float* slivers) {
  constexpr int kRowsAhead = 8;
  alignas(64) float side[kGroup + VL] = {};
  for (std::int64_t k = first; k < last; ++k) {
    for (int c = 0; c < count; c += kBlock) {
      if (k + kRowsAhead < depth) fetch(format, row + k + kRowsAhead, col + c);
      stretch(format, row + k, col + c, count - c < kBlock ? count - c : kBlock, side + c);
    }
    int c = 0;
    for (; c + kRows <= count; c += kRows) {
      float* to = slivers + c * depth + k * kRows;
      // As above: too much is written where the next step follows.
      if (k + VL < last) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i += VL) store(to + i, load(side + c + i));
      } else {
        put_exactly(side + c, kRows, to);
      }
    }
    if (c < count) put_exactly(side + c, count - c, slivers + c * depth + k * (count - c));
  }
}

void slivers_of_columns(const lt_matrix& m, std::int64_t col, int count, std::int64_t row, std::int64_t depth,
                        std::int64_t first, std::int64_t last, float* slivers) {
  with_format(m, [&](const auto& format) { columns_of(format, col, count, row, depth, first, last, slivers); });
}

void panel(const float* x, const std::int64_t stride, const std::int64_t depth, float* panel) {
  std::int64_t k = 0;
  for (; k + VL <= depth; k += VL) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; j += VL) transpose(x + j * stride + k, stride, panel + k * kColumns + j, kColumns);
  }
  for (; k < depth; ++k) {
    for (int j = 0; j < kColumns; ++j) panel[k * kColumns + j] = x[j * stride + k];
  }
}

void turn(const float* const* rows, const float* bias, const int count, const int tokens, float* y, const std::int64_t ld) {
  alignas(64) float side[VL][VL], turned[VL][VL];
  for (int t = 0; t < tokens; t += VL) {
    const int here = tokens - t < VL ? tokens - t : VL;
    for (int first = 0; first < count; first += VL) {
      float* to = y + t * ld + first;
      if (first + VL <= count) {
        if (bias == nullptr) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) store(side[i], load(rows[first + i] + t));
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) store(side[i], load(rows[first + i] + t) + set1(bias[first + i]));
        }
        if (here == VL) {
          transpose(&side[0][0], VL, to, ld);
          continue;
        }
      } else {
        for (int i = 0; i < VL; ++i) {
          const vf shift = bias == nullptr || first + i >= count ? zero() : set1(bias[first + i]);
          store(side[i], first + i < count ? load(rows[first + i] + t) + shift : zero());
        }
      }
      transpose(&side[0][0], VL, &turned[0][0], VL);
      for (int q = 0; q < here; ++q) put_exactly(turned[q], count - first < VL ? count - first : VL, to + q * ld);
    }
  }
}

}  // namespace

LT_DEFINE_TABLE(FactoredTable, factored) = {&sliver_of_rows, &slivers_of_columns, &panel, &turn, kGroup};

}  // namespace LT_NAMESPACE
}  // namespace lt
