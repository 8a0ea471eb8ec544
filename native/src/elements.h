// What is done to each element in the backward pass, rounded to x's type:
//
//   dx = k·dy + w·(c1·(x - mean) + c0)
//
// and k·dy alone where the weight is 0, whatever x is there. With `stream`, dx is written
// past the caches: it is then of float32 and begins, as rows do, at a multiple of sixteen
// bytes.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace jaxbn {

// mean, k, c1 and c0, in this order.
constexpr int kVectors = 4;

// Rows begin `stride` after each other. They have weights that are one a row, or null, and
// `width` lanes of each vector, in the order of `element_of`. A slab is of one channel, with
// a number for each vector, and with weights that are one an element.
#define JAXBN_OF_ELEMENTS(DY, X)                                                      \
  void apply_rows(const DY* dy, const X* x, const float* weights, int64_t rows,       \
                  int64_t stride, int64_t width, const float* const* vectors,         \
                  bool stream, X* dx);                                                \
  void apply_slab(const DY* dy, const X* x, const float* weights, int64_t size,       \
                  const float* numbers, bool stream, X* dx);

JAXBN_OF_ELEMENTS(float, float)
JAXBN_OF_ELEMENTS(float, BFloat16)
JAXBN_OF_ELEMENTS(BFloat16, float)
JAXBN_OF_ELEMENTS(BFloat16, BFloat16)
#undef JAXBN_OF_ELEMENTS

// What this thread has streamed is seen by others after this.
void finish_stream();

}  // namespace jaxbn
