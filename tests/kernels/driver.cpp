// Runs the linear kernels of one instruction set (LUTHIER_ISA) against sums in double, without Python: under an emulator, or
// built with the sanitizers. Prints one line a kind with a hash of its decoded weights, which every instruction set must
// share; ends with status 1 and a line "FAILED ..." if a result is off. `driver fork` also runs in a forked child, which an
// emulator of another processor cannot.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "linear.h"
#include "luthier.h"

LT_API int lt_linear_forward(const float*, std::int64_t, const lt_linear*, int, int);
LT_API int lt_linear_backward_input(float*, std::int64_t, const lt_linear*, int, int);
LT_API int lt_outer(const float*, std::int64_t, const float*, std::int64_t, std::int64_t, float, float*, int, int);
LT_API int lt_dequantize_rows(const lt_matrix*, const std::int64_t*, std::int64_t, float*, int);
LT_API int lt_factored_forward(const float*, std::int64_t, const lt_factors*, const float*, float*, int);
LT_API int lt_factored_backward_input(float*, std::int64_t, const lt_factors*, const float*, int);

namespace {

std::mt19937 engine(7);
int failures = 0;

std::vector<float> random_floats(std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(engine);
  return values;
}

struct Kind {
  const char* name;
  int weights, bytes;          // of a block; dense kinds: 1 and the size of an element
  std::vector<int> half_sites; // byte offsets of scales, which must be finite
};

const Kind kinds[LT_KINDS] = {{"f32", 1, 4, {}},          {"bf16", 1, 2, {0}},        {"f16", 1, 2, {0}},
                              {"nf4", 2, 1, {}},          {"q4_0", 32, 18, {0}},      {"q4_1", 32, 20, {0, 2}},
                              {"q5_0", 32, 22, {0}},      {"q5_1", 32, 24, {0, 2}},   {"q8_0", 32, 34, {0}},
                              {"q4_k", 256, 144, {0, 2}}, {"q5_k", 256, 176, {0, 2}}, {"q6_k", 256, 210, {208}}};

// Storage of random bytes whose 16-bit floats are between 2^-6 and 2^3, as bfloat16 read from above.
struct Stored {
  std::vector<std::uint8_t> bytes;
  std::vector<float> absmax, code;
  lt_matrix matrix{};

  Stored(int kind, std::int64_t rows, std::int64_t cols) {
    const Kind& k = kinds[kind];
    const std::int64_t blocks = (rows * cols + k.weights - 1) / k.weights;
    bytes.resize(std::size_t(blocks * k.bytes));
    for (auto& byte : bytes) byte = std::uint8_t(engine());
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (int site : k.half_sites) {
        const std::uint16_t half = kind == LT_BF16 ? 0x3e00 + engine() % 0x100 : 0x2000 + engine() % 0x1000;
        std::memcpy(&bytes[std::size_t(b * k.bytes + site)], &half, 2);
      }
    }
    if (kind == LT_F32) {
      const auto values = random_floats(std::size_t(blocks));
      std::memcpy(bytes.data(), values.data(), bytes.size());
    }
    if (kind == LT_NF4) absmax = random_floats(std::size_t((rows * cols + 63) / 64)), code = random_floats(16);
    matrix = {kind, 0, rows, cols, bytes.data(), absmax.data(), nullptr, nullptr, nullptr, code.data(), 0.0f};
  }
};

// |a - sum in double| / |sum|, over a whole result.
void check(const char* what, const char* kind, const std::vector<float>& got, const std::vector<double>& want) {
  double off = 0, size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) off += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
  if (!(std::sqrt(off / size) < 2e-6)) {
    std::printf("FAILED %s %s: relative error %g\n", kind, what, std::sqrt(off / size));
    ++failures;
  }
}

