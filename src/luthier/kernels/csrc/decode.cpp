// One step of a decoder: every layer for a few tokens, each with the cached keys and values of its text, by one team of
// threads. docs/generation.md derives what bounds it.
#include "decode.h"

#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "dispatch.h"
#include "elementwise.h"
#include "few.h"
#include "scratch.h"
#include "team.h"

namespace lt {

LT_DECLARE_TABLES(FewTable, few)
LT_DECLARE_TABLES(ElementwiseTable, elementwise)
LT_DECLARE_TABLES(DecodeTable, decode)

namespace {

struct StepScratch {};
struct TeamScratch {};

constexpr std::int64_t kRowsOfTask = 16;
// Up to so many tokens blocks of GGUF files are multiplied in fixed point, token by token; beyond, floats are faster, since
// every row is decoded once for all.
constexpr std::int64_t kFixedTokens = 2;
// Phases of a layer: two times norm, two of low-rank terms, product; keys; attention; and so on. An upper bound.
constexpr std::int64_t kPhasesOfLayer = 20;

// Hands out pieces of one buffer, each 64-byte aligned; without a buffer it only counts.
class Pieces {
 public:
  explicit Pieces(char* buffer) : buffer_(buffer) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = buffer_ == nullptr ? nullptr : reinterpret_cast<T*>(buffer_ + used_);
    used_ += up(count * std::int64_t(sizeof(T)), 64);
    return piece;
  }
  std::size_t used() const { return std::size_t(used_); }

 private:
  char* buffer_;
  std::int64_t used_ = 0;
};

// Tokens as the products read them: packed for few.h, and in fixed point.
struct Input {
  std::int64_t T, width, blocks;
  float *rows, *packed, *sums;
  FixedToken fixed;  // of token 0; the others follow
  std::uint8_t* finite;

  void place(Pieces& pieces, std::int64_t tokens, std::int64_t most) {
    const std::int64_t padded = up(most, kPanelGroup);
    rows = pieces.take<float>(tokens * padded);
    packed = pieces.take<float>(tokens * padded);
    sums = pieces.take<float>(tokens * padded / kPanelGroup);
    fixed = {pieces.take<std::int16_t>(tokens * padded), pieces.take<float>(tokens * padded / kPanelGroup),
             pieces.take<float>(tokens * padded / kPanelGroup)};
    finite = pieces.take<std::uint8_t>(tokens);
  }
  void resize(std::int64_t tokens, std::int64_t features) {
    T = tokens;
    width = features;
    blocks = up(features, kPanelGroup) / kPanelGroup;
  }
  float* row(std::int64_t t) const { return rows + t * blocks * kPanelGroup; }
  FixedToken token(std::int64_t t) const {
    return {fixed.q + t * blocks * kPanelGroup, fixed.scales + t * blocks, fixed.sums + t * blocks};
  }
};

// [block][T][32] of one token, and the sum of each block divided by the lanes of a vector.
void pack_token(const float* row, std::int64_t t, std::int64_t T, std::int64_t blocks, float* packed, float* sums, int lanes) {
  for (std::int64_t b = 0; b < blocks; ++b, row += kPanelGroup) {
    float parts[8] = {};
    for (int i = 0; i < kPanelGroup; ++i) parts[i % 8] += row[i];
    std::memcpy(packed + (b * T + t) * kPanelGroup, row, sizeof(float) * kPanelGroup);
    const float halves = (parts[0] + parts[4]) + (parts[1] + parts[5]);
    sums[t * blocks + b] = (halves + ((parts[2] + parts[6]) + (parts[3] + parts[7]))) / float(lanes);
  }
}

bool is_fixed(const lt_matrix& m) { return m.kind >= LT_Q4_0; }

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
  static std::int64_t width_gates(const lt_decoder_layer& layer) { return layer.gates[0].matrix->rows * layer.gate_count; }

  static std::int64_t ranks(const lt_linear* parts, int count) {
    std::int64_t total = 0;
    for (int p = 0; p < count; ++p) total += up(parts[p].rank, kPanelGroup);
    return total;
  }

