// The gradients of the low-rank factors: products of a tall, narrow matrix with activations, over all tokens.
#include "blocks.h"
#include "dispatch.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(LinearTable, linear)

namespace {

// Tokens whose narrow side is packed at once, so that scratch does not grow with the batch.
constexpr std::int64_t kMostTokens = 2048;

struct NarrowScratch {};
struct WideScratch {};
struct SumsScratch {};

// out (rank, C), or turned (C, rank): what a task's columns hold, between here and its own sums (rank, wide).
struct Result {
  float* out;
  std::int64_t rank, C, wide;
  bool turned;
  float& at(std::int64_t i, std::int64_t column) const { return out[turned ? column * rank + i : i * C + column]; }
  void get(std::int64_t c0, int columns, float* sums) const {
    for (std::int64_t i = 0; i < rank; ++i) {
      for (int c = 0; c < columns; ++c) sums[i * wide + c] = at(i, c0 + c);
    }
  }
  void put(std::int64_t c0, int columns, const float* sums) const {
    for (std::int64_t i = 0; i < rank; ++i) {
      for (int c = 0; c < columns; ++c) at(i, c0 + c) = sums[i * wide + c];
    }
  }
};

// Adds scale * inner^T x of T <= kMostTokens tokens to the result, or begins it with them. One task a stretch of columns:
// tokens are added in rising order by one thread.
void add_tokens(const float* inner, const float* x, std::int64_t T, float scale, const Result& result, bool begin,
                int threads) {
  const LinearTable& k = table(linear_tables, tiles_isa());
  const std::int64_t rank = result.rank, C = result.C, wide = result.wide, chunk = piece(T, k.depth, 1);
  float* slivers = Scratch<NarrowScratch>::get<float>(std::size_t(rank * T));
  parallel_for((T + chunk - 1) / chunk, threads, [&](std::int64_t task) {
    const std::int64_t t0 = task * chunk, here = std::min(chunk, T - t0);
    const Packed block{k, rank, slivers + t0 * rank};
    for (std::int64_t i = 0; i < block.count(); ++i) {
      k.pack_sliver(inner + t0 * rank + i * k.rows, 1, rank, block.rows_of(i), here, scale, block.sliver(i, here));
    }
  });
  parallel_for((C + wide - 1) / wide, threads, [&](std::int64_t task) {
    const std::int64_t c0 = task * wide;
    const int columns = int(std::min(wide, C - c0));
    float* panels = Scratch<WideScratch>::get<float>(std::size_t(chunk * wide));
    float* sums = Scratch<SumsScratch>::get<float>(std::size_t(rank * wide));
    if (!begin) result.get(c0, columns, sums);
    for (std::int64_t t0 = 0; t0 < T; t0 += chunk) {
      const std::int64_t here = std::min(chunk, T - t0);
      k.panels_backward(dense(x, T, C), c0, columns, t0, here, panels);
      multiply({k, rank, slivers + t0 * rank}, {nullptr, 0, here, false, false}, Low{}, panels, nullptr, sums, wide, columns,
               !begin || t0 > 0, nullptr);
    }
    result.put(c0, columns, sums);
  });
}

}  // namespace
}  // namespace lt

// out = scale * inner^T x, (rank, columns), or turned (columns, rank). inner: (T, rank), x: (T, columns).
// dA = s v^T x; dB = s dy^T u is the turned one.
LT_API int lt_outer(const float* inner, std::int64_t rank, const float* x, std::int64_t columns, std::int64_t T, float scale,
                    float* out, int turned, int threads) {
  if (lt_missing(inner, x, out) || rank < 1 || columns < 1 || T < 1 || threads < 1) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const lt::Result result{out, rank, columns, lt::wide_columns(columns), turned != 0};
    for (std::int64_t t = 0; t < T; t += lt::kMostTokens) {
      const std::int64_t here = std::min(lt::kMostTokens, T - t);
      lt::add_tokens(inner + t * rank, x + t * columns, here, scale, result, t == 0, threads);
    }
  })
}
