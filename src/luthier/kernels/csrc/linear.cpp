// The frozen linear layer: how the work is cut into blocks and shared by threads. docs/kernels.md derives the sizes.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "few.h"
#include "scratch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(LinearTable, linear)
LT_DECLARE_TABLES(FewTable, few)

namespace {

// Rows of activations packed together, for which each weight is decoded once: 1024 rows of 768 floats are 3 MB, of 320 1.3 MB,
// read from the second- or third-level cache.
constexpr std::int64_t kMostRows = 1024;

struct LowScratch {};
struct FactorScratch {};
struct LowPanelScratch {};
struct SumScratch {};

// Packs sliver i of the block, adds its share to every layer's inner result and, with the last block, packs that too.
void pack(const Packed& packed, const Block& block, std::int64_t i, const Low* lows, int count) {
  const LinearTable& k = packed.kernels;
  const int rows = packed.rows_of(i);
  const std::int64_t first_row = i * k.rows;
  float* sliver = packed.sliver(i, block.depth);
  k.pack_sliver(block.activations + first_row * block.stride, block.stride, 1, rows, block.depth, 1.0f, sliver);
  for (const Low* low = lows; low != lows + count; ++low) {
    if (low->rank == 0) continue;
    float* inner = low->inner + first_row * low->rank;
    for (std::int64_t c = 0; c < low->rank; c += k.columns) {
      const int columns = int(std::min<std::int64_t>(k.columns, low->rank - c));
      k.tile({sliver, low->factor + c * block.depth, block.depth, nullptr, nullptr, 0, inner + c, low->rank, rows, columns,
              !block.first, nullptr});
    }
    if (block.last) {
      k.pack_sliver(inner, low->rank, 1, rows, low->rank, low->scaling, low->slivers + first_row * low->rank);
    }
  }
}

// Room for each layer's factor panels and packed inner results.
std::vector<Low> prepare(const lt_linear* parts, int count, std::int64_t rows, std::int64_t depth, const LinearTable& k) {
  std::int64_t factors = 0, slivers = 0;
  for (int p = 0; p < count; ++p) {
    factors += up(parts[p].rank, k.columns) * depth;
    slivers += parts[p].rank * rows;
  }
  float* factor = Scratch<FactorScratch>::get<float>(std::size_t(factors));
  float* sliver = Scratch<LowScratch>::get<float>(std::size_t(slivers));
  std::vector<Low> lows(static_cast<std::size_t>(count));
  for (int p = 0; p < count; ++p) {
    lows[p].rank = parts[p].rank;
    lows[p].scaling = parts[p].scaling;
    lows[p].factor = factor;
    lows[p].slivers = sliver;
    factor += up(parts[p].rank, k.columns) * depth;
    sliver += parts[p].rank * rows;
  }
  return lows;
}

// y_p = x W_p^T + bias_p + s_p (x A_p^T) B_p^T for `rows` rows, u_p = x A_p^T on the way; x is packed once for all.
void forward_rows(const float* x, std::int64_t first_row, std::int64_t rows, const lt_linear* parts, int count, int threads) {
  const LinearTable& k = table(linear_tables, tiles_isa());
  const std::int64_t K = parts[0].matrix->cols, depth = piece(K, k.depth, kPanelGroup);
  const Packed packed{k, rows, Scratch<SliverScratch>::get<float>(std::size_t(rows * depth))};
  std::vector<Low> lows = prepare(parts, count, rows, depth, k);
  std::vector<std::int64_t> first_task(1, 0);
  for (int p = 0; p < count; ++p) {
    lows[p].inner = parts[p].rank > 0 ? parts[p].u + first_row * parts[p].rank : nullptr;
    first_task.push_back(first_task.back() + (parts[p].matrix->rows + k.columns - 1) / k.columns);
  }
  for (std::int64_t k0 = 0; k0 < K; k0 += depth) {
    const std::int64_t here = std::min(depth, K - k0);
    const Block block{x + first_row * K + k0, K, here, k0 == 0, k0 + here == K};
    for (int p = 0; p < count; ++p) {
      const std::int64_t r = parts[p].rank;
      if (r > 0) k.panels_forward(dense(parts[p].A, r, K), 0, int(r), k0, here, const_cast<float*>(lows[p].factor));
    }
    parallel_for(packed.count(), threads, [&](std::int64_t i) { pack(packed, block, i, lows.data(), count); });
    parallel_for(first_task.back(), threads, [&](std::int64_t task) {
      const auto p = std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
      const lt_linear& part = parts[p];
      const std::int64_t N = part.matrix->rows, n0 = (task - first_task[p]) * k.columns;
      const int columns = int(std::min<std::int64_t>(k.columns, N - n0));
      float* panel = Scratch<PanelScratch>::get<float>(std::size_t(here * k.columns));
      float* low_panel = Scratch<LowPanelScratch>::get<float>(std::size_t(part.rank * k.columns));
      k.panels_forward(*part.matrix, n0, columns, k0, here, panel);
      if (block.last && part.rank > 0) k.panels_forward(dense(part.B, N, part.rank), n0, columns, 0, part.rank, low_panel);
      multiply(packed, block, lows[p], panel, low_panel, part.y + first_row * N + n0, N, columns, !block.first,
               block.first && part.bias != nullptr ? part.bias + n0 : nullptr);
    });
  }
}

// scale * x, (T, features), in blocks of 32 features: [block][T][32], the last one filled up with zeros.
void pack_few(const float* x, std::int64_t T, std::int64_t features, float scale, float* out) {
  for (std::int64_t k = 0; k < features; k += kPanelGroup) {
    for (std::int64_t t = 0; t < T; ++t, out += kPanelGroup) {
      for (std::int64_t i = 0; i < kPanelGroup; ++i) out[i] = k + i < features ? scale * x[t * features + k + i] : 0.0f;
    }
  }
}

// The sums of the blocks of 32 features that pack_few laid out, an equal share for each of so many lanes, [T][blocks].
void add_blocks(const float* packed, std::int64_t T, std::int64_t blocks, int shares, float* sums) {
  for (std::int64_t b = 0; b < blocks * T; ++b, packed += kPanelGroup) {
    float lanes[8] = {};
    for (int i = 0; i < kPanelGroup; ++i) lanes[i % 8] += packed[i];
    const float halves = (lanes[0] + lanes[4]) + (lanes[1] + lanes[5]);
    sums[b % T * blocks + b / T] = (halves + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]))) / float(shares);
  }
}

