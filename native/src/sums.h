// Sums over rows of channels that are next to each other, in float32: Σwδ and Σwδ², or Σdy
// and Σdy·δ, with δ = x - center. Each channel is a lane, and eight rows are read at a time,
// so that sums are loaded and stored once for eight.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace jaxbn {

constexpr int kGroup = 8;  // Rows that are read together.

// Rows begin `stride` after each other. Weights are one a row, or null. Lanes are in the
// order of `element_of`.
#define JAXBN_OF_VALUES(X)                                                            \
  void add_rows(const X* x, const float* weights, int64_t rows, int64_t stride,       \
                int64_t width, const float* center, float* first, float* second);

// With weights, δ is 0 where x is not finite and its weight is 0; dy counts anyway.
#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  void add_rows(const DY* dy, const X* x, const float* weights, int64_t rows,         \
                int64_t stride, int64_t width, const float* center, float* first,     \
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
