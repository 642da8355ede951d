// Both products with a matrix in two factors, block by block of tokens. docs/kernels.md has the order of the work.
#pragma once
#include "factored.h"

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(LinearTable, linear)
LT_DECLARE_TABLES(FactoredTable, factored)

namespace {  // one file includes this

// Tokens for which each weight is decoded once, and numbers that are held of them between the products at most: 16 MB.
constexpr std::int64_t kMostRows = 1024, kMostNumbers = 1 << 22;
// Weights that are decoded at a time: 4 MB, which every thread reads from the third-level cache.
constexpr std::int64_t kMostWeights = 1 << 20;
// Slivers that meet one panel after the other: some 200 features of results to turn, and 512 KB of weights.
constexpr std::int64_t kSliversOfTurn = 16, kNumbersOfStretch = 1 << 17;
// Panels of a task; tasks for each thread where there are fewer panels than that.
constexpr std::int64_t kPanelsOfTask = 4, kTasksOfThread = 8;
// Rows of a matrix that a task decodes columns of.
constexpr std::int64_t kRowsOfTask = 64;

struct WeightScratch {};
struct LeftScratch {};
struct InputScratch {};
struct InnerScratch {};
struct ResultScratch {};

// Numbers of all tokens, a panel of `width` tokens each: [panel][feature][width].
struct Panels {
  float* data;
  std::int64_t tokens, features;
  int width;
  std::int64_t count() const { return (tokens + width - 1) / width; }
  int tokens_of(std::int64_t p) const { return int(std::min<std::int64_t>(width, tokens - p * width)); }
  float* row(std::int64_t p, std::int64_t feature) const { return data + (p * features + feature) * width; }
};

// Decoded weights: slivers [depth][rows] of so many features, one behind the other.
struct Slivers {
  const float* data;
  std::int64_t features, depth;
  int rows;
  std::int64_t count() const { return (features + rows - 1) / rows; }
};

class Factored {
 public:
  Factored(const lt_factors& factors, int threads) : right_(*factors.right), left_(*factors.left), threads_(threads) {
    const std::int64_t r = right_.rows, N = factors.places != nullptr ? factors.outputs : left_.rows;
    places_.resize(std::size_t(N));
    for (std::int64_t o = 0; o < N; ++o) places_[o] = factors.places != nullptr ? factors.places[o] : std::int32_t(r + o);
    again_.resize(std::size_t(N));
    std::vector<char> met(std::size_t(r + left_.rows));
    for (std::int64_t o = 0; o < N; ++o) {
      if (places_[o] >= r) others_.push_back(std::int32_t(o)), left_rows_.push_back(places_[o] - std::int32_t(r));
      again_[o] = met[places_[o]];
      met[places_[o]] = 1;
    }
    for (std::int64_t f = 0; f < r + left_.rows; ++f) {
      if (!met[f]) unused_.push_back(std::int32_t(f));
    }
  }

  // Tokens of one block, a multiple of what a panel holds.
  std::int64_t block(std::int64_t tokens, std::int64_t features) const {
    const std::int64_t panels = std::max<std::int64_t>(kMostNumbers / features / k_.columns, 4);
    return piece(tokens, std::min(kMostRows, panels * k_.columns), k_.columns);
  }

  // Of T tokens; the first product gives every panel's inner result, the second what is left of the outputs.
  void forward(const float* x, std::int64_t T, const float* bias, float* y) const {
    const std::int64_t K = right_.cols, r = right_.rows, M = std::int64_t(others_.size());
    const std::int64_t depth = piece(K, k_.depth, kPanelGroup);
    std::vector<std::int32_t> rows(static_cast<std::size_t>(r));
    for (std::int64_t i = 0; i < r; ++i) rows[i] = std::int32_t(i);
    const Output output{bias, y};
    if (K <= depth && (K + M) * r <= kMostWeights && has_many(T)) {
      const Rows right = rows_of<WeightScratch>(right_, rows.data(), r, 0, K);
      const Rows left = rows_of<LeftScratch>(left_, left_rows_.data(), M, 0, r);
      decode(right, &left);
      return both(x, T, right.slivers, left.slivers, output);
    }
    const Panels input = panels<InputScratch>(T, depth), inner = panels<InnerScratch>(T, r);
    for (std::int64_t k0 = 0; k0 < K; k0 += depth) {
      const std::int64_t here = std::min(depth, K - k0), most = features_at_once(here, k_.rows);
      for (std::int64_t r0 = 0; r0 < r; r0 += most) {
        const Slivers w = decode(rows_of<WeightScratch>(right_, rows.data() + r0, std::min(most, r - r0), k0, here), nullptr);
        const auto pack = [&](std::int64_t p) {
          if (r0 == 0) take_tokens(x + p * k_.columns * K + k0, K, inner.tokens_of(p), here, input.row(p, 0));
        };
        each(inner, w, pack, [&](std::int64_t p, std::int64_t first, std::int64_t last) {
          multiply(w, first, last, input.row(p, 0), inner.tokens_of(p), k0 > 0, inner.row(p, r0 + first * w.rows));
        });
      }
    }
    const std::int64_t most = features_at_once(r, k_.rows);
    for (std::int64_t m0 = 0; m0 == 0 || m0 < M; m0 += most) {
      const Slivers w = decode(rows_of<LeftScratch>(left_, left_rows_.data() + m0, std::min(most, M - m0), 0, r), nullptr);
      const auto nothing = [](std::int64_t) {};
      each(inner, w, nothing, [&](std::int64_t p, std::int64_t first, std::int64_t last) {
        second(inner, p, w, m0, first, last, output, y + p * k_.columns * std::int64_t(places_.size()));
      });
    }
  }

