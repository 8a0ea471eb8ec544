// The mean and Σw|x - mean|² of each channel.
//
// Blocks are summed in float32, about a center near their mean, and pooled in float64 by
// the formula of Chan, Golub and LeVeque, so that the variance is exact for any ratio of
// mean to standard deviation.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "parts.h"
#include "row_sums.h"

namespace jaxbn {

// Moments of part of an array, of weight n in each channel.
struct Moments {
  explicit Moments(int64_t channels) : mean(channels), squares(channels) {}

  void pool(const Moments& other) {
    if (other.n == 0) return;
    pool_parts({n, other.n, static_cast<int64_t>(mean.size())}, other.mean.data(),
               other.squares.data(), mean.data(), squares.data());
    n += other.n;
  }

  double n = 0;
  std::vector<double> mean, squares;
};

// A first guess at the mean: that of a few values of each channel.
template <class X>
std::vector<float> guess_mean(const X* x, const float* weights, Shape shape) {
  const auto [outer, channels, inner] = shape;
  std::vector<double> mean(channels);
  int64_t found = 0;
  for (int64_t a = 0; a < std::min<int64_t>(outer, 8); ++a) {
    for (int64_t b = 0; b < std::min<int64_t>(inner, 8); ++b) {
      if (weights && weights[a * inner + b] == 0) continue;
      ++found;
      const X* values = x + a * channels * inner + b;
      for (int64_t c = 0; c < channels; ++c) mean[c] += widen(values[c * inner]);
    }
  }
  const double each = 1.0 / static_cast<double>(std::max<int64_t>(found, 1));
  for (double& value : mean) value *= each;
  return {mean.begin(), mean.end()};
}

template <class X>
Moments moments_of_rows(const X* x, const float* weights, int64_t rows,
                        int64_t channels) {
  Moments m(channels);
  RowSums<kSplit<X>> lanes(channels, !weights);
  std::vector<float> center = guess_mean(x, weights, {rows, channels, 1});

  const int64_t folds = lanes.fold.rows(), width = lanes.fold.width();
  const int64_t step = block_rows(width) * folds;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t size = std::min(step, rows - begin), whole = size / folds;
    const float* w = weights ? weights + begin : nullptr;
    const X* block = x + begin * channels;
    const double k = w ? std::accumulate(w, w + size, 0.0) : static_cast<double>(size);
    if (k == 0) continue;
    const auto sum = [&] {
      lanes.sum(center.data(), [&](const float* center, float* first, float* second) {
        add_rows(block, w, whole, width, center, first, second);
      });
      for (int64_t i = whole * folds * channels; i < size * channels; ++i) {
        const int64_t c = i % channels;
        const double delta = widen(block[i]) - center[c];
        lanes.first[c] += delta;
        lanes.second[c] += delta * delta;
      }
    };
    sum();
    const Pooling pooling{m.n, k, channels};
    if (is_far(pooling, lanes.first.data(), lanes.second.data(), m.squares.data())) {
      for (int64_t c = 0; c < channels; ++c) {
        center[c] += static_cast<float>(lanes.first[c] / k);
      }
      sum();
    }
    pool_block(pooling, lanes.first.data(), lanes.second.data(), m.mean.data(),
               m.squares.data(), center.data());
    m.n += k;
  }
  return m;
}

template <class X>
Moments moments_of_slabs(const X* x, const float* weights, Shape shape) {
  const auto [outer, channels, inner] = shape;
  Moments m(channels);
  std::vector<double> first(channels), second(channels);
  std::vector<float> center = guess_mean(x, weights, shape);
  for (int64_t a = 0; a < outer; ++a) {
    const float* w = weights ? weights + a * inner : nullptr;
    const double k = w ? std::accumulate(w, w + inner, 0.0) : static_cast<double>(inner);
    if (k == 0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      const X* slab = x + (a * channels + c) * inner;
      Sums sums = sum_slab(slab, w, inner, center[c]);
      if (is_far({m.n, k, 1}, &sums.first, &sums.second, &m.squares[c])) {
        center[c] += static_cast<float>(sums.first / k);
        sums = sum_slab(slab, w, inner, center[c]);
      }
      first[c] = sums.first;
      second[c] = sums.second;
    }
    pool_block({m.n, k, channels}, first.data(), second.data(), m.mean.data(),
               m.squares.data(), center.data());
    m.n += k;
  }
  return m;
}

// Mean, what rounding takes off it, and Σw|x - mean|². Weights are of shape
// (outer, inner), or null.
template <class X, class Pool>
void moments(const X* x, const float* weights, Shape shape, float* mean, float* rest,
             float* squares, Pool& pool) {
  if (shape.channels == 0) return;
  if (shape.inner == 0) shape.outer = 0;  // Nothing to read.
  auto parts = in_parts(shape, 1, pool, [=](int64_t begin, Shape part) {
    const X* own = x + begin * part.channels * part.inner;
    const float* w = weights ? weights + begin * part.inner : nullptr;
    if (part.inner != 1) return moments_of_slabs(own, w, part);
    return moments_of_rows(own, w, part.outer, part.channels);
  });
  Moments total(shape.channels);
  for (const Moments& part : parts) total.pool(part);
  for (int64_t c = 0; c < shape.channels; ++c) {
    mean[c] = static_cast<float>(total.mean[c]);
    rest[c] = static_cast<float>(total.mean[c] - mean[c]);
  }
  std::copy(total.squares.begin(), total.squares.end(), squares);
}

}  // namespace jaxbn
