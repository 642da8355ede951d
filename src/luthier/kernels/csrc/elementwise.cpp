#include "elementwise.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace lt {

LT_DECLARE_TABLES(ElementwiseTable, elementwise)

namespace {

const ElementwiseTable& kernels() { return table(elementwise_tables); }

// Rows of a task: about 16384 elements, whatever the number of threads.
std::int64_t task_rows(std::int64_t width) { return width >= 16384 ? 1 : 16384 / (width > 0 ? width : 1); }

// Rows of a task that sums over rows: no more than kMostParts tasks, each with a part of the sum to be kept.
constexpr std::int64_t kMostParts = 64;
std::int64_t summing_rows(std::int64_t rows, std::int64_t width) {
  return std::max(task_rows(width), (rows + kMostParts - 1) / kMostParts);
}

// fn(first row, rows, task) over all rows, `size` of them a task.
template <class Fn>
void over_rows(std::int64_t rows, std::int64_t size, int threads, Fn&& fn) {
  parallel_for((rows + size - 1) / size, threads, [&](std::int64_t task) {
    const std::int64_t first = task * size;
    fn(first, rows - first < size ? rows - first : size, task);
  });
}

// Results of 16 MiB or more, whose rows start at whole cache lines, are stored past the caches: nobody finds them there
// again, and the lines need not be read first.
bool goes_past(std::int64_t rows, std::int64_t width, const float* out) {
  return rows * width >= (std::int64_t(4) << 20) && width % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
}

// Each task adds to its own row of a table, and the rows are added in order: no sum depends on the threads.
class WeightGradient {
 public:
  WeightGradient(std::int64_t rows, std::int64_t width, std::int64_t tables)
      : width_(width), tasks_(rows == 0 ? 0 : (rows + summing_rows(rows, width) - 1) / summing_rows(rows, width)) {
    parts_ = Scratch<WeightGradient>::get<float>(std::size_t(tables * tasks_ * width));
    if (tasks_ > 0) std::memset(parts_, 0, std::size_t(tables * tasks_ * width) * sizeof(float));
  }
  float* part(std::int64_t table, std::int64_t task) { return parts_ + (table * tasks_ + task) * width_; }
  void write(std::int64_t table, float* out) { kernels().add_parts(part(table, 0), tasks_, width_, width_, out); }

 private:
  std::int64_t width_, tasks_;
  float* parts_;
};

bool bad_sizes(std::int64_t rows, std::int64_t width, int threads) { return rows < 1 || width < 1 || threads < 1; }

}  // namespace
}  // namespace lt

// x, residual, sum, normed: (rows, width); residual and sum are both null or both given; inverse: (rows).
LT_API int lt_rms_norm(const float* x, const float* residual, const float* weight, float plus, float eps, std::int64_t rows,
                       std::int64_t width, float* sum, float* normed, float* inverse, int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(x, weight, normed, inverse)) return LT_BAD_ARGUMENT;
  if ((residual == nullptr) != (sum == nullptr)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool past = lt::goes_past(rows, width, normed);
    lt::over_rows(rows, lt::task_rows(width), threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
      const std::int64_t at = first * width;
      lt::kernels().rms_norm({count, width, weight, plus, eps, past}, x + at, residual == nullptr ? nullptr : residual + at,
                             sum == nullptr ? nullptr : sum + at, normed + at, inverse + first);
    });
  })
}

// dsum and dweight may be null.
LT_API int lt_rms_norm_backward(const float* dnormed, const float* dsum, const float* x, const float* weight, float plus,
                                const float* inverse, std::int64_t rows, std::int64_t width, float* dx, float* dweight,
                                int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(dnormed, x, weight, inverse, dx)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool sums = dweight != nullptr;
    lt::WeightGradient gradient(sums ? rows : 0, width, 1);
    const std::int64_t size = sums ? lt::summing_rows(rows, width) : lt::task_rows(width);
    lt::over_rows(rows, size, threads, [&](std::int64_t first, std::int64_t count, std::int64_t task) {
      const std::int64_t at = first * width;
      lt::kernels().rms_norm_backward({count, width, weight, plus, 0, lt::goes_past(rows, width, dx)}, dnormed + at,
                                      dsum == nullptr ? nullptr : dsum + at, x + at, inverse + first, dx + at,
                                      sums ? gradient.part(0, task) : nullptr);
    });
    if (sums) gradient.write(0, dweight);
  })
}

