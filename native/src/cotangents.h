// Σdy and Σdy·(x - mean) of each channel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "columns.h"
#include "parts.h"
#include "row_sums.h"
#include "slabs.h"

namespace jaxbn {

// Of some of the channels.
struct CotangentSums {
  explicit CotangentSums(int64_t channels) : first(channels), second(channels) {}

  // Those of a block, from some channel on.
  void add(const double* more_first, const double* more_second, int64_t channels,
           int64_t at = 0) {
    for (int64_t c = 0; c < channels; ++c) {
      first[at + c] += more_first[c];
      second[at + c] += more_second[c];
    }
  }
  void write(float* first_out, float* second_out) const {
    std::copy(first.begin(), first.end(), first_out);
    std::copy(second.begin(), second.end(), second_out);
  }

  std::vector<double> first, second;
};

template <class DY, class X>
CotangentSums cotangents_of_rows(const DY* dy, const X* x, const float* weights,
                                 const float* mean, const Part& part,
                                 Fold<kSplit<DY, X>>& fold) {
  RowSums<kSplit<DY, X>> lanes(fold);
  const auto [rows, channels, inner] = part.size;
  const int64_t folds = fold.rows(), width = fold.width();
  const int64_t stride = folds * part.row(), step = block_rows(width) * folds;
  CotangentSums total(channels);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t size = std::min(step, rows - begin), whole = size / folds;
    const float* w = weights ? weights + begin : nullptr;
    const DY* own_dy = dy + begin * part.row();
    const X* own_x = x + begin * part.row();
    lanes.sum(mean, [&](const float* center, float* first, float* second) {
      add_rows(own_dy, own_x, w, whole, stride, width, center, first, second);
    });
    if (folds > 1) {  // Rows are whole.
      for (int64_t i = whole * stride; i < size * part.row(); ++i) {
        const int64_t c = i / inner % channels;
        const double d = widen(own_dy[i]);
        lanes.first[c] += d;
        lanes.second[c] += d * (widen(own_x[i]) - mean[c]);
      }
    }
    total.add(lanes.first.data(), lanes.second.data(), channels);
  }
  return total;
}

template <class DY, class X>
CotangentSums cotangents_of_slabs(const DY* dy, const X* x, const float* weights,
                                  const float* mean, const Part& part) {
  const auto [outer, channels, inner] = part.size;
  CotangentSums total(channels);
  for (int64_t a = 0; a < outer; ++a) {
    const float* w = weights ? weights + a * part.whole.inner : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = a * part.row() + c * part.whole.inner;
      const Sums sums = sum_slab(dy + at, x + at, w, inner, mean[c]);
      total.first[c] += sums.first;
      total.second[c] += sums.second;
    }
  }
  return total;
}

// Calls f(sums, tile) with all channels of a part, some at a time.
template <class DY, class X, class F>
void for_cotangents(const DY* dy, const X* x, const float* weights, const float* mean,
                    const Part& part, F f) {
  const float* w = part.own(weights);
  if (are_rows(part.whole, weights)) {
    constexpr bool split = kSplit<DY, X>;
    constexpr int64_t lanes = kSumLanes<split>;
    for_folds<split>(part, weights, lanes, kGroup, [&](auto& fold, auto& tile) {
      const int64_t at = tile.begin();
      const float* center = mean + tile.from.channels;
      f(cotangents_of_rows(dy + at, x + at, w, center, tile, fold), tile);
    });
  } else {
    part.for_tiles(kSlabs, [&](const Part& tile) {
      const int64_t at = tile.begin();
      const float* center = mean + tile.from.channels;
      f(cotangents_of_slabs(dy + at, x + at, w, center, tile), tile);
    });
  }
}

// Σdy and Σdy·(x - mean), where x counts as the mean if it is not finite and of weight 0.
template <class DY, class X, class Pool>
void cotangents(const DY* dy, const X* x, const float* weights, const float* mean,
                Shape shape, float* first, float* second, Pool& pool) {
  if (shape.channels == 0) return;
  shape = simplified(shape);
  const Grid grid(shape, 2, pool.num_threads());
  if (are_few(shape, grid)) {
    return parallel_for(pool, grid.parts(), [=](int64_t i) {
      const Part part = grid.part(i);
      const int64_t at = part.begin(), c = part.from.channels;
      columns_of_cotangents(dy + at, x + at, weights, mean + c, part, first + c,
                            second + c);
    });
  }
  if (grid.layers() == 1) {
    return parallel_for(pool, grid.parts(), [=](int64_t i) {
      for_cotangents(dy, x, weights, mean, grid.part(i), [&](auto&& sums, auto&& tile) {
        sums.write(first + tile.from.channels, second + tile.from.channels);
      });
    });
  }
  std::vector<CotangentSums> layers(grid.layers(), CotangentSums(shape.channels));
  parallel_for(pool, grid.parts(), [=, &layers](int64_t i) {
    for_cotangents(dy, x, weights, mean, grid.part(i), [&](auto&& sums, auto&& tile) {
      layers[tile.layer].add(sums.first.data(), sums.second.data(), tile.size.channels,
                             tile.from.channels);
    });
  });
  CotangentSums total(shape.channels);
  for (const CotangentSums& layer : layers) {
    total.add(layer.first.data(), layer.second.data(), shape.channels);
  }
  total.write(first, second);
}

}  // namespace jaxbn
