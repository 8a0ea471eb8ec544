#include "slabs.h"

namespace jaxbn {
namespace {

constexpr int64_t kRun = 1 << 9;  // Elements that are summed in float32.
constexpr int kVectorsAtOnce = 4;  // So that no sum waits for the one before it.
constexpr int64_t kAtOnce = kVectorsAtOnce * kHalf;

// The terms of the two sums at a place, of one element or of several: of values.
template <bool kWeighted, class X>
struct Values {
  const X* x;
  const float* weights;

  template <class V>
  JAXBN_INLINE void terms(int64_t at, V center, V* a, V* b) const {
    V delta = load_as<V>(x + at) - center;
    *a = delta;
    if constexpr (kWeighted) {
      const V weight = load_as<V>(weights + at);
      delta = only(where_not_zero(weight), delta);
      *a = delta * weight;
    }
    *b = *a * delta;
  }
};

// And of cotangents.
template <bool kWeighted, class DY, class X>
struct Cotangents {
  const DY* dy;
  const X* x;
  const float* weights;

  template <class V>
  JAXBN_INLINE void terms(int64_t at, V center, V* a, V* b) const {
    const V v = load_as<V>(x + at);
    V delta = v - center;
    if constexpr (kWeighted) {
      delta = only(where_not_zero(load_as<V>(weights + at)) | where_finite(v), delta);
    }
    *a = load_as<V>(dy + at);
    *b = *a * delta;
  }
};

template <class Slab>
JAXBN_INLINE void add(const Slab& slab, int64_t at, HalfFloats center, HalfFloats* a,
                      HalfFloats* b) {
  HalfFloats one, two;
  slab.terms(at, center, &one, &two);
  *a += one;
  *b += two;
}

// The bits of no lanes and then of all. Among them begins the mask of the last few.
constexpr struct Masks {
  uint32_t words[2 * kHalf] = {};
  constexpr Masks() {
    for (int64_t i = kHalf; i < 2 * kHalf; ++i) words[i] = ~uint32_t{0};
  }
} kMasks;

// The same of the last `count` lanes. Those before them are known.
template <class Slab>
JAXBN_INLINE void add_last(const Slab& slab, int64_t at, int64_t count, HalfFloats center,
                           HalfFloats* a, HalfFloats* b) {
  const HalfWords where = load<HalfWords>(kMasks.words + count);
  HalfFloats one, two;
  slab.terms(at, center, &one, &two);
  *a += only(where, one);
  *b += only(where, two);
}

JAXBN_INLINE double folded(const HalfFloats* v) {
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  typedef double Doubles __attribute__((vector_size(32)));
  const HalfFloats all = (v[0] + v[1]) + (v[2] + v[3]);
  Four four[2];
  std::memcpy(four, &all, sizeof(all));
  const Doubles sum = __builtin_convertvector(four[0], Doubles) +
                      __builtin_convertvector(four[1], Doubles);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class Slab>
JAXBN_INLINE Sums sum(Slab slab, int64_t size, float center) {
  Sums sums;
  const HalfFloats m = HalfFloats{} + center;
  int64_t at = 0;
  while (at + kHalf <= size) {
    const int64_t end = size - at < kRun ? size : at + kRun;
    HalfFloats a[kVectorsAtOnce] = {}, b[kVectorsAtOnce] = {};
    for (; at + kAtOnce <= end; at += kAtOnce) {
      for (int v = 0; v < kVectorsAtOnce; ++v) add(slab, at + v * kHalf, m, a + v, b + v);
    }
    for (; at + kHalf <= end; at += kHalf) add(slab, at, m, a, b);
    if (at < end) {
      add_last(slab, end - kHalf, end - at, m, a + 1, b + 1);
      at = end;
    }
    sums.first += folded(a);
    sums.second += folded(b);
  }
  for (; at < size; ++at) {
    float one, two;
    slab.terms(at, center, &one, &two);
    sums.first += one;
    sums.second += two;
  }
  return sums;
}

}  // namespace

// Templates cannot have clones.
#define JAXBN_OF_VALUES(X)                                                            \
  JAXBN_CLONES Sums sum_slab(const X* x, const float* weights, int64_t size,          \
                             float center) {                                          \
    if (weights) return sum(Values<true, X>{x, weights}, size, center);               \
    return sum(Values<false, X>{x, nullptr}, size, center);                           \
  }

#define JAXBN_OF_COTANGENTS(DY, X)                                                    \
  JAXBN_CLONES Sums sum_slab(const DY* dy, const X* x, const float* weights,          \
                             int64_t size, float center) {                            \
    if (weights) return sum(Cotangents<true, DY, X>{dy, x, weights}, size, center);   \
    return sum(Cotangents<false, DY, X>{dy, x, nullptr}, size, center);               \
  }

JAXBN_OF_VALUES(float)
JAXBN_OF_VALUES(BFloat16)
JAXBN_OF_COTANGENTS(float, float)
JAXBN_OF_COTANGENTS(float, BFloat16)
JAXBN_OF_COTANGENTS(BFloat16, float)
JAXBN_OF_COTANGENTS(BFloat16, BFloat16)

}  // namespace jaxbn
