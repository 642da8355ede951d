// Runs the quantisers, element-wise passes, head and attention once, for builds that Python cannot load.
//
//     passes_driver INPUT OUTPUT
//
// INPUT is float32 numbers in the order in which they are taken below, OUTPUT the results in the order of `put`.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../src/luthier/kernels/csrc/linear.h"

struct lt_attention {
  std::int64_t heads, kv_heads, size;
  float scale, softcap;
  std::int64_t window, segments;
  const std::int64_t *starts, *parents;
  std::int64_t queries;
  const std::int64_t* rows;
};

using i64 = std::int64_t;
LT_API int lt_nf4_quantize(const void*, int, i64, std::uint8_t*, float*, int);
LT_API int lt_gguf_quantize(const void*, int, i64, int, std::uint8_t*, int);
LT_API int lt_rms_norm(const float*, const float*, const float*, float, float, i64, i64, float*, float*, float*, int);
LT_API int lt_rms_norm_backward(const float*, const float*, const float*, const float*, float, const float*, i64, i64, float*,
                                float*, int);
LT_API int lt_layer_norm(const float*, const float*, const float*, float, i64, i64, float*, float*, float*, int);
LT_API int lt_layer_norm_backward(const float*, const float*, const float*, const float*, const float*, i64, i64, float*,
                                  float*, float*, int);
LT_API int lt_rotary(const float*, i64, float*, i64, i64, i64, const float*, const float*, i64, i64, int, int);
LT_API int lt_gated(int, const float*, i64, const float*, i64, i64, i64, float*, int);
LT_API int lt_gated_backward(int, const float*, const float*, i64, const float*, i64, i64, i64, float*, float*, int);
LT_API int lt_linear_cross_entropy(const float*, i64, const lt_matrix*, const float*, const i64*, float, float, float, float*,
                                   i64, float*, float*, int);
LT_API int lt_attention_forward(const lt_attention*, const float*, const float*, const float*, float*, float*, int);
LT_API int lt_attention_backward(const lt_attention*, const float*, const float*, const float*, const float*, const float*,
                                 const float*, float*, float*, float*, int);

namespace {

std::FILE *input, *output;
int failures = 0;

std::vector<float> take(std::size_t count) {
  std::vector<float> values(count);
  failures += std::fread(values.data(), sizeof(float), count, input) != count;
  return values;
}

template <class T>
void put(const std::vector<T>& values) {
  failures += std::fwrite(values.data(), sizeof(T), values.size(), output) != values.size();
}

void must(int status) { failures += status != LT_OK; }

constexpr int kThreads = 2;
constexpr i64 T = 70, W = 37;

void norms() {
  const auto x = take(T * W), r = take(T * W), d = take(T * W), w = take(W), b = take(W);
  std::vector<float> sum(T * W), normed(T * W), inverse(T), mean(T), dx(T * W), dw(W), db(W);
  must(lt_rms_norm(x.data(), r.data(), w.data(), 1, 1e-6f, T, W, sum.data(), normed.data(), inverse.data(), kThreads));
  must(lt_rms_norm_backward(d.data(), r.data(), sum.data(), w.data(), 1, inverse.data(), T, W, dx.data(), dw.data(), kThreads));
  put(sum), put(normed), put(dx), put(dw);
  must(lt_layer_norm(x.data(), w.data(), b.data(), 1e-6f, T, W, normed.data(), mean.data(), inverse.data(), kThreads));
  must(lt_layer_norm_backward(d.data(), x.data(), w.data(), mean.data(), inverse.data(), T, W, dx.data(), dw.data(), db.data(),
                              kThreads));
  put(normed), put(dx), put(dw), put(db);
  for (int kind = 0; kind < 2; ++kind) {
    must(lt_gated(kind, x.data(), W, r.data(), W, T, W, normed.data(), kThreads));
    must(lt_gated_backward(kind, d.data(), x.data(), W, r.data(), W, T, W, dx.data(), sum.data(), kThreads));
    put(normed), put(dx), put(sum);
  }
}

void rotary() {
  const auto x = take(T * 2 * 16), cos = take(T * 10), sin = take(T * 10);
  for (int transposed = 0; transposed < 2; ++transposed) {
    std::vector<float> to(x.size());
    must(lt_rotary(x.data(), 32, to.data(), 32, 2, 16, cos.data(), sin.data(), 10, T, transposed, kThreads));
    put(to);
  }
}

void head() {
  const i64 rows = 9, width = 32, vocabulary = 50;
  const auto hidden = take(rows * width), weight = take(vocabulary * width);
  lt_matrix matrix{};
  matrix.kind = LT_F32;
  matrix.rows = vocabulary;
  matrix.cols = width;
  matrix.data = weight.data();
  std::vector<i64> targets;
  for (i64 row = 0; row < rows; ++row) targets.push_back(row * 7 % vocabulary);
  std::vector<float> logits(4 * vocabulary), losses(rows), dhidden(rows * width);
  must(lt_linear_cross_entropy(hidden.data(), rows, &matrix, nullptr, targets.data(), 0.7f, 5, 0.1f, logits.data(), 4,
                               losses.data(), dhidden.data(), kThreads));
  put(losses), put(dhidden);
}

void attention() {
  const i64 starts[5] = {0, 10, 90, 95, 130}, parents[4] = {-1, 0, 1, 0}, tokens = 130, q_size = tokens * 4 * 16, kv_size = tokens * 2 * 16;
  const lt_attention a = {4, 2, 16, 0.25f, 3, 40, 4, starts, parents, 0, nullptr};
  const auto q = take(q_size), k = take(kv_size), v = take(kv_size), d = take(q_size);
  std::vector<float> out(q_size), lse(tokens * 4), dq(q_size), dk(kv_size), dv(kv_size);
  must(lt_attention_forward(&a, q.data(), k.data(), v.data(), out.data(), lse.data(), kThreads));
  must(lt_attention_backward(&a, d.data(), q.data(), k.data(), v.data(), out.data(), lse.data(), dq.data(), dk.data(),
                             dv.data(), kThreads));
  put(out), put(lse), put(dq), put(dk), put(dv);
}

void quantize() {
  const auto w = take(4 * 256);
  std::vector<std::uint8_t> codes(512);
  std::vector<float> absmax(16);
  must(lt_nf4_quantize(w.data(), 0, 1024, codes.data(), absmax.data(), kThreads));
  put(codes), put(absmax);
  const i64 elements[5] = {32, 32, 32, 256, 256}, bytes[5] = {18, 20, 34, 144, 210};
  for (int kind = 0; kind < 5; ++kind) {
    const i64 blocks = 1024 / elements[kind];
    std::vector<std::uint8_t> stored(std::size_t(blocks * bytes[kind]));
    must(lt_gguf_quantize(w.data(), 0, blocks, kind, stored.data(), kThreads));
    put(stored);
  }
}

}  // namespace

int main(int count, char** names) {
  if (count != 3 || (input = std::fopen(names[1], "rb")) == nullptr || (output = std::fopen(names[2], "wb")) == nullptr)
    return 2;
  norms();
  rotary();
  head();
  attention();
  quantize();
  failures += std::fclose(output) != 0;
  std::printf("isa %d failures %d\n", lt_isa(), failures);
  return failures != 0;
}
