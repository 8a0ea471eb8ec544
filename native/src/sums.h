// Sums over a block of an array, in float32: (Σwδ, Σwδ²) and (Σdy, Σdy·δ), δ = x - center.
//
// "Rows" have the channels next to each other (channels last): each channel is a lane,
// and eight rows are read at a time, so that sums are loaded and stored once for eight.
// "Slabs" are of one channel (channels first): all lanes are of it.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace jaxbn {

struct Sums {
  double first = 0, second = 0;
};

// Weights are one a row, or null. Lanes are in the order of `element_of`.
#define JAXBN_OF_VALUES(X)                                                            \
  void add_rows(const X* x, const float* weights, int64_t rows, int64_t width,        \
                const float* center, float* first, float* second);                    \
  Sums sum_slab(const X* x, const float* weights, int64_t size, float center);

// With weights, δ is 0 where x is not finite and its weight is 0; dy counts anyway.
#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  void add_rows(const DY* dy, const X* x, const float* weights, int64_t rows,         \
                int64_t width, const float* center, float* first, float* second);     \
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

// Whether sums about a center are so far from it, in any channel, that digits of the
// squares are lost, beside the squares before them.
bool is_far(Pooling pooling, const double* first, const double* second,
            const double* squares);

}  // namespace jaxbn
