// Packed attention: which query tile meets which key tiles, and who adds to what. Tiles are computed in attention_isa.cpp.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

// q, out: (T, heads, size); k, v: (T, kv_heads, size); lse: (T, heads). Segment n is [starts[n], starts[n + 1]) and goes on
// where segment parents[n] < n ends, or begins a text where parents[n] is -1; it attends to itself and to all before it.
struct lt_attention {
  std::int64_t heads, kv_heads, size;
  float scale, softcap;
  std::int64_t window, segments;
  const std::int64_t *starts, *parents;
};

namespace lt {

LT_DECLARE_TABLES(AttentionTable, attention)

namespace {

struct KeysScratch {};
struct ValuesScratch {};
struct PartsScratch {};
struct DeltaScratch {};
struct TilesScratch {};

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

class Pack {
 public:
  explicit Pack(const lt_attention& a)
      : shape{a.heads, a.kv_heads, a.size, a.scale, a.softcap, a.window}, tokens(a.starts[a.segments]) {
    spans.reserve(std::size_t(a.segments));
    for (std::int64_t n = 0; n < a.segments; ++n) {
      const Span* above = a.parents[n] < 0 ? nullptr : &spans[std::size_t(a.parents[n])];
      const std::int64_t position = above == nullptr ? 0 : above->position + above->end - above->begin;
      spans.push_back({a.starts[n], a.starts[n + 1], key_tiles, position, a.parents[n]});
      key_tiles += spans.back().tiles();
    }
  }

  const AttentionShape shape;
  const std::int64_t tokens;
  std::vector<Span> spans;
  std::int64_t key_tiles = 0;

  std::int64_t group() const { return shape.heads / shape.kv_heads; }
  // The segment that `span` goes on from, if there is one.
  const Span* before(const Span& span) const { return span.parent < 0 ? nullptr : &spans[std::size_t(span.parent)]; }

