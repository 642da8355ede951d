// A few tokens: each row of W is decoded once and multiplied with every token while it is in registers.
#pragma once
#include "linear.h"

namespace lt {

// y[t * ldy + i] = W[row + i] . x[t] + low[row + i] . inner[t] + bias[row + i] for i < rows, t < T.
// x and inner lie in blocks of 32 features, [block][T][32], the last one filled up with zeros: tokens whose rows are a
// power of two apart would fall on the same few lines of the first-level cache.
struct FewProduct {
  const lt_matrix* matrix;
  std::int64_t row, rows;
  const float* x;
  const float* sums;  // of each block of x, divided by the lanes of a vector, [T][blocks]
  std::int64_t T;
  const float* low;  // (all rows, rank), or null with rank 0
  const float* inner;
  std::int64_t rank;
  const float* bias;  // or null
  float* y;
  std::int64_t ldy;
};

struct FewTable {
  int lanes;  // of a vector
  void (*multiply)(const FewProduct& product);
};

}  // namespace lt
