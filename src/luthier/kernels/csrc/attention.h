// Causal attention over segments of texts that lie end to end, with grouped queries, window, softcap and shared prefixes.
#pragma once
#include <cstdint>

namespace lt {

// Queries and keys are handled in tiles of kTile x kTile. Head sizes are multiples of 16, at most kMostHead.
constexpr int kTile = 64;
constexpr int kMostHead = 512;

struct AttentionShape {
  std::int64_t heads, kv_heads, size;
  float scale, softcap;  // softcap 0: none
  std::int64_t window;   // 0: none
  std::int64_t q_stride() const { return heads * size; }
  std::int64_t kv_stride() const { return kv_heads * size; }
};

// Up to kTile keys of one head: k and v are rows kv_stride apart; k_turned and v_turned the same, turned to [size][kTile].
struct KeyTile {
  const float *k, *v, *k_turned, *v_turned;
  std::int64_t count;
  std::int64_t shift;  // position of the query tile's first row minus the position of this tile's first key
};

// Up to kTile queries of one head, rows q_stride apart; lse and delta are `heads` apart.
struct QueryTile {
  const float* q;
  std::int64_t count;
  float* out;
  float* lse;
  const float *dout, *delta;
};

struct AttentionTable {
  // [count][size] rows kv_stride apart -> [size][kTile], absent keys zero up to a full vector.
  void (*turn)(const AttentionShape& shape, const float* rows, std::int64_t count, float* turned);
  // One query tile against its key tiles: out = softmax(scores) V, lse = log sum exp of the scores.
  void (*forward)(const AttentionShape& shape, const QueryTile& queries, const KeyTile* keys, std::int64_t tiles);
  // delta = sum over the head of dout * out, for `rows` rows of all heads.
  void (*delta)(const AttentionShape& shape, const float* dout, const float* out, std::int64_t rows, float* delta);
  // One query tile against one key tile; dq rows q_stride apart, dk and dv rows `size` apart; all are added to.
  void (*backward)(const AttentionShape& shape, const QueryTile& queries, const KeyTile& keys, float* dq, float* dk, float* dv);
};

}  // namespace lt
