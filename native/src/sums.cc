#include "sums.h"

namespace jaxbn {
namespace {

constexpr int kGroup = 8;         // Rows that are read together.
constexpr int64_t kRun = 1 << 9;  // Elements of a slab that are summed in float32.

bool is_finite(float x) { return (as<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// What is added to the two sums at a place: of values, wδ and wδ².
template <bool kWeighted, class X>
struct Values {
  static constexpr bool split = kSplit<X>;

  const X* x;
  float weight;

  JAXBN_INLINE void step(int64_t at, const Floats* center, Floats* a, Floats* b) const {
    Floats v[2];
    load_step<split>(x + at, v);
    for (int i = 0; i < 2; ++i) {
      Floats delta = v[i] - center[i];
      Floats term = kWeighted ? delta * weight : delta;
      a[i] += term;
      b[i] += term * delta;
    }
  }

  template <class Sum>
  JAXBN_INLINE void one(int64_t at, float center, Sum* a, Sum* b) const {
    float delta = widen(x[at]) - center;
    float term = kWeighted ? delta * weight : delta;
    *a += term;
    *b += term * delta;
  }
};

// Of cotangents, dy and dy·δ.
template <class DY, class X>
struct Cotangents {
  static constexpr bool split = kSplit<DY, X>;

  const DY* dy;
  const X* x;

  JAXBN_INLINE void step(int64_t at, const Floats* center, Floats* a, Floats* b) const {
    Floats v[2], c[2];
    load_step<split>(x + at, v);
    load_step<split>(dy + at, c);
    for (int i = 0; i < 2; ++i) {
      a[i] += c[i];
      b[i] += c[i] * (v[i] - center[i]);
    }
  }

  template <class Sum>
  JAXBN_INLINE void one(int64_t at, float center, Sum* a, Sum* b) const {
    float c = widen(dy[at]);
    *a += c;
    *b += c * (widen(x[at]) - center);
  }

  // At a weight of 0.
  template <class Sum>
  JAXBN_INLINE void hidden(int64_t at, float center, Sum* a, Sum* b) const {
    if (is_finite(widen(x[at]))) return one(at, center, a, b);
    *a += widen(dy[at]);
  }
};

// The sums of a group start at 0, so that few small numbers are added to large ones.
template <int kRows, class Row>
JAXBN_INLINE void add_group(const Row* rows, int64_t width, const float* center,
                            float* first, float* second) {
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    Floats m[2], a[2] = {}, b[2] = {};
    for (int i = 0; i < 2; ++i) m[i] = load<Floats>(center + c + i * kWidth);
    for (int r = 0; r < kRows; ++r) rows[r].step(c, m, a, b);
    for (int i = 0; i < 2; ++i) {
      float *one = first + c + i * kWidth, *two = second + c + i * kWidth;
      store(one, load<Floats>(one) + a[i]);
      store(two, load<Floats>(two) + b[i]);
    }
  }
  for (; c < width; ++c) {
    float a = 0, b = 0;
    for (int r = 0; r < kRows; ++r) rows[r].one(c, center[c], &a, &b);
    first[c] += a;
    second[c] += b;
  }
}

// Rows until there are enough for a group.
template <class Row>
class Group {
 public:
  JAXBN_INLINE Group(int64_t width, const float* center, float* first, float* second)
      : width_(width), center_(center), first_(first), second_(second) {}

  JAXBN_INLINE void add(Row row) {
    rows_[held_++] = row;
    if (held_ < kGroup) return;
    add_group<kGroup>(rows_, width_, center_, first_, second_);
    held_ = 0;
  }

  JAXBN_INLINE void finish() {
    for (int r = 0; r < held_; ++r) {
      add_group<1>(rows_ + r, width_, center_, first_, second_);
    }
  }

 private:
  Row rows_[kGroup];
  int held_ = 0;
  int64_t width_;
  const float* center_;
  float *first_, *second_;
};

template <bool kWeighted, class X>
JAXBN_INLINE void rows_of_values(const X* x, const float* weights, int64_t rows,
                                 int64_t width, const float* center, float* first,
                                 float* second) {
  Group<Values<kWeighted, X>> group(width, center, first, second);
  for (int64_t r = 0; r < rows; ++r) {
    float weight = kWeighted ? weights[r] : 1;
    if (weight != 0) group.add({x + r * width, weight});  // Else x may be anything.
  }
  group.finish();
}

template <class DY, class X>
JAXBN_INLINE void rows_of_cotangents(const DY* dy, const X* x, const float* weights,
                                     int64_t rows, int64_t width, const float* center,
                                     float* first, float* second) {
  using Row = Cotangents<DY, X>;
  Group<Row> group(width, center, first, second);
  for (int64_t r = 0; r < rows; ++r) {
    Row row{dy + r * width, x + r * width};
    if (!weights || weights[r] != 0) {
      group.add(row);
      continue;
    }
    for (int64_t lane = 0; lane < width; ++lane) {
      row.hidden(element_of<Row::split>(lane, width), center[lane], first + lane,
                 second + lane);
    }
  }
  group.finish();
}

JAXBN_INLINE double folded(Floats v) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// A slab that all counts: four vectors for each sum, so that none waits for another.
template <class Row>
JAXBN_INLINE Sums whole_slab(Row row, int64_t size, float center) {
  Sums sums;
  const Floats m[2] = {Floats{} + center, Floats{} + center};
  int64_t at = 0;
  while (at + kStep <= size) {
    const int64_t end = size - at < kRun ? size : at + kRun;
    Floats a[4] = {}, b[4] = {};
    for (; at + 2 * kStep <= end; at += 2 * kStep) {
      row.step(at, m, a, b);
      row.step(at + kStep, m, a + 2, b + 2);
    }
    if (at + kStep <= end) {
      row.step(at, m, a, b);
      at += kStep;
    }
    sums.first += folded((a[0] + a[1]) + (a[2] + a[3]));
    sums.second += folded((b[0] + b[1]) + (b[2] + b[3]));
  }
  for (; at < size; ++at) row.one(at, center, &sums.first, &sums.second);
  return sums;
}

template <class X>
JAXBN_INLINE Sums slab_of_values(const X* x, const float* weights, int64_t size,
                                 float center) {
  if (!weights) return whole_slab(Values<false, X>{x, 1}, size, center);
  Sums sums;
  for (int64_t at = 0; at < size; ++at) {
    if (weights[at] == 0) continue;
    Values<true, X>{x, weights[at]}.one(at, center, &sums.first, &sums.second);
  }
  return sums;
}

template <class DY, class X>
JAXBN_INLINE Sums slab_of_cotangents(const DY* dy, const X* x, const float* weights,
                                     int64_t size, float center) {
  Cotangents<DY, X> row{dy, x};
  if (!weights) return whole_slab(row, size, center);
  Sums sums;
  for (int64_t at = 0; at < size; ++at) {
    if (weights[at] == 0) {
      row.hidden(at, center, &sums.first, &sums.second);
    } else {
      row.one(at, center, &sums.first, &sums.second);
    }
  }
  return sums;
}

}  // namespace

// Templates cannot have clones.
#define JAXBN_OF_VALUES(X)                                                            \
  JAXBN_CLONES void add_rows(const X* x, const float* weights, int64_t rows,          \
                             int64_t width, const float* center, float* first,        \
                             float* second) {                                         \
    if (weights) {                                                                    \
      rows_of_values<true>(x, weights, rows, width, center, first, second);           \
    } else {                                                                          \
      rows_of_values<false>(x, weights, rows, width, center, first, second);          \
    }                                                                                 \
  }                                                                                   \
  JAXBN_CLONES Sums sum_slab(const X* x, const float* weights, int64_t size,          \
                             float center) {                                          \
    return slab_of_values(x, weights, size, center);                                  \
  }

#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  JAXBN_CLONES void add_rows(const DY* dy, const X* x, const float* weights,          \
                             int64_t rows, int64_t width, const float* center,        \
                             float* first, float* second) {                           \
    rows_of_cotangents(dy, x, weights, rows, width, center, first, second);           \
  }                                                                                   \
  JAXBN_CLONES Sums sum_slab(const DY* dy, const X* x, const float* weights,          \
                             int64_t size, float center) {                            \
    return slab_of_cotangents(dy, x, weights, size, center);                          \
  }

JAXBN_CLONES void add_units(const float* lanes, int64_t width, int64_t unit,
                            double* __restrict sums) {
  for (int64_t at = 0; at < width; at += unit) {
    for (int64_t i = 0; i < unit; ++i) sums[i] += lanes[at + i];
  }
}

JAXBN_CLONES bool is_far(Pooling pooling, const double* first, const double* second,
                         const double* squares) {
  const double each = 1 / pooling.k;
  int64_t far = 0;
  for (int64_t c = 0; c < pooling.channels; ++c) {
    const double between = first[c] * first[c] * each, within = second[c] - between;
    far += between > 4 * ((within > 0 ? within : 0) + squares[c]);
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

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)

}  // namespace jaxbn
