// Packed attention: its entries, and which query tile meets which key tiles. Tiles are computed in attention_isa.cpp.
#include "attention_pack.h"

namespace lt {

namespace {

struct DeltaScratch {};
struct TilesScratch {};

// The key tiles that a query tile sees: its own span's, then those of each span before it.
std::int64_t collect(const Round& round, const Queries& of, std::int64_t row, std::int64_t count, std::int64_t kv_head,
                     KeyTile* tiles) {
  std::int64_t found = 0;
  for (const Span* keys = &round.pack.spans[of.span]; keys != nullptr; keys = round.pack.before(*keys)) {
    for (std::int64_t b = 0; b < keys->tiles(); ++b) {
      if (!round.pack.meets(of, row, count, *keys, b, tiles + found)) continue;
      round.point(tiles + found, *keys, b, kv_head);
      ++found;
    }
  }
  return found;
}

void forward(const Pack& pack, const float* q, const float* k, const float* v, float* out, float* lse, int threads) {
  const AttentionShape& s = pack.shape;
  std::vector<std::pair<const Queries*, std::int64_t>> tiles;
  for (const Queries& of : pack.queries) {
    for (std::int64_t row = of.begin; row < of.end; row += kTile) tiles.emplace_back(&of, row);
  }
  in_rounds(pack, k, v, 0, false, threads, [&](const Round& round) {
    const std::int64_t heads = round.count * pack.group();
    parallel_for(std::int64_t(tiles.size()) * heads, threads, [&](std::int64_t task) {
      const auto [of, row] = tiles[std::size_t(task / heads)];
      const std::int64_t head = round.first * pack.group() + task % heads, at = row * s.q_stride() + head * s.size;
      const std::int64_t count = std::min<std::int64_t>(kTile, of->end - row);
      KeyTile* keys = Scratch<TilesScratch>::get<KeyTile>(std::size_t(pack.key_tiles + 1));
      const std::int64_t found = collect(round, *of, row, count, head / pack.group(), keys);
      table(attention_tables).forward(s, {q + at, count, out + at, lse + row * s.heads + head, nullptr, nullptr}, keys, found);
    });
  });
}

bool fits(const lt_attention& a) {
  bool rising = a.segments >= 0 && a.starts != nullptr && a.parents != nullptr && a.starts[0] == 0;
  for (std::int64_t n = 0; rising && n < a.segments; ++n) {
    rising = a.starts[n] <= a.starts[n + 1] && a.parents[n] >= -1 && a.parents[n] < n;
  }
  for (std::int64_t i = 0; rising && a.rows != nullptr && i < a.queries; ++i) {
    rising = a.rows[i] >= (i == 0 ? 0 : a.rows[i - 1] + 1) && a.rows[i] < a.starts[a.segments];
  }
  return rising && a.queries >= 0 && a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0 && a.size % 16 == 0 &&
         a.size > 0 && a.size <= kMostHead && a.window >= 0;
}

// What has no rows has nothing to point at.
bool has_keys(const lt_attention& a) { return a.starts[a.segments] > 0; }
bool has_queries(const lt_attention& a) { return a.rows == nullptr ? has_keys(a) : a.queries > 0; }

}  // namespace
}  // namespace lt

LT_API int lt_attention_forward(const lt_attention* a, const float* q, const float* k, const float* v, float* out, float* lse,
                                int threads) {
  if (a == nullptr || !lt::fits(*a) || threads < 1) return LT_BAD_ARGUMENT;
  if ((lt::has_keys(*a) && lt_missing(k, v)) || (lt::has_queries(*a) && lt_missing(q, out, lse))) return LT_BAD_ARGUMENT;
  LT_GUARD({ lt::forward(lt::Pack(*a), q, k, v, out, lse, threads); })
}

LT_API int lt_attention_backward(const lt_attention* a, const float* dout, const float* q, const float* k, const float* v,
                                 const float* out, const float* lse, float* dq, float* dk, float* dv, int threads) {
  if (a == nullptr || !lt::fits(*a) || threads < 1) return LT_BAD_ARGUMENT;
  if (lt::has_keys(*a) && lt_missing(k, v, dk, dv)) return LT_BAD_ARGUMENT;
  if (lt::has_queries(*a) && lt_missing(dout, q, out, lse, dq)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const lt::Pack pack(*a);
    float* delta = lt::Scratch<lt::DeltaScratch>::get<float>(std::size_t(pack.rows * a->heads));
    lt::parallel_for((pack.rows + 63) / 64, threads, [&](std::int64_t task) {
      const std::int64_t row = task * 64, count = std::min<std::int64_t>(64, pack.rows - row);
      lt::table(lt::attention_tables)
          .delta(pack.shape, dout + row * pack.shape.q_stride(), out + row * pack.shape.q_stride(), count,
                 delta + row * a->heads);
    });
    lt::attention_backward(pack, {q, dout, lse, delta, dq, dk, dv}, k, v, threads);
  })
}
