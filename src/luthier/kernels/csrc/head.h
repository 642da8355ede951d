// Cross entropy over rows of logits, with the gradient written over them.
#pragma once
#include <cstdint>

namespace lt {

struct HeadRows {
  std::int64_t vocabulary;
  float scale;      // z = scale * logit
  float softcap;    // then softcap * tanh(z / softcap), where not 0
  float smoothing;  // share of the target spread over the vocabulary
};

// Some scores z of one row: the largest, the sum of exp(z - largest), and the sum of z.
struct HeadSummary {
  float largest, exponentials, total;
};

struct HeadTable {
  // Neighbouring logits of a row become scores z.
  HeadSummary (*summarise)(const HeadRows& head, float* logits, std::int64_t count);
  // Scores of a row whose log sum exp is `lse` become d loss / d logit, but for what the target adds.
  void (*gradient)(const HeadRows& head, float* scores, std::int64_t count, float lse);
};

}  // namespace lt