// bias may be null; mean, inverse: (rows).
LT_API int lt_layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                         std::int64_t width, float* normed, float* mean, float* inverse, int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(x, weight, normed, mean, inverse)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool past = lt::goes_past(rows, width, normed);
    lt::over_rows(rows, lt::task_rows(width), threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
      const std::int64_t at = first * width;
      lt::kernels().layer_norm({count, width, weight, 0, eps, past}, x + at, bias, normed + at, mean + first, inverse + first);
    });
  })
}

// dweight and dbias may be null.
LT_API int lt_layer_norm_backward(const float* dnormed, const float* x, const float* weight, const float* mean,
                                  const float* inverse, std::int64_t rows, std::int64_t width, float* dx, float* dweight,
                                  float* dbias, int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(dnormed, x, weight, mean, inverse, dx)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool sums = dweight != nullptr || dbias != nullptr;
    lt::WeightGradient gradient(sums ? rows : 0, width, 2);
    const std::int64_t size = sums ? lt::summing_rows(rows, width) : lt::task_rows(width);
    lt::over_rows(rows, size, threads, [&](std::int64_t first, std::int64_t count, std::int64_t task) {
      const std::int64_t at = first * width;
      lt::kernels().layer_norm_backward(
          {count, width, weight, 0, 0, lt::goes_past(rows, width, dx)}, dnormed + at, x + at, mean + first, inverse + first,
          dx + at, dweight == nullptr ? nullptr : gradient.part(0, task), dbias == nullptr ? nullptr : gradient.part(1, task));
    });
    if (dweight != nullptr) gradient.write(0, dweight);
    if (dbias != nullptr) gradient.write(1, dbias);
  })
}

// from, to: rows of `heads` heads of `head_size`, strides in floats; cos, sin: (rows, size), size even, at most head_size.
LT_API int lt_rotary(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride, std::int64_t heads,
                     std::int64_t head_size, const float* cos, const float* sin, std::int64_t size, std::int64_t rows,
                     int transposed, int threads) {
  if (lt_missing(from, to, cos, sin) || rows < 0 || heads < 1 || threads < 1) return LT_BAD_ARGUMENT;
  if (size < 2 || size % 2 != 0 || size > head_size) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const std::int64_t rows_of_task = lt::task_rows(heads * head_size);
    lt::over_rows(rows, rows_of_task, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
      const lt::RotaryHeads part = {from + first * from_stride, to + first * to_stride, from_stride, to_stride, heads};
      lt::kernels().rotary(part, count, head_size, size, cos + first * size, sin + first * size, transposed);
    });
  })
}

// kind: 0 SiLU, 1 GELU by tanh. gate, up: rows of `width` floats, strides in floats; out: (rows, width).
LT_API int lt_gated(int kind, const float* gate, std::int64_t gate_stride, const float* up, std::int64_t up_stride,
                    std::int64_t rows, std::int64_t width, float* out, int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(gate, up, out) || kind < 0 || kind > 1) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool past = lt::goes_past(rows, width, out);
    lt::over_rows(rows, lt::task_rows(width), threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
      const lt::Rows g = {gate + first * gate_stride, gate_stride};
      const lt::Rows u = {up + first * up_stride, up_stride};
      lt::kernels().gated({kind, g, u, count, width, past}, out + first * width);
    });
  })
}

LT_API int lt_gated_backward(int kind, const float* dout, const float* gate, std::int64_t gate_stride, const float* up,
                             std::int64_t up_stride, std::int64_t rows, std::int64_t width, float* dgate, float* dup,
                             int threads) {
  if (lt::bad_sizes(rows, width, threads) || lt_missing(dout, gate, up, dgate, dup)) return LT_BAD_ARGUMENT;
  if (kind < 0 || kind > 1) return LT_BAD_ARGUMENT;
  LT_GUARD({
    const bool past = lt::goes_past(rows, width, dgate) && lt::goes_past(rows, width, dup);
    lt::over_rows(rows, lt::task_rows(width), threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
      const std::int64_t at = first * width;
      const lt::Rows g = {gate + first * gate_stride, gate_stride};
      const lt::Rows u = {up + first * up_stride, up_stride};
      lt::kernels().gated_backward({kind, g, u, count, width, past}, dout + at, dgate + at, dup + at);
    });
  })
}
