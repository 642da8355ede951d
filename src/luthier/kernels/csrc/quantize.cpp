#include "quantize.h"

#include "dispatch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(QuantizeTable, quantize)
LT_DECLARE_TABLES(KQuantsTable, kquants)

namespace {

constexpr std::int64_t kNf4Task = 64 * 512;  // elements of a task, whole blocks
constexpr std::int64_t kTaskElements = 8192;

std::int64_t parts(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

const char* at(const void* weight, int type, std::int64_t element) {
  return static_cast<const char*>(weight) + element * (type == kF32 ? 4 : 2);
}

bool is_float_type(int type) { return type == kF32 || type == kBF16 || type == kF16; }

}  // namespace
}  // namespace lt

// weight: `count` elements of `type`; codes: ceil(count / 2) bytes; absmax: ceil(count / 64) floats.
LT_API int lt_nf4_quantize(const void* weight, int type, std::int64_t count, std::uint8_t* codes, float* absmax, int threads) {
  if (lt_missing(weight, codes, absmax) || !lt::is_float_type(type) || count < 0 || threads < 1) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const lt::QuantizeTable& kernels = lt::table(lt::quantize_tables);
    lt::parallel_for(lt::parts(count, lt::kNf4Task), threads, [&](std::int64_t task) {
      const std::int64_t first = task * lt::kNf4Task;
      const std::int64_t here = count - first < lt::kNf4Task ? count - first : lt::kNf4Task;
      kernels.nf4(lt::at(weight, type, first), type, here, codes + first / 2, absmax + first / 64);
    });
  })
}

// kind: 0 Q4_0, 1 Q4_1, 2 Q8_0, 3 Q4_K, 4 Q6_K. weight: `blocks` blocks, one after the other.
LT_API int lt_gguf_quantize(const void* weight, int type, std::int64_t blocks, int kind, std::uint8_t* out, int threads) {
  if (lt_missing(weight, out) || !lt::is_float_type(type) || blocks < 0 || threads < 1) return LT_BAD_ARGUMENT;
  if (kind < 0 || kind > 4) return LT_BAD_ARGUMENT;
  const lt::QuantizeTable& plain = lt::table(lt::quantize_tables);
  const lt::KQuantsTable& searched = lt::table(lt::kquants_tables);
  const decltype(plain.q4_0) kernels[5] = {plain.q4_0, plain.q4_1, plain.q8_0, searched.q4_k, searched.q6_k};
  constexpr int kElements[5] = {32, 32, 32, 256, 256};
  constexpr int kBytes[5] = {18, 20, 34, 144, 210};
  const std::int64_t size = lt::kTaskElements / kElements[kind];
  LT_GUARD({
    lt::parallel_for(lt::parts(blocks, size), threads, [&](std::int64_t task) {
      const std::int64_t first = task * size;
      const std::int64_t here = blocks - first < size ? blocks - first : size;
      kernels[kind](lt::at(weight, type, first * kElements[kind]), type, here, out + first * kBytes[kind]);
    });
  })
}
