#include "dispatch.h"
#include "quantize.h"
#include "quantize_blocks.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// ---- NF4

constexpr float kCodes[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

// The code of a scaled value is the number of midpoints below it.
vf nf4_code(vf scaled) {
  vf code = zero();
#pragma GCC unroll 15
  for (int i = 0; i < 15; ++i) {
    code = code + choose(less(set1((kCodes[i] + kCodes[i + 1]) / 2), scaled), set1(1.0f), zero());
  }
  return code;
}

// A full block is multiplied by the reciprocal; `tail` divides, and raises absmax to 1e-38.
void nf4_block(const float* x, bool tail, std::uint8_t* codes, float* absmax) {
  vf largest_of = zero(), bad = zero();
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += VL) {
    const vf v = load(x + i);
    largest_of = vmax(vabs(v), largest_of);
    bad = fma(v, zero(), bad);
  }
  const float found = largest(largest_of);
  const float raised = found > 1e-38f ? found : 1e-38f;
  const vf scale = set1(tail ? raised : 1.0f / raised);
  std::int32_t code[64];
  for (int i = 0; i < 64; i += VL) {
    const vf v = load(x + i);
    store(reinterpret_cast<float*>(code + i), as_float(to_int(nf4_code(tail ? v / scale : v * scale))));
  }
  for (int i = 0; i < 32; ++i) codes[i] = std::uint8_t(code[2 * i] << 4 | code[2 * i + 1]);
  *absmax = any(is_nan(bad)) ? NAN : tail ? raised : found;
}

void nf4(const void* weight, int type, std::int64_t count, std::uint8_t* codes, float* absmax) {
  float buffer[64];
  std::int64_t first = 0;
  for (; first + 64 <= count; first += 64) {
    nf4_block(widened(weight, type, first, 64, buffer), false, codes + first / 2, absmax + first / 64);
  }
  const int rest = int(count - first);
  if (rest == 0) return;
  float tail[64] = {};
  std::uint8_t packed[32];
  std::memcpy(tail, widened(weight, type, first, rest, buffer), std::size_t(rest) * sizeof(float));
  nf4_block(tail, true, packed, absmax + first / 64);
  std::memcpy(codes + first / 2, packed, std::size_t(rest + 1) / 2);
}

// ---- GGUF: blocks of 32

// q: 32 values 0..15; byte j holds value j low and value j + 16 high.
void put_nibbles(const float* q, std::uint8_t* out) {
  for (int j = 0; j < 16; ++j) out[j] = std::uint8_t(int(q[j]) | int(q[j + 16]) << 4);
}

void q4_0_block(const float* x, std::uint8_t* out) {
  float largest_value = x[0];
  for (int j = 1; j < 32; ++j) {
    if (absolute(x[j]) > absolute(largest_value)) largest_value = x[j];
  }
  const float scale = largest_value / -8, inverse = reciprocal(scale);
  float q[32];
  for (int j = 0; j < 32; ++j) q[j] = bounded(x[j] * inverse + 8.5f, 0, 15);
  put_half(out, scale);
  put_nibbles(q, out + 2);
}

void q4_1_block(const float* x, std::uint8_t* out) {
  float low = x[0], high = x[0];
  for (int j = 1; j < 32; ++j) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
  }
  low += 0.0f;  // -0 becomes 0
  const float scale = absolute((high - low) / 15), inverse = reciprocal(scale);
  float q[32];
  for (int j = 0; j < 32; ++j) q[j] = bounded((x[j] - low) * inverse + 0.5f, 0, 15);
  put_half(out, scale);
  put_half(out + 2, low);
  put_nibbles(q, out + 4);
}

void q8_0_block(const float* x, std::uint8_t* out) {
  float largest_magnitude = 0;
  for (int j = 0; j < 32; ++j) largest_magnitude = absolute(x[j]) > largest_magnitude ? absolute(x[j]) : largest_magnitude;
  const float scale = largest_magnitude / 127, inverse = reciprocal(scale);
  put_half(out, scale);
  for (int j = 0; j < 32; ++j) {  // halves away from zero
    const float scaled = x[j] * inverse, magnitude = absolute(scaled);
    const int down = int(magnitude);
    const int rounded = down + int(2 * (magnitude - float(down)));
    out[2 + j] = std::uint8_t(std::int8_t(scaled < 0 ? -rounded : rounded));
  }
}

}  // namespace

LT_DEFINE_TABLE(QuantizeTable, quantize) = {
    &nf4,
    &each_block<q4_0_block, 32, 18, 0>,
    &each_block<q4_1_block, 32, 20, 0>,
    &each_block<q8_0_block, 32, 34, 0>,
};

}  // namespace LT_NAMESPACE
}  // namespace lt
