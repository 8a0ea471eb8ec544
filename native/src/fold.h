// Narrow rows, several at a time, as one wide row of lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "lanes.h"
#include "parts.h"
#include "pooling.h"

namespace jaxbn {

// Which channel each lane of a row is of, where each channel has `inner` elements next to
// each other. Narrow rows are taken several at a time, as one row of at most `most` lanes;
// after `unit()` lanes the channels come again.
template <bool split>
class Fold {
 public:
  Fold(int64_t channels, int64_t inner, int64_t most)
      : channels_(channels), inner_(inner), unit_(channels * inner), width_(unit_) {
    const int64_t whole = kStep / std::gcd(unit_, kStep);
    if (unit_ * whole <= most) {
      rows_ = most / (unit_ * whole) * whole;
      width_ = rows_ * unit_;
      unit_ *= whole;
    }
    if (rows_ == 1 && inner == 1) return;
    if (rows_ == 1) repeated_.resize(width_ + kHalf);
    channel_.resize(unit_);
    for (int64_t i = 0, channel = 0; i < unit_; ++channel) {
      if (channel == channels) channel = 0;
      for (int64_t b = 0; b < inner; ++b, ++i) channel_[lane_of<split>(i, unit_)] = channel;
    }
  }

  // How many of the array's rows are one.
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t channels() const { return channels_; }
  // Whether lanes are channels, in order.
  bool is_direct() const { return !split && channel_.empty(); }

  // A number for each channel, as one for each lane.
  void spread(const float* values, float* lanes) {
    if (!repeated_.empty()) {
      repeat(values, channels_, inner_, repeated_.data());
      values = repeated_.data();
    }
    if (rows_ == 1) return into_lanes(values, width_, split, lanes);
    for (int64_t lane = 0; lane < unit_; ++lane) lanes[lane] = values[channel_[lane]];
    for (int64_t at = unit_; at < width_; at += unit_) {
      std::copy(lanes, lanes + unit_, lanes + at);
    }
  }

  // The sums of the lanes of each channel.
  void gather(const float* lanes, double* sums) {
    if (channel_.empty()) return out_of_lanes(lanes, width_, split, sums);
    units_.assign(unit_, 0.0);
    add_units(lanes, width_, unit_, units_.data());
    std::fill(sums, sums + channels_, 0.0);
    for (int64_t lane = 0; lane < unit_; ++lane) sums[channel_[lane]] += units_[lane];
  }

 private:
  int64_t channels_, inner_, unit_, width_, rows_ = 1;
  std::vector<int32_t> channel_;  // Empty if each channel has one lane.
  std::vector<float> repeated_;
  std::vector<double> units_;
};

// Calls f(fold, tile) with all channels of a part, of at most so many lanes at a time.
// Narrow rows are folded if there are enough of them for `groups`.
template <bool split, class F>
void for_folds(const Part& part, bool weighted, int64_t lanes, int64_t groups, F f) {
  const int64_t inner = part.whole.inner;
  const int64_t channels = std::max<int64_t>(lanes / inner / kStep, 1) * kStep;
  const bool whole = part.whole.channels <= std::min(part.size.channels, channels);
  const int64_t most = whole && !weighted ? std::min(lanes, part.size.size() / groups) : 0;
  std::optional<Fold<split>> fold;
  part.for_tiles(channels, [&](const Part& tile) {
    if (!fold || fold->channels() != tile.size.channels) {
      fold.emplace(tile.size.channels, inner, most);
    }
    f(*fold, tile);
  });
}

}  // namespace jaxbn
