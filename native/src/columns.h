// Few values for each channel: several channels at a time, each in a lane, whole.
//
// All values of a channel are at hand at once. The mean comes first, then what is about
// it, so that nothing is left to pool, and float32 suffices.

#pragma once

#include <cstdint>

#include "lanes.h"
#include "parts.h"

namespace jaxbn {

// Whether these kernels are the ones for an array.
inline bool are_few(Shape shape, const Grid& grid) {
  constexpr int64_t rows_at_once = 8, in_slabs = 64;
  if (grid.layers() > 1 || shape.inner >= kLongSlab) return false;
  return shape.rows() <= (shape.inner == 1 ? rows_at_once : in_slabs);
}

// Arrays and weights are the part's own, weights may be null. The squares are
// Σw|x - mean|²; what rounding took off the mean is in `rest`.
#define JAXBN_OF_VALUES(X)                                                            \
  void columns_of_values(const X* x, const float* weights, const Part& part,          \
                         float* mean, float* rest, float* squares);                   \
  void means_of_columns(const X* x, const float* weights, const Part& part,           \
                        float* mean);

// With weights, x counts as the mean where it is not finite and its weight is 0.
#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  void columns_of_cotangents(const DY* dy, const X* x, const float* weights,          \
                             const float* mean, const Part& part, float* first,       \
                             float* second);

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)
#undef JAXBN_OF_VALUES
#undef JAXBN_OF_COTANGENTS

}  // namespace jaxbn
