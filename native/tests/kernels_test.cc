// The reductions beside plain loops in float64: every type, layout and number of channels
// that is easy to get wrong. Meant for a sanitizer build; run without arguments.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cotangents.h"
#include "input_cotangent.h"
#include "moments.h"

namespace {

struct Pool {
  int threads;
  int64_t num_threads() const { return threads; }
  template <class F>
  void Schedule(F f) {
    std::thread(f).detach();
  }
};

std::mt19937 generator(0);
int failures = 0;

void require_close(double got, double expected, double scale, double tolerance,
                   const char* what, jaxbn::Shape s) {
  if (std::abs(got - expected) <= tolerance * scale) return;  // Not if it is NaN.
  std::printf("%s of (%ld, %ld, %ld): got %.9g, expected %.9g\n", what, (long)s.outer,
              (long)s.channels, (long)s.inner, got, expected);
  ++failures;
}

float to(float x, float*) { return x; }
jaxbn::BFloat16 to(float x, jaxbn::BFloat16*) {
  return {static_cast<uint16_t>(jaxbn::as<uint32_t>(x) >> 16)};
}

// Allocated to the byte, so that one too far is seen.
template <class T>
std::vector<T> numbers(int64_t size, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  std::vector<T> v(size);
  for (T& x : v) x = to(static_cast<float>(normal(generator)), static_cast<T*>(nullptr));
  v.shrink_to_fit();
  return v;
}

template <class DY, class X>
void check(jaxbn::Shape s, bool weighted, int threads, double far) {
  const int64_t size = s.outer * s.channels * s.inner;
  auto x = numbers<X>(size, far, 1);
  auto dy = numbers<DY>(size, 0.5, 1);
  std::vector<float> w;
  if (weighted) {
    w.resize(s.outer * s.inner);
    for (float& v : w) v = static_cast<float>(generator() % 4) / 2;
    if (!w.empty()) {
      w[0] = 0;  // Under which there may be anything.
      for (int64_t c = 0; c < s.channels; ++c) {
        x[c * s.inner] = to(std::numeric_limits<float>::quiet_NaN(), (X*)nullptr);
      }
    }
  }
  const float* weights = weighted ? w.data() : nullptr;
  std::vector<float> mean(s.channels), rest(s.channels);
  std::vector<float> squares(s.channels), again(s.channels);
  std::vector<float> first(s.channels), second(s.channels);
  Pool pool{threads};
  jaxbn::moments(x.data(), weights, s, mean.data(), rest.data(), squares.data(),
                 pool);
  jaxbn::moments(x.data(), weights, s, mean.data(), rest.data(), again.data(), pool);
  jaxbn::cotangents(dy.data(), x.data(), weights, mean.data(), s, first.data(),
                    second.data(), pool);

  const auto k = numbers<float>(s.channels, 0, 1), c1 = numbers<float>(s.channels, 0, 1);
  const auto c0 = numbers<float>(s.channels, 0, 1);
  const float* vectors[] = {mean.data(), k.data(), c1.data(), c0.data()};
  // In one of two cases dx is not where it can be written past the caches.
  const int64_t aside = threads % 2;
  auto placed = numbers<X>(size + aside, 0, 1);
  X* dx = placed.data() + aside;
  jaxbn::input_cotangent(dy.data(), x.data(), weights, vectors, s, dx, pool);

  for (int64_t c = 0; c < s.channels; ++c) {
    double n = 0, sum = 0, square = 0, sum_dy = 0, product = 0, size_dy = 1e-30;
    auto each = [&](auto f) {
      for (int64_t a = 0; a < s.outer; ++a) {
        for (int64_t b = 0; b < s.inner; ++b) {
          int64_t i = (a * s.channels + c) * s.inner + b;
          f(jaxbn::widen(x[i]), jaxbn::widen(dy[i]), weights ? w[a * s.inner + b] : 1, i);
        }
      }
    };
    each([&](double v, double, double k, int64_t) {
      n += k;
      if (k) sum += k * v;
    });
    double truth = n ? sum / n : 0;
    each([&](double v, double d, double k, int64_t) {
      if (k) square += k * (v - truth) * (v - truth);
      double delta = k || std::isfinite(v) ? v - mean[c] : 0;
      sum_dy += d;
      product += d * delta;
      size_dy += std::abs(d) * (1 + std::abs(delta));
    });
    const double narrow = sizeof(X) == 2 ? 4e-3 : 0;
    each([&](double v, double d, double w, int64_t i) {
      double direct = k[c] * d, by_mean = w ? w * c1[c] * (v - mean[c]) : 0;
      double rest = w ? w * c0[c] : 0, all = direct + by_mean + rest;
      double tolerance = 4e-7 * (std::abs(direct) + std::abs(by_mean) + std::abs(rest));
      require_close(jaxbn::widen(dx[i]), all, 1, tolerance + narrow * std::abs(all), "dx", s);
    });
    require_close(mean[c], truth, std::abs(truth) + 1, 4e-7, "mean", s);
    require_close(squares[c], square, square + 1e-30, 2e-6, "squares", s);
    require_close(squares[c], again[c], 1, 0, "repeated squares", s);
    require_close(first[c], sum_dy, size_dy, 1e-6, "sum of dy", s);
    require_close(second[c], product, size_dy, 1e-6, "sum of products", s);
  }
}

}  // namespace

int main() {
  const jaxbn::Shape shapes[] = {
      {0, 3, 1},   {5, 0, 1},  {200, 64, 0},     {1, 1, 1},    {1, 7, 1},     {9, 1, 1},
      {8, 16, 1},  {17, 3, 1},    {33, 32, 1},  {1000, 5, 1},  {4099, 24, 1},
      {300, 48, 1}, {9, 10007, 1}, {513, 100, 1}, {2, 3, 49},  {3, 1, 20000},
      {5, 4, 33},  {64, 8, 1024}, {1, 6, 100},  {40000, 2, 1}, {700, 64, 3},
      // Few rows, slabs of few elements, and channels of which each thread has some.
      {1, 40, 1},   {3, 33, 1},   {8, 100, 1},     {2, 50, 3},   {4, 65, 8},    {1, 9, 31},
      {100, 70, 4}, {50, 3, 5},   {3, 7, 32},      {2, 90, 45},  {20, 4500, 1}, {9, 2500, 11},
      {4, 70000, 1}, {2, 20001, 7}, {3, 5000, 40}, {1, 3, 200000},
  };
  for (const jaxbn::Shape& s : shapes) {
    for (bool weighted : {false, true}) {
      check<float, float>(s, weighted, 1, 0);
      check<float, float>(s, weighted, 3, 100);
      check<jaxbn::BFloat16, jaxbn::BFloat16>(s, weighted, 3, 100);
      check<float, jaxbn::BFloat16>(s, weighted, 3, 0);
      check<jaxbn::BFloat16, float>(s, weighted, 3, 0);
    }
    check<float, float>(s, false, 2, 1e4);
  }
  for (const jaxbn::Shape& s : {jaxbn::Shape{4097, 256, 1}, jaxbn::Shape{4, 8, 32768}}) {
    check<float, float>(s, false, 2, 0);  // Large enough to be written past the caches,
    check<float, float>(s, false, 3, 0);  // and not where it could be,
    check<float, float>(s, true, 2, 0);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
