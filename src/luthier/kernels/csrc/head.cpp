// The loss of the language model's head: logits of a few rows at a time, their loss, and the gradient to the hidden states.
#include "head.h"

#include "dispatch.h"
#include "linear.h"
#include "threads.h"

LT_API int lt_linear_forward(const float* x, std::int64_t T, const lt_linear* parts, int count, int threads);
LT_API int lt_linear_backward_input(float* dx, std::int64_t T, const lt_linear* parts, int count, int threads);

namespace lt {

LT_DECLARE_TABLES(HeadTable, head)

namespace {

bool targets_fit(const std::int64_t* targets, std::int64_t rows, std::int64_t vocabulary) {
  for (std::int64_t row = 0; row < rows; ++row) {
    if (targets[row] < 0 || targets[row] >= vocabulary) return false;
  }
  return true;
}

}  // namespace
}  // namespace lt

// losses[s] of hidden (S, width) against the head `matrix` (vocabulary, width); `bias` may be null. `logits` is room for
// chunk * vocabulary floats. dhidden (S, width) is the gradient of the losses' sum, or null.
LT_API int lt_linear_cross_entropy(const float* hidden, std::int64_t S, const lt_matrix* matrix, const float* bias,
                                   const std::int64_t* targets, float scale, float softcap, float smoothing, float* logits,
                                   std::int64_t chunk, float* losses, float* dhidden, int threads) {
  if (lt_missing(hidden, targets, logits, losses) || !lt::fits(matrix)) return LT_BAD_ARGUMENT;
  if (S < 0 || chunk < 1 || threads < 1 || !lt::targets_fit(targets, S, matrix->rows)) return LT_BAD_ARGUMENT;
  const std::int64_t vocabulary = matrix->rows, width = matrix->cols;
  const lt::HeadTable& kernels = lt::table(lt::head_tables);
  LT_GUARD({
    for (std::int64_t s = 0; s < S; s += chunk) {
      const std::int64_t rows = S - s < chunk ? S - s : chunk;
      lt_linear layer{};
      layer.matrix = matrix;
      layer.bias = bias;
      layer.y = logits;
      layer.dy = logits;
      int status = lt_linear_forward(hidden + s * width, rows, &layer, 1, threads);
      if (status != LT_OK) return status;
      lt::parallel_for(rows, threads, [&](std::int64_t row) {
        kernels.cross_entropy({1, vocabulary, scale, softcap, smoothing}, logits + row * vocabulary, targets + s + row,
                              losses + s + row, dhidden != nullptr);
      });
      if (dhidden == nullptr) continue;
      status = lt_linear_backward_input(dhidden + s * width, rows, &layer, 1, threads);
      if (status != LT_OK) return status;
    }
  })
}
