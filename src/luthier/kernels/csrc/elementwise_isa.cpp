#include "activations.h"
#include "dispatch.h"
#include "elementwise.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

void rms_norm(const NormRows& norm, const float* x, const float* residual, float* sum_out, float* normed, float* inverse) {
  const std::int64_t width = norm.width;
  const vf plus = set1(norm.plus);
  for (std::int64_t row = 0; row < norm.rows; ++row, x += width, normed += width) {
    const float* values = x;
    float squares;
    if (residual != nullptr) {
      squares = sum_of(width, [&](auto lanes, std::int64_t i, vf chain) {
        const vf v = lanes.get(x + i) + lanes.get(residual + i);
        lanes.put(sum_out + i, v);
        return fma(v, v, chain);
      });
      values = sum_out;
      residual += width;
      sum_out += width;
    } else {
      squares = sum_of(width, [&](auto lanes, std::int64_t i, vf chain) {
        const vf v = lanes.get(x + i);
        return fma(v, v, chain);
      });
    }
    inverse[row] = 1.0f / __builtin_sqrtf(squares / float(width) + norm.eps);
    const vf scale = set1(inverse[row]);
    each_vector(width, [&](auto lanes, std::int64_t i) {
      lanes.put(normed + i, lanes.get(values + i) * scale * (lanes.get(norm.weight + i) + plus), norm.past);
    });
  }
  settle();
}

// With g = dnormed (weight + plus) and u = x inverse: dx = inverse (g - u mean(g u)) + dsum; dweight += dnormed u.
void rms_norm_backward(const NormRows& norm, const float* dnormed, const float* dsum, const float* x, const float* inverse,
                       float* dx, float* dweight) {
  const std::int64_t width = norm.width;
  const vf plus = set1(norm.plus);
  for (std::int64_t row = 0; row < norm.rows; ++row, x += width, dnormed += width, dx += width) {
    const vf scale = set1(inverse[row]);
    const float products = sum_of(width, [&](auto lanes, std::int64_t i, vf chain) {
      return fma(lanes.get(dnormed + i) * (lanes.get(norm.weight + i) + plus), lanes.get(x + i), chain);
    });
    const float cubed = inverse[row] * inverse[row] * inverse[row];
    const vf pull = set1(-(products / float(width)) * cubed);
    each_vector(width, [&](auto lanes, std::int64_t i) {
      const vf g = lanes.get(dnormed + i) * (lanes.get(norm.weight + i) + plus);
      vf d = fma(lanes.get(x + i), pull, g * scale);
      if (dsum != nullptr) d = d + lanes.get(dsum + i);
      lanes.put(dx + i, d, norm.past);
    });
    if (dsum != nullptr) dsum += width;
    if (dweight == nullptr) continue;
    each_vector(width, [&](auto lanes, std::int64_t i) {
      lanes.put(dweight + i, fma(lanes.get(dnormed + i), lanes.get(x + i) * scale, lanes.get(dweight + i)));
    });
  }
  settle();
}

void layer_norm(const NormRows& norm, const float* x, const float* bias, float* normed, float* mean, float* inverse) {
  const std::int64_t width = norm.width;
  for (std::int64_t row = 0; row < norm.rows; ++row, x += width, normed += width) {
    mean[row] = sum_of(width, [&](auto lanes, std::int64_t i, vf chain) { return chain + lanes.get(x + i); }) / float(width);
    const vf centre = set1(mean[row]);
    const std::int64_t whole = width / VL * VL;
    float squares = sum_of(whole, [&](auto lanes, std::int64_t i, vf chain) {
      const vf v = lanes.get(x + i) - centre;
      return fma(v, v, chain);
    });
    for (std::int64_t i = whole; i < width; ++i)
      squares += (x[i] - mean[row]) * (x[i] - mean[row]);  // absent lanes are not -mean
    inverse[row] = 1.0f / __builtin_sqrtf(squares / float(width) + norm.eps);
    const vf scale = set1(inverse[row]);
    each_vector(width, [&](auto lanes, std::int64_t j) {
      const vf u = (lanes.get(x + j) - centre) * scale;
      lanes.put(normed + j, fma(u, lanes.get(norm.weight + j), bias == nullptr ? zero() : lanes.get(bias + j)), norm.past);
    });
  }
  settle();
}