  // Of T tokens: the gradient to the inner result, then to x. Its panels hold what goes to each row of R, then of L.
  void backward(float* dx, std::int64_t T, const float* dy) const {
    const std::int64_t K = right_.cols, r = right_.rows, M = left_.rows, depth = piece(M, k_.depth, 1);
    const Panels given = panels<InputScratch>(T, r + M);
    for (std::int64_t n0 = 0; n0 < M; n0 += depth) {
      const std::int64_t here = std::min(depth, M - n0), most = features_at_once(here, f_.group);
      for (std::int64_t c0 = 0; c0 < r; c0 += most) {
        const Slivers w = decode_columns(left_, c0, std::min(most, r - c0), n0, here);
        const auto pack = [&](std::int64_t p) {
          if (n0 == 0 && c0 == 0) take_outputs(given, p, dy);
        };
        each(given, w, pack, [&](std::int64_t p, std::int64_t first, std::int64_t last) {
          multiply(w, first, last, given.row(p, r + n0), given.tokens_of(p), true, given.row(p, c0 + first * w.rows));
        });
      }
    }
    const std::int64_t most = features_at_once(r, f_.group);
    for (std::int64_t c0 = 0; c0 < K; c0 += most) {
      const Slivers w = decode_columns(right_, c0, std::min(most, K - c0), 0, r);
      const auto nothing = [](std::int64_t) {};
      each(given, w, nothing, [&](std::int64_t p, std::int64_t first, std::int64_t last) {
        float* z = Scratch<ResultScratch>::get<float>(std::size_t(kSliversOfTurn * w.rows * k_.columns));
        multiply(w, first, last, given.row(p, 0), given.tokens_of(p), false, z);
        const std::int64_t from = first * w.rows, columns = std::min(last * w.rows, w.features) - from;
        put_columns(z, columns, given.tokens_of(p), dx + p * k_.columns * K + c0 + from);
      });
    }
  }

 private:
  struct Output {
    const float* bias;
    float* y;
  };

  // Both products of a few panels at a time, one after the other while these are near: weights are all decoded.
  void both(const float* x, std::int64_t T, const Slivers& right, const Slivers& left, const Output& output) const {
    const std::int64_t K = right_.cols, r = right_.rows, N = std::int64_t(places_.size()), groups = groups_of(T);
    const std::int64_t P = (T + k_.columns - 1) / k_.columns;
    parallel_for(groups, threads_, [&](std::int64_t group) {
      const std::int64_t t0 = P * group / groups * k_.columns, t1 = std::min(T, P * (group + 1) / groups * k_.columns);
      const Panels input = panels<InputScratch>(t1 - t0, K), inner = panels<InnerScratch>(t1 - t0, r);
      for (std::int64_t p = 0; p < input.count(); ++p) {
        take_tokens(x + (t0 + p * k_.columns) * K, K, input.tokens_of(p), K, input.row(p, 0));
      }
      stretches(right, 0, right.count(), 0, input.count(), [&](std::int64_t p, std::int64_t first, std::int64_t last) {
        multiply(right, first, last, input.row(p, 0), input.tokens_of(p), false, inner.row(p, first * right.rows));
      });
      stretches(left, 0, left.count(), 0, input.count(), [&](std::int64_t p, std::int64_t first, std::int64_t last) {
        second(inner, p, left, 0, first, last, output, output.y + (t0 + p * k_.columns) * N);
      });
    });
  }

  // Slivers [first, last) of L times one panel's inner result, and the outputs up to theirs. w begins with the m0-th output
  // that is no pivot; y: the panel's.
  void second(const Panels& inner, std::int64_t p, const Slivers& w, std::int64_t m0, std::int64_t first, std::int64_t last,
              const Output& output, float* y) const {
    float* z = Scratch<ResultScratch>::get<float>(std::size_t(kSliversOfTurn * w.rows * k_.columns));
    multiply(w, first, last, inner.row(p, 0), inner.tokens_of(p), false, z);
    put_outputs(inner, p, m0 + first * w.rows, m0 + std::min(last * w.rows, w.features), z, output.bias, y);
  }

