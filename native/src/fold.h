// Narrow rows, several at a time, as one wide row of lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes.h"

namespace jaxbn {

// Which channel each lane of a row is of. Narrow rows are taken several at a time, as one
// row of at most `most` lanes; after `unit()` lanes the channels come again.
template <bool split>
class Fold {
 public:
  Fold(int64_t channels, int64_t most) {
    const int64_t whole = kStep / std::gcd(channels, kStep);
    const bool folded = channels * whole <= most;
    rows_ = folded ? most / (channels * whole) * whole : 1;
    channel_.resize(folded ? channels * whole : channels);
    for (int64_t i = 0, channel = 0; i < unit(); ++i) {
      channel_[lane_of<split>(i, unit())] = channel;
      if (++channel == channels) channel = 0;
    }
    width_ = folded ? rows_ / whole * unit() : channels;
  }

  // How many of the array's rows are one.
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t unit() const { return channel_.size(); }

  // Of a lane of the first unit.
  int64_t channel(int64_t lane) const { return channel_[lane]; }

  // A number for each channel, as one for each lane.
  void spread(const float* values, float* lanes) const {
    for (int64_t lane = 0; lane < unit(); ++lane) lanes[lane] = values[channel_[lane]];
    for (int64_t at = unit(); at < width(); at += unit()) {
      std::copy(lanes, lanes + unit(), lanes + at);
    }
  }

 private:
  int64_t rows_, width_;
  std::vector<int64_t> channel_;
};

}  // namespace jaxbn
