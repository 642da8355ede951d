// The gradients of packed attention: who adds to what, and in which order.
#include <cstring>

#include "attention_pack.h"

namespace lt {

namespace {

struct PartsScratch {};
struct KeyTileScratch {};

// Where dk and dv of one head lie: rows `stride` apart.
struct KeyGradients {
  float *dk, *dv;
  std::int64_t stride;
};

void copy_rows(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride, std::int64_t count,
               std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, std::size_t(size) * 4);
}

// The queries [from, end), by the heads [head, last_head) of one group, against the keys of `keys`; adds to dq,
// and adds to dk and dv or, with `begin`, writes them. Those of a tile stay in the nearest cache while all that see it are
// gone through.
void meet(const Round& round, const AttentionGradients& g, const Queries* from, const Queries* end, const Span& keys,
          std::int64_t head, std::int64_t last_head, const KeyGradients& to, bool begin) {
  const Pack& pack = round.pack;
  const AttentionShape& s = pack.shape;
  float* tile_dk = Scratch<KeyTileScratch>::get<float>(std::size_t(2 * kTile * s.size));
  float* tile_dv = tile_dk + kTile * s.size;
  for (std::int64_t b = 0; b < keys.tiles(); ++b) {
    const std::int64_t first = keys.begin + b * kTile, rows = std::min<std::int64_t>(kTile, keys.end - first);
    if (begin) {
      std::memset(tile_dk, 0, std::size_t(2 * kTile * s.size) * sizeof(float));
    } else {
      copy_rows(to.dk + first * to.stride, to.stride, tile_dk, s.size, rows, s.size);
      copy_rows(to.dv + first * to.stride, to.stride, tile_dv, s.size, rows, s.size);
    }
    for (std::int64_t h = head; h < last_head; ++h) {
      for (const Queries* of = from; of != end; ++of) {
        for (std::int64_t row = of->begin; row < of->end; row += kTile) {
          const std::int64_t count = std::min<std::int64_t>(kTile, of->end - row), at = row * s.q_stride() + h * s.size;
          KeyTile tile;
          if (!pack.meets(*of, row, count, keys, b, &tile)) continue;
          round.point(&tile, keys, b, h / pack.group());
          const std::int64_t scalar = row * s.heads + h;
          const QueryTile queries{g.q + at, count, nullptr, const_cast<float*>(g.lse) + scalar, g.dout + at, g.delta + scalar};
          table(attention_tables).backward(s, queries, tile, g.dq + at, tile_dk, tile_dv);
        }
      }
    }
    copy_rows(tile_dk, s.size, to.dk + first * to.stride, to.stride, rows, s.size);
    copy_rows(tile_dv, s.size, to.dv + first * to.stride, to.stride, rows, s.size);
  }
}

// Parts of dk and dv, one for each query head of a round: (heads of the round, T, size) each.
struct Parts {
  float *dk, *dv;
  std::int64_t tokens, size;
  KeyGradients of(std::int64_t head) const { return {dk + head * tokens * size, dv + head * tokens * size, size}; }
};

// dk, dv of the round's key heads for `span`: the parts of each group's query heads, in order, added to what is there or,
// with `begin`, to nothing.
void add_parts(const Round& round, const AttentionGradients& g, const Parts& parts, const Span& span, bool begin, int threads) {
  const AttentionShape& s = round.pack.shape;
  const std::int64_t group = round.pack.group();
  parallel_for(span.end - span.begin, threads, [&](std::int64_t task) {
    const std::int64_t row = span.begin + task;
    for (std::int64_t head = 0; head < round.count; ++head) {
      const std::int64_t to = row * s.kv_stride() + (round.first + head) * s.size;
      for (float* const total : {g.dk + to, g.dv + to}) {
        if (begin) std::memset(total, 0, std::size_t(s.size) * sizeof(float));
        for (std::int64_t member = head * group; member < (head + 1) * group; ++member) {
          const KeyGradients part = parts.of(member);
          const float* from = (total == g.dk + to ? part.dk : part.dv) + row * s.size;
          for (std::int64_t d = 0; d < s.size; ++d) total[d] += from[d];
        }
      }
    }
  });
}

// The queries of each span's descendants, in order. Without a window they see all of its keys, wherever they stand, so
// neighbours are taken together: short runs fill the tiles.
std::vector<std::vector<Queries>> descendants(const Pack& pack) {
  std::vector<std::vector<Queries>> found(pack.spans.size());
  for (const Queries& of : pack.queries) {
    for (const Span* above = pack.before(pack.spans[of.span]); above != nullptr; above = pack.before(*above)) {
      std::vector<Queries>& below = found[std::size_t(above - pack.spans.data())];
      if (pack.shape.window == 0 && !below.empty() && below.back().end == of.begin) {
        below.back().end = of.end;
      } else {
        below.push_back(of);
      }
    }
  }
  return found;
}

// Whether the spans with themselves make enough tasks of like size by key heads alone. By threads it must not be decided:
// the order of sums would depend on them.
bool are_many(const Pack& pack) {
  constexpr std::int64_t kManyTasks = 16;
  std::int64_t all = 0, largest = 0;
  for (const Span& span : pack.spans) {
    const std::int64_t meetings = span.tiles() * (span.tiles() + 1) / 2;
    all += meetings;
    largest = std::max(largest, meetings);
  }
  return all * pack.shape.kv_heads >= kManyTasks * largest;
}

}  // namespace

