// A pack as attention goes through it: its segments, the key tiles that a query tile meets, and rounds of key heads whose turned
// tiles are held at once. For attention.cpp and attention_backward.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

// q, out: (T, heads, size); k, v: (T, kv_heads, size); lse: (T, heads). Segment n is [starts[n], starts[n + 1]) and goes on
// where segment parents[n] < n ends, or begins a text where parents[n] is -1; it attends to itself and to all before it.
// With rows, q, out and lse are of the tokens rows[0] < rows[1] < ... only, `queries` of them; without, of all.
struct lt_attention {
  std::int64_t heads, kv_heads, size;
  float scale, softcap;
  std::int64_t window, segments;
  const std::int64_t *starts, *parents;
  std::int64_t queries;
  const std::int64_t* rows;
};

namespace lt {

LT_DECLARE_TABLES(AttentionTable, attention)

struct KeysScratch {};
struct ValuesScratch {};

// Turned keys and gradient parts of so many bytes at once; heads are handled in as many rounds as that takes.
constexpr std::int64_t kRoundBytes = std::int64_t(48) << 20;

// A segment: rows [begin, end) of the pack.
struct Span {
  std::int64_t begin, end;
  std::int64_t first_tile;  // among all key tiles of a head
  std::int64_t position;    // of its first token: 0, or behind its parent's last
  std::int64_t parent;      // -1: none
  std::int64_t tiles() const { return (end - begin + kTile - 1) / kTile; }
};

// Neighbouring tokens of one segment that are queries: rows [begin, end) of q.
struct Queries {
  std::int64_t begin, end;
  std::int64_t position;  // of the first, in its text
  std::size_t span;
};

class Pack {
 public:
  explicit Pack(const lt_attention& a)
      : shape{a.heads, a.kv_heads, a.size, a.scale, a.softcap, a.window},
        tokens(a.starts[a.segments]),
        rows(a.rows == nullptr ? tokens : a.queries) {
    spans.reserve(std::size_t(a.segments));
    for (std::int64_t n = 0; n < a.segments; ++n) {
      const Span* above = a.parents[n] < 0 ? nullptr : &spans[std::size_t(a.parents[n])];
      const std::int64_t position = above == nullptr ? 0 : above->position + above->end - above->begin;
      spans.push_back({a.starts[n], a.starts[n + 1], key_tiles, position, a.parents[n]});
      key_tiles += spans.back().tiles();
      first_queries.push_back(queries.size());
      add_queries(a.rows);
    }
    first_queries.push_back(queries.size());
  }

  const AttentionShape shape;
  const std::int64_t tokens, rows;  // of k and v; of q
  std::vector<Span> spans;
  std::vector<Queries> queries;            // of one span after the other
  std::vector<std::size_t> first_queries;  // those of span n: [first_queries[n], first_queries[n + 1])
  std::int64_t key_tiles = 0;

  std::int64_t group() const { return shape.heads / shape.kv_heads; }
  // The segment that `span` goes on from, if there is one.
  const Span* before(const Span& span) const { return span.parent < 0 ? nullptr : &spans[std::size_t(span.parent)]; }

  // Tile b of `keys` as rows [row, row + count) of q, all in `of`, meet it; false if none of them sees any of it.
  bool meets(const Queries& of, std::int64_t row, std::int64_t count, const Span& keys, std::int64_t b, KeyTile* tile) const {
    tile->count = std::min<std::int64_t>(kTile, keys.end - keys.begin - b * kTile);
    tile->shift = of.position + row - of.begin - keys.position - b * kTile;
    const bool behind = shape.window > 0 && tile->shift - shape.window + 1 > tile->count - 1;
    return tile->shift + count > 0 && !behind;
  }

 private:
  // The queries of the span made last: without rows all its tokens, else the runs of those that are named.
  void add_queries(const std::int64_t* named) {
    const Span& span = spans.back();
    const std::size_t own = spans.size() - 1;
    if (named == nullptr) {
      if (span.end > span.begin) queries.push_back({span.begin, span.end, span.position, own});
      return;
    }
    std::int64_t row = queries.empty() ? 0 : queries.back().end;
    while (row < rows && named[row] < span.end) {
      const std::int64_t begin = row, first = named[row];
      while (row < rows && named[row] < span.end && named[row] == first + row - begin) ++row;
      queries.push_back({begin, row, span.position + first - span.begin, own});
    }
  }
};

// Heads [first, first + count) of the keys, whose turned tiles are held now.
struct Round {
  const Pack& pack;
  const float *k, *v;
  std::int64_t first, count;
  float *k_turned, *v_turned;

  std::int64_t turned_size() const { return pack.shape.size * kTile; }

  void point(KeyTile* tile, const Span& keys, std::int64_t b, std::int64_t kv_head) const {
    const std::int64_t row = (keys.begin + b * kTile) * pack.shape.kv_stride() + kv_head * pack.shape.size;
    const std::int64_t at = ((kv_head - first) * pack.key_tiles + keys.first_tile + b) * turned_size();
    tile->k = k + row;
    tile->v = v + row;
    tile->k_turned = k_turned + at;
    tile->v_turned = v_turned == nullptr ? nullptr : v_turned + at;
  }

  // Turns every key tile (and value tile, for gradients) of these heads.
  void turn(int threads) const {
    const AttentionTable& kernels = table(attention_tables);
    parallel_for(std::int64_t(pack.spans.size()) * count, threads, [&](std::int64_t task) {
      const Span& span = pack.spans[std::size_t(task / count)];
      KeyTile tile;
      for (std::int64_t b = 0; b < span.tiles(); ++b) {
        point(&tile, span, b, first + task % count);
        const std::int64_t rows = std::min<std::int64_t>(kTile, span.end - span.begin - b * kTile);
        kernels.turn(pack.shape, tile.k, rows, const_cast<float*>(tile.k_turned));
        if (v_turned != nullptr) kernels.turn(pack.shape, tile.v, rows, const_cast<float*>(tile.v_turned));
      }
    });
  }
};

// Runs fn on rounds of key heads, as many at once as the memory named above allows.
template <class Fn>
void in_rounds(const Pack& pack, const float* k, const float* v, std::int64_t bytes_per_head, bool turn_values, int threads,
               Fn&& fn) {
  const std::int64_t turned = pack.key_tiles * pack.shape.size * kTile;
  const std::int64_t each = turned * 4 * (turn_values ? 2 : 1) + bytes_per_head;
  const std::int64_t most =
      std::max<std::int64_t>(1, std::min(pack.shape.kv_heads, kRoundBytes / std::max<std::int64_t>(1, each)));
  float* k_turned = Scratch<KeysScratch>::get<float>(std::size_t(turned * most));
  float* v_turned = turn_values ? Scratch<ValuesScratch>::get<float>(std::size_t(turned * most)) : nullptr;
  for (std::int64_t head = 0; head < pack.shape.kv_heads; head += most) {
    const Round round{pack, k, v, head, std::min(most, pack.shape.kv_heads - head), k_turned, v_turned};
    round.turn(threads);
    fn(round);
  }
}

// What the gradient is made from, and where it goes: arguments of lt_attention_backward, with delta = sum of dout * out.
struct AttentionGradients {
  const float *q, *dout, *lse, *delta;
  float *dq, *dk, *dv;
};

void attention_backward(const Pack& pack, const AttentionGradients& g, const float* k, const float* v, int threads);

}  // namespace lt
