// What is asked of a step's structures before anything is read through them.
#include <algorithm>

#include "decode_linears.h"
#include "elementwise.h"

namespace lt {
namespace {

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

}  // namespace

bool step_fits(const lt_decoder* d, const lt_step* s) {
  if (lt_missing(d, s) || d->layer_count < 1 || d->layers == nullptr || d->norm.weight == nullptr) return false;
  if (d->hidden < 1 || d->size < 2 || d->kv_heads < 1 || d->heads < 1 || d->heads % d->kv_heads != 0) return false;
  if (!tokens_fit(*d, *s)) return false;
  if (s->logits != nullptr && (d->head.factors != nullptr || !linear_fits(d->head, 0, d->hidden))) return false;
  return std::all_of(d->layers, d->layers + d->layer_count, [&](const auto& layer) { return layer_fits(*d, layer, *s); });
}

}  // namespace lt