  // Tile b of `keys` as queries [row, row + count) of `span` meet it; false if none of them sees any of it.
  bool meets(const Span& span, std::int64_t row, std::int64_t count, const Span& keys, std::int64_t b, KeyTile* tile) const {
    tile->count = std::min<std::int64_t>(kTile, keys.end - keys.begin - b * kTile);
    tile->shift = span.position + row - span.begin - keys.position - b * kTile;
    const bool behind = shape.window > 0 && tile->shift - shape.window + 1 > tile->count - 1;
    return tile->shift + count > 0 && !behind;
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

// The key tiles that a query tile sees: its own span's, then those of each span before it.
std::int64_t collect(const Round& round, const Span& span, std::int64_t row, std::int64_t count, std::int64_t kv_head,
                     KeyTile* tiles) {
  std::int64_t found = 0;
  for (const Span* keys = &span; keys != nullptr; keys = round.pack.before(*keys)) {
    for (std::int64_t b = 0; b < keys->tiles(); ++b) {
      if (!round.pack.meets(span, row, count, *keys, b, tiles + found)) continue;
      round.point(tiles + found, *keys, b, kv_head);
      ++found;
    }
  }
  return found;
}

void forward(const Pack& pack, const float* q, const float* k, const float* v, float* out, float* lse, int threads) {
  const AttentionShape& s = pack.shape;
  std::vector<std::pair<const Span*, std::int64_t>> tiles;
  for (const Span& span : pack.spans) {
    for (std::int64_t b = 0; b < span.tiles(); ++b) tiles.emplace_back(&span, span.begin + b * kTile);
  }
  in_rounds(pack, k, v, 0, false, threads, [&](const Round& round) {
    const std::int64_t heads = round.count * pack.group();
    parallel_for(std::int64_t(tiles.size()) * heads, threads, [&](std::int64_t task) {
      const auto [span, row] = tiles[std::size_t(task / heads)];
      const std::int64_t head = round.first * pack.group() + task % heads, at = row * s.q_stride() + head * s.size;
      const std::int64_t count = std::min<std::int64_t>(kTile, span->end - row);
      KeyTile* keys = Scratch<TilesScratch>::get<KeyTile>(std::size_t(pack.key_tiles + 1));
      const std::int64_t found = collect(round, *span, row, count, head / pack.group(), keys);
      table(attention_tables).forward(s, {q + at, count, out + at, lse + row * s.heads + head, nullptr, nullptr}, keys, found);
    });
  });
}

struct Gradients {
  const float *q, *dout, *lse, *delta;
  float *dq, *dk_parts, *dv_parts;  // parts: (heads of the round, T, size), one for each query head
};

// All query tiles of `span` against all key tiles of `keys`, for one head; adds to dq and to the head's parts.
void meet(const Round& round, const Gradients& g, const Span& span, const Span& keys, std::int64_t head) {
  const Pack& pack = round.pack;
  const AttentionShape& s = pack.shape;
  const std::int64_t part = (head - round.first * pack.group()) * pack.tokens * s.size;
  for (std::int64_t b = 0; b < keys.tiles(); ++b) {
    const std::int64_t key_at = part + (keys.begin + b * kTile) * s.size;
    for (std::int64_t row = span.begin; row < span.end; row += kTile) {
      const std::int64_t count = std::min<std::int64_t>(kTile, span.end - row), at = row * s.q_stride() + head * s.size;
      KeyTile tile;
      if (!pack.meets(span, row, count, keys, b, &tile)) continue;
      round.point(&tile, keys, b, head / pack.group());
      const std::int64_t scalar = row * s.heads + head;
      const QueryTile queries{g.q + at, count, nullptr, const_cast<float*>(g.lse) + scalar, g.dout + at, g.delta + scalar};
      table(attention_tables).backward(s, queries, tile, g.dq + at, g.dk_parts + key_at, g.dv_parts + key_at);
    }
  }
}

void zero_rows(float* rows, std::int64_t stride, std::int64_t count, std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) std::memset(rows + i * stride, 0, std::size_t(size) * sizeof(float));
}

// dk, dv of the round's key heads: the parts of each group's query heads, added in order.
void add_groups(const Round& round, const Gradients& g, float* dk, float* dv, int threads) {
  const AttentionShape& s = round.pack.shape;
  const std::int64_t tokens = round.pack.tokens, group = round.pack.group();
  parallel_for(tokens, threads, [&](std::int64_t row) {
    for (std::int64_t head = 0; head < round.count; ++head) {
      const std::int64_t to = row * s.kv_stride() + (round.first + head) * s.size;
      for (std::int64_t d = 0; d < s.size; ++d) {
        float k_sum = 0, v_sum = 0;
        for (std::int64_t member = 0; member < group; ++member) {
          const std::int64_t from = ((head * group + member) * tokens + row) * s.size + d;
          k_sum += g.dk_parts[from];
          v_sum += g.dv_parts[from];
        }
        dk[to + d] = k_sum;
        dv[to + d] = v_sum;
      }
    }
  });
}

// First every span with itself, span by span and head by head at once; then each with those before it, head by head, since
// all that share one add to its dk and dv. The order of every sum is fixed.
void backward(const Pack& pack, Gradients g, const float* k, const float* v, float* dk, float* dv, int threads) {
  const AttentionShape& s = pack.shape;
  const std::int64_t part = pack.group() * pack.tokens * s.size;
  in_rounds(pack, k, v, part * 8, true, threads, [&](const Round& round) {
    const std::int64_t heads = round.count * pack.group(), first = round.first * pack.group();
    float* parts = Scratch<PartsScratch>::get<float>(std::size_t(2 * part * round.count));
    g.dk_parts = parts;
    g.dv_parts = parts + part * round.count;
    parallel_for(std::int64_t(pack.spans.size()) * heads, threads, [&](std::int64_t task) {
      const Span& span = pack.spans[std::size_t(task / heads)];
      const std::int64_t head = task % heads, rows = span.end - span.begin, at = (head * pack.tokens + span.begin) * s.size;
      zero_rows(g.dq + span.begin * s.q_stride() + (first + head) * s.size, s.q_stride(), rows, s.size);
      zero_rows(g.dk_parts + at, s.size, rows, s.size);
      zero_rows(g.dv_parts + at, s.size, rows, s.size);
      meet(round, g, span, span, first + head);
    });
    parallel_for(heads, threads, [&](std::int64_t head) {
      for (const Span& span : pack.spans) {
        for (const Span* keys = pack.before(span); keys != nullptr; keys = pack.before(*keys)) {
          meet(round, g, span, *keys, first + head);
        }
      }
    });
    add_groups(round, g, dk, dv, threads);
  });
}

bool fits(const lt_attention& a) {
  bool rising = a.segments >= 0 && a.starts != nullptr && a.parents != nullptr && a.starts[0] == 0;
  for (std::int64_t n = 0; rising && n < a.segments; ++n) {
    rising = a.starts[n] <= a.starts[n + 1] && a.parents[n] >= -1 && a.parents[n] < n;
  }
  return rising && a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0 && a.size % 16 == 0 && a.size > 0 &&
         a.size <= kMostHead && a.window >= 0;
}

// An empty pack has no rows to point at.
bool is_empty(const lt_attention& a) { return a.starts[a.segments] == 0; }

}  // namespace
}  // namespace lt

LT_API int lt_attention_forward(const lt_attention* a, const float* q, const float* k, const float* v, float* out, float* lse,
                                int threads) {
  if (a == nullptr || !lt::fits(*a) || threads < 1) return LT_BAD_ARGUMENT;
  if (!lt::is_empty(*a) && lt_missing(q, k, v, out, lse)) return LT_BAD_ARGUMENT;
  LT_GUARD({ lt::forward(lt::Pack(*a), q, k, v, out, lse, threads); })
}

LT_API int lt_attention_backward(const lt_attention* a, const float* dout, const float* q, const float* k, const float* v,
                                 const float* out, const float* lse, float* dq, float* dk, float* dv, int threads) {
  if (a == nullptr || !lt::fits(*a) || threads < 1) return LT_BAD_ARGUMENT;
  if (!lt::is_empty(*a) && lt_missing(dout, q, k, v, out, lse, dq, dk, dv)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const lt::Pack pack(*a);
    float* delta = lt::Scratch<lt::DeltaScratch>::get<float>(std::size_t(pack.tokens * a->heads));
    lt::parallel_for((pack.tokens + 63) / 64, threads, [&](std::int64_t task) {
      const std::int64_t row = task * 64, count = std::min<std::int64_t>(64, pack.tokens - row);
      lt::table(lt::attention_tables)
          .delta(pack.shape, dout + row * pack.shape.q_stride(), out + row * pack.shape.q_stride(), count,
                 delta + row * a->heads);
    });
    lt::backward(pack, {q, dout, lse, delta, dq, nullptr, nullptr}, k, v, dk, dv, threads);
  })
}