  void place(Pieces& pieces) {
    std::int64_t gates = 0, rank = ranks(&d.head, 1);
    for (std::int64_t l = 0; l < d.layer_count; ++l) {
      const lt_decoder_layer& layer = d.layers[l];
      gates = std::max(gates, width_gates(layer));
      rank = std::max({rank, ranks(layer.projections, layer.projection_count), ranks(&layer.output, 1),
                       ranks(layer.gates, layer.gate_count), ranks(&layer.down, 1)});
    }
    x.place(pieces, s.T, std::max({d.hidden, width_q(), gates / 2}));
    qkv = pieces.take<float>(s.T * width_qkv());
    gated = pieces.take<float>(s.T * gates);
    y = pieces.take<float>(s.T * d.hidden);
    u = pieces.take<float>(s.T * rank);
    inner = pieces.take<float>(s.T * rank);
    inner_rows = pieces.take<float>(s.T * rank);
  }

  void norm_row(const lt_norm& norm, const float* from, std::int64_t rows, std::int64_t width, float* to) const {
    float inverse;
    for (std::int64_t row = 0; row < rows; ++row) {
      k.rms_norm({1, width, norm.weight, norm.plus, norm.eps, false}, from + row * width, nullptr, nullptr, to + row * width,
                 &inverse);
    }
  }

  // Row t of the input, filled up with zeros, as the products need it.
  void finish_row(std::int64_t t) const {
    float* row = x.row(t);
    std::memset(row + x.width, 0, sizeof(float) * std::size_t(x.blocks * kPanelGroup - x.width));
    if (x.T <= kFixedTokens) x.finite[t] = kernels.fix(row, x.blocks * kPanelGroup, x.token(t));
    pack_token(row, t, x.T, x.blocks, x.packed, x.sums, few.lanes);
  }

  // y += post(y of the half before), then the norm of the half that begins.
  void begin_half(Team::Member& team, const lt_norm* post, const lt_norm& norm) {
    x.resize(s.T, d.hidden);
    team.each(s.T, [&](std::int64_t t) {
      if (post != nullptr) add_to_hidden(t, *post);
      norm_row(norm, s.hidden + t * d.hidden, 1, d.hidden, x.row(t));
      finish_row(t);
    });
  }

  void add_to_hidden(std::int64_t t, const lt_norm& post) const {
    float *own = y + t * d.hidden, *hidden = s.hidden + t * d.hidden;
    if (post.weight != nullptr) norm_row(post, own, 1, d.hidden, own);
    for (std::int64_t i = 0; i < d.hidden; ++i) hidden[i] += own[i];
  }

  void attention(Team::Member& team, const lt_decoder_layer& layer, std::int64_t number, const lt_norm* post) {
    begin_half(team, post, layer.norm);
    linears(team, layer.projections, layer.projection_count, qkv, width_qkv());
    const std::int64_t keys = number * 2 * width_kv() * kPage, values = keys + width_kv() * kPage;
    team.each(s.T, [&](std::int64_t t) { turn_and_store(layer, t, keys, values); });
    x.resize(s.T, width_q());
    const std::int64_t group = d.heads / d.kv_heads;
    // Heads of a group share the keys that they read; where there are too few groups for all threads, each goes alone.
    const std::int64_t together = s.T * d.kv_heads >= 2 * threads_ ? group : 1, tasks = d.heads / together;
    team.each(s.T * tasks, [&](std::int64_t task) {
      const std::int64_t t = task / tasks, head = task % tasks * together, kv = head / group * d.size * kPage;
      const std::int64_t end = s.positions[t] + 1, first = layer.window > 0 ? std::max<std::int64_t>(0, end - layer.window) : 0;
      kernels.attend({s.pages + t * s.most_pages, keys + kv, values + kv, first, end, d.size, layer.scale, layer.softcap},
                     qkv + t * width_qkv() + head * d.size, together, x.row(t) + head * d.size);
    });
    team.each(s.T, [&](std::int64_t t) { finish_row(t); });
    linears(team, &layer.output, 1, y, d.hidden);
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
    linears(team, layer.gates, layer.gate_count, gated, both);
    x.resize(s.T, width);
    team.each(s.T, [&](std::int64_t t) {
      const float* gate = gated + t * both;
      k.gated({layer.gate, {gate, both}, {gate + width, both}, 1, width, false}, x.row(t));
      finish_row(t);
    });
    linears(team, &layer.down, 1, y, d.hidden);
  }

