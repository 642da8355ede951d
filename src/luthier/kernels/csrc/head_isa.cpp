#include <math.h>

#include "activations.h"
#include "dispatch.h"
#include "head.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

HeadSummary summarise(const HeadRows& head, float* logits, std::int64_t count) {
  const vf scale = set1(head.scale), cap = set1(head.softcap), into = set1(head.softcap != 0 ? head.scale / head.softcap : 0);
  vf found = set1(-INFINITY);
  const float total = sum_of(count, [&](auto lanes, std::int64_t i, vf chain) {
    const vf logit = lanes.get(logits + i), z = head.softcap != 0 ? cap * vtanh(logit * into) : logit * scale;
    lanes.put(logits + i, z);
    found = vmax(lanes.choose(z, set1(-INFINITY)), found);
    return chain + z;
  });
  const float top = largest(found);
  const vf base = set1(top == -INFINITY ? 0 : top);  // nothing but -Inf: exponentials of zero, not NaN
  const float exponentials = sum_of(count, [&](auto lanes, std::int64_t i, vf chain) {
    return chain + lanes.choose(quick_exp(lanes.get(logits + i) - base), zero());
  });
  return {top, exponentials, total};
}

void gradient(const HeadRows& head, float* scores, std::int64_t count, float lse) {
  const bool capped = head.softcap != 0;
  const vf base = set1(lse), spread = set1(head.smoothing / float(head.vocabulary)), scale = set1(head.scale);
  const vf slope = set1(capped ? 1 / head.softcap : 0);
  each_vector(count, [&](auto lanes, std::int64_t i) {
    const vf z = lanes.get(scores + i), t = capped ? z * slope : zero();
    lanes.put(scores + i, (quick_exp(z - base) - spread) * (scale * (set1(1.0f) - t * t)));
  });
}

}  // namespace

LT_DEFINE_TABLE(HeadTable, head) = {&summarise, &gradient};

}  // namespace LT_NAMESPACE
}  // namespace lt
