// Sums in float64, by channel: pooled, and made of lanes.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace jaxbn {

// A number for each channel, so many times. Up to `kHalf` more are written behind them.
void repeat(const float* values, int64_t channels, int64_t times, float* repeated);

// Numbers in the order of `element_of` if lanes are split, and back.
void into_lanes(const float* values, int64_t width, bool split, float* lanes);
void out_of_lanes(const float* lanes, int64_t width, bool split, double* values);

// Adds up the lanes of as many units as there are in a row.
void add_units(const float* lanes, int64_t width, int64_t unit, double* sums);

// A block of weight k beside what came before it, of weight n.
struct Pooling {
  double n, k;
  int64_t channels;
};

// Adds the moments of a block, whose sums are about `center`, to those before it, and
// makes the new mean the next center.
void pool_block(Pooling pooling, const double* first, const double* second, double* mean,
                double* squares, float* center);

// The same with a block whose mean is known.
void pool_parts(Pooling pooling, const double* mean_of_block,
                const double* squares_of_block, double* mean, double* squares);

// Whether sums about a center are so far from it that digits of the squares are lost,
// beside the squares before them. `each` is 1/k.
JAXBN_INLINE bool is_far(double each, double first, double second, double squares) {
  const double between = first * first * each, within = second - between;
  return between > 4 * ((within > 0 ? within : 0) + squares);
}

// In any channel.
bool is_far(Pooling pooling, const double* first, const double* second,
            const double* squares);

// In float32, with what rounding took off the mean.
void round_moments(int64_t channels, const double* mean, const double* squares,
                   float* mean_out, float* rest, float* squares_out);

}  // namespace jaxbn