  void head(Team::Member& team, const lt_norm& post) {
    team.each(s.T, [&](std::int64_t t) { add_to_hidden(t, post); });
    x.resize(s.S, d.hidden);
    team.each(s.S, [&](std::int64_t i) {
      float* normed = s.normed + i * d.hidden;
      norm_row(d.norm, s.hidden + s.rows[i] * d.hidden, 1, d.hidden, normed);
      std::memcpy(x.row(i), normed, sizeof(float) * std::size_t(d.hidden));
      finish_row(i);
    });
    if (s.logits != nullptr) linears(team, &d.head, 1, s.logits, d.head.matrix->rows);
  }

  // Layers of one input, the results side by side: rows of `to` are `ld` apart.
  void linears(Team::Member& team, const lt_linear* parts, int count, float* to, std::int64_t ld) const {
    if (ranks(parts, count) > 0) low_rank(team, parts, count);
    std::int64_t first[4] = {0, 0, 0, 0};
    for (int p = 0; p < count; ++p) first[p + 1] = first[p] + (parts[p].matrix->rows + kRowsOfTask - 1) / kRowsOfTask;
    bool fixed = x.T <= kFixedTokens;
    for (std::int64_t t = 0; fixed && t < x.T; ++t) fixed = x.finite[t] != 0;
    team.each(first[count], [&](std::int64_t task) {
      std::int64_t column = 0, low = 0;
      int p = 0;
      for (; task >= first[p + 1]; ++p) column += parts[p].matrix->rows, low += x.T * up(parts[p].rank, kPanelGroup);
      const lt_linear& part = parts[p];
      const std::int64_t row = (task - first[p]) * kRowsOfTask, rows = std::min(kRowsOfTask, part.matrix->rows - row);
      const float* factors = part.rank > 0 ? part.B : nullptr;
      if (!fixed || !is_fixed(*part.matrix)) {
        few.multiply({part.matrix, row, rows, x.packed, x.sums, x.T, factors, inner + low, part.rank, part.bias, to + column, ld});
        return;
      }
      for (std::int64_t t = 0; t < x.T; ++t) {
        kernels.multiply({part.matrix, row, rows, x.token(t), factors, inner_rows + low + t * part.rank, part.rank, part.bias,
                          to + t * ld + column + row});
      }
    });
  }

  // s x A^T of each layer, plain in inner_rows and packed in inner; each layer's begins behind T * rank of those before it.
  void low_rank(Team::Member& team, const lt_linear* parts, int count) const {
    std::int64_t total = 0;
    for (int p = 0; p < count; ++p) total += parts[p].rank;
    team.each(total, [&](std::int64_t row) {
      std::int64_t low = 0;
      int p = 0;
      for (; row >= parts[p].rank; ++p) row -= parts[p].rank, low += x.T * up(parts[p].rank, kPanelGroup);
      const lt_matrix A = dense(parts[p].A, parts[p].rank, x.width);
      few.multiply({&A, row, 1, x.packed, x.sums, x.T, nullptr, nullptr, 0, nullptr, u + low, parts[p].rank});
    });
    team.each(x.T, [&](std::int64_t t) {
      std::int64_t low = 0;
      for (int p = 0; p < count; ++p) {
        const std::int64_t r = parts[p].rank, padded = up(r, kPanelGroup);
        for (std::int64_t i = 0; i < padded; ++i) {
          const float value = i < r ? parts[p].scaling * u[low + t * r + i] : 0.0f;
          if (i < r) inner_rows[low + t * r + i] = value;
          inner[low + (i / kPanelGroup * x.T + t) * kPanelGroup + i % kPanelGroup] = value;
        }
        low += x.T * padded;
      }
    });
  }

