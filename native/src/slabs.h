// Sums over a slab, elements of one channel next to each other: Σwδ and Σwδ², or Σdy and
// Σdy·δ, with δ = x - center.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace jaxbn {

struct Sums {
  double first = 0, second = 0;
};

// Weights are one an element, or null. With weights, δ of cotangents is 0 where x is not
// finite and its weight is 0; dy counts anyway.
#define JAXBN_OF_VALUES(X) \
  Sums sum_slab(const X* x, const float* weights, int64_t size, float center);

#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  Sums sum_slab(const DY* dy, const X* x, const float* weights, int64_t size,         \
                float center);

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)
#undef JAXBN_OF_VALUES
#undef JAXBN_OF_COTANGENTS

}  // namespace jaxbn
