// One step of a decoder: every layer for a few tokens, each with the cached keys and values of its text, by one team of
// threads. docs/generation.md derives what bounds it.
#include "decode.h"

#include <algorithm>
#include <cstring>

#include "decode_linears.h"
#include "elementwise.h"
#include "scratch.h"

namespace lt {

LT_DECLARE_TABLES(ElementwiseTable, elementwise)

namespace {

struct StepScratch {};
struct TeamScratch {};

// Phases of a layer: two times norm, two of low-rank terms, three of factors, product; keys; attention; and so on. An upper
// bound.
constexpr std::int64_t kPhasesOfLayer = 32;

// What one member of the team does; each has a copy, over the same buffers.
class Step {
 public:
  Step(const lt_decoder& decoder, const lt_step& step, int threads) : d(decoder), s(step), threads_(threads) {
    Pieces counted(nullptr);
    place(counted);
    Pieces pieces(Scratch<StepScratch>::get<char>(counted.used()));
    place(pieces);
  }

  void run(Team::Member& team) {
    linears.belong_to(team);
    for (std::int64_t l = 0; l < d.layer_count; ++l) {
      const lt_decoder_layer& layer = d.layers[l];
      attention(team, layer, l, l == 0 ? nullptr : &d.layers[l - 1].mlp_post);
      mlp(team, layer);
    }
    head(team, d.layers[d.layer_count - 1].mlp_post);
  }

 private:
  std::int64_t width_q() const { return d.heads * d.size; }
  std::int64_t width_kv() const { return d.kv_heads * d.size; }
  std::int64_t width_qkv() const { return width_q() + 2 * width_kv(); }
  static std::int64_t width_gates(const lt_decoder_layer& layer) { return rows_of(layer.gates[0]) * layer.gate_count; }

  void place(Pieces& pieces) {
    std::int64_t gates = 0, rank = Linears::ranks(&d.head, 1), narrow = 0;
    const auto see = [&](const lt_linear* parts, int count) {
      rank = std::max(rank, Linears::ranks(parts, count));
      narrow = std::max(narrow, Linears::inner_of(parts, count));
    };
    for (std::int64_t l = 0; l < d.layer_count; ++l) {
      const lt_decoder_layer& layer = d.layers[l];
      gates = std::max(gates, width_gates(layer));
      see(layer.projections, layer.projection_count);
      see(&layer.output, 1);
      see(layer.gates, layer.gate_count);
      see(&layer.down, 1);
    }
    const std::int64_t widest = std::max({width_qkv(), gates, d.hidden});
    linears.place(pieces, s.T, std::max({d.hidden, width_q(), gates / 2}), rank, narrow, widest, threads_);
    qkv = pieces.take<float>(s.T * width_qkv());
    gated = pieces.take<float>(s.T * gates);
    y = pieces.take<float>(s.T * d.hidden);
  }

  void norm_row(const lt_norm& norm, const float* from, std::int64_t rows, std::int64_t width, float* to) const {
    float inverse;
    for (std::int64_t row = 0; row < rows; ++row) {
      k.rms_norm({1, width, norm.weight, norm.plus, norm.eps, false}, from + row * width, nullptr, nullptr, to + row * width,
                 &inverse);
    }
  }

  // y += post(y of the half before), then the norm of the half that begins.
  void begin_half(Team::Member& team, const lt_norm* post, const lt_norm& norm) {
    linears.x.resize(s.T, d.hidden);
    team.each(s.T, [&](std::int64_t t) {
      if (post != nullptr) add_to_hidden(t, *post);
      norm_row(norm, s.hidden + t * d.hidden, 1, d.hidden, linears.x.row(t));
      linears.finish_row(t);
    });
  }

  void add_to_hidden(std::int64_t t, const lt_norm& post) const {
    float *own = y + t * d.hidden, *hidden = s.hidden + t * d.hidden;
    if (post.weight != nullptr) norm_row(post, own, 1, d.hidden, own);
    for (std::int64_t i = 0; i < d.hidden; ++i) hidden[i] += own[i];
  }

  void attention(Team::Member& team, const lt_decoder_layer& layer, std::int64_t number, const lt_norm* post) {
    begin_half(team, post, layer.norm);
    linears.run(team, layer.projections, layer.projection_count, qkv, width_qkv());
    const std::int64_t keys = number * 2 * width_kv() * kPage, values = keys + width_kv() * kPage;
    team.each(s.T, [&](std::int64_t t) { turn_and_store(layer, t, keys, values); });
    linears.x.resize(s.T, width_q());
    const std::int64_t group = d.heads / d.kv_heads;
    // Heads of a group share the keys that they read; where there are too few groups for all threads, each goes alone.
    const std::int64_t together = s.T * d.kv_heads >= 2 * threads_ ? group : 1, tasks = d.heads / together;
    team.each(s.T * tasks, [&](std::int64_t task) {
      const std::int64_t t = task / tasks, head = task % tasks * together, kv = head / group * d.size * kPage;
      const std::int64_t end = s.positions[t] + 1, first = layer.window > 0 ? std::max<std::int64_t>(0, end - layer.window) : 0;
      kernels.attend({s.pages + t * s.most_pages, keys + kv, values + kv, first, end, d.size, layer.scale, layer.softcap},
                     qkv + t * width_qkv() + head * d.size, together, linears.x.row(t) + head * d.size);
    });
    team.each(s.T, [&](std::int64_t t) { linears.finish_row(t); });
    linears.run(team, &layer.output, 1, y, d.hidden);
    begin_half(team, &layer.attention_post, layer.mlp_norm);
  }

