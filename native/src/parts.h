// An array of shape (outer, channels, inner), divided among threads.
//
// Which part of the array is whose depends on its shape and the number of threads, and on
// nothing else: so do the results, to the bit.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "parallel.h"

namespace jaxbn {

struct Shape {
  int64_t outer, channels, inner;

  int64_t rows() const { return outer * inner; }  // For each channel.
  int64_t size() const { return outer * channels * inner; }
};

// Slabs of so many elements are vectors of one channel. In shorter ones, and in none, the
// lanes of a vector are of several channels, and weights are one a row.
constexpr int64_t kLongSlab = 32;

inline bool are_rows(Shape shape, bool weighted) {
  return shape.inner == 1 || (shape.inner < kLongSlab && !weighted);
}

// The same elements, as long slabs where that is possible, and with no axis of length 0
// but the outer one.
inline Shape simplified(Shape shape) {
  if (shape.rows() == 0) return {0, shape.channels, 1};
  if (shape.channels == 1) return {1, 1, shape.rows()};
  return shape;
}

// Some of the outer axis, of the channels and of the inner axis of an array. Weights are
// of shape (outer, inner).
struct Part {
  Shape whole, from, size;
  int64_t layer;

  // From one row of channels to the next.
  int64_t row() const { return whole.channels * whole.inner; }
  int64_t begin() const {
    return (from.outer * whole.channels + from.channels) * whole.inner + from.inner;
  }
  // Of the weights; null stays null.
  const float* own(const float* weights) const {
    return weights ? weights + from.outer * whole.inner + from.inner : nullptr;
  }

  // Calls f with the part, so many channels at a time.
  template <class F>
  void for_tiles(int64_t channels, F f) const {
    for (int64_t c = 0; c < size.channels; c += channels) {
      Part tile = *this;
      tile.from.channels += c;
      tile.size.channels = std::min(channels, size.channels - c);
      f(tile);
    }
  }
};

// How an array is divided: along the channels as far as each part has long runs of them,
// since nothing need be added up between those; then along the outer axis, then along the
// inner one. The parts that have the same channels are layers.
class Grid {
 public:
  // `arrays` of this shape are read. There are several parts for each thread, since
  // threads are late now and then.
  Grid(Shape whole, int arrays, int64_t threads) : whole_(whole) {
    constexpr int64_t worth_while = 1 << 18, run = 1 << 12, for_each_thread = 4;
    const int64_t most = for_each_thread * threads;
    int64_t parts = std::clamp<int64_t>(arrays * whole.size() / worth_while, 1, most);
    const auto divide = [&parts](int64_t limit) {
      const int64_t count = std::clamp<int64_t>(parts, 1, std::max<int64_t>(limit, 1));
      parts = (parts + count - 1) / count;
      return count;
    };
    const int64_t row = whole.channels * whole.inner;
    count_.channels = divide(std::min(whole.channels, row / run));
    count_.outer = divide(whole.outer);
    count_.inner = divide(whole.inner / run);
  }

  int64_t parts() const { return count_.size(); }
  int64_t layers() const { return count_.rows(); }

  Part part(int64_t i) const {
    const int64_t layer = i / count_.channels;
    const auto [a, sa] = cut(whole_.outer, layer / count_.inner, count_.outer, 1);
    const auto [c, sc] = cut(whole_.channels, i % count_.channels, count_.channels, 64);
    const auto [b, sb] = cut(whole_.inner, layer % count_.inner, count_.inner, 64);
    return {whole_, {a, c, b}, {sa, sc, sb}, layer};
  }

 private:
  struct Cut {
    int64_t from, size;
  };

  // At multiples of `unit`, if the parts are many times as long.
  static Cut cut(int64_t length, int64_t i, int64_t count, int64_t unit) {
    if (length < 4 * unit * count) unit = 1;
    const auto at = [=](int64_t i) {
      return i == count ? length : length / unit * i / count * unit;
    };
    return {at(i), at(i + 1) - at(i)};
  }

  Shape whole_, count_;
};

}  // namespace jaxbn
