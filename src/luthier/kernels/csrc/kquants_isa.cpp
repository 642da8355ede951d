#include "dispatch.h"
#include "quantize.h"
#include "quantize_blocks.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// ---- GGUF: super-blocks of 256. Element i of every sub-block stands in one vector, so that the sub-blocks are the
// lanes; sums run over i in rising order, as the reference does. The compiler maps these vectors to what the set has.

typedef float f8 __attribute__((vector_size(32)));

LT_INLINE void spread(float x, f8& out) {
  for (int s = 0; s < 8; ++s) out[s] = x;
}

LT_INLINE void gather(const float* x, int elements, f8* out) {
  for (int s = 0; s < 8; ++s) {
    for (int i = 0; i < elements; ++i) out[i][s] = x[s * elements + i];
  }
}

LT_INLINE void reciprocals(f8& x) {
  for (int s = 0; s < 8; ++s) x[s] = reciprocal(x[s]);
}

// Whole numbers nearest to x, held in low..high.
LT_INLINE void round_bounded(f8& x, const f8& low, const f8& high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  f8 magic;
  spread(12582912.0f, magic);
  x = (x + magic) - magic;
}

struct Affine {
  const f8* x;
  const f8* weight;
  f8 low, zeros, fifteen, sum_w, sum_wx;
};

// Error of x ~ scale q - lift with q = (x - low) inverse, rounded.
LT_INLINE void affine_error(const Affine& a, const f8& inverse, const f8& scale, const f8& lift, f8& error) {
  f8 total = a.zeros;
  for (int i = 0; i < 32; ++i) {
    f8 q = (a.x[i] - a.low) * inverse;
    round_bounded(q, a.zeros, a.fifteen);
    const f8 residual = (scale * q - lift) - a.x[i];
    total += a.weight[i] * (residual * residual);
  }
  error = total;
}

// The scale and lift >= 0 that minimise that error for those roundings.
LT_INLINE void least_squares(const Affine& a, const f8& inverse, f8& scale, f8& lift) {
  f8 sum_wq = a.zeros, sum_wqq = a.zeros, sum_wqx = a.zeros;
  for (int i = 0; i < 32; ++i) {
    f8 q = (a.x[i] - a.low) * inverse;
    round_bounded(q, a.zeros, a.fifteen);
    const f8 wq = a.weight[i] * q;
    sum_wq += wq;
    sum_wqq += wq * q;
    sum_wqx += wq * a.x[i];
  }
  const f8 determinant = a.sum_w * sum_wqq - sum_wq * sum_wq;
  f8 one;
  spread(1.0f, one);
  const f8 solve = determinant > a.zeros ? one / determinant : a.zeros;
  const f8 free_scale = (a.sum_w * sum_wqx - a.sum_wx * sum_wq) * solve;
  const f8 free_lift = (sum_wq * sum_wqx - sum_wqq * a.sum_wx) * solve;
  const f8 through_zero = sum_wqq > a.zeros ? sum_wqx / sum_wqq : a.zeros;
  const f8 wanted = free_lift < a.zeros ? through_zero : free_scale;
  scale = wanted > a.zeros ? wanted : a.zeros;
  lift = free_lift < a.zeros ? a.zeros : free_lift;
}

void affine_fit(const f8* x, const f8* weight, f8& best_scale, f8& best_lift) {
  Affine a = {x, weight, {}, {}, {}, {}, {}};
  spread(15.0f, a.fifteen);
  f8 high = x[0], best_error;
  for (int i = 0; i < 32; ++i) {
    a.low = x[i] < a.low ? x[i] : a.low;
    high = x[i] > high ? x[i] : high;
    a.sum_w += weight[i];
    a.sum_wx += weight[i] * x[i];
  }
  f8 span = high - a.low;
  for (int s = 0; s < 8; ++s) span[s] = absolute(span[s]);  // never -0
  f8 unit = span;
  reciprocals(unit);
  best_scale = span / a.fifteen;
  best_lift = a.zeros - a.low;
  affine_error(a, a.fifteen * unit, best_scale, best_lift, best_error);
  for (int step = 0; step <= 20; ++step) {
    f8 scale, lift, error, steps;
    spread(float(14.0 + 0.1 * step), steps);
    const f8 inverse = steps * unit;
    least_squares(a, inverse, scale, lift);
    affine_error(a, inverse, scale, lift, error);
    best_scale = error < best_error ? scale : best_scale;
    best_lift = error < best_error ? lift : best_lift;
    best_error = error < best_error ? error : best_error;
  }
}

// A float16 unit (returned, widened) and the multiples 0..63 of it that come nearest to the values.
float six_bits(const f8& values, std::uint8_t* out, float* multiples) {
  float largest_value = values[0];
  for (int s = 1; s < 8; ++s) largest_value = values[s] > largest_value ? values[s] : largest_value;
  const std::uint16_t bits = half_bits(largest_value / 63);
  std::memcpy(out, &bits, sizeof bits);
  const float unit = f16(bits), inverse = reciprocal(unit);
  for (int s = 0; s < 8; ++s) multiples[s] = whole(bounded(values[s] * inverse, 0, 63));
  return unit;
}