// The same for T <= kFewTokens rows, row by row of W.
void forward_few(const float* x, std::int64_t T, const lt_linear* parts, int count, int threads) {
  constexpr std::int64_t kRowsOfTask = 16;
  const FewTable& k = table(few_tables);
  const std::int64_t K = parts[0].matrix->cols;
  float* packed = Scratch<SliverScratch>::get<float>(std::size_t(T * up(K, kPanelGroup)));
  pack_few(x, T, K, 1.0f, packed);
  const std::int64_t blocks = up(K, kPanelGroup) / kPanelGroup;
  float* sums = Scratch<SumScratch>::get<float>(std::size_t(T * blocks));
  add_blocks(packed, T, blocks, k.lanes, sums);
  for (int p = 0; p < count; ++p) {
    const lt_linear& part = parts[p];
    const std::int64_t N = part.matrix->rows, r = part.rank;
    float* inner = Scratch<LowScratch>::get<float>(std::size_t(T * up(r, kPanelGroup)));
    if (r > 0) {
      const lt_matrix A = dense(part.A, r, K);
      parallel_for(r, threads, [&](std::int64_t i) {
        k.multiply({&A, i, 1, packed, sums, T, nullptr, nullptr, 0, nullptr, part.u, r, nullptr});
      });
      pack_few(part.u, T, r, part.scaling, inner);
    }
    parallel_for((N + kRowsOfTask - 1) / kRowsOfTask, threads, [&](std::int64_t task) {
      const std::int64_t row = task * kRowsOfTask;
      k.multiply({part.matrix, row, std::min(kRowsOfTask, N - row), packed, sums, T, part.B, inner, r, part.bias, part.y, N, nullptr});
    });
  }
}

