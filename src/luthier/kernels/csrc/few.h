// A few tokens: a row of W is decoded once and multiplied with several of them, up to four while it is in registers (three as
// two and one), more from the nearest cache.
#pragma once
#include "linear.h"

namespace lt {

// Up to so many tokens lie side by side.
constexpr std::int64_t kFewGroup = 4;

// x and inner lie in groups of four tokens, the last group of those that are left, and in each in blocks of 32 features,
// [block][tokens of the group][32], the last block filled up with zeros: tokens whose rows are a power of two apart would fall
// on the same few lines of the first-level cache.
// Where the 32 features of a block of token t begin, of T tokens in so many blocks. Static, since *_isa.cpp files include it.
static inline std::int64_t few_place(std::int64_t t, std::int64_t T, std::int64_t block, std::int64_t blocks) {
  const std::int64_t first = t / kFewGroup * kFewGroup, group = T - first < kFewGroup ? T - first : kFewGroup;
  return (first * blocks + block * group + t - first) * kPanelGroup;
}

// y[t * ldy + i] = W[row + i] . x[t] + low[row + i] . inner[t] + bias[row + i] for i < rows, t < T.
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
  float* decoded;  // room for FewTable::rows rows of W, each of whole blocks, with more than kFewGroup tokens
};

struct FewTable {
  int lanes;  // of a vector
  int rows;   // that are decoded at once
  void (*multiply)(const FewProduct& product);
};

}  // namespace lt