  void turn_and_store(const lt_decoder_layer& layer, std::int64_t t, std::int64_t keys, std::int64_t values) const {
    float *q = qkv + t * width_qkv(), *key = q + width_q(), *value = key + width_kv();
    if (layer.query_norm.weight != nullptr) norm_row(layer.query_norm, q, d.heads, d.size, q);
    if (layer.key_norm.weight != nullptr) norm_row(layer.key_norm, key, d.kv_heads, d.size, key);
    const lt_rotary& table = s.rotary[layer.rotary];
    const std::int64_t position = s.positions[t];
    const float *cos = table.cos + position * table.size, *sin = table.sin + position * table.size;
    k.rotary({q, q, width_q(), width_q(), d.heads}, 1, d.size, table.size, cos, sin, 0);
    k.rotary({key, key, width_kv(), width_kv(), d.kv_heads}, 1, d.size, table.size, cos, sin, 0);
    float* page = s.pages[t * s.most_pages + position / kPage];
    const std::int64_t slot = position % kPage;
    for (std::int64_t i = 0; i < width_kv(); ++i) page[keys + i * kPage + slot] = key[i];
    for (std::int64_t h = 0; h < d.kv_heads; ++h) {
      std::memcpy(page + values + (h * kPage + slot) * d.size, value + h * d.size, sizeof(float) * std::size_t(d.size));
    }
  }

  // After begin_half for the MLP: y = D (act(G x) * U x).
  void mlp(Team::Member& team, const lt_decoder_layer& layer) {
    const std::int64_t both = width_gates(layer), width = both / 2;
    linears.run(team, layer.gates, layer.gate_count, gated, both);
    linears.x.resize(s.T, width);
    team.each(s.T, [&](std::int64_t t) {
      const float* gate = gated + t * both;
      k.gated({layer.gate, {gate, both}, {gate + width, both}, 1, width, false}, linears.x.row(t));
      linears.finish_row(t);
    });
    linears.run(team, &layer.down, 1, y, d.hidden);
  }

  void head(Team::Member& team, const lt_norm& post) {
    team.each(s.T, [&](std::int64_t t) { add_to_hidden(t, post); });
    linears.x.resize(s.S, d.hidden);
    team.each(s.S, [&](std::int64_t i) {
      float* normed = s.normed + i * d.hidden;
      norm_row(d.norm, s.hidden + s.rows[i] * d.hidden, 1, d.hidden, normed);
      std::memcpy(linears.x.row(i), normed, sizeof(float) * std::size_t(d.hidden));
      linears.finish_row(i);
    });
    if (s.logits != nullptr) linears.run(team, &d.head, 1, s.logits, rows_of(d.head));
  }

  const lt_decoder& d;
  const lt_step& s;
  const int threads_;
  const ElementwiseTable& k = table(elementwise_tables);
  const DecodeTable& kernels = table(decode_tables);
  Linears linears;
  float *qkv, *gated, *y;
};

}  // namespace
}  // namespace lt

// Runs all layers for the step's tokens: their keys and values are stored in their pages, then read with those before.
LT_API int lt_decode_step(const lt_decoder* decoder, const lt_step* step, int threads) {
  if (threads < 1 || !lt::step_fits(decoder, step)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const int members = std::min(threads, lt::kMostThreads);
    const std::int64_t counters = (decoder->layer_count + 1) * lt::kPhasesOfLayer * lt::Progress::counters(members);
    auto* progress = lt::Scratch<lt::TeamScratch>::get<lt::Progress::Counter>(std::size_t(counters));
    std::memset(static_cast<void*>(progress), 0, sizeof(lt::Progress::Counter) * std::size_t(counters));
    const lt::Step step_of_all(*decoder, *step, members);
    lt::Team team(members, progress);
    team.run([&](lt::Team::Member& member) {
      lt::Step own(step_of_all);
      own.run(member);
    });
  })
}

// Stores keys and values (., kv_heads, size) of rows sources[i] in slot slots[i] of pages[i]; `offset`: where the layer's keys
// begin in a page.
LT_API int lt_cache_fill(const float* k, const float* v, std::int64_t count, const std::int64_t* sources, float* const* pages,
                         const std::int64_t* slots, std::int64_t kv_heads, std::int64_t size, std::int64_t offset,
                         int threads) {
  if (lt_missing(k, v, sources, pages, slots) || count < 0 || kv_heads < 1 || size < 1 || offset < 0 || threads < 1) {
    return LT_BAD_ARGUMENT;
  }
  const std::int64_t width = kv_heads * size;
  for (std::int64_t i = 0; i < count; ++i) {
    if (sources[i] < 0 || slots[i] < 0 || slots[i] >= lt::kPage || pages[i] == nullptr) return LT_BAD_ARGUMENT;
  }
  LT_GUARD({
    lt::parallel_for((count + 15) / 16, threads, [&](std::int64_t task) {
      for (std::int64_t i = task * 16; i < std::min(count, task * 16 + 16); ++i) {
        const float *key = k + sources[i] * width, *value = v + sources[i] * width;
        float *keys = pages[i] + offset, *values = keys + width * lt::kPage;
        for (std::int64_t j = 0; j < width; ++j) keys[j * lt::kPage + slots[i]] = key[j];
        for (std::int64_t h = 0; h < kv_heads; ++h) {
          std::memcpy(values + (h * lt::kPage + slots[i]) * size, value + h * size, sizeof(float) * std::size_t(size));
        }
      }
    });
  })
}
