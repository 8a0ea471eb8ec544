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

#include "elements.h"
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

  void pool(const Moments& other) {
    if (other.n == 0) return;
    pool_parts({n, other.n, static_cast<int64_t>(mean.size())}, other.mean.data(),
               other.squares.data(), mean.data(), squares.data());
    n += other.n;
  }

  double n = 0;
  std::vector<double> mean, squares;
};

struct CotangentSums {
  explicit CotangentSums(int64_t channels) : first(channels), second(channels) {}

  std::vector<double> first, second;
};

// Lanes of a row of sums. Eight rows are read at a time, and where each is two pages of
// memory these are eight streams to the processor, which fetches ahead in each. Nearer to
// each other they are none (three times slower at 64 channels).
template <bool split>
constexpr int64_t kSumLanes = split ? 4096 : 2048;

// Sums of rows, a channel a lane, and of lanes of one channel.
template <bool split>
class RowSums {
 public:
  RowSums(int64_t channels, bool folded)
      : first(channels), second(channels), fold(channels, folded ? kSumLanes<split> : 0),
        center_(fold.width()), first_(fold.width()), second_(fold.width()),
        unit_(fold.unit()) {}

  // The sums of a block, in `first` and `second`; `add` calls add_rows.
  template <class Add>
  void sum(const float* center, Add add) {
    fold.spread(center, center_.data());
    for (auto* lanes : {&first_, &second_}) std::fill(lanes->begin(), lanes->end(), 0.f);
    add(center_.data(), first_.data(), second_.data());
    gather(first_, &first);
    gather(second_, &second);
  }

  std::vector<double> first, second;
  const Fold<split> fold;

 private:
  void gather(const std::vector<float>& lanes, std::vector<double>* sums) {
    std::fill(unit_.begin(), unit_.end(), 0.0);
    std::fill(sums->begin(), sums->end(), 0.0);
    add_units(lanes.data(), fold.width(), fold.unit(), unit_.data());
    for (int64_t i = 0; i < fold.unit(); ++i) (*sums)[fold.channel(i)] += unit_[i];
  }

  std::vector<float> center_, first_, second_;
  std::vector<double> unit_;
};

// Rows that are summed in float32: enough to make pooling cheap, few enough that rounding
// stays below that of the elements.
inline int64_t block_rows(int64_t width) {
  return std::clamp<int64_t>((1 << 18) / width, 64, 512);
}

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
  constexpr int64_t worth_while = 1 << 18, for_each_thread = 4;
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
  for (const Moments& part : parts) total.pool(part);
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

// Bytes of an array of which little is in the caches when it is read again.
constexpr int64_t kStreamedBytes = 4 << 20;

// dx = k·dy + w·(c1·(x - mean) + c0). `vectors` are mean, k, c1 and c0.
template <class DY, class X, class Pool>
void input_cotangent(const DY* dy, const X* x, const float* weights,
                     const float* const* vectors, Shape shape, X* dx, Pool& pool) {
  const auto [outer, channels, inner] = shape;
  const int64_t slab = channels * inner, bytes = outer * slab * sizeof(X);
  if (bytes == 0) return;
  const Fold<kSplit<DY, X>> fold(channels, weights || inner != 1 ? 0 : 1024);
  const int64_t folds = fold.rows(), rows = outer / folds, width = fold.width();
  std::vector<float> lanes(kVectors * width);
  for (int v = 0; v < kVectors; ++v) fold.spread(vectors[v], &lanes[v * width]);
  const bool stream = bytes >= kStreamedBytes && (inner == 1 ? width : inner) % kStep == 0 &&
                      reinterpret_cast<uintptr_t>(dx) % 16 == 0;
  const int64_t parts = std::min(parts_of(shape, pool), std::max<int64_t>(rows, 1));
  parallel_for(pool, parts, [=, &lanes](int64_t i) {
    const int64_t begin = rows * i / parts, end = rows * (i + 1) / parts;
    for (int64_t a = begin; inner != 1 && a < end; ++a) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = a * slab + c * inner;
        const float numbers[] = {vectors[0][c], vectors[1][c], vectors[2][c], vectors[3][c]};
        const float* w = weights ? weights + a * inner : nullptr;
        apply_slab(dy + at, x + at, w, inner, numbers, stream, dx + at);
      }
    }
    if (inner == 1) {
      const int64_t at = begin * width;
      const float* w = weights ? weights + begin : nullptr;
      apply_rows(dy + at, x + at, w, end - begin, width, lanes.data(), stream, dx + at);
    }
  });
  for (int64_t at = rows * folds * slab; at < outer * slab; ++at) {  // Too few to fold.
    const int64_t c = at % channels;
    const float through = (widen(x[at]) - vectors[0][c]) * vectors[2][c] + vectors[3][c];
    dx[at] = narrow<X>(widen(dy[at]) * vectors[1][c] + through);
  }
}

}  // namespace jaxbn