// (m, depth) a times (depth, n) b, added to `to`; `turned`: b is (n, depth).
void add_product(std::vector<double>& to, const float* a, const float* b, std::int64_t m, std::int64_t n, std::int64_t depth,
                 bool turned, double scale) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < depth; ++k) sum += double(a[i * depth + k]) * double(turned ? b[j * depth + k] : b[k * n + j]);
      to[std::size_t(i * n + j)] += scale * sum;
    }
  }
}

std::vector<float> turn(const std::vector<float>& a, std::int64_t rows, std::int64_t cols) {
  std::vector<float> b(a.size());
  for (std::int64_t i = 0; i < rows * cols; ++i) b[std::size_t(i % cols * rows + i / cols)] = a[std::size_t(i)];
  return b;
}

std::vector<float> run(int kind, std::int64_t T, std::int64_t N, std::int64_t K, std::int64_t r, int threads, std::uint64_t* hash) {
  engine.seed(unsigned(kind * 1000 + T));
  const Stored stored(kind, N, K);
  std::vector<float> w(std::size_t(N * K));
  lt_dequantize_rows(&stored.matrix, nullptr, N, w.data(), threads);
  for (float v : w) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    *hash = (*hash ^ bits) * 0x100000001b3ull;
  }
  const auto x = random_floats(std::size_t(T * K)), dy = random_floats(std::size_t(T * N)), bias = random_floats(std::size_t(N));
  const auto A = random_floats(std::size_t(r * K)), B = random_floats(std::size_t(N * r));
  std::vector<float> y(std::size_t(T * N)), u(std::size_t(T * r)), dx(std::size_t(T * K)), v(std::size_t(T * r));
  std::vector<float> dB(std::size_t(N * r));
  lt_linear part{&stored.matrix, bias.data(), A.data(), B.data(), r, 0.5f, y.data(), u.data(), dy.data(), v.data(), nullptr};
  if (lt_linear_forward(x.data(), T, &part, 1, threads) || lt_linear_backward_input(dx.data(), T, &part, 1, threads) ||
      lt_outer(u.data(), r, dy.data(), N, T, 0.5f, dB.data(), 1, threads)) {
    std::printf("FAILED %s: an entry refused its arguments\n", kinds[kind].name);
    ++failures;
  }
  std::vector<double> want_u(u.size()), want_v(v.size()), want_y(y.size()), want_dx(dx.size()), want_dB(dB.size());
  add_product(want_u, x.data(), A.data(), T, r, K, true, 1.0);
  add_product(want_v, dy.data(), B.data(), T, r, N, false, 1.0);
  for (std::size_t i = 0; i < want_y.size(); ++i) want_y[i] = bias[i % std::size_t(N)];
  add_product(want_y, x.data(), w.data(), T, N, K, true, 1.0);
  add_product(want_y, u.data(), B.data(), T, N, r, true, 0.5);
  add_product(want_dx, dy.data(), w.data(), T, K, N, false, 1.0);
  add_product(want_dx, v.data(), A.data(), T, K, r, false, 0.5);
  const auto turned = turn(dy, T, N);
  add_product(want_dB, turned.data(), u.data(), N, r, T, false, 0.5);
  check("y", kinds[kind].name, y, want_y);
  check("u", kinds[kind].name, u, want_u);
  check("dx", kinds[kind].name, dx, want_dx);
  check("v", kinds[kind].name, v, want_v);
  check("dB", kinds[kind].name, dB, want_dB);
  y.insert(y.end(), dx.begin(), dx.end());
  return y;
}

