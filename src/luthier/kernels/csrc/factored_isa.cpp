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

template <class Format>
LT_INLINE void stretch(const Format& format, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  if (count == kBlock) {
    format.block(row, col, [&](vf v, int i) { store(out + i, v); });
  } else {
    format.some(row, col, count, out);
  }
}

// The `count` floats at `from` as a step of a sliver. Whole vectors are stored where `room` floats from `to` on allow it: what
// they write too much belongs to later steps, which are written later.
LT_INLINE void put_step(const float* from, int count, std::int64_t room, float* to) {
  if (room >= count + VL) {
    for (int i = 0; i < count; i += VL) store(to + i, load(from + i));
  } else {
    std::memcpy(to, from, sizeof(float) * std::size_t(count));
  }
}

void sliver_of_rows(const lt_matrix& m, const std::int32_t* rows, int count, std::int64_t listed, std::int64_t col,
                    std::int64_t depth, float* sliver) {
  with_format(m, [&](const auto& format) {
    alignas(64) float side[kLanes][kBlock] = {}, turned[kBlock][kLanes];
    const int ahead = listed - count < count ? int(listed - count) : count;
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      const int here = depth - k < kBlock ? int(depth - k) : kBlock;
      for (int i = 0; i < count; ++i) {
        if (i < ahead) fetch(format, rows[count + i], col + k);
        stretch(format, rows[i], col + k, here, side[i]);
      }
      for (int j = 0; j < kLanes; j += VL) {
        for (int i = 0; i < kBlock; i += VL) transpose(&side[j][i], kBlock, &turned[i][j], kLanes);
      }
      for (int i = 0; i < here; ++i) put_step(turned[i], count, (depth - k - i) * count, sliver + (k + i) * count);
    }
  });
}

void slivers_of_columns(const lt_matrix& m, std::int64_t col, int count, std::int64_t row, std::int64_t depth,
                        std::int64_t first, std::int64_t last, float* slivers) {
  with_format(m, [&](const auto& format) {
    constexpr int kRowsAhead = 8;
    alignas(64) float side[kGroup + VL] = {};
    for (std::int64_t k = first; k < last; ++k) {
      for (int c = 0; c < count; c += kBlock) {
        if (k + kRowsAhead < depth) fetch(format, row + k + kRowsAhead, col + c);
        stretch(format, row + k, col + c, count - c < kBlock ? count - c : kBlock, side + c);
      }
      for (int c = 0; c < count; c += kRows) {
        const int here = count - c < kRows ? count - c : kRows;
        put_step(side + c, here, (last - k) * here, slivers + c * depth + k * here);
      }
    }
  });
}

void turn(const float* const* rows, const float* bias, int count, int tokens, float* y, std::int64_t ld) {
  alignas(64) float side[VL][VL], turned[VL][VL];
  for (int first = 0; first < count; first += VL) {
    const int outputs = count - first < VL ? count - first : VL;
    for (int t = 0; t < tokens; t += VL) {
      const int here = tokens - t < VL ? tokens - t : VL;
      for (int i = 0; i < outputs; ++i) {
        const vf v = load(rows[first + i] + t);
        store(side[i], bias == nullptr ? v : v + set1(bias[first + i]));
      }
      float* to = y + t * ld + first;
      if (outputs == VL && here == VL) {
        transpose(&side[0][0], VL, to, ld);
        continue;
      }
      for (int i = outputs; i < VL; ++i) store(side[i], zero());
      transpose(&side[0][0], VL, &turned[0][0], VL);
      for (int q = 0; q < here; ++q) std::memcpy(to + q * ld, turned[q], sizeof(float) * std::size_t(outputs));
    }
  }
}

}  // namespace

LT_DEFINE_TABLE(FactoredTable, factored) = {&sliver_of_rows, &slivers_of_columns, &turn, kGroup};

}  // namespace LT_NAMESPACE
}  // namespace lt