  // Whether threads share the panels alone, and so many tasks then.
  bool has_many(std::int64_t tokens) const { return threads_ == 1 || tokens >= kPanelsOfTask * threads_ * k_.columns; }
  std::int64_t groups_of(std::int64_t tokens) const {
    const std::int64_t most = kPanelsOfTask * threads_ * k_.columns;
    return threads_ * ((tokens + most - 1) / most);
  }

  // body(panel, first sliver, last) for slivers [s, end) and panels [p0, p1): a stretch of slivers meets one panel after the
  // other. Once where there are no slivers, since outputs may all be pivots.
  template <class Body>
  void stretches(const Slivers& w, std::int64_t s, std::int64_t end, std::int64_t p0, std::int64_t p1, const Body& body) const {
    // Eight slivers hold a multiple of a cache line's results.
    const std::int64_t most = std::min(kSliversOfTurn, kNumbersOfStretch / (w.rows * w.depth));
    const std::int64_t step = most >= 8 ? most / 8 * 8 : std::max<std::int64_t>(1, most);
    do {
      for (std::int64_t p = p0; p < p1; ++p) body(p, s, std::min(end, s + step));
      s += step;
    } while (s < end);
  }

  template <class Tag>
  Panels panels(std::int64_t tokens, std::int64_t features) const {
    const std::int64_t count = (tokens + k_.columns - 1) / k_.columns;
    return {Scratch<Tag>::template get<float>(std::size_t(count * features * k_.columns)), tokens, features, k_.columns};
  }

  std::int64_t features_at_once(std::int64_t depth, int unit) const {
    return std::max<std::int64_t>(kMostWeights / depth / unit, 1) * unit;
  }

  // Rows of a matrix that are to be slivers over its columns from `col`.
  struct Rows {
    const lt_matrix& matrix;
    const std::int32_t* rows;
    std::int64_t col;
    float* data;
    Slivers slivers;
  };

  template <class Tag>
  Rows rows_of(const lt_matrix& m, const std::int32_t* rows, std::int64_t count, std::int64_t col, std::int64_t depth) const {
    float* data = Scratch<Tag>::template get<float>(std::size_t(count * depth));
    return {m, rows, col, data, {data, count, depth, k_.rows}};
  }

  // Decodes these rows, and others at the same time.
  Slivers decode(const Rows& own, const Rows* also) const {
    const std::int64_t count = own.slivers.count();
    parallel_for(count + (also == nullptr ? 0 : also->slivers.count()), threads_, [&](std::int64_t task) {
      const Rows& part = task < count ? own : *also;
      const Slivers& w = part.slivers;
      const std::int64_t first = (task < count ? task : task - count) * w.rows, listed = w.features - first;
      f_.sliver_of_rows(part.matrix, part.rows + first, int(std::min<std::int64_t>(w.rows, listed)), listed, part.col, w.depth,
                        part.data + first * w.depth);
    });
    return own.slivers;
  }

  // Columns col ... col + count of m as slivers over rows row ... row + depth.
  Slivers decode_columns(const lt_matrix& m, std::int64_t col, std::int64_t count, std::int64_t row, std::int64_t depth) const {
    float* data = Scratch<WeightScratch>::get<float>(std::size_t(count * depth));
    const std::int64_t groups = (count + f_.group - 1) / f_.group, pieces = (depth + kRowsOfTask - 1) / kRowsOfTask;
    parallel_for(groups * pieces, threads_, [&](std::int64_t task) {
      const std::int64_t c = task / pieces * f_.group, first = task % pieces * kRowsOfTask;
      f_.slivers_of_columns(m, col + c, int(std::min<std::int64_t>(f_.group, count - c)), row, depth, first,
                            std::min(depth, first + kRowsOfTask), data + c * depth);
    });
    return {data, count, depth, k_.rows};
  }

  // body(panel, first sliver, last) for all slivers of every panel, pack(panel) before the first of a panel. A task is a few
  // panels; where there are few, each is one and its slivers are shared out too.
  template <class Pack, class Body>
  void each(const Panels& panels, const Slivers& w, const Pack& pack, const Body& body) const {
    const std::int64_t P = panels.count(), S = w.count();
    const bool many = has_many(panels.tokens);
    const std::int64_t groups = many ? groups_of(panels.tokens) : P;
    const std::int64_t ranges = many ? 1 : std::max<std::int64_t>(1, std::min(S, (kTasksOfThread * threads_ + P - 1) / P));
    if (!many) parallel_for(P, threads_, pack);
    parallel_for(groups * ranges, threads_, [&](std::int64_t task) {
      const std::int64_t group = task / ranges, range = task % ranges;
      const std::int64_t p0 = P * group / groups, p1 = P * (group + 1) / groups;
      for (std::int64_t p = p0; many && p < p1; ++p) pack(p);
      if (p0 < p1) stretches(w, S * range / ranges, S * (range + 1) / ranges, p0, p1, body);
    });
  }

