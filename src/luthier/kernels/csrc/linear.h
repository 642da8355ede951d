// The frozen linear layer: the C structures, and the table of its kernels.
#pragma once
#include <cstdint>

#include "luthier.h"

// How a matrix is stored. Numbers are part of the ABI.
enum lt_kind : std::int32_t {
  LT_F32 = 0, LT_BF16 = 1, LT_F16 = 2, LT_NF4 = 3,
  LT_Q4_0 = 4, LT_Q4_1 = 5, LT_Q5_0 = 6, LT_Q5_1 = 7, LT_Q8_0 = 8, LT_Q4_K = 9, LT_Q5_K = 10, LT_Q6_K = 11,
  LT_KINDS = 12,
};

// W: rows (out_features) x cols (in_features). Dense kinds may lie transposed in memory, (cols, rows).
// NF4: flat row-major nibbles, the even index in the high one; a scale for 64 weights, either absmax float32, or bytes
// with scale = nested_map[byte] * nested_absmax[block / 256] + offset. code: the 16 values.
struct lt_matrix {
  std::int32_t kind;
  std::int32_t transposed;
  std::int64_t rows, cols;
  const void* data;
  const float* absmax;
  const std::uint8_t* absmax_bytes;
  const float* nested_absmax;
  const float* nested_map;
  const float* code;
  float offset;
};

// W = L R beside or in place of a stored matrix: y += (x R^T) L^T. right: (rank, cols), left: (rows, rank). With places, of
// each output: column places[o] of x R^T where that is below the rank, else column places[o] - rank of (x R^T) L^T.
struct lt_factors {
  const lt_matrix *right, *left;
  const std::int32_t* places;  // (outputs,), or null
  std::int64_t outputs;        // with places
};

// One layer of a group: y = x W^T + bias + scaling (x A^T) B^T. All float32, contiguous; absent parts are null, rank 0.
// A: (rank, cols), B: (rows, rank), y and dy: (T, rows), u = x A^T and v = dy B: (T, rank).
struct lt_linear {
  const lt_matrix* matrix;
  const float *bias, *A, *B;
  std::int64_t rank;
  float scaling;
  float *y, *u;
  const float* dy;
  float* v;
  const lt_factors* factors;  // read by the decoder alone, where matrix may then be null
};

namespace lt {

// Whether an entry may read the matrix: a known kind, the pointers that it needs, rows of whole blocks.
bool fits(const lt_matrix* matrix);
// The same for `count` layers of one input, and where they write: y and u forward; dy and v backward.
bool fit(const lt_linear* parts, int count, bool forward);

// One tile: two parts of the contraction, the matrix and the low-rank term, of which the second may be empty.
struct Product {
  const float *sliver, *panel;
  std::int64_t depth;
  const float *low_sliver, *low_panel;
  std::int64_t low_depth;
  float* c;
  std::int64_t ldc;
  int rows, columns;
  bool accumulate;    // add to what c holds
  const float* bias;  // added to every row, or null
};

// Columns of panels are counted in these: the 32 weights that every format decodes together.
constexpr int kPanelGroup = 32;
// Up to so many tokens are multiplied row by row of W (few.h); from five on tiles are faster, measured for every storage.
constexpr std::int64_t kFewTokens = 4;

// Kernels work on blocks: rows of activations packed in slivers, panels of the matrix, tiles of the result.
struct LinearTable {
  int rows;     // of a full sliver
  int columns;  // of a panel; divides kPanelGroup
  int depth;    // longest stretch of the contraction that is packed at once
  // scale * x, (rows, depth) with these strides -> one sliver [depth][rows].
  void (*pack_sliver)(const float* x, std::int64_t row_stride, std::int64_t depth_stride, int rows, std::int64_t depth,
                      float scale, float* sliver);
  // Panels [depth][columns] for y = x W^T: their columns are W's rows from `row`, depth is W's columns from `col`.
  void (*panels_forward)(const lt_matrix& m, std::int64_t row, int rows, std::int64_t col, std::int64_t depth, float* panels);
  // Panels [depth][columns] for dx = dy W: their columns are W's columns from `col`, depth is W's rows from `row`.
  void (*panels_backward)(const lt_matrix& m, std::int64_t col, int cols, std::int64_t row, std::int64_t depth, float* panels);
  // c (rows x columns, ldc apart) = sliver times panel + low_sliver times low_panel, + bias or what c holds.
  void (*tile)(const Product& product);
  // out: `count` weights of row `row` from column `col`, which is a multiple of 32.
  void (*decode)(const lt_matrix& m, std::int64_t row, std::int64_t col, std::int64_t count, float* out);
};

}  // namespace lt
