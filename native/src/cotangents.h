// Σdy and Σdy·(x - mean) of each channel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parts.h"
#include "row_sums.h"

namespace jaxbn {

struct CotangentSums {
  explicit CotangentSums(int64_t channels) : first(channels), second(channels) {}

  std::vector<double> first, second;
};

template <class DY, class X>
CotangentSums cotangents_of_rows(const DY* dy, const X* x, const float* weights,
                                 const float* mean, int64_t rows, int64_t channels) {
  CotangentSums total(channels);
  RowSums<kSplit<DY, X>> lanes(channels, !weights);
  const int64_t folds = lanes.fold.rows(), width = lanes.fold.width();
  const int64_t step = block_rows(width) * folds;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t size = std::min(step, rows - begin), whole = size / folds;
    const float* w = weights ? weights + begin : nullptr;
    const DY* own_dy = dy + begin * channels;
    const X* own_x = x + begin * channels;
    lanes.sum(mean, [&](const float* center, float* first, float* second) {
      add_rows(own_dy, own_x, w, whole, width, center, first, second);
    });
    for (int64_t i = whole * folds * channels; i < size * channels; ++i) {
      const double d = widen(own_dy[i]);
      lanes.first[i % channels] += d;
      lanes.second[i % channels] += d * (widen(own_x[i]) - mean[i % channels]);
    }
    for (int64_t c = 0; c < channels; ++c) {
      total.first[c] += lanes.first[c];
      total.second[c] += lanes.second[c];
    }
  }
  return total;
}

template <class DY, class X>
CotangentSums cotangents_of_slabs(const DY* dy, const X* x, const float* weights,
                                  const float* mean, Shape shape) {
  const auto [outer, channels, inner] = shape;
  CotangentSums total(channels);
  for (int64_t a = 0; a < outer; ++a) {
    const float* w = weights ? weights + a * inner : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = (a * channels + c) * inner;
      Sums sums = sum_slab(dy + at, x + at, w, inner, mean[c]);
      total.first[c] += sums.first;
      total.second[c] += sums.second;
    }
  }
  return total;
}

// Σdy and Σdy·(x - mean), where x counts as the mean if it is not finite and of weight 0.
template <class DY, class X, class Pool>
void cotangents(const DY* dy, const X* x, const float* weights, const float* mean,
                Shape shape, float* first, float* second, Pool& pool) {
  if (shape.channels == 0) return;
  if (shape.inner == 0) shape.outer = 0;  // Nothing to read.
  auto parts = in_parts(shape, 2, pool, [=](int64_t begin, Shape part) {
    const int64_t at = begin * part.channels * part.inner;
    const float* w = weights ? weights + begin * part.inner : nullptr;
    if (part.inner != 1) return cotangents_of_slabs(dy + at, x + at, w, mean, part);
    return cotangents_of_rows(dy + at, x + at, w, mean, part.outer, part.channels);
  });
  CotangentSums total(shape.channels);
  for (const CotangentSums& part : parts) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      total.first[c] += part.first[c];
      total.second[c] += part.second[c];
    }
  }
  std::copy(total.first.begin(), total.first.end(), first);
  std::copy(total.second.begin(), total.second.end(), second);
}

}  // namespace jaxbn
