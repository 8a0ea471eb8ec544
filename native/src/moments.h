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

#include "columns.h"
#include "parts.h"
#include "pooling.h"
#include "row_sums.h"
#include "slabs.h"

namespace jaxbn {

// Moments of some of the channels, of weight n in each.
struct Moments {
  explicit Moments(int64_t channels) : mean(channels), squares(channels) {}

  // Adds a block whose sums are about `center`, and moves that to the mean.
  void pool(double k, const double* first, const double* second, float* center) {
    pool_block({n, k, channels()}, first, second, mean.data(), squares.data(), center);
    n += k;
  }
  void pool(const Moments& other) {
    if (other.n == 0) return;
    pool_parts({n, other.n, channels()}, other.mean.data(), other.squares.data(),
               mean.data(), squares.data());
    n += other.n;
  }
  int64_t channels() const { return mean.size(); }

  double n = 0;
  std::vector<double> mean, squares;
};

// A first guess at the mean: that of about eight values of each channel. `x` and
// `weights` are the part's own.
template <class X>
std::vector<float> guess_mean(const X* x, const float* weights, Part part) {
  constexpr int64_t enough = 8;
  part.size.outer = std::min(part.size.outer, enough);
  part.size.inner = std::min(part.size.inner, enough / part.size.outer);
  std::vector<float> mean(part.size.channels);
  means_of_columns(x, weights, part, mean.data());
  return mean;
}

template <class X>
Moments moments_of_rows(const X* x, const float* weights, const Part& part,
                        Fold<kSplit<X>>& fold) {
  RowSums<kSplit<X>> lanes(fold);
  const auto [rows, channels, inner] = part.size;
  const int64_t folds = fold.rows(), width = fold.width();
  const int64_t stride = folds * part.row(), step = block_rows(width) * folds;
  Moments m(channels);
  std::vector<float> center = guess_mean(x, weights, part);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t size = std::min(step, rows - begin), whole = size / folds;
    const float* w = weights ? weights + begin : nullptr;
    const X* block = x + begin * part.row();
    const double k = w ? std::accumulate(w, w + size, 0.0) : size * inner;
    if (k == 0) continue;
    const auto sum = [&, channels = channels, inner = inner] {
      lanes.sum(center.data(), [&](const float* center, float* first, float* second) {
        add_rows(block, w, whole, stride, width, center, first, second);
      });
      if (folds == 1) return;
      for (int64_t i = whole * stride; i < size * part.row(); ++i) {  // Rows are whole.
        const int64_t c = i / inner % channels;
        const double delta = widen(block[i]) - center[c];
        lanes.first[c] += delta;
        lanes.second[c] += delta * delta;
      }
    };
    sum();
    const double *first = lanes.first.data(), *second = lanes.second.data();
    if (is_far({m.n, k, channels}, first, second, m.squares.data())) {
      for (int64_t c = 0; c < channels; ++c) {
        center[c] += static_cast<float>(first[c] / k);
      }
      sum();
    }
    m.pool(k, first, second, center.data());
  }
  return m;
}

template <class X>
Moments moments_of_slabs(const X* x, const float* weights, const Part& part) {
  const auto [outer, channels, inner] = part.size;
  Moments m(channels);
  std::vector<double> first(channels), second(channels);
  std::vector<float> center = guess_mean(x, weights, part);
  for (int64_t a = 0; a < outer; ++a) {
    const float* w = weights ? weights + a * part.whole.inner : nullptr;
    const double k = w ? std::accumulate(w, w + inner, 0.0) : static_cast<double>(inner);
    if (k == 0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      const X* slab = x + a * part.row() + c * part.whole.inner;
      Sums sums = sum_slab(slab, w, inner, center[c]);
      if (is_far(1 / k, sums.first, sums.second, m.squares[c])) {
        center[c] += static_cast<float>(sums.first / k);
        sums = sum_slab(slab, w, inner, center[c]);
      }
      first[c] = sums.first;
      second[c] = sums.second;
    }
    m.pool(k, first.data(), second.data(), center.data());
  }
  return m;
}

// Calls f(moments, tile) with all channels of a part, some at a time.
template <class X, class F>
void for_moments(const X* x, const float* weights, const Part& part, F f) {
  const float* w = part.own(weights);
  if (are_rows(part.whole, weights)) {
    constexpr bool split = kSplit<X>;
    constexpr int64_t lanes = kSumLanes<split>;
    for_folds<split>(part, weights, lanes, kGroup, [&](auto& fold, auto& tile) {
      f(moments_of_rows(x + tile.begin(), w, tile, fold), tile);
    });
  } else {
    part.for_tiles(kSlabs, [&](const Part& tile) {
      f(moments_of_slabs(x + tile.begin(), w, tile), tile);
    });
  }
}

// Mean, what rounding takes off it, and Σw|x - mean|². Weights are of shape
// (outer, inner), or null.
template <class X, class Pool>
void moments(const X* x, const float* weights, Shape shape, float* mean, float* rest,
             float* squares, Pool& pool) {
  if (shape.channels == 0) return;
  shape = simplified(shape);
  const Grid grid(shape, 1, pool.num_threads());
  const auto write = [=](const Moments& m, int64_t c) {
    round_moments(m.channels(), m.mean.data(), m.squares.data(), mean + c, rest + c,
                  squares + c);
  };
  if (are_few(shape, grid)) {
    return parallel_for(pool, grid.parts(), [=](int64_t i) {
      const Part part = grid.part(i);
      const int64_t c = part.from.channels;
      columns_of_values(x + part.begin(), weights, part, mean + c, rest + c, squares + c);
    });
  }
  if (grid.layers() == 1) {
    return parallel_for(pool, grid.parts(), [=](int64_t i) {
      for_moments(x, weights, grid.part(i), [&](const Moments& m, const Part& tile) {
        write(m, tile.from.channels);
      });
    });
  }
  std::vector<Moments> layers(grid.layers(), Moments(shape.channels));
  parallel_for(pool, grid.parts(), [=, &layers](int64_t i) {
    for_moments(x, weights, grid.part(i), [&](const Moments& m, const Part& tile) {
      Moments& layer = layers[tile.layer];
      const int64_t c = tile.from.channels;
      std::copy(m.mean.begin(), m.mean.end(), layer.mean.begin() + c);
      std::copy(m.squares.begin(), m.squares.end(), layer.squares.begin() + c);
      if (c == 0) layer.n = m.n;  // For all channels.
    });
  });
  Moments total(shape.channels);
  for (const Moments& layer : layers) total.pool(layer);
  write(total, 0);
}

}  // namespace jaxbn
