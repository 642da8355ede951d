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

// The first rows of q and d are those of the tokens in `rows`; without rows of all.
void attention(const lt_attention& a, const float* q, const float* k, const float* v, const float* d) {
  const i64 tokens = a.starts[a.segments], queries = a.rows == nullptr ? tokens : a.queries;
  std::vector<float> out(queries * a.heads * a.size), lse(queries * a.heads), dq(out.size());
  std::vector<float> dk(tokens * a.kv_heads * a.size), dv(dk.size());
  must(lt_attention_forward(&a, q, k, v, out.data(), lse.data(), kThreads));
  must(lt_attention_backward(&a, d, q, k, v, out.data(), lse.data(), dq.data(), dk.data(), dv.data(), kThreads));
  put(out), put(lse), put(dq), put(dk), put(dv);
}

void attention() {
  const i64 starts[5] = {0, 10, 90, 95, 130}, parents[4] = {-1, 0, 1, 0}, rows[7] = {2, 3, 9, 40, 93, 94, 129};
  const auto q = take(130 * 4 * 16), k = take(130 * 2 * 16), v = take(130 * 2 * 16), d = take(130 * 4 * 16);
  attention({4, 2, 16, 0.25f, 3, 40, 4, starts, parents, 0, nullptr}, q.data(), k.data(), v.data(), d.data());
  attention({4, 2, 16, 0.25f, 3, 0, 4, starts, parents, 7, rows}, q.data(), k.data(), v.data(), d.data());
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
