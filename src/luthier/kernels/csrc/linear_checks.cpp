// What the entries of the linear layer ask of their structures before they read through them.
#include "linear.h"

namespace lt {
namespace {

// Weights of a block, which rows are whole multiples of.
std::int64_t weights_of_block(std::int32_t kind) { return kind <= LT_NF4 ? 1 : kind < LT_Q4_K ? 32 : 256; }

bool has_scales(const lt_matrix& m) {
  const bool nested = !lt_missing(m.absmax_bytes, m.nested_absmax, m.nested_map);
  return m.code != nullptr && (m.absmax != nullptr || nested);
}

// rank 0, or both factors and room for the inner result.
bool has_term(const lt_linear& part, const float* inner) {
  return part.rank == 0 || (part.rank > 0 && !lt_missing(part.A, part.B, inner));
}

}  // namespace

bool fits(const lt_matrix* m) {
  if (m == nullptr || m->kind < 0 || m->kind >= LT_KINDS || m->rows < 1 || m->cols < 1 || m->data == nullptr) return false;
  if (m->transposed != 0 && m->kind > LT_F16) return false;
  return m->cols % weights_of_block(m->kind) == 0 && (m->kind != LT_NF4 || has_scales(*m));
}

bool fit(const lt_linear* parts, int count, bool forward) {
  for (int p = 0; p < count; ++p) {
    const lt_linear& part = parts[p];
    if (!fits(part.matrix) || part.factors != nullptr || part.matrix->cols != parts[0].matrix->cols) return false;
    if ((forward ? part.y : part.dy) == nullptr || !has_term(part, forward ? part.u : part.v)) return false;
  }
  return count >= 1;
}

}  // namespace lt
