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

// c[i][j] (+)= sum_k a(i, k) b[k][j] for R rows; a(i, k) = a[i row + k step], b and c with rows ldb and ldc apart.
struct Operands {
  const float* a;
  std::int64_t row, step;
  const float* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc, depth;
  bool add;
};

template <int R, int NV>
LT_INLINE void block(const Operands& o, std::int64_t column) {
  vf sums[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) sums[i][j] = o.add ? load(o.c + i * o.ldc + column + j * VL) : zero();
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
    const Operands o = {left + i * s.q_stride(), s.q_stride(), 1,      right_turned, kTile,
                        scores + i * kTile,      kTile,        s.size, false};
    panel(rows, o, last);
  }
}

// out[i] += sum_j p[i][j] right[j] over the keys that the panel sees.
void weighted(const AttentionShape& s, const KeyTile& keys, const float* p, std::int64_t count, const float* right,
              float* out) {
  for (std::int64_t i = 0; i < count; i += kPanel) {
    const int rows = int(at_most(kPanel, count - i));
    const std::int64_t last = seen(s, keys, i + rows - 1).last;
    if (last == 0) continue;
    panel(rows, {p + i * kTile, kTile, 1, right, s.kv_stride(), out + i * s.q_stride(), s.q_stride(), last, true}, s.size);
  }
}