// First every span with itself, all at once: by key heads where that makes many tasks, else by query heads with parts. Then
// each with those that go on from it, head by head, since all of these add to its dk and dv, and several spans to a dq. The
// order of every sum follows from the pack alone.
void attention_backward(const Pack& pack, const AttentionGradients& g, const float* k, const float* v, int threads) {
  const AttentionShape& s = pack.shape;
  const std::int64_t spans = std::int64_t(pack.spans.size()), part = pack.tokens * s.size;
  const std::vector<std::vector<Queries>> below = descendants(pack);
  const bool shared = std::any_of(below.begin(), below.end(), [](const auto& each) { return !each.empty(); });
  const bool direct = pack.group() == 1 || are_many(pack);
  const std::int64_t part_bytes = direct && !shared ? 0 : pack.group() * part * 8;
  in_rounds(pack, k, v, part_bytes, true, threads, [&](const Round& round) {
    const std::int64_t heads = round.count * pack.group(), first = round.first * pack.group();
    float* room = part_bytes == 0 ? nullptr : Scratch<PartsScratch>::get<float>(std::size_t(2 * heads * part));
    const Parts parts{room, room + (part_bytes == 0 ? 0 : heads * part), pack.tokens, s.size};
    const std::int64_t together = direct ? pack.group() : 1, tasks = heads / together;
    parallel_for(spans * tasks, threads, [&](std::int64_t task) {
      const std::size_t n = std::size_t(task / tasks);
      const Queries *from = pack.queries.data() + pack.first_queries[n], *end = pack.queries.data() + pack.first_queries[n + 1];
      const std::int64_t head = task % tasks * together, kv_at = (round.first + task % tasks) * s.size;
      for (std::int64_t row = from == end ? 0 : from->begin; from != end && row < end[-1].end; ++row) {
        std::memset(g.dq + row * s.q_stride() + (first + head) * s.size, 0, std::size_t(together * s.size) * sizeof(float));
      }
      const KeyGradients to = direct ? KeyGradients{g.dk + kv_at, g.dv + kv_at, s.kv_stride()} : parts.of(head);
      meet(round, g, from, end, pack.spans[n], first + head, first + head + together, to, true);
    });
    if (shared) {
      parallel_for(heads, threads, [&](std::int64_t head) {
        for (std::size_t n = 0; n < below.size(); ++n) {
          if (below[n].empty()) continue;
          const Queries *from = below[n].data(), *end = from + below[n].size();
          meet(round, g, from, end, pack.spans[n], first + head, first + head + 1, parts.of(head), direct);
        }
      });
    }
    for (std::size_t n = 0; n < below.size(); ++n) {
      if (!direct || !below[n].empty()) add_parts(round, g, parts, pack.spans[n], !direct, threads);
    }
  });
}

}  // namespace lt