void put_six_bits(const float* scales, const float* lifts, std::uint8_t* out) {
  for (int s = 0; s < 4; ++s) {
    const int low_scale = int(scales[s]), high_scale = int(scales[s + 4]);
    const int low_lift = int(lifts[s]), high_lift = int(lifts[s + 4]);
    out[s] = std::uint8_t(low_scale | (high_scale >> 4) << 6);
    out[s + 4] = std::uint8_t(low_lift | (high_lift >> 4) << 6);
    out[s + 8] = std::uint8_t((high_scale & 15) | (high_lift & 15) << 4);
  }
}

void q4_k_block(const float* flat, std::uint8_t* out) {
  f8 x[32], weight[32], squares = {}, scale, lift;
  gather(flat, 32, x);
  for (int i = 0; i < 32; ++i) squares += x[i] * x[i];
  for (int s = 0; s < 8; ++s) squares[s] = __builtin_sqrtf(squares[s] / 32);
  for (int i = 0; i < 32; ++i) {
    for (int s = 0; s < 8; ++s) weight[i][s] = squares[s] + absolute(x[i][s]);
  }
  affine_fit(x, weight, scale, lift);
  float scale_bits[8], lift_bits[8];
  const float d = six_bits(scale, out, scale_bits), dmin = six_bits(lift, out + 2, lift_bits);
  put_six_bits(scale_bits, lift_bits, out + 4);
  float q[256];
  for (int s = 0; s < 8; ++s) {
    const float inverse = reciprocal(d * scale_bits[s]), offset = dmin * lift_bits[s];
    for (int i = 0; i < 32; ++i) q[s * 32 + i] = whole(bounded((flat[s * 32 + i] + offset) * inverse, 0, 15));
  }
  for (int pair = 0; pair < 4; ++pair) {
    for (int i = 0; i < 32; ++i)
      out[16 + pair * 32 + i] = std::uint8_t(int(q[pair * 64 + i]) | int(q[pair * 64 + 32 + i]) << 4);
  }
}

// The scale of x ~ scale q, q in -32..31, of each of 8 sub-blocks.
void symmetric_fit(const f8* x, f8& best_scale) {
  f8 largest_value = x[0], zeros = {}, best_gain = {}, low, high;
  spread(-32.0f, low);
  spread(31.0f, high);
  for (int i = 1; i < 16; ++i) {
    for (int s = 0; s < 8; ++s) largest_value[s] = absolute(x[i][s]) > absolute(largest_value[s]) ? x[i][s] : largest_value[s];
  }
  f8 unit = largest_value;
  reciprocals(unit);
  unit = -unit;
  best_scale = zeros;
  for (int trial = 0; trial < 19; ++trial) {
    const int step = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9;
    f8 sum_wqx = {}, sum_wqq = {}, steps;
    spread(float(32.0 + 0.1 * step), steps);
    const f8 inverse = steps * unit;
    for (int i = 0; i < 16; ++i) {
      f8 q = x[i] * inverse;
      round_bounded(q, low, high);
      const f8 wq = (x[i] * x[i]) * q;
      sum_wqx += wq * x[i];
      sum_wqq += wq * q;
    }
    const f8 scale = sum_wqq > zeros ? sum_wqx / sum_wqq : zeros;
    const f8 gain = scale * sum_wqx;
    best_scale = gain > best_gain ? scale : best_scale;
    best_gain = gain > best_gain ? gain : best_gain;
  }
}

void q6_k_block(const float* flat, std::uint8_t* out) {
  float scale[16];
  for (int half = 0; half < 2; ++half) {
    f8 x[16], fitted;
    gather(flat + 128 * half, 16, x);
    symmetric_fit(x, fitted);
    std::memcpy(scale + 8 * half, &fitted, sizeof fitted);
  }
  float largest_scale = scale[0];
  for (int s = 1; s < 16; ++s) largest_scale = absolute(scale[s]) > absolute(largest_scale) ? scale[s] : largest_scale;
  const std::uint16_t d_bits = half_bits(largest_scale / -128);
  const float d = f16(d_bits), d_inverse = reciprocal(d);
  std::memcpy(out + 208, &d_bits, sizeof d_bits);
  int q[256];
  for (int s = 0; s < 16; ++s) {
    const float rounded = whole(bounded(scale[s] * d_inverse, -128, 127));
    out[192 + s] = std::uint8_t(std::int8_t(rounded));
    const float inverse = reciprocal(d * rounded);
    for (int i = 0; i < 16; ++i) q[s * 16 + i] = int(whole(bounded(flat[s * 16 + i] * inverse, -32, 31))) + 32;
  }
  for (int half = 0; half < 2; ++half) {
    const int* from = q + 128 * half;
    std::uint8_t *low = out + 64 * half, *high = out + 128 + 32 * half;
    for (int i = 0; i < 32; ++i) {
      low[i] = std::uint8_t((from[i] & 15) | (from[i + 64] & 15) << 4);
      low[i + 32] = std::uint8_t((from[i + 32] & 15) | (from[i + 96] & 15) << 4);
      high[i] = std::uint8_t(from[i] >> 4 | from[i + 32] >> 4 << 2 | from[i + 64] >> 4 << 4 | from[i + 96] >> 4 << 6);
    }
  }
}

}  // namespace

LT_DEFINE_TABLE(KQuantsTable, kquants) = {
    &each_block<q4_k_block, 256, 144, 0>,
    &each_block<q6_k_block, 256, 210, 208>,
};

}  // namespace LT_NAMESPACE
}  // namespace lt