  const lt_decoder& d;
  const lt_step& s;
  const int threads_;
  const ElementwiseTable& k = table(elementwise_tables);
  const FewTable& few = table(few_tables);
  const DecodeTable& kernels = table(decode_tables);
  Input x{};
  float *qkv, *gated, *y, *u, *inner, *inner_rows;
};

// ---- What is asked of the structures before anything is read through them.

bool linear_fits(const lt_linear& part, std::int64_t rows, std::int64_t cols) {
  if (!fits(part.matrix) || part.matrix->transposed || part.matrix->cols != cols) return false;
  if (rows > 0 && part.matrix->rows != rows) return false;
  return part.rank == 0 || (part.rank > 0 && !lt_missing(part.A, part.B));
}

bool layer_fits(const lt_decoder& d, const lt_decoder_layer& layer, const lt_step& s) {
  const std::int64_t q = d.heads * d.size, kv = d.kv_heads * d.size;
  const lt_linear* own = layer.projections;
  const bool three = layer.projection_count == 3;
  if (!three && layer.projection_count != 1) return false;
  if (!linear_fits(own[0], three ? q : q + 2 * kv, d.hidden)) return false;
  if (three && !(linear_fits(own[1], kv, d.hidden) && linear_fits(own[2], kv, d.hidden))) return false;
  if (layer.gate_count < 1 || layer.gate_count > 2 || !linear_fits(layer.gates[0], 0, d.hidden)) return false;
  const std::int64_t both = layer.gates[0].matrix->rows * layer.gate_count;
  if (layer.gate_count == 2 && !linear_fits(layer.gates[1], both / 2, d.hidden)) return false;
  if (both % 2 != 0 || (layer.gate != kSilu && layer.gate != kGeluTanh)) return false;
  if (!linear_fits(layer.output, d.hidden, q) || !linear_fits(layer.down, d.hidden, both / 2)) return false;
  const bool known_table = layer.rotary >= 0 && layer.rotary < s.rotary_count;
  return known_table && !lt_missing(layer.norm.weight, layer.mlp_norm.weight) && layer.window >= 0;
}

bool tokens_fit(const lt_decoder& d, const lt_step& s) {
  if (s.T < 1 || s.S < 0 || s.S > s.T || lt_missing(s.hidden, s.positions, s.pages, s.rotary)) return false;
  if (s.S > 0 && lt_missing(s.rows, s.normed)) return false;
  for (std::int64_t n = 0; n < s.rotary_count; ++n) {
    const lt_rotary& table = s.rotary[n];
    if (lt_missing(table.cos, table.sin) || table.size < 2 || table.size % 2 != 0 || table.size > d.size) return false;
  }
  for (std::int64_t t = 0; t < s.T; ++t) {
    const std::int64_t position = s.positions[t];
    if (position < 0 || position / kPage >= s.most_pages) return false;
    for (std::int64_t n = 0; n < s.rotary_count; ++n) {
      if (position >= s.rotary[n].length) return false;
    }
    for (std::int64_t n = 0; n <= position / kPage; ++n) {
      if (s.pages[t * s.most_pages + n] == nullptr) return false;
    }
  }
  return std::all_of(s.rows, s.rows + s.S, [&](std::int64_t row) { return row >= 0 && row < s.T; });
}

bool step_fits(const lt_decoder* d, const lt_step* s) {
  if (lt_missing(d, s) || d->layer_count < 1 || d->layers == nullptr || d->norm.weight == nullptr) return false;
  if (d->hidden < 1 || d->size < 2 || d->kv_heads < 1 || d->heads < 1 || d->heads % d->kv_heads != 0) return false;
  if (!tokens_fit(*d, *s)) return false;
  if (s->logits != nullptr && !linear_fits(d->head, 0, d->hidden)) return false;
  return std::all_of(d->layers, d->layers + d->layer_count, [&](const auto& layer) { return layer_fits(*d, layer, *s); });
}

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
