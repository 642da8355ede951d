#include "probe.h"

#include <chrono>

#include "dispatch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(ProbeTable, probe)

namespace {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace
}  // namespace lt

// Flops a second of `threads` threads at once, each doing `steps` rounds.
LT_API int lt_fma_peak(std::int64_t steps, int threads, double* flops_per_second) {
  if (steps < 1 || threads < 1 || threads > lt::kMostThreads || flops_per_second == nullptr) return LT_BAD_ARGUMENT;
  LT_GUARD({
    double work[lt::kMostThreads];
    float sinks[lt::kMostThreads];
    const lt::ProbeTable& kernels = lt::table(lt::probe_tables, lt::tiles_isa());  // what products run on
    const double start = lt::now();
    lt::parallel_for(threads, threads, [&](std::int64_t i) { work[i] = kernels.fma(steps, sinks + i); });
    const double seconds = lt::now() - start;
    double total = 0;
    for (int i = 0; i < threads; ++i) total += work[i];
    *flops_per_second = total / seconds;
  })
}

// Bytes a second with which `threads` threads read `count` floats once, each its own share.
LT_API int lt_read_bandwidth(const float* data, std::int64_t count, int threads, double* bytes_per_second) {
  if (lt_missing(data, bytes_per_second) || count < threads) return LT_BAD_ARGUMENT;
  if (threads < 1 || threads > lt::kMostThreads) return LT_BAD_ARGUMENT;
  LT_GUARD({
    float sinks[lt::kMostThreads];
    const lt::ProbeTable& kernels = lt::table(lt::probe_tables);
    const std::int64_t share = count / threads;
    const double start = lt::now();
    lt::parallel_for(threads, threads, [&](std::int64_t i) { kernels.read(data + i * share, share, sinks + i); });
    *bytes_per_second = 4.0 * double(share * threads) / (lt::now() - start);
  })
}