// dx = sum_p dy_p W_p + s_p (dy_p B_p) A_p for `rows` rows, v_p = dy_p B_p on the way.
void backward_rows(float* dx, std::int64_t first_row, std::int64_t rows, const lt_linear* parts, int count, int threads) {
  const LinearTable& k = table(linear_tables, tiles_isa());
  const std::int64_t K = parts[0].matrix->cols, wide = wide_columns(K);
  std::int64_t longest = 0;
  for (int p = 0; p < count; ++p) longest = std::max(longest, piece(parts[p].matrix->rows, k.depth, kPanelGroup));
  const Packed packed{k, rows, Scratch<SliverScratch>::get<float>(std::size_t(rows * longest))};
  std::vector<Low> lows = prepare(parts, count, rows, longest, k);
  for (int p = 0; p < count; ++p) {
    const lt_linear& part = parts[p];
    const std::int64_t N = part.matrix->rows, r = part.rank, depth = piece(N, k.depth, kPanelGroup);
    lows[p].inner = r > 0 ? part.v + first_row * r : nullptr;
    for (std::int64_t n0 = 0; n0 < N; n0 += depth) {
      const std::int64_t here = std::min(depth, N - n0);
      const Block block{part.dy + first_row * N + n0, N, here, n0 == 0, n0 + here == N};
      for (std::int64_t c = 0; c < r; c += kPanelGroup) {
        const int cols = int(std::min<std::int64_t>(kPanelGroup, r - c));
        k.panels_backward(dense(part.B, N, r), c, cols, n0, here, const_cast<float*>(lows[p].factor) + c * here);
      }
      parallel_for(packed.count(), threads, [&](std::int64_t i) { pack(packed, block, i, &lows[p], 1); });
      parallel_for((K + wide - 1) / wide, threads, [&](std::int64_t task) {
        const std::int64_t c0 = task * wide;
        const int columns = int(std::min(wide, K - c0));
        float* panels = Scratch<PanelScratch>::get<float>(std::size_t(here * wide));
        float* low_panels = Scratch<LowPanelScratch>::get<float>(std::size_t(r * wide));
        k.panels_backward(*part.matrix, c0, columns, n0, here, panels);
        if (block.last && r > 0) k.panels_backward(dense(part.A, r, K), c0, columns, 0, r, low_panels);
        multiply(packed, block, lows[p], panels, low_panels, dx + first_row * K + c0, K, columns, p > 0 || n0 > 0, nullptr);
      });
    }
  }
}

}  // namespace
}  // namespace lt

// Fills y and u of every part. x: (T, K). All parts have K columns.
LT_API int lt_linear_forward(const float* x, std::int64_t T, const lt_linear* parts, int count, int threads) {
  if (lt_missing(x, parts) || T < 0 || threads < 1 || !lt::fit(parts, count, true)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    bool turned = false;
    for (int p = 0; p < count; ++p) turned = turned || parts[p].matrix->transposed;
    if (T <= lt::kFewTokens && !turned) {
      lt::forward_few(x, T, parts, count, threads);
      return LT_OK;
    }
    const std::int64_t rows = lt::piece(std::max<std::int64_t>(T, 1), lt::kMostRows, 1);
    for (std::int64_t t = 0; t < T; t += rows) lt::forward_rows(x, t, std::min(rows, T - t), parts, count, threads);
  })
}

// dx: (T, K), overwritten; fills v of every part from its dy.
LT_API int lt_linear_backward_input(float* dx, std::int64_t T, const lt_linear* parts, int count, int threads) {
  if (lt_missing(dx, parts) || T < 0 || threads < 1 || !lt::fit(parts, count, false)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const std::int64_t rows = lt::piece(std::max<std::int64_t>(T, 1), lt::kMostRows, 1);
    for (std::int64_t t = 0; t < T; t += rows) lt::backward_rows(dx, t, std::min(rows, T - t), parts, count, threads);
  })
}

// out: (count, cols), the rows ids[i] of the matrix in float32; ids null: rows 0, 1, ...
LT_API int lt_dequantize_rows(const lt_matrix* m, const std::int64_t* ids, std::int64_t count, float* out, int threads) {
  if (!lt::fits(m) || out == nullptr || count < 0 || threads < 1 || m->transposed) return LT_BAD_ARGUMENT;
  if (ids == nullptr && count > m->rows) return LT_BAD_ARGUMENT;
  for (std::int64_t i = 0; ids != nullptr && i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= m->rows) return LT_BAD_ARGUMENT;
  }
  LT_GUARD({
    const lt::LinearTable& k = lt::table(lt::linear_tables);
    lt::parallel_for(count, threads, [&](std::int64_t i) {
      k.decode(*m, ids == nullptr ? i : ids[i], 0, m->cols, out + i * m->cols);
    });
  })
}