// out[j] += sum_i p[i][j] rows[i] over the queries that see a key of the panel.
void gathered(const AttentionShape& s, const KeyTile& keys, const float* p, std::int64_t count, const float* rows, float* out) {
  for (std::int64_t j = 0; j < keys.count; j += kPanel) {
    const int here = int(at_most(kPanel, keys.count - j));
    const std::int64_t first = at_least(0, j - keys.shift);  // the first query that sees key j
    if (first >= count) continue;
    const Operands o = {p + first * kTile + j, 1,   kTile, rows + first * s.q_stride(), s.q_stride(), out + j * s.size, s.size,
                        count - first,         true};
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

// Columns from `from` to the end of the tile become zero, so that products over whole panels may read them.
LT_INLINE void clear(float* row, std::int64_t from) {
  for (std::int64_t j = from; j < kTile; j += VL) store(row + j, zero());
}

// scores -> exp(z - largest), largest and total brought up to date; returns the factor for what was summed before.
float softmax_row(const AttentionShape& s, float* row, Seen range, float* largest_z, float* total) {
  if (range.first == range.last) {
    clear(row, 0);
    return 1;
  }
  const vf lanes = lane_numbers();
  vf largest_of = set1(-INFINITY), sums = zero();
  std::int64_t j = 0;
  for (; j < range.last; j += VL) {
    const vf z = masked(capped(s, load(row + j)), lanes, j, range, -INFINITY);
    store(row + j, z);
    largest_of = vmax(z, largest_of);
  }
  const float before = *largest_z, found = largest(largest_of);
  const float now = found > before ? found : before;
  const float base = now == -INFINITY ? 0 : now;  // nothing but -Inf so far: weights of zero, where -Inf + Inf is NaN
  for (std::int64_t i = 0; i < j; i += VL) {
    const vf p = quick_exp(load(row + i) - set1(base));
    store(row + i, p);
    sums = sums + p;
  }
  clear(row, j);
  const float factor = before == -INFINITY ? 0 : expf(before - now);
  *largest_z = now;
  *total = *total * factor + sum(sums);
  return factor;
}

LT_INLINE void scale_row(float* row, std::int64_t size, float factor) {
  for (std::int64_t d = 0; d < size; d += VL) store(row + d, load(row + d) * set1(factor));
}

void forward(const AttentionShape& s, const QueryTile& queries, const KeyTile* keys, std::int64_t tiles) {
  alignas(64) float scores[kTile * kTile];
  float largest_z[kTile], total[kTile];
  for (std::int64_t i = 0; i < queries.count; ++i) {
    largest_z[i] = -INFINITY;
    total[i] = 0;
    for (std::int64_t d = 0; d < s.size; d += VL) store(queries.out + i * s.q_stride() + d, zero());
  }
  for (const KeyTile* tile = keys; tile != keys + tiles; ++tile) {
    products(s, *tile, queries.q, queries.count, tile->k_turned, scores);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      const float factor = softmax_row(s, scores + i * kTile, seen(s, *tile, i), largest_z + i, total + i);
      if (factor != 1 && tile != keys) scale_row(queries.out + i * s.q_stride(), s.size, factor);
    }
    weighted(s, *tile, scores, queries.count, tile->v, queries.out);
  }
  for (std::int64_t i = 0; i < queries.count; ++i) {
    scale_row(queries.out + i * s.q_stride(), s.size, 1 / total[i]);
    queries.lse[i * s.heads] = largest_z[i] + logf(total[i]);
  }
}

// p = exp(z - lse) over the scores, and ds = p (dp - delta) dz/dscore over dp.
void gradient_row(const AttentionShape& s, float* scores, float* dp, Seen range, float lse, float delta) {
  const vf lanes = lane_numbers(), scale = set1(s.scale);
  std::int64_t j = 0;
  for (; j < range.last; j += VL) {
    const vf z = capped(s, load(scores + j));
    const vf p = masked(quick_exp(z - set1(lse)), lanes, j, range, 0);
    vf slope = scale;
    if (s.softcap != 0) {
      const vf t = z * set1(1 / s.softcap);
      slope = scale * (set1(1.0f) - t * t);
    }
    store(scores + j, p);
    store(dp + j, masked(p * (load(dp + j) - set1(delta)) * slope, lanes, j, range, 0));
  }
  clear(scores, j);
  clear(dp, j);
}

void backward(const AttentionShape& s, const QueryTile& queries, const KeyTile& keys, float* dq, float* dk, float* dv) {
  alignas(64) float scores[kTile * kTile];
  alignas(64) float dp[kTile * kTile];
  products(s, keys, queries.q, queries.count, keys.k_turned, scores);
  products(s, keys, queries.dout, queries.count, keys.v_turned, dp);
  for (std::int64_t i = 0; i < queries.count; ++i) {
    gradient_row(s, scores + i * kTile, dp + i * kTile, seen(s, keys, i), queries.lse[i * s.heads], queries.delta[i * s.heads]);
  }
  gathered(s, keys, scores, queries.count, queries.dout, dv);
  gathered(s, keys, dp, queries.count, queries.q, dk);
  weighted(s, keys, dp, queries.count, keys.k, dq);
}

void delta(const AttentionShape& s, const float* dout, const float* out, std::int64_t rows, float* result) {
  for (std::int64_t i = 0; i < rows * s.heads; ++i, dout += s.size, out += s.size) {
    vf products_of = zero();
    for (std::int64_t d = 0; d < s.size; d += VL) products_of = fma(load(dout + d), load(out + d), products_of);
    result[i] = sum(products_of);
  }
}

typedef float four __attribute__((vector_size(16)));
#if defined(__clang__)
#define LT_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int four_int __attribute__((vector_size(16)));
#define LT_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, four_int{i, j, k, l})
#endif

// Four keys by four elements.
LT_INLINE void turn_four(const float* rows, std::int64_t stride, float* turned) {
  four r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(r + i, rows + i * stride, sizeof(four));
  const four low01 = LT_SHUFFLE(r[0], r[1], 0, 4, 1, 5), high01 = LT_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const four low23 = LT_SHUFFLE(r[2], r[3], 0, 4, 1, 5), high23 = LT_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const four out[4] = {LT_SHUFFLE(low01, low23, 0, 1, 4, 5), LT_SHUFFLE(low01, low23, 2, 3, 6, 7),
                       LT_SHUFFLE(high01, high23, 0, 1, 4, 5), LT_SHUFFLE(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(turned + i * kTile, out + i, sizeof(four));
}

void turn(const AttentionShape& s, const float* rows, std::int64_t count, float* turned) {
  const std::int64_t stride = s.kv_stride(), whole = count / 4 * 4, padded = (count + VL - 1) / VL * VL;
  for (std::int64_t j = 0; j < whole; j += 4) {
    for (std::int64_t d = 0; d < s.size; d += 4) turn_four(rows + j * stride + d, stride, turned + d * kTile + j);
  }
  for (std::int64_t d = 0; d < s.size; ++d) {
    for (std::int64_t j = whole; j < padded; ++j) turned[d * kTile + j] = j < count ? rows[j * stride + d] : 0;
  }
}

}  // namespace

LT_DEFINE_TABLE(AttentionTable, attention) = {&turn, &forward, &delta, &backward};

}  // namespace LT_NAMESPACE
}  // namespace lt
