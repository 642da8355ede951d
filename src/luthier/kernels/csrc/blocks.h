// What the products of linear.cpp and factors.cpp are made of: blocks of packed activations against panels.
#pragma once
#include <algorithm>

#include "linear.h"

namespace lt {

// Slivers of one block, and a thread's panels: linear layer and head, which never run at once in a thread, share their room.
struct SliverScratch {};
struct PanelScratch {};

inline std::int64_t up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// The length of equal pieces, multiples of `unit`, no longer than `most`.
inline std::int64_t piece(std::int64_t n, std::int64_t most, std::int64_t unit) {
  const std::int64_t pieces = (n + most - 1) / most;
  return std::min(most, up((n + pieces - 1) / pieces, unit));
}

inline lt_matrix dense(const float* data, std::int64_t rows, std::int64_t cols) {
  lt_matrix m{};
  m.kind = LT_F32;
  m.rows = rows;
  m.cols = cols;
  m.data = data;
  return m;
}

// Columns of a task whose panels are stretches of stored rows: wide enough to read rows at speed where there are columns
// enough to share between threads.
inline std::int64_t wide_columns(std::int64_t columns) { return kPanelGroup * (columns >= 2048 ? 4 : columns >= 1024 ? 2 : 1); }

// A block of activations, packed: `rows` rows in slivers.
struct Packed {
  const LinearTable& kernels;
  std::int64_t rows;
  float* slivers;

  std::int64_t count() const { return (rows + kernels.rows - 1) / kernels.rows; }
  int rows_of(std::int64_t i) const { return int(std::min<std::int64_t>(kernels.rows, rows - i * kernels.rows)); }
  float* sliver(std::int64_t i, std::int64_t depth) const { return slivers + i * kernels.rows * depth; }
};

// Which part of which layer's contraction one block covers.
struct Block {
  const float* activations;  // (rows, depth), `stride` apart
  std::int64_t stride, depth;
  bool first, last;          // block of this layer's contraction
};

// The low-rank side of one layer during a block: its inner result (rows, rank), and the panel of the factor it comes from.
struct Low {
  std::int64_t rank = 0;
  float scaling = 0;
  float* inner = nullptr;
  const float* factor = nullptr;
  float* slivers = nullptr;  // the inner result packed, once it is complete
};

// All slivers of the block against panels of `columns` columns, of which the result's columns begin at c.
inline void multiply(const Packed& packed, const Block& block, const Low& low, const float* panels, const float* low_panels,
                     float* c, std::int64_t ldc, int columns, bool accumulate, const float* bias) {
  const LinearTable& k = packed.kernels;
  const std::int64_t low_depth = block.last ? low.rank : 0;
  for (int j = 0; j < columns; j += k.columns) {
    const int here = std::min(k.columns, columns - j);
    const float* panel = panels + j * block.depth;
    const float* low_panel = low_depth > 0 ? low_panels + j * low_depth : nullptr;
    for (std::int64_t i = 0; i < packed.count(); ++i) {
      const float* low_sliver = low_depth > 0 ? low.slivers + i * k.rows * low_depth : nullptr;
      k.tile({packed.sliver(i, block.depth), panel, block.depth, low_sliver, low_panel, low_depth, c + i * k.rows * ldc + j,
              ldc, packed.rows_of(i), here, accumulate, bias == nullptr ? nullptr : bias + j});
    }
  }
}

}  // namespace lt
