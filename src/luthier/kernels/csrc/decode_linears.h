// The linear layers of a decoder on the tokens of a step: stored matrix, factors, low-rank term and bias.
#pragma once
#include <algorithm>

#include "decode_input.h"
#include "dispatch.h"
#include "team.h"

namespace lt {

LT_DECLARE_TABLES(FewTable, few)
LT_DECLARE_TABLES(DecodeTable, decode)

constexpr std::int64_t kRowsOfTask = 16;
// Up to so many tokens blocks of GGUF files are multiplied in fixed point, token by token; beyond, floats are faster, since
// every row is decoded once for all.
constexpr std::int64_t kFixedTokens = 2;
constexpr int kMostParts = 3;  // layers of one input

inline std::int64_t rows_of(const lt_linear& part) {
  if (part.matrix != nullptr) return part.matrix->rows;
  return part.factors->places != nullptr ? part.factors->outputs : part.factors->left->rows;
}

// Layers that read one input together. Each member of the team has a copy, over the same buffers.
class Linears {
 public:
  Input x{};  // what is multiplied: its rows written, then finished

  // Ranks of the terms, each filled up to whole blocks.
  static std::int64_t ranks(const lt_linear* parts, int count) {
    std::int64_t total = 0;
    for (int p = 0; p < count; ++p) total += up(parts[p].rank, kPanelGroup);
    return total;
  }

  // The largest rank of their factors.
  static std::int64_t inner_of(const lt_linear* parts, int count) {
    std::int64_t most = 0;
    for (int p = 0; p < count; ++p) {
      if (parts[p].factors != nullptr) most = std::max(most, parts[p].factors->right->rows);
    }
    return most;
  }

  // The largest of all layers each: input: features, most_rank: `ranks`, narrow: `inner_of`, widest: results of one input.
  // members: of the team.
  void place(Pieces& pieces, std::int64_t tokens, std::int64_t input, std::int64_t most_rank, std::int64_t narrow,
             std::int64_t widest, int members) {
    room = few.rows * up(std::max(input, narrow), kPanelGroup);
    decoded = pieces.take<float>(members * room);
    x.place(pieces, tokens, input);
    u = pieces.take<float>(tokens * most_rank);
    inner = pieces.take<float>(tokens * most_rank);
    inner_rows = pieces.take<float>(tokens * most_rank);
    if (narrow == 0) return;
    for (Input& one : z) one.place(pieces, tokens, narrow);
    product = pieces.take<float>(tokens * widest);
  }

  // Once, in each member's copy: its own room for decoded rows.
  void belong_to(const Team::Member& member) { decoded += member.number() * room; }

  void finish_row(std::int64_t t) const { finish_row(x, t); }

  // Layers of one input, the results side by side: rows of `to` are `ld` apart.
  void run(Team::Member& team, const lt_linear* parts, int count, float* to, std::int64_t ld) {
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

 private:
  // Row t of an input, filled up with zeros, as the products need it.
  void finish_row(const Input& in, std::int64_t t) const {
    float* row = in.row(t);
    std::memset(row + in.width, 0, sizeof(float) * std::size_t(in.blocks * kPanelGroup - in.width));
    if (in.T <= kFixedTokens) in.finite[t] = kernels.fix(row, in.blocks * kPanelGroup, in.token(t));
    pack_token(row, t, in.T, in.blocks, in.packed, in.sums, few.lanes);
  }

  // The low-rank term of a layer, as the products take it; rank 0 for none.
  struct Low {
    const float *B, *packed, *rows;
    std::int64_t rank;
  };

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
    if (!fixed || m.kind < LT_Q4_0) {
      few.multiply({&m, row, rows, in.packed, in.sums, in.T, low.B, low.packed, low.rank, bias, to, ld, decoded});
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
      few.multiply({&A, row, 1, x.packed, x.sums, x.T, nullptr, nullptr, 0, nullptr, u + low, parts[p].rank, decoded});
    });
    team.each(x.T, [&](std::int64_t t) {
      std::int64_t low = 0;
      for (int p = 0; p < count; ++p) {
        const std::int64_t r = parts[p].rank, padded = up(r, kPanelGroup);
        for (std::int64_t i = 0; i < padded; ++i) {
          const float value = i < r ? parts[p].scaling * u[low + t * r + i] : 0.0f;
          if (i < r) inner_rows[low + t * r + i] = value;
          inner[low + few_place(t, x.T, i / kPanelGroup, padded / kPanelGroup) + i % kPanelGroup] = value;
        }
        low += x.T * padded;
      }
    });
  }

  const FewTable& few = table(few_tables);
  const DecodeTable& kernels = table(decode_tables);
  Input z[kMostParts]{};
  float *u = nullptr, *inner = nullptr, *inner_rows = nullptr, *product = nullptr;
  float* decoded = nullptr;  // rows of W: of the first member until belong_to
  std::int64_t room = 0;     // floats of each member
};

}  // namespace lt
