// Narrow rows, several at a time, as one wide row of lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes.h"

namespace jaxbn {

// Which channel each lane of a row is of. Narrow rows are taken several at a time, as one
// row of two pages of memory: eight of those that are read together are then eight
// streams to the processor, which fetches ahead in each. Nearer to each other they are
// none (three times slower at 64 channels).
template <bool split>
class Fold {
 public:
  explicit Fold(int64_t channels, bool folded = true) {
    const int64_t whole = kStep / std::gcd(channels, kStep);
    const int64_t most = split ? 4096 : 2048;
    if (folded && channels * whole <= most) rows_ = most / (channels * whole) * whole;
    channel_.resize(channels * rows_);
    for (int64_t i = 0, channel = 0; i < width(); ++i) {
      channel_[lane_of<split>(i, width())] = channel;
      if (++channel == channels) channel = 0;
    }
  }

  // How many of the array's rows are one.
  int64_t rows() const { return rows_; }
  int64_t width() const { return channel_.size(); }

  int64_t channel(int64_t lane) const { return channel_[lane]; }

  // A number for each channel, as one for each lane.
  std::vector<float> spread(const float* values) const {
    std::vector<float> lanes(width());
    for (int64_t lane = 0; lane < width(); ++lane) lanes[lane] = values[channel_[lane]];
    return lanes;
  }

 private:
  int64_t rows_ = 1;
  std::vector<int64_t> channel_;
};

}  // namespace jaxbn