// L: (M, r), R: (r, K); outputs in reverse of R's rows and L's where `pivoted`.
std::vector<float> run_factored(int kind, std::int64_t T, std::int64_t M, std::int64_t r, std::int64_t K, bool pivoted, int threads) {
  engine.seed(unsigned(kind * 1000 + T));
  const Stored left(kind, M, r), right(kind, r, K);
  std::vector<float> l(std::size_t(M * r)), rows(std::size_t((r + M) * K));
  lt_dequantize_rows(&left.matrix, nullptr, M, l.data(), threads);
  lt_dequantize_rows(&right.matrix, nullptr, r, rows.data(), threads);
  std::vector<double> product(std::size_t(M * K));
  add_product(product, l.data(), rows.data(), M, K, r, false, 1.0);
  const std::int64_t N = pivoted ? r + M : M;
  std::vector<double> w(std::size_t(N * K));
  std::vector<std::int32_t> places(static_cast<std::size_t>(N));
  for (std::int64_t o = 0; o < N; ++o) {
    places[o] = std::int32_t(r + M - 1 - o);
    const std::int64_t row = pivoted ? places[o] : r + o;
    for (std::int64_t k = 0; k < K; ++k) w[o * K + k] = row < r ? rows[row * K + k] : product[(row - r) * K + k];
  }
  const auto x = random_floats(std::size_t(T * K)), dy = random_floats(std::size_t(T * N)), bias = random_floats(std::size_t(N));
  std::vector<float> y(std::size_t(T * N)), dx(std::size_t(T * K));
  const lt_factors factors{&right.matrix, &left.matrix, pivoted ? places.data() : nullptr, N};
  if (lt_factored_forward(x.data(), T, &factors, bias.data(), y.data(), threads) ||
      lt_factored_backward_input(dx.data(), T, &factors, dy.data(), threads)) {
    std::printf("FAILED %s: an entry for factors refused its arguments\n", kinds[kind].name);
    ++failures;
  }
  std::vector<double> want_y(y.size()), want_dx(dx.size());
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t o = 0; o < N; ++o) {
      double sum = bias[o];
      for (std::int64_t k = 0; k < K; ++k) {
        sum += x[t * K + k] * w[o * K + k];
        want_dx[t * K + k] += dy[t * N + o] * w[o * K + k];
      }
      want_y[t * N + o] = sum;
    }
  }
  check("y of factors", kinds[kind].name, y, want_y);
  check("dx of factors", kinds[kind].name, dx, want_dx);
  y.insert(y.end(), dx.begin(), dx.end());
  return y;
}

// After a fork the child has no threads of its parent's: it must still finish.
void check_fork() {
  std::uint64_t hash = 0;
  const pid_t child = fork();
  if (child == 0) {
    run(LT_Q8_0, 20, 64, 64, 3, 2, &hash);
    _exit(failures == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) std::printf("FAILED in a forked child\n"), ++failures;
}

}  // namespace

int main(int count, char**) {
  std::printf("isa %d threads %d\n", lt_isa(), lt_thread_backend());
  if (lt_isa() < 0) return 1;
  for (int kind = 0; kind < LT_KINDS; ++kind) {
    std::uint64_t hash = 0xcbf29ce484222325ull;
    const bool ragged = kind <= LT_NF4;
    for (std::int64_t T : {1, 3, 4, 9, 37}) {
      const auto one = run(kind, T, 50, ragged ? 77 : 256, 5, 1, &hash), two = run(kind, T, 50, ragged ? 77 : 256, 5, 3, &hash);
      if (one != two) std::printf("FAILED %s: threads change the result\n", kinds[kind].name), ++failures;
    }
    run(kind, 33, 96, 512, 16, 2, &hash);
    const std::int64_t rank = ragged ? 21 : 256, columns = ragged ? 77 : 256;
    for (std::int64_t T : {1, 9, 37, 100}) {
      for (const bool pivoted : {false, true}) {
        const auto one = run_factored(kind, T, 30, rank, columns, pivoted, 1);
        const auto two = run_factored(kind, T, 30, rank, columns, pivoted, 3);
        if (one != two) std::printf("FAILED %s: threads change the results of factors\n", kinds[kind].name), ++failures;
      }
    }
    std::printf("%s %016llx\n", kinds[kind].name, static_cast<unsigned long long>(hash));
  }
  if (count > 1) check_fork();
  return failures == 0 ? 0 : 1;
}
