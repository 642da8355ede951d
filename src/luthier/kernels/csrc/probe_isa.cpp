#include "dispatch.h"
#include "probe.h"
#include "simd.h"

namespace lt {
namespace LT_NAMESPACE {
namespace {

constexpr int kChains = 12;  // latency 4 or 5 times two pipes, and still in 16 registers

double fma_rounds(std::int64_t steps, float* sink) {
  vf chain[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chain[i] = set1(float(i));
  const vf scale = set1(0.999f), shift = set1(1e-3f);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      chain[i] = fma(chain[i], scale, shift);
      LT_KEEP(chain[i]);
    }
  }
  vf total = zero();
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total = total + chain[i];
  *sink = sum(total);
  return 2.0 * kChains * VL * double(steps);
}

void read_all(const float* data, std::int64_t count, float* sink) {
  vf totals[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) totals[j] = zero();
  std::int64_t i = 0;
  for (; i + 8 * VL <= count; i += 8 * VL) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) totals[j] = totals[j] + load(data + i + j * VL);
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) totals[0] = totals[0] + totals[j];
  *sink = sum(totals[0]);
}

}  // namespace

LT_DEFINE_TABLE(ProbeTable, probe) = {&fma_rounds, &read_all};

}  // namespace LT_NAMESPACE
}  // namespace lt
