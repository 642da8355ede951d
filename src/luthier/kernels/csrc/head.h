// Cross entropy over rows of logits, with the gradient written over them.
#pragma once
#include <cstdint>

namespace lt {

struct HeadRows {
  std::int64_t rows, vocabulary;
  float scale;      // z = scale * logit
  float softcap;    // then softcap * tanh(z / softcap), where not 0
  float smoothing;  // share of the target spread over the vocabulary
};

struct HeadTable {
  // losses[row] = lse - (1 - smoothing) z[target] - smoothing mean(z). With `gradient` the logits become d loss / d logit.
  void (*cross_entropy)(const HeadRows& head, float* logits, const std::int64_t* targets, float* losses, int gradient);
};

}  // namespace lt
