// dx = k·dy + w·(c1·(x - mean) + c0), of the four vectors mean, k, c1 and c0.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "elements.h"
#include "fold.h"
#include "parts.h"

namespace jaxbn {

// Whether dx goes past the caches. Of an array of some megabytes little would be left in
// them when it is read, and its lines would be read before they are written. For bfloat16
// the arithmetic takes as long as the memory, and nothing is gained.
template <class X>
bool is_streamed(const X* dx, int64_t size, int64_t row) {
  const bool aligned = reinterpret_cast<uintptr_t>(dx) % 16 == 0 && row % kStep == 0;
  return std::is_same_v<X, float> && aligned && size >= 1 << 20;
}

// The four vectors, by lanes.
template <bool split>
std::vector<float> spread(const Fold<split>& fold, const float* const* vectors) {
  std::vector<float> lanes(kVectors * fold.width());
  for (int v = 0; v < kVectors; ++v) fold.spread(vectors[v], &lanes[v * fold.width()]);
  return lanes;
}

template <class DY, class X, class Pool>
void input_cotangent_of_rows(const DY* dy, const X* x, const float* weights,
                             const float* const* vectors, Shape shape, X* dx,
                             Pool& pool) {
  const Fold<kSplit<DY, X>> fold(shape.channels, weights ? 0 : 1024);
  const int64_t width = fold.width(), rows = shape.outer / fold.rows();
  const std::vector<float> lanes = spread(fold, vectors);
  const bool stream = is_streamed(dx, rows * width, width);
  const int64_t parts = std::min(parts_of(shape, 3, pool), std::max<int64_t>(rows, 1));
  parallel_for(pool, parts, [=, &lanes](int64_t i) {
    const int64_t begin = rows * i / parts, end = rows * (i + 1) / parts;
    const int64_t at = begin * width;
    const float* w = weights ? weights + begin : nullptr;
    apply_rows(dy + at, x + at, w, end - begin, width, lanes.data(), stream, dx + at);
    if (stream) finish_stream();
  });
  const int64_t rest = shape.outer % fold.rows(), at = rows * width;
  if (rest == 0) return;  // Else there are no weights.
  const Fold<kSplit<DY, X>> plain(shape.channels, 0);
  apply_rows(dy + at, x + at, nullptr, rest, plain.width(), spread(plain, vectors).data(),
             false, dx + at);
}

template <class DY, class X, class Pool>
void input_cotangent_of_slabs(const DY* dy, const X* x, const float* weights,
                              const float* const* vectors, Shape shape, X* dx,
                              Pool& pool) {
  const int64_t size = shape.outer * shape.channels * shape.inner;
  const bool stream = is_streamed(dx, size, shape.inner);
  const int64_t parts = parts_of(shape, 3, pool);
  parallel_for(pool, parts, [=](int64_t i) {
    const int64_t begin = shape.outer * i / parts, end = shape.outer * (i + 1) / parts;
    for (int64_t a = begin; a < end; ++a) {
      const float* w = weights ? weights + a * shape.inner : nullptr;
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t at = (a * shape.channels + c) * shape.inner;
        const float numbers[] = {vectors[0][c], vectors[1][c], vectors[2][c],
                                 vectors[3][c]};
        apply_slab(dy + at, x + at, w, shape.inner, numbers, stream, dx + at);
      }
    }
    if (stream) finish_stream();
  });
}

template <class DY, class X, class Pool>
void input_cotangent(const DY* dy, const X* x, const float* weights,
                     const float* const* vectors, Shape shape, X* dx, Pool& pool) {
  if (shape.outer * shape.channels * shape.inner == 0) return;
  if (shape.inner == 1) {
    input_cotangent_of_rows(dy, x, weights, vectors, shape, dx, pool);
  } else {
    input_cotangent_of_slabs(dy, x, weights, vectors, shape, dx, pool);
  }
}

}  // namespace jaxbn
