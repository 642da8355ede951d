#include "elementwise.h"

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

// fn(first row, rows, task) over all rows.
template <class Fn>
void over_rows(std::int64_t rows, std::int64_t width, int threads, Fn&& fn) {
  const std::int64_t size = task_rows(width);
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
      : width_(width), tasks_((rows + task_rows(width) - 1) / task_rows(width)) {
    parts_ = Scratch<WeightGradient>::get<float>(std::size_t(tables * tasks_ * width));
    std::memset(parts_, 0, std::size_t(tables * tasks_ * width) * sizeof(float));
  }
  float* part(std::int64_t table, std::int64_t task) { return parts_ + (table * tasks_ + task) * width_; }
  void write(std::int64_t table, float* out) { kernels().add_parts(part(table, 0), tasks_, width_, width_, out); }

 private:
  std::int64_t width_, tasks_;
  float* parts_;
};

bool bad_norm(std::int64_t rows, std::int64_t width, const void* weight) { return rows < 1 || width < 1 || weight == nullptr; }

}  // namespace
}  // namespace lt

// x, residual, sum, normed: (rows, width); residual and sum are both null or both given; inverse: (rows).
LT_API int lt_rms_norm(const float* x, const float* residual, const float* weight, float plus, float eps, std::int64_t rows,
                       std::int64_t width, float* sum, float* normed, float* inverse, int threads) {
  if (lt::bad_norm(rows, width, weight) || (residual == nullptr) != (sum == nullptr)) return LT_BAD_ARGUMENT;
  const bool past = lt::goes_past(rows, width, normed);
  lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
    const std::int64_t at = first * width;
    lt::kernels().rms_norm({count, width, weight, plus, eps, past}, x + at, residual == nullptr ? nullptr : residual + at,
                           sum == nullptr ? nullptr : sum + at, normed + at, inverse + first);
  });
  return LT_OK;
}

// dsum and dweight may be null.
LT_API int lt_rms_norm_backward(const float* dnormed, const float* dsum, const float* x, const float* weight, float plus,
                                const float* inverse, std::int64_t rows, std::int64_t width, float* dx, float* dweight,
                                int threads) {
  if (lt::bad_norm(rows, width, weight)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    lt::WeightGradient gradient(dweight == nullptr ? 0 : rows, width, 1);
    lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t task) {
      const std::int64_t at = first * width;
      lt::kernels().rms_norm_backward({count, width, weight, plus, 0, lt::goes_past(rows, width, dx)}, dnormed + at,
                                      dsum == nullptr ? nullptr : dsum + at, x + at, inverse + first, dx + at,
                                      dweight == nullptr ? nullptr : gradient.part(0, task));
    });
    if (dweight != nullptr) gradient.write(0, dweight);
  })
}

// bias may be null; mean, inverse: (rows).
LT_API int lt_layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                         std::int64_t width, float* normed, float* mean, float* inverse, int threads) {
  if (lt::bad_norm(rows, width, weight)) return LT_BAD_ARGUMENT;
  lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
    const std::int64_t at = first * width;
    lt::kernels().layer_norm({count, width, weight, 0, eps, lt::goes_past(rows, width, normed)}, x + at, bias, normed + at,
                             mean + first, inverse + first);
  });
  return LT_OK;
}

// dweight and dbias may be null.
LT_API int lt_layer_norm_backward(const float* dnormed, const float* x, const float* weight, const float* mean,
                                  const float* inverse, std::int64_t rows, std::int64_t width, float* dx, float* dweight,
                                  float* dbias, int threads) {
  if (lt::bad_norm(rows, width, weight)) return LT_BAD_ARGUMENT;
  LT_GUARD({
    lt::WeightGradient gradient(dweight == nullptr && dbias == nullptr ? 0 : rows, width, 2);
    lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t task) {
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
  if (rows < 0 || heads < 1 || size < 2 || size % 2 != 0 || size > head_size) return LT_BAD_ARGUMENT;
  lt::over_rows(rows, heads * head_size, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
    const lt::RotaryHeads part = {from + first * from_stride, to + first * to_stride, from_stride, to_stride, heads};
    lt::kernels().rotary(part, count, head_size, size, cos + first * size, sin + first * size, transposed);
  });
  return LT_OK;
}

// kind: 0 SiLU, 1 GELU by tanh. gate, up: rows of `width` floats, strides in floats; out: (rows, width).
LT_API int lt_gated(int kind, const float* gate, std::int64_t gate_stride, const float* up, std::int64_t up_stride,
                    std::int64_t rows, std::int64_t width, float* out, int threads) {
  if (rows < 0 || width < 1 || kind < 0 || kind > 1) return LT_BAD_ARGUMENT;
  lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
    const lt::Rows g = {gate + first * gate_stride, gate_stride}, u = {up + first * up_stride, up_stride};
    lt::kernels().gated({kind, g, u, count, width, lt::goes_past(rows, width, out)}, out + first * width);
  });
  return LT_OK;
}

LT_API int lt_gated_backward(int kind, const float* dout, const float* gate, std::int64_t gate_stride, const float* up,
                             std::int64_t up_stride, std::int64_t rows, std::int64_t width, float* dgate, float* dup,
                             int threads) {
  if (rows < 0 || width < 1 || kind < 0 || kind > 1) return LT_BAD_ARGUMENT;
  lt::over_rows(rows, width, threads, [&](std::int64_t first, std::int64_t count, std::int64_t) {
    const std::int64_t at = first * width;
    const lt::Rows g = {gate + first * gate_stride, gate_stride}, u = {up + first * up_stride, up_stride};
    const bool past = lt::goes_past(rows, width, dgate) && lt::goes_past(rows, width, dup);
    lt::kernels().gated_backward({kind, g, u, count, width, past}, dout + at, dgate + at, dup + at);
  });
  return LT_OK;
}
