// The loss of the language model's head: logits of a few rows at a time, their loss, and the gradient to the hidden states.
#include "head.h"

#include <cmath>

#include "blocks.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(LinearTable, linear)
LT_DECLARE_TABLES(HeadTable, head)

namespace {

struct SummaryScratch {};

// Logits lie in blocks of so many columns, (rows, kRoom) each: a block is summed up and turned into slivers where it was
// made, near, and its rows are not a power of two apart, which would bring them to the same few sets of a cache.
constexpr std::int64_t kColumns = 768, kRoom = kColumns + 16;
std::int64_t blocks_of(std::int64_t vocabulary) { return (vocabulary + kColumns - 1) / kColumns; }

// A chunk of rows: their logits, and the hidden states packed in slivers, stretch by stretch of the width.
struct Chunk {
  const LinearTable& kernels;
  const lt_matrix& matrix;
  const HeadRows head;
  std::int64_t rows;
  float *logits, *slivers;

  std::int64_t blocks() const { return blocks_of(head.vocabulary); }
  std::int64_t columns(std::int64_t block) const { return std::min(kColumns, head.vocabulary - block * kColumns); }
  float* row(std::int64_t block, std::int64_t r) const { return logits + (block * rows + r) * kRoom; }
  float& score(std::int64_t r, std::int64_t token) const { return row(token / kColumns, r)[token % kColumns]; }
  std::int64_t depth() const { return piece(matrix.cols, kernels.depth, kPanelGroup); }
  Packed packed(std::int64_t k0) const { return {kernels, rows, slivers + rows * k0}; }
};

void pack_hidden(const Chunk& chunk, const float* hidden, int threads) {
  const LinearTable& k = chunk.kernels;
  const std::int64_t width = chunk.matrix.cols, depth = chunk.depth();
  parallel_for(chunk.packed(0).count(), threads, [&](std::int64_t i) {
    for (std::int64_t k0 = 0; k0 < width; k0 += depth) {
      const Packed packed = chunk.packed(k0);
      const std::int64_t here = std::min(depth, width - k0);
      k.pack_sliver(hidden + i * k.rows * width + k0, width, 1, packed.rows_of(i), here, 1.0f, packed.sliver(i, here));
    }
  });
}

// The logits of one block for all rows of the chunk.
void make_logits(const Chunk& chunk, std::int64_t block, const float* bias) {
  const LinearTable& k = chunk.kernels;
  const std::int64_t width = chunk.matrix.cols, depth = chunk.depth(), first = block * kColumns;
  float* panel = Scratch<PanelScratch>::get<float>(std::size_t(depth * k.columns));
  for (std::int64_t k0 = 0; k0 < width; k0 += depth) {
    const Block stretch{nullptr, 0, std::min(depth, width - k0), k0 == 0, false};
    for (std::int64_t c = 0; c < chunk.columns(block); c += k.columns) {
      const int columns = int(std::min<std::int64_t>(k.columns, chunk.columns(block) - c));
      k.panels_forward(chunk.matrix, first + c, columns, k0, stretch.depth, panel);
      multiply(chunk.packed(k0), stretch, Low{}, panel, nullptr, chunk.row(block, 0) + c, kRoom, columns, !stretch.first,
               stretch.first && bias != nullptr ? bias + first + c : nullptr);
    }
  }
}

// The log sum exp of a row, and the sum of its scores, from those of its blocks.
float joined(const HeadSummary* blocks, std::int64_t count, float* total) {
  float largest = -INFINITY, sum = 0;
  *total = 0;
  for (std::int64_t b = 0; b < count; ++b) largest = std::max(largest, blocks[b].largest);
  for (std::int64_t b = 0; b < count; ++b) {
    *total += blocks[b].total;
    // A block without a score above -Inf adds nothing, unless one was NaN.
    sum += blocks[b].largest == -INFINITY ? blocks[b].exponentials : blocks[b].exponentials * expf(blocks[b].largest - largest);
  }
  return largest + logf(sum);
}

// losses, and each row's log sum exp, (rows).
void add_up(const Chunk& chunk, const std::int64_t* targets, const float* bias, float* losses, float* lse, int threads) {
  const HeadTable& kernels = table(head_tables);
  const HeadRows& head = chunk.head;
  const std::int64_t blocks = chunk.blocks();
  HeadSummary* summaries = Scratch<SummaryScratch>::get<HeadSummary>(std::size_t(chunk.rows * blocks));
  parallel_for(blocks, threads, [&](std::int64_t block) {
    make_logits(chunk, block, bias);
    for (std::int64_t r = 0; r < chunk.rows; ++r) {
      summaries[r * blocks + block] = kernels.summarise(head, chunk.row(block, r), chunk.columns(block));
    }
  });
  const float share = head.smoothing / float(head.vocabulary);
  parallel_for(chunk.rows, threads, [&](std::int64_t r) {
    float total;
    lse[r] = joined(summaries + r * blocks, blocks, &total);
    // 0 times an infinite sum would be NaN.
    losses[r] = lse[r] - (1 - head.smoothing) * chunk.score(r, targets[r]) - (share != 0 ? share * total : 0);
  });
}

// Scores [first, first + count) of row r, in one block, become d loss / d logit.
void differentiate(const Chunk& chunk, std::int64_t r, std::int64_t first, std::int64_t count, float lse, std::int64_t target) {
  const HeadRows& head = chunk.head;
  const bool aimed = target >= first && target < first + count;
  const float t = aimed && head.softcap != 0 ? chunk.score(r, target) / head.softcap : 0;
  table(head_tables).gradient(head, &chunk.score(r, first), count, lse);
  if (aimed) chunk.score(r, target) -= (1 - head.smoothing) * head.scale * (1 - t * t);
}

// dhidden (rows, width) from the scores, which become gradients on the way.
void backward(const Chunk& chunk, const std::int64_t* targets, const float* lse, float* dhidden, int threads) {
  const LinearTable& k = chunk.kernels;
  const std::int64_t K = chunk.matrix.cols, wide = wide_columns(K), depth = piece(kColumns, k.depth, kPanelGroup);
  const Packed packed{k, chunk.rows, Scratch<SliverScratch>::get<float>(std::size_t(chunk.rows * depth))};
  for (std::int64_t n0 = 0, here; n0 < chunk.head.vocabulary; n0 += here) {
    const std::int64_t block = n0 / kColumns;
    here = std::min(depth, block * kColumns + chunk.columns(block) - n0);
    parallel_for(packed.count(), threads, [&](std::int64_t i) {
      const std::int64_t first = i * k.rows;
      for (std::int64_t r = first; r < first + packed.rows_of(i); ++r) differentiate(chunk, r, n0, here, lse[r], targets[r]);
      k.pack_sliver(&chunk.score(first, n0), kRoom, 1, packed.rows_of(i), here, 1.0f, packed.sliver(i, here));
    });
    parallel_for((K + wide - 1) / wide, threads, [&](std::int64_t task) {
      const std::int64_t c0 = task * wide;
      const int columns = int(std::min(wide, K - c0));
      float* panels = Scratch<PanelScratch>::get<float>(std::size_t(here * wide));
      k.panels_backward(chunk.matrix, c0, columns, n0, here, panels);
      multiply(packed, {nullptr, 0, here, n0 == 0, false}, Low{}, panels, nullptr, dhidden + c0, K, columns, n0 > 0, nullptr);
    });
  }
}

bool targets_fit(const std::int64_t* targets, std::int64_t rows, std::int64_t vocabulary) {
  for (std::int64_t row = 0; row < rows; ++row) {
    if (targets[row] < 0 || targets[row] >= vocabulary) return false;
  }
  return true;
}

}  // namespace
}  // namespace lt

