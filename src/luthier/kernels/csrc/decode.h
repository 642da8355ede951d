// One step of a decoder with cached keys and values: its C structures, and the kernels that only it has.
#pragma once
#include <cstdint>

#include "linear.h"

// x / sqrt(mean(x^2) + eps) * (weight + plus); no norm where weight is null.
struct lt_norm {
  const float* weight;
  float eps, plus;
};

// A decoder layer. Of the linear layers matrix, factors, bias, A, B, rank and scaling are read; no dense matrix lies
// transposed.
struct lt_decoder_layer {
  lt_norm norm, query_norm, key_norm, attention_post, mlp_norm, mlp_post;
  lt_linear projections[3];  // q, k, v, or the one that gives all three side by side
  lt_linear output;
  lt_linear gates[2];  // gate, up, or the one that gives both side by side
  lt_linear down;
  std::int32_t projection_count, gate_count;
  std::int32_t gate;    // a Gate of elementwise.h
  std::int32_t rotary;  // which of the step's tables
  float scale, softcap;
  std::int64_t window;  // 0: none
};

struct lt_decoder {
  const lt_decoder_layer* layers;
  std::int64_t layer_count, hidden, heads, kv_heads, size;  // size: of a head
  lt_norm norm;
  lt_linear head;  // without a matrix: no logits
};

// cos and sin of positions 0 ... length - 1, (length, size); size <= that of a head.
struct lt_rotary {
  const float *cos, *sin;
  std::int64_t length, size;
};

// T tokens, each of some text at some position. Pages hold keys and values of lt::kPage positions of a text in all layers:
// of each layer [kv_heads][size][kPage] keys, then [kv_heads][kPage][size] values. Page n of token t's text is
// pages[t * most_pages + n]. Several tokens of one text may come together, in any order.
struct lt_step {
  std::int64_t T;
  float* hidden;  // (T, hidden), embeddings; overwritten
  const std::int64_t* positions;
  float* const* pages;
  std::int64_t most_pages;
  const lt_rotary* rotary;
  std::int64_t rotary_count;
  const std::int64_t* rows;  // S of the T tokens
  std::int64_t S;
  float* normed;  // (S, hidden) after the final norm
  float* logits;  // (S, vocabulary), or null
};

namespace lt {

constexpr int kPage = 64;

// Whether a step may be run: no pointer missing, all shapes fitting, every position in a page (decode_checks.cpp).
bool step_fits(const lt_decoder* decoder, const lt_step* step);

// A token in fixed point: x[k] = scale q[k] with |q| <= 32767 and one scale for 32, so |error| <= largest of its 32 / 65534.
// Blocks lie in pairs, so that two are multiplied in one vector: the first 16 of both, then the last 16 of both.
struct FixedToken {
  std::int16_t* q;
  float* common;  // of each block its scale, then scale times the sum of q, divided by 8, the lanes it is added to
  // Where the 16 values from value i, 0 or 16, of a block lie.
  std::int16_t* sixteen(std::int64_t block, int i) const { return q + block / 2 * 64 + block % 2 * 16 + 2 * i; }
  float scale(std::int64_t block) const { return common[2 * block]; }
  float sum(std::int64_t block) const { return common[2 * block + 1]; }
};

// y[i] = W[row + i] . x + low[row + i] . inner + bias[row + i], for i < rows. W: blocks of a GGUF file.
struct FixedProduct {
  const lt_matrix* matrix;
  std::int64_t row, rows;
  FixedToken x;
  const float* low;  // (all rows, rank), or null with rank 0
  const float* inner;
  std::int64_t rank;
  const float* bias;  // or null
  float* y;
};

// What one token sees of one key head: positions [first, end) of its text.
struct CachedHead {
  float* const* pages;
  std::int64_t keys, values;  // where this head's begin in a page, in floats
  std::int64_t first, end, size;
  float scale, softcap;  // softcap 0: none
};

struct DecodeTable {
  // Fills x's arrays from `count` values, a multiple of 32 and the last ones zero where a row is shorter. False: NaN or Inf.
  bool (*fix)(const float* values, std::int64_t count, const FixedToken& x);
  void (*multiply)(const FixedProduct& product);
  // out = softmax(cap(scale q K^T)) V for `heads` query heads, rows of q and out.
  void (*attend)(const CachedHead& head, const float* q, std::int64_t heads, float* out);
};

}  // namespace lt
