#include "decode.h"

#include <math.h>

#include "activations.h"
#include "dispatch.h"
#include "fixed_dot.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// ---- Products in fixed point.

LT_INLINE float low_rank(const FixedProduct& p, std::int64_t row) {
  const float* factors = p.low + row * p.rank;
  return sum_of(p.rank, [&](auto lanes, std::int64_t i, vf chain) {
    return fma(lanes.get(factors + i), lanes.get(p.inner + i), chain);
  });
}

template <class Format>
void rows_of(const Format& format, const FixedProduct& p) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    float y = dot(format, p.x, p.row + i, p.matrix->cols);
    if (p.rank > 0) y += low_rank(p, p.row + i);
    p.y[i] = p.bias == nullptr ? y : y + p.bias[p.row + i];
  }
}

void multiply(const FixedProduct& p) {
  switch (p.matrix->kind) {
    case LT_Q4_0: return rows_of(Q4_0(*p.matrix), p);
    case LT_Q4_1: return rows_of(Q4_1(*p.matrix), p);
    case LT_Q5_0: return rows_of(Q5_0(*p.matrix), p);
    case LT_Q5_1: return rows_of(Q5_1(*p.matrix), p);
    case LT_Q8_0: return rows_of(Q8_0(*p.matrix), p);
    case LT_Q4_K: return rows_of(Q4_K(*p.matrix), p);
    case LT_Q5_K: return rows_of(Q5_K(*p.matrix), p);
    case LT_Q6_K: return rows_of(Q6_K(*p.matrix), p);
    default: return;
  }
}

bool fix(const float* values, std::int64_t count, const FixedToken& x) {
  float nothing = 0;
  for (std::int64_t b = 0; b < count / kBlock; ++b, values += kBlock) {
    vf most = zero(), not_finite = zero();
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += VL) {
      const vf v = load(values + i);
      most = vmax(vabs(v), most);
      not_finite = not_finite + v * zero();
    }
    nothing += sum(not_finite);
    const float top = largest(most), inverse = top > 1e-30f ? 32767.0f / top : 0.0f;
    std::int32_t total = 0;
    for (int half = 0; half < kBlock; half += 16) {
      std::int16_t* out = x.sixteen(b, half);
      for (int i = 0; i < 16; ++i) {
        const float q = (values[half + i] * inverse + 12582912.0f) - 12582912.0f;  // to the nearest whole number
        out[i] = std::int16_t(std::int32_t(q));
        total += std::int32_t(q);
      }
    }
    const float scale = top > 1e-30f ? top / 32767.0f : 0.0f;
    x.common[2 * b] = scale;
    x.common[2 * b + 1] = scale * float(total) * 0.125f;
    if (nothing != 0.0f) return false;
  }
  return true;
}

// ---- Attention over pages.

constexpr int kVectors = kPage / VL;

// scores -> exp(z - largest) with zeros outside [first, last); largest and total brought up to date. Gives the factor for
// what was summed before.
float softmax(const CachedHead& c, vf* scores, std::int64_t first, std::int64_t last, float* weights, float* largest_z,
              float* total) {
  float numbers[VL];
  for (int i = 0; i < VL; ++i) numbers[i] = float(i);
  const vf lanes = load(numbers), none = set1(-INFINITY);
  vf most = none;
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) {
    vf z = scores[j] * set1(c.scale);
    if (c.softcap != 0) z = set1(c.softcap) * vtanh(z * set1(1 / c.softcap));
    z = choose(less(lanes, set1(float(last - j * VL))), z, none);
    scores[j] = choose(less(lanes, set1(float(first - j * VL))), none, z);
    most = vmax(scores[j], most);
  }
  const float before = *largest_z, found = largest(most), now = found > before ? found : before;
  const vf base = set1(now == -INFINITY ? 0 : now);
  vf sums = zero();
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) {
    const vf p = quick_exp(scores[j] - base);
    store(weights + j * VL, p);
    sums = sums + p;
  }
  const float factor = before == -INFINITY ? 0 : expf(before - now);
  *largest_z = now;
  *total = *total * factor + sum(sums);
  return factor;
}

LT_INLINE void scores_of(const CachedHead& c, const float* q, const float* keys, vf* scores) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) scores[j] = zero();
  for (std::int64_t d = 0; d < c.size; ++d, keys += kPage) {
    const vf value = set1(q[d]);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) scores[j] = fma(value, load(keys + j * VL), scores[j]);
  }
}

// out = factor out + weights[first .. last) V
LT_INLINE void add_values(const CachedHead& c, const float* weights, const float* values, std::int64_t first,
                          std::int64_t last, float factor, float* out) {
  each_vector(c.size, [&](auto lanes, std::int64_t d) {
    vf even = lanes.get(out + d) * set1(factor), odd = zero();
    std::int64_t j = first;
    for (; j + 2 <= last; j += 2) {
      even = fma(set1(weights[j]), lanes.get(values + j * c.size + d), even);
      odd = fma(set1(weights[j + 1]), lanes.get(values + (j + 1) * c.size + d), odd);
    }
    if (j < last) even = fma(set1(weights[j]), lanes.get(values + j * c.size + d), even);
    lanes.put(out + d, even + odd);
  });
}

constexpr int kHeadsAtOnce = 16;

void some_heads(const CachedHead& c, const float* q, std::int64_t heads, float* out) {
  alignas(64) float weights[kPage];
  float largest_z[kHeadsAtOnce], total[kHeadsAtOnce];
  for (std::int64_t h = 0; h < heads; ++h) largest_z[h] = -INFINITY, total[h] = 0;
  std::memset(out, 0, sizeof(float) * std::size_t(heads * c.size));
  for (std::int64_t page = c.first / kPage; page * kPage < c.end; ++page) {
    const float* base = c.pages[page];
    const std::int64_t from = c.first - page * kPage, to = c.end - page * kPage;
    const std::int64_t first = from > 0 ? from : 0, last = to < kPage ? to : kPage;
    for (std::int64_t h = 0; h < heads; ++h) {
      vf scores[kVectors];
      scores_of(c, q + h * c.size, base + c.keys, scores);
      const float factor = softmax(c, scores, first, last, weights, largest_z + h, total + h);
      add_values(c, weights, base + c.values, first, last, factor, out + h * c.size);
    }
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    const vf inverse = set1(1 / total[h]);
    each_vector(c.size, [&](auto lanes, std::int64_t d) {
      float* place = out + h * c.size + d;
      lanes.put(place, lanes.get(place) * inverse);
    });
  }
}

void attend(const CachedHead& c, const float* q, std::int64_t heads, float* out) {
  for (std::int64_t h = 0; h < heads; h += kHeadsAtOnce) {
    some_heads(c, q + h * c.size, heads - h < kHeadsAtOnce ? heads - h : kHeadsAtOnce, out + h * c.size);
  }
}

}  // namespace

LT_DEFINE_TABLE(DecodeTable, decode) = {&fix, &multiply, &attend};

}  // namespace LT_NAMESPACE
}  // namespace lt
