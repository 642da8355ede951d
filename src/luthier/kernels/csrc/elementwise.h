// Normalisation, rotary embedding and gated activations, forward and backward, over rows of float32.
#pragma once
#include <cstdint>

namespace lt {

enum Gate : int { kSilu = 0, kGeluTanh = 1 };

struct NormRows {
  std::int64_t rows, width;
  const float* weight;
  float plus;  // added to weight: 1 for Gemma
  float eps;
  bool past;  // results go past the caches
};

// A matrix whose rows are contiguous and `stride` floats apart.
struct Rows {
  const float* data;
  std::int64_t stride;
};

struct GatedRows {
  int kind;  // a Gate
  Rows gate, up;
  std::int64_t rows, width;
  bool past;
};

struct RotaryHeads {
  const float* from;
  float* to;  // may be `from`
  std::int64_t from_stride, to_stride, heads;
};

struct ElementwiseTable {
  // normed = (x + residual) inverse (weight + plus), inverse = 1 / sqrt(mean square + eps); residual and sum may be null.
  void (*rms_norm)(const NormRows& norm, const float* x, const float* residual, float* sum, float* normed, float* inverse);
  // dx is written; dsum may be null; dweight (width) is added to, or null.
  void (*rms_norm_backward)(const NormRows& norm, const float* dnormed, const float* dsum, const float* x, const float* inverse,
                            float* dx, float* dweight);
  void (*layer_norm)(const NormRows& norm, const float* x, const float* bias, float* normed, float* mean, float* inverse);
  void (*layer_norm_backward)(const NormRows& norm, const float* dnormed, const float* x, const float* mean,
                              const float* inverse, float* dx, float* dweight, float* dbias);
  // `size` of each head's `head_size` values turn: pairs (j, j + size / 2). `transposed` is for gradients.
  void (*rotary)(const RotaryHeads& heads, std::int64_t rows, std::int64_t head_size, std::int64_t size, const float* cos,
                 const float* sin, int transposed);
  void (*gated)(const GatedRows& g, float* out);
  void (*gated_backward)(const GatedRows& g, const float* dout, float* dgate, float* dup);
  // out[i] = parts[0][i] + parts[1][i] + ..., parts `stride` floats apart.
  void (*add_parts)(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t width, float* out);
};

}  // namespace lt