  // A panel of tokens' numbers, (tokens, depth), rows `stride` apart.
  void take_tokens(const float* x, std::int64_t stride, int tokens, std::int64_t depth, float* panel) const {
    // Rows whole pages apart fall on one set of the nearest cache: there the detour by a copy is faster.
    constexpr std::int64_t kPage = 1024;
    if (tokens == k_.columns && stride % kPage != 0) return f_.panel(x, stride, depth, panel);
    k_.panels_forward(dense(x, tokens, stride), 0, tokens, 0, depth, panel);
  }

  // c, (features, width), of slivers [first, last) times one panel.
  void multiply(const Slivers& w, std::int64_t first, std::int64_t last, const float* panel, int tokens, bool accumulate,
                float* c) const {
    // Whole vectors, since what lies beside the tokens is multiplied again.
    const int lanes = tokens <= k_.columns / 2 ? k_.columns / 2 : k_.columns;
    for (std::int64_t s = first; s < last; ++s, c += w.rows * k_.columns) {
      const int rows = int(std::min<std::int64_t>(w.rows, w.features - s * w.rows));
      const float* sliver = w.data + s * w.rows * w.depth;
      k_.tile({sliver, panel, w.depth, nullptr, nullptr, 0, c, k_.columns, rows, lanes, accumulate, nullptr});
    }
  }

  // The outputs of one panel from the first of others_[from ... to) up to the next behind them, pivots among them; z has the
  // results of the others.
  void put_outputs(const Panels& inner, std::int64_t p, std::int64_t from, std::int64_t to, const float* z, const float* bias,
                   float* y) const {
    const std::int64_t N = std::int64_t(places_.size()), M = std::int64_t(others_.size()), r = right_.rows;
    const std::int64_t begin = from == 0 ? 0 : others_[from], end = to == M ? N : others_[to];
    const float* rows[kPanelGroup];
    for (std::int64_t o = begin; o < end; o += kPanelGroup) {
      const int count = int(std::min<std::int64_t>(kPanelGroup, end - o));
      for (int i = 0; i < count; ++i) {
        const std::int32_t place = places_[o + i];
        rows[i] = place < r ? inner.row(p, place) : z;
        if (place >= r) z += k_.columns;
      }
      f_.turn(rows, bias == nullptr ? nullptr : bias + o, count, inner.tokens_of(p), y + o, N);
    }
  }

  void put_columns(const float* z, std::int64_t columns, int tokens, float* dx) const {
    const float* rows[kPanelGroup];
    for (std::int64_t c = 0; c < columns; c += kPanelGroup) {
      const int count = int(std::min<std::int64_t>(kPanelGroup, columns - c));
      for (int i = 0; i < count; ++i) rows[i] = z + (c + i) * k_.columns;
      f_.turn(rows, nullptr, count, tokens, dx + c, right_.cols);
    }
  }

  // The outputs' gradients of one panel, each to the row that gave it. Rows may have given several outputs, or none.
  void take_outputs(const Panels& given, std::int64_t p, const float* dy) const {
    const std::int64_t N = std::int64_t(places_.size()), width = k_.columns;
    const int tokens = given.tokens_of(p);
    dy += p * width * N;
    float* side = Scratch<ResultScratch>::get<float>(std::size_t(kPanelGroup * width));
    for (std::int64_t o = 0; o < N; o += kPanelGroup) {
      const std::int64_t here = std::min<std::int64_t>(kPanelGroup, N - o);
      take_tokens(dy + o, N, tokens, here, side);
      for (std::int64_t i = 0; i < here; ++i) {
        float* row = given.row(p, places_[o + i]);
        if (again_[o + i]) {
          for (std::int64_t t = 0; t < width; ++t) row[t] += side[i * width + t];
        } else {
          std::copy_n(side + i * width, width, row);
        }
      }
    }
    for (std::int32_t f : unused_) std::fill_n(given.row(p, f), width, 0.0f);
  }

  const LinearTable& k_ = table(linear_tables, tiles_isa());
  const FactoredTable& f_ = table(factored_tables, tiles_isa());
  const lt_matrix &right_, &left_;
  const int threads_;
  std::vector<std::int32_t> places_, others_, left_rows_;  // of outputs; outputs that L gives, and its rows for them
  std::vector<char> again_;                                // whether an earlier output has the same place
  std::vector<std::int32_t> unused_;                       // places that no output has
};

}  // namespace
}  // namespace lt
