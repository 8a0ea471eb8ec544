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

// Weights are one a row, or null. `vectors` has `width` lanes of each vector, in the order
// of `element_of`.
template <class DY, class X>
void apply_rows(const DY* dy, const X* x, const float* weights, int64_t rows,
                int64_t width, const float* vectors, bool stream, X* dx);

// A slab is of one channel, with a number for each vector. Weights are one an element.
template <class DY, class X>
void apply_slab(const DY* dy, const X* x, const float* weights, int64_t size,
                const float* numbers, bool stream, X* dx);

}  // namespace jaxbn