// With g = dnormed weight and u = (x - mean) inverse: dx = inverse (g - mean(g) - u mean(g u)).
void layer_norm_backward(const NormRows& norm, const float* dnormed, const float* x, const float* mean, const float* inverse,
                         float* dx, float* dweight, float* dbias) {
  const std::int64_t width = norm.width;
  for (std::int64_t row = 0; row < norm.rows; ++row, x += width, dnormed += width, dx += width) {
    const vf centre = set1(mean[row]), scale = set1(inverse[row]);
    float products, total;
    sums_of(width, &products, &total, [&](auto lanes, std::int64_t i, vf& with_u, vf& alone) {  // absent lanes have g = 0
      const vf g = lanes.get(dnormed + i) * lanes.get(norm.weight + i);
      with_u = fma(g, (lanes.get(x + i) - centre) * scale, with_u);
      alone = alone + g;
    });
    const vf pull = set1(products / float(width)), shift = set1(total / float(width));
    each_vector(width, [&](auto lanes, std::int64_t i) {
      const vf g = lanes.get(dnormed + i) * lanes.get(norm.weight + i);
      const vf u = (lanes.get(x + i) - centre) * scale;
      lanes.put(dx + i, (g - shift - u * pull) * scale, norm.past);
    });
    if (dweight != nullptr) {
      each_vector(width, [&](auto lanes, std::int64_t i) {
        const vf u = (lanes.get(x + i) - centre) * scale;
        lanes.put(dweight + i, fma(lanes.get(dnormed + i), u, lanes.get(dweight + i)));
      });
    }
    if (dbias != nullptr) {
      each_vector(width,
                  [&](auto lanes, std::int64_t i) { lanes.put(dbias + i, lanes.get(dbias + i) + lanes.get(dnormed + i)); });
    }
  }
  settle();
}

// One head: (a, b) -> (a cos - b sin, b cos' + a sin'), where a, b are the halves and ' is the table's second half.
LT_INLINE void turn(const float* from, float* to, std::int64_t half, const float* cos, const float* sin, bool transposed) {
  each_vector(half, [&](auto lanes, std::int64_t j) {
    const vf a = lanes.get(from + j), b = lanes.get(from + half + j);
    const vf cos_a = lanes.get(cos + j), cos_b = lanes.get(cos + half + j);
    const vf sin_a = lanes.get(sin + j), sin_b = lanes.get(sin + half + j);
    if (transposed) {
      lanes.put(to + j, fma(a, cos_a, b * sin_b));
      lanes.put(to + half + j, fma(b, cos_b, zero() - a * sin_a));
    } else {
      lanes.put(to + j, fma(a, cos_a, zero() - b * sin_a));
      lanes.put(to + half + j, fma(b, cos_b, a * sin_b));
    }
  });
}

void rotary(const RotaryHeads& heads, std::int64_t rows, std::int64_t head_size, std::int64_t size, const float* cos,
            const float* sin, int transposed) {
  for (std::int64_t row = 0; row < rows; ++row, cos += size, sin += size) {
    for (std::int64_t head = 0; head < heads.heads; ++head) {
      const float* from = heads.from + row * heads.from_stride + head * head_size;
      float* to = heads.to + row * heads.to_stride + head * head_size;
      turn(from, to, size / 2, cos, sin, transposed != 0);
      if (to == from) continue;
      each_vector(head_size - size, [&](auto lanes, std::int64_t j) { lanes.put(to + size + j, lanes.get(from + size + j)); });
    }
  }
}

constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluExponent = -2.3022081988f;  // -kGeluScale log2(e)

// 2^t, relative error below 2e-7 from -126 to 127.5, Inf beyond, 2^-126 below; NaN stays NaN. The polynomial was fitted to
// (2^f - 1) / f for |f| <= 1/2 by least squares, reweighted until its largest relative error was smallest, 9.1e-8.
LT_INLINE vf quick_exp2(vf t) {
  t = vmin(set1(128.0f), vmax(set1(-126.0f), t));
  const vi k = to_int(t);
  const vf f = t - to_float(k);
  vf p = set1(1.326472690e-3f);
  p = fma(p, f, set1(9.671512661e-3f));
  p = fma(p, f, set1(5.550733744e-2f));
  p = fma(p, f, set1(2.402224208e-1f));
  p = fma(p, f, set1(6.931469776e-1f));
  p = fma(p, f, set1(1.0f));
  return p * as_float(shl<23>(iadd(k, iset1(127))));
}

