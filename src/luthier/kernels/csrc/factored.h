// Products with a matrix in two factors: the table of what they need beside the tiles of linear.h.
#pragma once
#include "linear.h"

namespace lt {

// Here the weights lie in slivers and the tokens in panels, so that a tile holds features below each other: what the first
// product gives is a panel of the second as it stands, and outputs are put in any order by whole vectors.
struct FactoredTable {
  // Rows rows[0 ... count) of m, at most a sliver's, from column `col`: one sliver [depth][count]. `listed` rows, of which
  // those behind the first `count` are asked for early.
  void (*sliver_of_rows)(const lt_matrix& m, const std::int32_t* rows, int count, std::int64_t listed, std::int64_t col,
                         std::int64_t depth, float* sliver);
  // Columns col ... col + count of m, at most a group's, as slivers [depth][R] one behind the other; of the `depth` rows from
  // `row` those from `first` to `last` are filled in. `col` is a multiple of 32.
  void (*slivers_of_columns)(const lt_matrix& m, std::int64_t col, int count, std::int64_t row, std::int64_t depth,
                             std::int64_t first, std::int64_t last, float* slivers);
  // A full panel [depth][C] of C tokens, (C, depth), `stride` apart.
  void (*panel)(const float* x, std::int64_t stride, std::int64_t depth, float* panel);
  // y[t * ld + i] = rows[i][t] + bias[i] for `count` rows and so many tokens; bias may be null.
  void (*turn)(const float* const* rows, const float* bias, int count, int tokens, float* y, std::int64_t ld);
  int group;  // columns of `slivers_of_columns`: a multiple of a sliver's and of 32
};

}  // namespace lt
