// The sums of a block of rows, in float32 by lanes and in float64 by channels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fold.h"
#include "sums.h"

namespace jaxbn {

// Lanes of a row of sums. Eight rows are read at a time, and where each is two pages of
// memory these are eight streams to the processor, which fetches ahead in each. Nearer to
// each other they are none (three times slower at 64 channels). What belongs to so many
// channels stays in the caches.
template <bool split>
constexpr int64_t kSumLanes = split ? 4096 : 2048;

// Sums of rows, a channel a lane, and of lanes of one channel.
template <bool split>
class RowSums {
 public:
  explicit RowSums(Fold<split>& fold)
      : first(fold.channels()), second(fold.channels()), fold_(fold),
        center_(fold.width()), first_(fold.width()), second_(fold.width()) {}

  // The sums of a block, in `first` and `second`; `add` calls add_rows.
  template <class Add>
  void sum(const float* center, Add add) {
    fold_.spread(center, center_.data());
    for (auto* lanes : {&first_, &second_}) std::fill(lanes->begin(), lanes->end(), 0.f);
    add(center_.data(), first_.data(), second_.data());
    fold_.gather(first_.data(), first.data());
    fold_.gather(second_.data(), second.data());
  }

  std::vector<double> first, second;

 private:
  Fold<split>& fold_;
  std::vector<float> center_, first_, second_;
};

// Channels whose slabs are summed together.
constexpr int64_t kSlabs = 128;

// Rows that are summed in float32: enough to make pooling cheap, few enough that rounding
// stays near that of the elements (at 512 rows it is ten times as much).
inline int64_t block_rows(int64_t width) {
  return std::clamp<int64_t>((1 << 18) / width, 64, 128);
}

}  // namespace jaxbn
