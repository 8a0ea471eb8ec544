#include "columns.h"

namespace jaxbn {
namespace {

// The value of one channel, or of as many as there are lanes, which are `stride` apart.
template <class V, class X>
JAXBN_INLINE V lanes_at(const X* p, int64_t stride) {
  if constexpr (sizeof(V) == sizeof(HalfFloats)) {
    if (stride == 1) return load_as<V>(p);
    return HalfFloats{widen(p[0]),          widen(p[stride]),     widen(p[2 * stride]),
                      widen(p[3 * stride]), widen(p[4 * stride]), widen(p[5 * stride]),
                      widen(p[6 * stride]), widen(p[7 * stride])};
  } else {
    return load_as<V>(p);
  }
}

// Where the rows of a part are.
struct Rows {
  int64_t outer, inner, row, slab;
  const float* weights;

  Rows(const Part& part, const float* weights)
      : outer(part.size.outer), inner(part.size.inner), row(part.row()),
        slab(part.whole.inner), weights(weights) {}

  // Calls f(place, weight) with the place of each row.
  template <class F>
  JAXBN_INLINE void each(F f) const {
    for (int64_t a = 0; a < outer; ++a) {
      for (int64_t b = 0; b < inner; ++b) {
        f(a * row + b, weights ? weights[a * slab + b] : 1.f);
      }
    }
  }

  // 1/Σw, or 0.
  JAXBN_INLINE double over_weight() const {
    double n = 0;
    each([&](int64_t, float weight) JAXBN_INLINED { n += weight; });
    return n ? 1 / n : 0;
  }
};

// Σwx/n. Nothing is larger on the way than it is.
template <class V, class X>
JAXBN_INLINE V mean_at(const X* x, const Rows& rows, float each) {
  V mean{};
  rows.each([&](int64_t at, float weight) JAXBN_INLINED {
    if (weight != 0) mean += lanes_at<V>(x + at, rows.slab) * (weight * each);
  });
  return mean;
}

// 0 instead of what is below; NaN stays.
template <class V>
JAXBN_INLINE V not_negative(V v) {
  return only(~(-(as_bits(v) >> 31) & where_finite(v)), v);
}

// Calls f(V, channel) for all channels: by vectors, the last of which may overlap with
// the one before it, or one by one.
template <class F>
JAXBN_INLINE void for_channels(int64_t channels, F f) {
  if (channels < kHalf) {
    for (int64_t c = 0; c < channels; ++c) f(float{}, c);
    return;
  }
  for (int64_t c = 0; c + kHalf <= channels; c += kHalf) f(HalfFloats{}, c);
  if (channels % kHalf) f(HalfFloats{}, channels - kHalf);
}

template <class X>
JAXBN_INLINE void values(const X* x, const Rows& rows, int64_t channels, float* mean,
                         float* rest, float* squares) {
  const double over_weight = rows.over_weight();
  const float each = static_cast<float>(over_weight);
  const float n = static_cast<float>(over_weight ? 1 / over_weight : 0);
  for_channels(channels, [&](auto kind, int64_t c) JAXBN_INLINED {
    using V = decltype(kind);
    const X* own = x + c * rows.slab;
    const V center = mean_at<V>(own, rows, each);
    V offset{}, square{};
    rows.each([&](int64_t at, float weight) JAXBN_INLINED {
      if (weight == 0) return;
      const V delta = lanes_at<V>(own + at, rows.slab) - center;
      offset += delta * (weight * each);
      square += delta * weight * delta;
    });
    square -= n * offset * offset;
    const V sum = center + offset, taken = sum - center;
    store(mean + c, sum);
    store(rest + c, (center - (sum - taken)) + (offset - taken));
    store(squares + c, not_negative(square));
  });
}

template <class X>
JAXBN_INLINE void means(const X* x, const Rows& rows, int64_t channels, float* mean) {
  const float each = static_cast<float>(rows.over_weight());
  for_channels(channels, [&](auto kind, int64_t c) JAXBN_INLINED {
    using V = decltype(kind);
    store(mean + c, mean_at<V>(x + c * rows.slab, rows, each));
  });
}

template <class DY, class X>
JAXBN_INLINE void cotangents(const DY* dy, const X* x, const Rows& rows,
                             int64_t channels, const float* mean, float* first,
                             float* second) {
  for_channels(channels, [&](auto kind, int64_t c) JAXBN_INLINED {
    using V = decltype(kind);
    const V center = load<V>(mean + c);
    V a{}, b{};
    rows.each([&](int64_t at, float weight) JAXBN_INLINED {
      const V d = lanes_at<V>(dy + c * rows.slab + at, rows.slab);
      const V v = lanes_at<V>(x + c * rows.slab + at, rows.slab);
      V delta = v - center;
      if (weight == 0) delta = only(where_finite(v), delta);
      a += d;
      b += d * delta;
    });
    store(first + c, a);
    store(second + c, b);
  });
}

}  // namespace

// Templates cannot have clones. Next to each other, channels are read as vectors.
#define JAXBN_OF_VALUES(X)                                                            \
  JAXBN_CLONES void columns_of_values(const X* x, const float* weights,               \
                                      const Part& part, float* mean, float* rest,     \
                                      float* squares) {                               \
    values(x, Rows(part, weights), part.size.channels, mean, rest, squares);          \
  }                                                                                   \
  JAXBN_CLONES void means_of_columns(const X* x, const float* weights,                \
                                     const Part& part, float* mean) {                 \
    means(x, Rows(part, weights), part.size.channels, mean);                          \
  }

#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  JAXBN_CLONES void columns_of_cotangents(const DY* dy, const X* x,                   \
                                          const float* weights, const float* mean,    \
                                          const Part& part, float* first,             \
                                          float* second) {                            \
    cotangents(dy, x, Rows(part, weights), part.size.channels, mean, first, second);  \
  }

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)

}  // namespace jaxbn