// gelu(x) = x / 2 (1 + tanh(v)) = x sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3); silu(x) = x sigmoid(x). This is 1 over
// that sigmoid. Since 2 v is rounded anyway, what turns it into a power of two is part of its factors.
template <int kind>
LT_INLINE vf divisor(vf x) {
  if (kind == kSilu) return set1(1.0f) + quick_exp(zero() - x);
  return set1(1.0f) + quick_exp2(x * fma(x * x, set1(kGeluExponent * kGeluCubic), set1(kGeluExponent)));
}

// Far enough ahead that a line is there when its turn comes, also where a page ends and the processor's own prefetch with it.
constexpr std::int64_t kAhead = 256;
LT_INLINE void fetch_ahead(const float* a, const float* b) {
  __builtin_prefetch(a + kAhead);
  __builtin_prefetch(b + kAhead);
}

template <int kind>
void gated_rows(const GatedRows& g, float* out) {
  for (std::int64_t row = 0; row < g.rows; ++row, out += g.width) {
    const float *gate = g.gate.data + row * g.gate.stride, *up = g.up.data + row * g.up.stride;
    each_vector(g.width, [&](auto lanes, std::int64_t i) {
      fetch_ahead(gate + i, up + i);
      const vf x = lanes.get(gate + i);
      lanes.put(out + i, x / divisor<kind>(x) * lanes.get(up + i), g.past);
    });
  }
  settle();
}

void gated(const GatedRows& g, float* out) { g.kind == kSilu ? gated_rows<kSilu>(g, out) : gated_rows<kGeluTanh>(g, out); }

// act = x s: dup = dout x s; dgate = dout up (s + x s (1 - s) w), w = 1 for SiLU and d(2 v)/dx for GELU.
template <int kind>
void gated_backward_rows(const GatedRows& g, const float* dout, float* dgate, float* dup) {
  for (std::int64_t row = 0; row < g.rows; ++row, dout += g.width, dgate += g.width, dup += g.width) {
    const float *gate = g.gate.data + row * g.gate.stride, *up = g.up.data + row * g.up.stride;
    each_vector(g.width, [&](auto lanes, std::int64_t i) {
      fetch_ahead(gate + i, up + i);
      __builtin_prefetch(dout + i + kAhead);
      const vf x = lanes.get(gate + i), d = lanes.get(dout + i);
      const vf s = set1(1.0f) / divisor<kind>(x);
      const vf act = x * s;
      vf inner = act * (set1(1.0f) - s);
      if (kind == kGeluTanh) inner = inner * set1(kGeluScale) * fma(x * x, set1(3 * kGeluCubic), set1(1.0f));
      lanes.put(dup + i, d * act, g.past);
      lanes.put(dgate + i, d * lanes.get(up + i) * (s + inner), g.past);
    });
  }
  settle();
}

void gated_backward(const GatedRows& g, const float* dout, float* dgate, float* dup) {
  g.kind == kSilu ? gated_backward_rows<kSilu>(g, dout, dgate, dup) : gated_backward_rows<kGeluTanh>(g, dout, dgate, dup);
}

void add_parts(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t width, float* out) {
  each_vector(width, [&](auto lanes, std::int64_t i) {
    vf total = lanes.get(parts + i);
    for (std::int64_t part = 1; part < count; ++part) total = total + lanes.get(parts + part * stride + i);
    lanes.put(out + i, total);
  });
}

}  // namespace

LT_DEFINE_TABLE(ElementwiseTable, elementwise) = {&rms_norm, &rms_norm_backward, &layer_norm, &layer_norm_backward, &rotary,
                                                  &gated,    &gated_backward,    &add_parts};

}  // namespace LT_NAMESPACE
}  // namespace lt
