#include "pooling.h"

#include "lanes.h"

namespace jaxbn {

JAXBN_CLONES void repeat(const float* values, int64_t channels, int64_t times,
                         float* repeated) {
  for (int64_t c = 0; c < channels; ++c, repeated += times) {
    const HalfFloats same = HalfFloats{} + values[c];
    for (int64_t at = 0; at < times; at += kHalf) store(repeated + at, same);
  }
}

JAXBN_CLONES void into_lanes(const float* __restrict values, int64_t width, bool split,
                             float* __restrict lanes) {
  int64_t at = 0;
  for (; split && at + kStep <= width; at += kStep) {
    for (int64_t i = 0; i < kWidth; ++i) {
      lanes[at + i] = values[at + 2 * i];
      lanes[at + kWidth + i] = values[at + 2 * i + 1];
    }
  }
  for (; at < width; ++at) lanes[at] = values[at];
}

JAXBN_CLONES void out_of_lanes(const float* __restrict lanes, int64_t width, bool split,
                               double* __restrict values) {
  int64_t at = 0;
  for (; split && at + kStep <= width; at += kStep) {
    for (int64_t i = 0; i < kWidth; ++i) {
      values[at + 2 * i] = lanes[at + i];
      values[at + 2 * i + 1] = lanes[at + kWidth + i];
    }
  }
  for (; at < width; ++at) values[at] = lanes[at];
}

JAXBN_CLONES void add_units(const float* lanes, int64_t width, int64_t unit,
                            double* __restrict sums) {
  for (int64_t at = 0; at < width; at += unit) {
    for (int64_t i = 0; i < unit; ++i) sums[i] += lanes[at + i];
  }
}

JAXBN_CLONES bool is_far(Pooling pooling, const double* first, const double* second,
                         const double* squares) {
  int64_t far = 0;
  for (int64_t c = 0; c < pooling.channels; ++c) {
    far += is_far(1 / pooling.k, first[c], second[c], squares[c]);
  }
  return far > 0;
}

JAXBN_CLONES void pool_block(Pooling pooling, const double* __restrict first,
                             const double* __restrict second, double* __restrict mean,
                             double* __restrict squares, float* __restrict center) {
  const auto [n, k, channels] = pooling;
  const double share = k / (n + k), between = n * share, each = 1 / k;
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = first[c] * each;
    const double within = second[c] - first[c] * offset;
    const double delta = center[c] + offset - mean[c];
    squares[c] += (within > 0 ? within : 0) + delta * delta * between;
    mean[c] += delta * share;
    center[c] = static_cast<float>(mean[c]);
  }
}

JAXBN_CLONES void pool_parts(Pooling pooling, const double* __restrict mean_of_block,
                             const double* __restrict squares_of_block,
                             double* __restrict mean, double* __restrict squares) {
  const auto [n, k, channels] = pooling;
  const double share = k / (n + k), between = n * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = mean_of_block[c] - mean[c];
    squares[c] += squares_of_block[c] + delta * delta * between;
    mean[c] += delta * share;
  }
}

JAXBN_CLONES void round_moments(int64_t channels, const double* __restrict mean,
                                const double* __restrict squares,
                                float* __restrict mean_out, float* __restrict rest,
                                float* __restrict squares_out) {
  for (int64_t c = 0; c < channels; ++c) {
    mean_out[c] = static_cast<float>(mean[c]);
    rest[c] = static_cast<float>(mean[c] - mean_out[c]);
    squares_out[c] = static_cast<float>(squares[c]);
  }
}

}  // namespace jaxbn