// Floats of `room` that lt_linear_cross_entropy needs for each row of a chunk.
LT_API std::int64_t lt_head_room(std::int64_t vocabulary, std::int64_t width) {
  return lt::blocks_of(vocabulary) * lt::kRoom + width + 1;
}

// losses[s] of hidden (S, width) against the head `matrix` (vocabulary, width); `bias` may be null. `room` is for `chunk`
// rows at a time (lt_head_room). dhidden (S, width) is the gradient of the losses' sum, or null.
LT_API int lt_linear_cross_entropy(const float* hidden, std::int64_t S, const lt_matrix* matrix, const float* bias,
                                   const std::int64_t* targets, float scale, float softcap, float smoothing, float* room,
                                   std::int64_t chunk, float* losses, float* dhidden, int threads) {
  if (lt_missing(hidden, targets, room, losses) || !lt::fits(matrix)) return LT_BAD_ARGUMENT;
  if (S < 0 || chunk < 1 || threads < 1 || !lt::targets_fit(targets, S, matrix->rows)) return LT_BAD_ARGUMENT;
  const std::int64_t vocabulary = matrix->rows, width = matrix->cols;
  const lt::LinearTable& kernels = lt::table(lt::linear_tables, lt::tiles_isa());
  LT_GUARD({
    for (std::int64_t s = 0; s < S; s += chunk) {
      const std::int64_t rows = std::min(chunk, S - s);
      float *slivers = room + rows * lt::blocks_of(vocabulary) * lt::kRoom, *lse = slivers + rows * width;
      const lt::Chunk part{kernels, *matrix, {vocabulary, scale, softcap, smoothing}, rows, room, slivers};
      lt::pack_hidden(part, hidden + s * width, threads);
      lt::add_up(part, targets + s, bias, losses + s, lse, threads);
      if (dhidden != nullptr) lt::backward(part, targets + s, lse, dhidden + s * width, threads);
    }
  })
}
