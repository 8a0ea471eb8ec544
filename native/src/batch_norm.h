// The two reductions of batch norm over an array of shape (outer, channels, inner):
//
//   moments     mean and Σw|x - mean|², of each channel
//   cotangents  Σdy and Σdy·(x - mean)
//
// Blocks are summed in float32, about a center near their mean, and pooled in float64 by
// the formula of Chan, Golub and LeVeque, so that the variance is exact for any ratio of
// mean to standard deviation. Which part of the array a block is depends on the array's
// shape and the number of threads, and on nothing else: so do the results, to the bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "fold.h"
#include "parallel.h"
#include "sums.h"

namespace jaxbn {

struct Shape {
  int64_t outer, channels, inner;
};

// Moments of part of an array, of weight n in each channel.
struct Moments {
  explicit Moments(int64_t channels) : mean(channels), squares(channels) {}

  void pool(int64_t c, double k, double mean_, double squares_) {
    const double delta = mean_ - mean[c], share = k / (n + k);
    squares[c] += squares_ + delta * delta * (n * share);
    mean[c] += delta * share;
  }

  double n = 0;
  std::vector<double> mean, squares;
};

struct CotangentSums {
  explicit CotangentSums(int64_t channels) : first(channels), second(channels) {}

  std::vector<double> first, second;
};

// Sums of rows, a channel a lane, and of lanes of one channel.
template <bool split>
class RowSums {
 public:
  RowSums(int64_t channels, bool folded)
      : first(channels), second(channels), fold(channels, folded), first_(fold.width()),
        second_(fold.width()) {}

  // The sums of a block, in `first` and `second`; `add` calls add_rows.
  template <class Add>
  void sum(const float* center, Add add) {
    const std::vector<float> centers = fold.spread(center);
    for (auto* lanes : {&first_, &second_}) std::fill(lanes->begin(), lanes->end(), 0.f);
    for (auto* sums : {&first, &second}) std::fill(sums->begin(), sums->end(), 0.0);
    add(centers.data(), first_.data(), second_.data());
    for (int64_t lane = 0; lane < fold.width(); ++lane) {
      first[fold.channel(lane)] += first_[lane];
      second[fold.channel(lane)] += second_[lane];
    }
  }

  std::vector<double> first, second;
  const Fold<split> fold;

 private:
  std::vector<float> first_, second_;
};

// Rows that are summed in float32: enough to make pooling cheap, few enough that rounding
// stays below that of the elements.
inline int64_t block_rows(int64_t width) {
  return std::clamp<int64_t>((1 << 15) / width, 64, 512);
}

// A first guess at the mean: that of a few values of each channel.
template <class X>
std::vector<float> guess_mean(const X* x, const float* weights, Shape shape) {
  const auto [outer, channels, inner] = shape;
  std::vector<double> mean(channels);
  std::vector<int64_t> found(channels);
  for (int64_t a = 0; a < outer && a < 8; ++a) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t b = 0; b < inner && b < 8; ++b) {
        if (weights && weights[a * inner + b] == 0) continue;
        const double value = widen(x[(a * channels + c) * inner + b]);
        mean[c] += (value - mean[c]) / static_cast<double>(++found[c]);
      }
    }
  }
  return {mean.begin(), mean.end()};
}

// Whether a block of weight k is so far from its center that digits of its squares are
// lost, beside the squares before it.
inline bool is_far(double k, double first, double second, double before) {
  const double between = first * first / k, within = second - between;
  return between > 4 * (std::max(within, 0.0) + before);
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
    bool far = false;
    for (int64_t c = 0; c < channels && !far; ++c) {
      far = is_far(k, lanes.first[c], lanes.second[c], m.squares[c]);
    }
    if (far) {
      for (int64_t c = 0; c < channels; ++c) {
        center[c] += static_cast<float>(lanes.first[c] / k);
      }
      sum();
    }
    pool_block({m.n, k, channels}, lanes.first.data(), lanes.second.data(),
               m.mean.data(), m.squares.data(), center.data());
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
      if (is_far(k, sums.first, sums.second, m.squares[c])) {
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

// How many parts an array is divided into, along its outer axis: several for each thread,
// since threads are late now and then.
template <class Pool>
int64_t parts_of(Shape shape, Pool& pool) {
  constexpr int64_t worth_while = 1 << 16, for_each_thread = 4;
  const int64_t size = shape.outer * shape.channels * shape.inner;
  const int64_t most = std::min<int64_t>(for_each_thread * pool.num_threads(), shape.outer);
  return std::clamp<int64_t>(size / worth_while, 1, std::max<int64_t>(most, 1));
}

// The results of all parts, in their order. `f` makes that of some of the outer axis.
template <class Pool, class F>
auto in_parts(Shape shape, Pool& pool, F f) {
  using Result = decltype(f(int64_t{0}, Shape{}));
  const int64_t parts = parts_of(shape, pool);
  std::vector<Result> results(parts, Result(shape.channels));
  parallel_for(pool, parts, [=, &results](int64_t i) {
    const int64_t begin = shape.outer * i / parts, end = shape.outer * (i + 1) / parts;
    results[i] = f(begin, Shape{end - begin, shape.channels, shape.inner});
  });
  return results;
}

// Mean and Σw|x - mean|². Weights are of shape (outer, inner), or null.
template <class X, class Pool>
void moments(const X* x, const float* weights, Shape shape, float* mean, float* squares,
             Pool& pool) {
  if (shape.channels == 0) return;
  if (shape.inner == 0) shape.outer = 0;  // Nothing to read.
  auto parts = in_parts(shape, pool, [=](int64_t begin, Shape part) {
    const X* own = x + begin * part.channels * part.inner;
    const float* w = weights ? weights + begin * part.inner : nullptr;
    if (part.inner != 1) return moments_of_slabs(own, w, part);
    return moments_of_rows(own, w, part.outer, part.channels);
  });
  Moments total(shape.channels);
  for (const Moments& part : parts) {
    if (part.n == 0) continue;
    for (int64_t c = 0; c < shape.channels; ++c) {
      total.pool(c, part.n, part.mean[c], part.squares[c]);
    }
    total.n += part.n;
  }
  std::copy(total.mean.begin(), total.mean.end(), mean);
  std::copy(total.squares.begin(), total.squares.end(), squares);
}

// Σdy and Σdy·(x - mean), where x counts as the mean if it is not finite and of weight 0.
template <class DY, class X, class Pool>
void cotangents(const DY* dy, const X* x, const float* weights, const float* mean,
                Shape shape, float* first, float* second, Pool& pool) {
  if (shape.channels == 0) return;
  if (shape.inner == 0) shape.outer = 0;  // Nothing to read.
  auto parts = in_parts(shape, pool, [=](int64_t begin, Shape part) {
    const int64_t at = begin * part.channels * part.inner;
    const float* w = weights ? weights + begin * part.inner : nullptr;
    if (part.inner != 1) return cotangents_of_slabs(dy + at, x + at, w, mean, part);
    return cotangents_of_rows(dy + at, x + at, w, mean, part.outer, part.channels);
  });
  for (int64_t c = 0; c < shape.channels; ++c) {
    Sums total;
    for (const CotangentSums& part : parts) {
      total.first += part.first[c];
      total.second += part.second[c];
    }
    first[c] = static_cast<float>(total.first);
    second[c] = static_cast<float>(total.second);
  }
}

}  // namespace jaxbn
