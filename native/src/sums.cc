#include "sums.h"

namespace jaxbn {
namespace {

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
      Floats term = kWeighted ? delta * filled(weight) : delta;
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
    if (where_finite(widen(x[at]))) return one(at, center, a, b);
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
                                 int64_t stride, int64_t width, const float* center,
                                 float* first, float* second) {
  Group<Values<kWeighted, X>> group(width, center, first, second);
  for (int64_t r = 0; r < rows; ++r) {
    float weight = kWeighted ? weights[r] : 1;
    if (weight != 0) group.add({x + r * stride, weight});  // Else x may be anything.
  }
  group.finish();
}

template <class DY, class X>
JAXBN_INLINE void rows_of_cotangents(const DY* dy, const X* x, const float* weights,
                                     int64_t rows, int64_t stride, int64_t width,
                                     const float* center, float* first, float* second) {
  using Row = Cotangents<DY, X>;
  Group<Row> group(width, center, first, second);
  for (int64_t r = 0; r < rows; ++r) {
    Row row{dy + r * stride, x + r * stride};
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

}  // namespace

// Templates cannot have clones.
#define JAXBN_OF_VALUES(X)                                                            \
  JAXBN_CLONES void add_rows(const X* x, const float* weights, int64_t rows,          \
                             int64_t stride, int64_t width, const float* center,      \
                             float* first, float* second) {                           \
    if (weights) {                                                                    \
      rows_of_values<true>(x, weights, rows, stride, width, center, first, second);   \
    } else {                                                                          \
      rows_of_values<false>(x, weights, rows, stride, width, center, first, second);  \
    }                                                                                 \
  }

#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  JAXBN_CLONES void add_rows(const DY* dy, const X* x, const float* weights,          \
                             int64_t rows, int64_t stride, int64_t width,             \
                             const float* center, float* first, float* second) {      \
    rows_of_cotangents(dy, x, weights, rows, stride, width, center, first, second);   \
  }

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)

}  // namespace jaxbn
