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
// Phases of a layer: two times norm, two of low-rank terms, three of factors, product; keys; attention; and so on. An upper
// bound.
constexpr std::int64_t kPhasesOfLayer = 32;
constexpr int kMostParts = 3;  // layers of one input

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

std::int64_t rows_of(const lt_linear& part) {
  if (part.matrix != nullptr) return part.matrix->rows;
  return part.factors->places != nullptr ? part.factors->outputs : part.factors->left->rows;
}

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
  static std::int64_t width_gates(const lt_decoder_layer& layer) { return rows_of(layer.gates[0]) * layer.gate_count; }

  static std::int64_t ranks(const lt_linear* parts, int count) {
    std::int64_t total = 0;
    for (int p = 0; p < count; ++p) total += up(parts[p].rank, kPanelGroup);
    return total;
  }

  static std::int64_t inner_of(const lt_linear* parts, int count) {
    std::int64_t most = 0;
    for (int p = 0; p < count; ++p) {
      if (parts[p].factors != nullptr) most = std::max(most, parts[p].factors->right->rows);
    }
    return most;
  }

  void place(Pieces& pieces) {
    std::int64_t gates = 0, rank = ranks(&d.head, 1), narrow = 0;
    for (std::int64_t l = 0; l < d.layer_count; ++l) {
      const lt_decoder_layer& layer = d.layers[l];
      gates = std::max(gates, width_gates(layer));
      rank = std::max({rank, ranks(layer.projections, layer.projection_count), ranks(&layer.output, 1),
                       ranks(layer.gates, layer.gate_count), ranks(&layer.down, 1)});
      narrow = std::max({narrow, inner_of(layer.projections, layer.projection_count), inner_of(&layer.output, 1),
                         inner_of(layer.gates, layer.gate_count), inner_of(&layer.down, 1)});
    }
    x.place(pieces, s.T, std::max({d.hidden, width_q(), gates / 2}));
    qkv = pieces.take<float>(s.T * width_qkv());
    gated = pieces.take<float>(s.T * gates);
    y = pieces.take<float>(s.T * d.hidden);
    u = pieces.take<float>(s.T * rank);
    inner = pieces.take<float>(s.T * rank);
    inner_rows = pieces.take<float>(s.T * rank);
    if (narrow == 0) return;
    for (Input& one : z) one.place(pieces, s.T, narrow);
    product = pieces.take<float>(s.T * std::max({width_qkv(), gates, d.hidden}));
  }

  void norm_row(const lt_norm& norm, const float* from, std::int64_t rows, std::int64_t width, float* to) const {
    float inverse;
    for (std::int64_t row = 0; row < rows; ++row) {
      k.rms_norm({1, width, norm.weight, norm.plus, norm.eps, false}, from + row * width, nullptr, nullptr, to + row * width,
                 &inverse);
    }
  }

  // Row t of the input, filled up with zeros, as the products need it.
  void finish_row(const Input& in, std::int64_t t) const {
    float* row = in.row(t);
    std::memset(row + in.width, 0, sizeof(float) * std::size_t(in.blocks * kPanelGroup - in.width));
    if (in.T <= kFixedTokens) in.finite[t] = kernels.fix(row, in.blocks * kPanelGroup, in.token(t));
    pack_token(row, t, in.T, in.blocks, in.packed, in.sums, few.lanes);
  }
  void finish_row(std::int64_t t) const { finish_row(x, t); }

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
    if (s.logits != nullptr) linears(team, &d.head, 1, s.logits, rows_of(d.head));
  }

  // The low-rank term of a layer, as the products take it; rank 0 for none.
  struct Low {
    const float *B, *packed, *rows;
    std::int64_t rank;
  };

  // Layers of one input, the results side by side: rows of `to` are `ld` apart.
  void linears(Team::Member& team, const lt_linear* parts, int count, float* to, std::int64_t ld) {
    if (ranks(parts, count) > 0) low_rank(team, parts, count);
    const bool factored = inner_of(parts, count) > 0;
    if (factored) narrow(team, parts, count);
    std::int64_t first[kMostParts + 1] = {};
    for (int p = 0; p < count; ++p) first[p + 1] = first[p] + (rows_of(parts[p]) + kRowsOfTask - 1) / kRowsOfTask;
    const bool fixed = is_finite(x);
    bool narrow_fixed[kMostParts] = {};
    for (int p = 0; factored && p < count; ++p) narrow_fixed[p] = parts[p].factors != nullptr && is_finite(z[shared(parts, p)]);
    team.each(first[count], [&](std::int64_t task) {
      std::int64_t column = 0, low = 0;
      int p = 0;
      for (; task >= first[p + 1]; ++p) column += rows_of(parts[p]), low += x.T * up(parts[p].rank, kPanelGroup);
      const lt_linear& part = parts[p];
      const std::int64_t row = (task - first[p]) * kRowsOfTask, rows = std::min(kRowsOfTask, rows_of(part) - row);
      const Low term{part.rank > 0 ? part.B : nullptr, inner + low, inner_rows + low, part.rank};
      if (part.matrix != nullptr) multiply(*part.matrix, x, fixed, row, rows, term, part.bias, to + column, ld);
      if (part.factors == nullptr) return;
      const Input& narrowed = z[shared(parts, p)];
      const lt_matrix& left = *part.factors->left;
      const Low none{};
      if (part.matrix == nullptr && part.factors->places == nullptr) {
        multiply(left, narrowed, narrow_fixed[p], row, rows, term, part.bias, to + column, ld);
        return;
      }
      const std::int64_t here = std::min(rows, left.rows - row);
      if (here > 0) multiply(left, narrowed, narrow_fixed[p], row, here, none, nullptr, product + column, ld);
      if (part.matrix == nullptr) return;
      for (std::int64_t t = 0; t < x.T; ++t) {
        const std::int64_t at = t * ld + column + row;
        for (std::int64_t i = 0; i < rows; ++i) to[at + i] += product[at + i];
      }
    });
    if (has_places(parts, count)) scatter(team, parts, count, to, ld);
  }

  static bool has_places(const lt_linear* parts, int count) {
    return std::any_of(parts, parts + count, [](const auto& part) { return part.factors && part.factors->places; });
  }

  // Whether every token is there in fixed point.
  static bool is_finite(const Input& in) {
    bool finite = in.T <= kFixedTokens;
    for (std::int64_t t = 0; finite && t < in.T; ++t) finite = in.finite[t] != 0;
    return finite;
  }

  // y[t * ld + i] for rows `row` ... of m, all tokens of the input.
  void multiply(const lt_matrix& m, const Input& in, bool fixed, std::int64_t row, std::int64_t rows, const Low& low,
                const float* bias, float* to, std::int64_t ld) const {
    if (!fixed || !is_fixed(m)) {
      few.multiply({&m, row, rows, in.packed, in.sums, in.T, low.B, low.packed, low.rank, bias, to, ld});
      return;
    }
    for (std::int64_t t = 0; t < in.T; ++t) {
      kernels.multiply({&m, row, rows, in.token(t), low.B, low.rows + t * low.rank, low.rank, bias, to + t * ld + row});
    }
  }

  // The first of the layers that has the right factor of layer p, whose x R^T serves both.
  static int shared(const lt_linear* parts, int p) {
    int first = 0;
    while (parts[first].factors == nullptr || parts[first].factors->right != parts[p].factors->right) ++first;
    return first;
  }

  // x R^T of each right factor, once, into its z.
  void narrow(Team::Member& team, const lt_linear* parts, int count) {
    std::int64_t first[kMostParts + 1] = {};
    for (int p = 0; p < count; ++p) {
      const bool own = parts[p].factors != nullptr && shared(parts, p) == p;
      if (own) z[p].resize(x.T, parts[p].factors->right->rows);
      first[p + 1] = first[p] + (own ? (z[p].width + kRowsOfTask - 1) / kRowsOfTask : 0);
    }
    const bool fixed = is_finite(x);
    team.each(first[count], [&](std::int64_t task) {
      int p = 0;
      while (task >= first[p + 1]) ++p;
      const std::int64_t row = (task - first[p]) * kRowsOfTask;
      multiply(*parts[p].factors->right, x, fixed, row, std::min(kRowsOfTask, z[p].width - row), Low{}, nullptr, z[p].rows,
               z[p].blocks * kPanelGroup);
    });
    team.each(x.T, [&](std::int64_t t) {
      for (int p = 0; p < count; ++p) {
        if (first[p + 1] > first[p]) finish_row(z[p], t);
      }
    });
  }

  // Pivoted layers: each output from where its place is, and the layer's term and bias.
  void scatter(Team::Member& team, const lt_linear* parts, int count, float* to, std::int64_t ld) const {
    team.each(x.T, [&](std::int64_t t) {
      std::int64_t column = 0, low = 0;
      for (int p = 0; p < count; ++p) {
        const lt_linear& part = parts[p];
        const std::int64_t outputs = rows_of(part), r = part.rank;
        if (part.factors != nullptr && part.factors->places != nullptr) {
          const Input& in = z[shared(parts, p)];
          const float *pivots = in.row(t), *others = product + t * ld + column, *term = inner_rows + low + t * r;
          for (std::int64_t o = 0; o < outputs; ++o) {
            const std::int64_t place = part.factors->places[o];
            float sum = place < in.width ? pivots[place] : others[place - in.width];
            for (std::int64_t i = 0; i < r; ++i) sum += part.B[o * r + i] * term[i];
            to[t * ld + column + o] = sum + (part.bias == nullptr ? 0.0f : part.bias[o]);
          }
        }
        column += outputs;
        low += x.T * up(r, kPanelGroup);
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
  Input x{}, z[kMostParts]{};
  float *qkv, *gated, *y, *u, *inner, *inner_rows, *product = nullptr;
};

// ---- What is asked of the structures before anything is read through them.

bool factors_fit(const lt_linear& part, std::int64_t cols) {
  const lt_factors& f = *part.factors;
  if (!fits(f.right) || !fits(f.left) || f.right->transposed || f.left->transposed) return false;
  if (f.right->cols != cols || f.left->cols != f.right->rows) return false;
  if (f.places == nullptr) return part.matrix == nullptr || part.matrix->rows == f.left->rows;
  const std::int64_t limit = f.right->rows + f.left->rows;
  return part.matrix == nullptr && f.outputs >= f.left->rows &&
         std::all_of(f.places, f.places + f.outputs, [&](std::int32_t place) { return place >= 0 && place < limit; });
}

bool linear_fits(const lt_linear& part, std::int64_t rows, std::int64_t cols) {
  if (part.matrix == nullptr && part.factors == nullptr) return false;
  if (part.matrix != nullptr && (!fits(part.matrix) || part.matrix->transposed || part.matrix->cols != cols)) return false;
  if (part.factors != nullptr && !factors_fit(part, cols)) return false;
  if (rows > 0 && rows_of(part) != rows) return false;
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
  const std::int64_t both = rows_of(layer.gates[0]) * layer.gate_count;
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
  if (s->logits != nullptr && (d->head.factors != nullptr || !linear_fits(d->head, 0, d->hidden))) return false;
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
