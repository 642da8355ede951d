#include <math.h>

#include "activations.h"
#include "dispatch.h"
#include "head.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

// One row of logits becomes z, scaled and capped; returns the largest z and adds up all.
LT_INLINE float capped_row(const HeadRows& head, float* logits, float* total) {
  const vf scale = set1(head.scale), cap = set1(head.softcap), into = set1(head.softcap != 0 ? head.scale / head.softcap : 0);
  vf largest_of = set1(-INFINITY), totals = zero();
  std::int64_t j = 0;
  for (; j + VL <= head.vocabulary; j += VL) {
    const vf z = head.softcap != 0 ? cap * vtanh(load(logits + j) * into) : load(logits + j) * scale;
    store(logits + j, z);
    largest_of = vmax(z, largest_of);
    totals = totals + z;
  }
  float found = largest(largest_of), rest = 0;
  for (; j < head.vocabulary; ++j) {
    const vf lane = load_n(logits + j, 1);
    store_n(logits + j, head.softcap != 0 ? cap * vtanh(lane * into) : lane * scale, 1);
    found = logits[j] > found ? logits[j] : found;
    rest += logits[j];
  }
  *total = sum(totals) + rest;
  return found;
}

void cross_entropy(const HeadRows& head, float* logits, const std::int64_t* targets, float* losses, int gradient) {
  const std::int64_t vocabulary = head.vocabulary;
  const float share = head.smoothing / float(vocabulary);
  for (std::int64_t row = 0; row < head.rows; ++row, logits += vocabulary) {
    float total;
    const float largest_z = capped_row(head, logits, &total);
    const vf shift = set1(largest_z);
    vf sums = zero();
    std::int64_t j = 0;
    for (; j + VL <= vocabulary; j += VL) sums = sums + quick_exp(load(logits + j) - shift);
    float lanes_left[VL] = {};
    store_n(lanes_left, quick_exp(load_n(logits + j, int(vocabulary - j)) - shift), int(vocabulary - j));
    const float lse = largest_z + logf(sum(sums + load(lanes_left)));
    const float target_z = logits[targets[row]];
    // 0 times an infinite sum would be NaN.
    losses[row] = lse - (1 - head.smoothing) * target_z - (share != 0 ? share * total : 0);
    if (!gradient) continue;
    const vf base = set1(lse), spread = set1(share), scale = set1(head.scale);
    const bool capped = head.softcap != 0;
    const vf slope = set1(capped ? 1 / head.softcap : 0);
    each_vector(vocabulary, [&](auto lanes, std::int64_t i) {
      const vf z = lanes.get(logits + i), t = capped ? z * slope : zero();
      lanes.put(logits + i, (quick_exp(z - base) - spread) * (scale * (set1(1.0f) - t * t)));
    });
    const float t = head.softcap != 0 ? target_z / head.softcap : 0;
    logits[targets[row]] -= (1 - head.smoothing) * head.scale * (1 - t * t);
  }
}

}  // namespace

LT_DEFINE_TABLE(HeadTable, head) = {&cross_entropy};

}  // namespace LT_NAMESPACE
}  // namespace lt
