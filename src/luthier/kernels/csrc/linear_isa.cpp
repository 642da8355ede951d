// Packing, tiles and decoding of the frozen linear layer, compiled once for each instruction set.
#include "dispatch.h"
#include "formats.h"
#include "linear.h"
#include "microkernel.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// Full slivers of rows that are contiguous: VL steps of the depth at once. Where kRows is no multiple of VL, a vector's
// last lanes are overwritten by the next step's; the last step, which has no next, is left to the caller.
std::int64_t pack_turned(const float* x, std::int64_t row_stride, std::int64_t depth, float* sliver) {
  constexpr int whole = kRows / VL * VL, rest = kRows % VL;
  std::int64_t k = 0;
  for (; k + VL < depth; k += VL) {
#pragma GCC unroll 4
    for (int i = 0; i < whole; i += VL) transpose(x + i * row_stride + k, row_stride, sliver + k * kRows + i, kRows);
    if constexpr (rest > 0) transpose<rest>(x + whole * row_stride + k, row_stride, sliver + k * kRows + whole, kRows);
  }
  return k;
}

void pack_sliver(const float* x, std::int64_t row_stride, std::int64_t depth_stride, int rows, std::int64_t depth, float scale,
                 float* sliver) {
  const bool plain = rows == kRows && depth_stride == 1 && scale == 1.0f;
  const std::int64_t done = plain ? pack_turned(x, row_stride, depth, sliver) : 0;
  for (int i = 0; i < rows; ++i) {
    const float* from = x + i * row_stride;
    for (std::int64_t k = done; k < depth; ++k) sliver[k * rows + i] = from[k * depth_stride] * scale;
  }
}

// Panels whose columns are stored rows: 32 weights of each are decoded side by side, then turned.
template <class Format>
void turned_panels(const Format& format, std::int64_t row, int rows, std::int64_t col, std::int64_t depth, float* panels) {
  alignas(64) float side[kColumns][kBlock];
  for (int first = 0; first < rows; first += kColumns, panels += depth * kColumns) {
    const int here = rows - first < kColumns ? rows - first : kColumns;
    for (int i = here; i < kColumns; ++i) std::memset(side[i], 0, sizeof side[i]);
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      const std::int64_t count = depth - k < kBlock ? depth - k : kBlock;
      for (int i = 0; i < here; ++i) {
        fetch(format, row + first + i + kColumns, col + k);  // the panel that this thread builds next lies below
        stretch(format, row + first + i, col + k, count, side[i]);
      }
      for (int j = 0; j < kVectors; ++j) {
        float* to = panels + k * kColumns + j * VL;
        std::int64_t i = 0;
        for (; i + VL <= count; i += VL) transpose(&side[j * VL][i], kBlock, to + i * kColumns, kColumns);
        for (; i < count; ++i) {
          for (int c = 0; c < VL; ++c) to[i * kColumns + c] = side[j * VL + c][i];
        }
      }
    }
  }
}

// Panels whose columns are stored columns: stretches of the rows, one below the other. Rows may lie a power of two apart,
// where no cache would hold what the next panels need; so what is fetched early is the rows just below.
template <class Format>
void straight_panels(const Format& format, std::int64_t col, int cols, std::int64_t row, std::int64_t depth, float* panels) {
  static_assert(kBlock == kPanelGroup && kBlock % kColumns == 0);
  constexpr int kRowsAhead = 32;
  const std::int64_t apart = depth * kColumns;
  for (std::int64_t k = 0; k < depth; ++k) {
    float* to = panels + k * kColumns;
    for (int c = 0; c < cols; c += kBlock, to += kBlock / kColumns * apart) {
      fetch(format, row + k + kRowsAhead, col + c);
      if (cols - c >= kBlock) {
        format.block(row + k, col + c, [&](vf v, int i) { store(to + i / kColumns * apart + i % kColumns, v); });
        continue;
      }
      float side[kBlock] = {};
      format.some(row + k, col + c, cols - c, side);
      for (int i = 0; i < (cols - c + kColumns - 1) / kColumns * kColumns; ++i) {
        to[i / kColumns * apart + i % kColumns] = side[i];
      }
    }
  }
}

void panels_forward(const lt_matrix& m, std::int64_t row, int rows, std::int64_t col, std::int64_t depth, float* panels) {
  with_format(m, [&](const auto& format) {
    if (m.transposed) {
      straight_panels(format, row, rows, col, depth, panels);
    } else {
      turned_panels(format, row, rows, col, depth, panels);
    }
  });
}

void panels_backward(const lt_matrix& m, std::int64_t col, int cols, std::int64_t row, std::int64_t depth, float* panels) {
  with_format(m, [&](const auto& format) {
    if (m.transposed) {
      turned_panels(format, col, cols, row, depth, panels);
    } else {
      straight_panels(format, col, cols, row, depth, panels);
    }
  });
}

void decode(const lt_matrix& m, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  with_format(m, [&](const auto& format) {
    for (std::int64_t k = 0; k < count; k += kBlock) {
      stretch(format, row, col + k, count - k < kBlock ? count - k : kBlock, out + k);
    }
  });
}

void tile(const Product& product) { choose_tile<kRows>(product); }

}  // namespace

LT_DEFINE_TABLE(LinearTable, linear) = {
    kRows, kColumns, kDepth, &pack_sliver, &panels_forward, &panels_backward, &tile, &decode,
};

}  // namespace LT_NAMESPACE
}  // namespace lt
