// dx = k·dy + w·(c1·(x - mean) + c0), of the four vectors mean, k, c1 and c0.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "columns.h"
#include "elements.h"
#include "fold.h"
#include "parts.h"

namespace jaxbn {

// Lanes of a row of dx: their four vectors stay in the caches, for one row after another.
constexpr int64_t kVectorLanes = 2048;

// Whether dx goes past the caches. Of an array of some megabytes little would be left in
// them when it is read, and its lines would be read before they are written. For bfloat16
// the arithmetic takes as long as the memory, and nothing is gained.
template <class X>
bool is_streamed(const X* dx, const Part& tile, int64_t row) {
  const bool aligned = reinterpret_cast<uintptr_t>(dx) % 16 == 0 &&
                       tile.begin() % kStep == 0 && row % kStep == 0;
  return std::is_same_v<X, float> && aligned && tile.whole.size() >= 1 << 20;
}

// The four vectors, by lanes: where they are, or copies.
template <bool split>
class Spread {
 public:
  Spread(Fold<split>& fold, const float* const* vectors, int64_t channel) {
    for (int v = 0; v < kVectors; ++v) at_[v] = vectors[v] + channel;
    if (fold.is_direct()) return;
    lanes_.resize(kVectors * fold.width());
    for (int v = 0; v < kVectors; ++v) {
      float* lanes = &lanes_[v * fold.width()];
      fold.spread(at_[v], lanes);
      at_[v] = lanes;
    }
  }

  const float* const* at() const { return at_; }

 private:
  const float* at_[kVectors];
  std::vector<float> lanes_;
};

// Rows of some channels, as many at a time as are folded.
template <class DY, class X>
void input_cotangent_of_rows(const DY* dy, const X* x, const float* weights,
                             const float* const* vectors, const Part& tile,
                             Fold<kSplit<DY, X>>& fold, X* dx) {
  const Spread<kSplit<DY, X>> spread(fold, vectors, tile.from.channels);
  const int64_t rows = tile.size.outer / fold.rows(), stride = fold.rows() * tile.row();
  const int64_t at = tile.begin();
  const bool stream = is_streamed(dx, tile, stride);
  apply_rows(dy + at, x + at, weights, rows, stride, fold.width(), spread.at(), stream,
             dx + at);
  Part rest = tile;
  rest.from.outer += rows * fold.rows();
  rest.size.outer -= rows * fold.rows();
  if (rest.size.outer == 0) return;  // Else there are no weights.
  Fold<kSplit<DY, X>> plain(tile.size.channels, tile.size.inner, 0);
  input_cotangent_of_rows(dy, x, nullptr, vectors, rest, plain, dx);
}

template <class DY, class X>
void input_cotangent_of_slabs(const DY* dy, const X* x, const float* weights,
                              const float* const* vectors, const Part& part, X* dx) {
  const bool stream = is_streamed(dx, part, part.whole.inner);
  for (int64_t a = 0; a < part.size.outer; ++a) {
    const float* w = weights ? weights + a * part.whole.inner : nullptr;
    for (int64_t c = 0; c < part.size.channels; ++c) {
      const int64_t channel = part.from.channels + c;
      const int64_t at = part.begin() + a * part.row() + c * part.whole.inner;
      const float numbers[] = {vectors[0][channel], vectors[1][channel],
                               vectors[2][channel], vectors[3][channel]};
      apply_slab(dy + at, x + at, w, part.size.inner, numbers, stream, dx + at);
    }
  }
}

template <class DY, class X, class Pool>
void input_cotangent(const DY* dy, const X* x, const float* weights,
                     const float* const* vectors, Shape shape, X* dx, Pool& pool) {
  if (shape.size() == 0) return;
  shape = simplified(shape);
  const Grid grid(shape, 3, pool.num_threads());
  parallel_for(pool, grid.parts(), [=](int64_t i) {
    constexpr bool split = kSplit<DY, X>;
    const Part part = grid.part(i);
    const float* w = part.own(weights);
    if (are_rows(shape, weights)) {
      for_folds<split>(part, weights, kVectorLanes, 1, [&](auto& fold, auto& tile) {
        input_cotangent_of_rows(dy, x, w, vectors, tile, fold, dx);
      });
    } else {
      input_cotangent_of_slabs(dy, x, w, vectors, part, dx);
    }
    finish_stream();
  });
}

}  // namespace jaxbn
