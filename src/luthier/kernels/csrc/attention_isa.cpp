#include <math.h>

#include "activations.h"
#include "attention.h"
#include "dispatch.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

#if defined(LT_ISA_AVX512) || defined(LT_ISA_NEON)
constexpr int kPanel = 8;  // rows of a register block: 16 accumulators of 32 registers
#elif defined(LT_ISA_AVX2)
constexpr int kPanel = 6;  // 12 of 16
#else
constexpr int kPanel = 4;
#endif

// c[i][j] = sum_k a(i, k) b[k][j] for R rows, added to c or to factors[i] c; a(i, k) = a[i row + k step], b and c with rows
// ldb and ldc apart.
enum class Onto { nothing, c, scaled };
struct Operands {
  const float* a;
  std::int64_t row, step;
  const float* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc, depth;
  Onto onto;
  const float* factors;
};

template <int R, int NV>
LT_INLINE void block(const Operands& o, std::int64_t column) {
  vf sums[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sums[i][j] = o.onto == Onto::nothing ? zero() : load(o.c + i * o.ldc + column + j * VL);
  }
  if (o.onto == Onto::scaled) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vf factor = set1(o.factors[i]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sums[i][j] = sums[i][j] * factor;
    }
  }
  const float* b = o.b + column;
  const float* a = o.a;
  for (std::int64_t k = 0; k < o.depth; ++k, a += o.step, b += o.ldb) {
    vf right[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) right[j] = load(b + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vf left = set1(a[i * o.row]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(o.c + i * o.ldc + column + j * VL, sums[i][j]);
  }
}

template <int R>
void panel_of(const Operands& o, std::int64_t columns) {
  std::int64_t column = 0;
  for (; column + VL < columns; column += 2 * VL) block<R, 2>(o, column);
  if (column < columns) block<R, 1>(o, column);
}

// `columns` is rounded up to whole vectors, which b and c must have.
template <int R = kPanel>
LT_INLINE void panel(int rows, const Operands& o, std::int64_t columns) {
  if (rows == R) return panel_of<R>(o, columns);
  if constexpr (R > 1) panel<R - 1>(rows, o, columns);
}

std::int64_t at_most(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t at_least(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Keys [first, last) of the tile that query `row` sees: none later than itself, none `window` or more before it.
struct Seen {
  std::int64_t first, last;
};
LT_INLINE Seen seen(const AttentionShape& s, const KeyTile& keys, std::int64_t row) {
  const std::int64_t last = at_least(0, at_most(keys.count, row + keys.shift + 1));
  const std::int64_t first = s.window == 0 ? 0 : at_least(0, row + keys.shift - s.window + 1);
  return {at_most(first, last), last};
}

// scores = left right^T for the keys that any row of each panel sees, right given turned.
void products(const AttentionShape& s, const KeyTile& keys, const float* left, std::int64_t count, const float* right_turned,
              float* scores) {
  for (std::int64_t i = 0; i < count; i += kPanel) {
    const int rows = int(at_most(kPanel, count - i));
    const std::int64_t last = seen(s, keys, i + rows - 1).last;
    const Operands o = {left + i * s.q_stride(), s.q_stride(), 1,      right_turned,  kTile,
                        scores + i * kTile,      kTile,        s.size, Onto::nothing, nullptr};
    panel(rows, o, last);
  }
}

// out[i] += sum_j p[i][j] right[j] over the keys that the panel sees; with factors, out[i] times its factor first.
void weighted(const AttentionShape& s, const KeyTile& keys, const float* p, std::int64_t count, const float* right,
              float* out, Onto onto, const float* factors) {
  for (std::int64_t i = 0; i < count; i += kPanel) {
    const int rows = int(at_most(kPanel, count - i));
    const std::int64_t last = seen(s, keys, i + rows - 1).last;
    if (last == 0 && onto != Onto::nothing) continue;
    const Operands o = {p + i * kTile,         kTile,        1,    right, s.kv_stride(),
                        out + i * s.q_stride(), s.q_stride(), last, onto,  factors + i};
    panel(rows, o, s.size);
  }
}

// out[j] += sum_i p[i][j] rows[i] over the queries that see a key of the panel.
void gathered(const AttentionShape& s, const KeyTile& keys, const float* p, std::int64_t count, const float* rows, float* out) {
  for (std::int64_t j = 0; j < keys.count; j += kPanel) {
    const int here = int(at_most(kPanel, keys.count - j));
    const std::int64_t first = at_least(0, j - keys.shift);  // the first query that sees key j
    if (first >= count) continue;
    const Operands o = {p + first * kTile + j, 1,      kTile,         rows + first * s.q_stride(), s.q_stride(),
                        out + j * s.size,      s.size, count - first, Onto::c,                     nullptr};
    panel(here, o, s.size);
  }
}

LT_INLINE vf lane_numbers() {
  float numbers[VL];
  for (int i = 0; i < VL; ++i) numbers[i] = float(i);
  return load(numbers);
}

// z where lane + j lies in [first, last), else `other`.
LT_INLINE vf masked(vf z, vf lanes, std::int64_t j, Seen range, float other) {
  z = choose(less(lanes, set1(float(range.last - j))), z, set1(other));
  return choose(less(lanes, set1(float(range.first - j))), set1(other), z);
}

LT_INLINE vf capped(const AttentionShape& s, vf score) {
  const vf z = score * set1(s.scale);
  return s.softcap == 0 ? z : set1(s.softcap) * vtanh(z * set1(1 / s.softcap));
}

// Whether every query of the tile sees every key of it, and these fill whole vectors: nothing to mask.
LT_INLINE bool is_open(const AttentionShape& s, const KeyTile& keys, std::int64_t queries) {
  return keys.count % VL == 0 && seen(s, keys, 0).last == keys.count && seen(s, keys, queries - 1).first == 0;
}

// Lane i: the largest of, or the sum over, the lanes of row i of `rows`, VL x VL.
template <class Fn>
LT_INLINE vf across(const float* rows, Fn join) {
  alignas(64) float turned[VL * VL];
  transpose(rows, VL, turned, VL);
  vf joined = load(turned);
#pragma GCC unroll 16
  for (int i = 1; i < VL; ++i) joined = join(load(turned + i * VL), joined);
  return joined;
}

// What the softmax of a query tile keeps between key tiles, a query a lane: the largest score, the sum of exp(score -
// largest), and the factor for what was summed up before the present tile.
struct Running {
  alignas(64) float largest[kTile], total[kTile], factor[kTile];
};

// scores -> exp(z - largest) for up to VL rows from i on, whose sums run across vectors: row by row only what vectors do at
// once. Columns up to the last that any of them sees are written, zero where a row does not see them.
template <bool Open>
LT_INLINE void softmax_rows(const AttentionShape& s, const KeyTile& keys, std::int64_t i, int count, float* scores, Running* run) {
  alignas(64) float rows[VL * VL];
  const vf lanes = lane_numbers();
  // As far as the last row sees of any panel of products that one of these rows is in.
  const std::int64_t columns = Open ? keys.count : seen(s, keys, i + count + kPanel - 2).last;
  for (int r = 0; r < VL; ++r) {
    vf found = set1(-INFINITY);
    float* row = scores + (i + r) * kTile;
    const Seen range = Open || r >= count ? Seen{0, 0} : seen(s, keys, i + r);
    for (std::int64_t j = 0; r < count && j < columns; j += VL) {
      vf z = capped(s, load(row + j));
      if (!Open) z = masked(z, lanes, j, range, -INFINITY);
      store(row + j, z);
      found = vmax(z, found);
    }
    store(rows + r * VL, found);
  }
  const vf before = load(run->largest + i), now = vmax(across(rows, [](vf a, vf b) { return vmax(a, b); }), before);
  const vf base = choose(less(set1(-INFINITY), now), now, zero());  // nothing but -Inf so far: weights of zero, not NaN
  store(run->largest + i, now);
  alignas(64) float bases[VL];
  store(bases, base);
  for (int r = 0; r < count; ++r) {
    vf sums = zero();
    float* row = scores + (i + r) * kTile;
    const vf shift = set1(bases[r]);
    for (std::int64_t j = 0; j < columns; j += VL) {
      const vf p = quick_exp(load(row + j) - shift);
      store(row + j, p);
      sums = sums + p;
    }
    store(rows + r * VL, sums);
  }
  const vf factor = quick_exp(before - base);
  store(run->factor + i, factor);
  store(run->total + i, load(run->total + i) * factor + across(rows, [](vf a, vf b) { return a + b; }));
}

void softmax(const AttentionShape& s, const KeyTile& keys, std::int64_t queries, float* scores, Running* run) {
  const bool open = is_open(s, keys, queries);
  for (std::int64_t i = 0; i < queries; i += VL) {
    const int count = int(at_most(VL, queries - i));
    if (open) {
      softmax_rows<true>(s, keys, i, count, scores, run);
    } else {
      softmax_rows<false>(s, keys, i, count, scores, run);
    }
  }
}

LT_INLINE void scale_row(float* row, std::int64_t size, float factor) {
  for (std::int64_t d = 0; d < size; d += VL) store(row + d, load(row + d) * set1(factor));
}

void forward(const AttentionShape& s, const QueryTile& queries, const KeyTile* keys, std::int64_t tiles) {
  alignas(64) float scores[kTile * kTile];
  Running run;
  for (std::int64_t i = 0; i < kTile; i += VL) {
    store(run.largest + i, set1(-INFINITY));
    store(run.total + i, zero());
  }
  for (const KeyTile* tile = keys; tile != keys + tiles; ++tile) {
    products(s, *tile, queries.q, queries.count, tile->k_turned, scores);
    softmax(s, *tile, queries.count, scores, &run);
    weighted(s, *tile, scores, queries.count, tile->v, queries.out, tile == keys ? Onto::nothing : Onto::scaled, run.factor);
  }
  for (std::int64_t i = 0; i < queries.count; ++i) {
    scale_row(queries.out + i * s.q_stride(), s.size, 1 / run.total[i]);
    queries.lse[i * s.heads] = run.largest[i] + logf(run.total[i]);
  }
}

// p = exp(z - lse) over the scores, and ds = p (dp - delta) dz/dscore over dp, zero where the row does not see the key, up to
// the end of the tile: products over whole panels read that.
template <bool Open>
LT_INLINE void gradient_row(const AttentionShape& s, float* scores, float* dp, Seen range, float lse, float delta) {
  const vf lanes = lane_numbers(), scale = set1(s.scale), shift = set1(lse), mean = set1(delta);
  std::int64_t j = 0;
  for (; j < range.last; j += VL) {
    const vf z = capped(s, load(scores + j));
    vf p = quick_exp(z - shift), slope = scale;
    if (!Open) p = masked(p, lanes, j, range, 0);
    if (s.softcap != 0) {
      const vf t = z * set1(1 / s.softcap);
      slope = scale * (set1(1.0f) - t * t);
    }
    vf ds = p * (load(dp + j) - mean) * slope;
    if (!Open) ds = masked(ds, lanes, j, range, 0);
    store(scores + j, p);
    store(dp + j, ds);
  }
  for (; j < kTile; j += VL) {
    store(scores + j, zero());
    store(dp + j, zero());
  }
}

void backward(const AttentionShape& s, const QueryTile& queries, const KeyTile& keys, float* dq, float* dk, float* dv) {
  alignas(64) float scores[kTile * kTile];
  alignas(64) float dp[kTile * kTile];
  products(s, keys, queries.q, queries.count, keys.k_turned, scores);
  products(s, keys, queries.dout, queries.count, keys.v_turned, dp);
  const bool open = is_open(s, keys, queries.count);
  for (std::int64_t i = 0; i < queries.count; ++i) {
    float *row = scores + i * kTile, *dp_row = dp + i * kTile;
    const float lse = queries.lse[i * s.heads], delta = queries.delta[i * s.heads];
    if (open) {
      gradient_row<true>(s, row, dp_row, {0, keys.count}, lse, delta);
    } else {
      gradient_row<false>(s, row, dp_row, seen(s, keys, i), lse, delta);
    }
  }
  gathered(s, keys, scores, queries.count, queries.dout, dv);
  gathered(s, keys, dp, queries.count, queries.q, dk);
  weighted(s, keys, dp, queries.count, keys.k, dq, Onto::c, nullptr);
}

void delta(const AttentionShape& s, const float* dout, const float* out, std::int64_t rows, float* result) {
  for (std::int64_t i = 0; i < rows * s.heads; ++i, dout += s.size, out += s.size) {
    vf products_of = zero();
    for (std::int64_t d = 0; d < s.size; d += VL) products_of = fma(load(dout + d), load(out + d), products_of);
    result[i] = sum(products_of);
  }
}

void turn(const AttentionShape& s, const float* rows, std::int64_t count, float* turned) {
  const std::int64_t stride = s.kv_stride(), whole = count / VL * VL, padded = (count + VL - 1) / VL * VL;
  for (std::int64_t d = 0; d < s.size; d += VL) {
    for (std::int64_t j = 0; j < whole; j += VL) transpose(rows + j * stride + d, stride, turned + d * kTile + j, kTile);
  }
  for (std::int64_t d = 0; d < s.size; ++d) {
    for (std::int64_t j = whole; j < padded; ++j) turned[d * kTile + j] = j < count ? rows[j * stride + d] : 0;
  }
}

}  // namespace

LT_DEFINE_TABLE(AttentionTable, attention) = {&turn, &forward, &delta, &backward};

}  // namespace LT_NAMESPACE
}  // namespace lt
