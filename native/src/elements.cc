#include "elements.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace jaxbn {
namespace {

// Where the numbers of a channel are: each in its lane, or all the same.
struct Lanes {
  static constexpr bool are_equal = false;

  const float* const* vectors;

  JAXBN_INLINE Floats step(int vector, int64_t at) const {
    return load<Floats>(vectors[vector] + at);
  }
  JAXBN_INLINE float one(int vector, int64_t at) const {
    return vectors[vector][at];
  }
};

struct Same {
  static constexpr bool are_equal = true;

  Floats lanes[kVectors];

  JAXBN_INLINE explicit Same(const float* numbers) {
    for (int v = 0; v < kVectors; ++v) lanes[v] = filled(numbers[v]);
  }
  JAXBN_INLINE Floats step(int vector, int64_t) const { return lanes[vector]; }
  JAXBN_INLINE float one(int vector, int64_t) const { return lanes[vector][0]; }
};

// What weighs the part of dx that comes through the moments.
struct Unweighted {
  template <class V>
  JAXBN_INLINE V times(V through, int64_t) const {
    return through;
  }
};

struct OneWeight {
  float weight;

  JAXBN_INLINE float times(float through, int64_t) const {
    return weight != 0 ? through * weight : 0;
  }
  JAXBN_INLINE Floats times(Floats through, int64_t) const {
    return weight != 0 ? through * filled(weight) : Floats{};
  }
};

struct EachWeight {
  const float* weights;

  JAXBN_INLINE float times(float through, int64_t at) const {
    return OneWeight{weights[at]}.times(through, at);
  }
  JAXBN_INLINE Floats times(Floats through, int64_t at) const {
    const Floats w = load<Floats>(weights + at);
    return only(where_not_zero(w), through * w);
  }
};

// Past the caches, sixteen bytes at a time, which every x86-64 can.
JAXBN_INLINE void stream(float* p, Floats v) {
#ifdef __SSE2__
  __m128 parts[kWidth / 4];
  std::memcpy(parts, &v, sizeof(v));
  for (int i = 0; i < kWidth / 4; ++i) _mm_stream_ps(p + 4 * i, parts[i]);
#else
  store(p, v);
#endif
}

template <bool split, bool kStream>
JAXBN_INLINE void store_step(float* p, const Floats* v) {
  static_assert(!split);
  for (int i = 0; i < 2; ++i, p += kWidth) kStream ? stream(p, v[i]) : store(p, v[i]);
}

template <bool split, bool kStream>
JAXBN_INLINE void store_step(BFloat16* p, const Floats* v) {
  static_assert(!kStream);
  const Words even = rounded(as<Words>(v[0])), odd = rounded(as<Words>(v[1]));
  if constexpr (split) {
    const Words both = even >> 16 | (odd & 0xffff0000u);
    std::memcpy(p, &both, sizeof(both));
  } else {
    const Halves halves[] = {__builtin_convertvector(even >> 16, Halves),
                             __builtin_convertvector(odd >> 16, Halves)};
    std::memcpy(p, halves, sizeof(halves));
  }
}

template <bool split, bool kStream, class DY, class X, class Vectors, class Weights>
JAXBN_INLINE void apply_step(int64_t at, const DY* dy, const X* x, Weights weights,
                             const Vectors& vectors, X* dx) {
  Floats v[2], c[2];
  load_step<split>(x + at, v);
  load_step<split>(dy + at, c);
  for (int i = 0; i < 2; ++i) {
    const int64_t lane = at + i * kWidth;
    v[i] = (v[i] - vectors.step(0, lane)) * vectors.step(2, lane);
    v[i] = weights.times(v[i] + vectors.step(3, lane), lane);
    v[i] += c[i] * vectors.step(1, lane);
  }
  store_step<split, kStream>(dx + at, v);
}

// The last step may begin among elements that are known, if its lanes are in order.
template <bool split, bool kStream, class DY, class X, class Vectors, class Weights>
JAXBN_INLINE void apply(const DY* dy, const X* x, Weights weights, int64_t size,
                        const Vectors& vectors, X* dx) {
  int64_t at = 0;
  for (; at + kStep <= size; at += kStep) {
    apply_step<split, kStream>(at, dy, x, weights, vectors, dx);
  }
  if ((!split || Vectors::are_equal) && at < size && size >= kStep) {
    return apply_step<split, false>(size - kStep, dy, x, weights, vectors, dx);
  }
  for (; at < size; ++at) {
    const float delta = widen(x[at]) - vectors.one(0, at);
    const float through = delta * vectors.one(2, at) + vectors.one(3, at);
    const float out = widen(dy[at]) * vectors.one(1, at) + weights.times(through, at);
    dx[at] = narrow<X>(out);
  }
}

template <bool kStream, class DY, class X>
JAXBN_INLINE void rows_of(const DY* dy, const X* x, const float* weights, int64_t rows,
                          int64_t stride, int64_t width, const float* const* vectors,
                          X* dx) {
  constexpr bool split = kSplit<DY, X>;
  const Lanes lanes{vectors};
  for (int64_t r = 0, at = 0; r < rows; ++r, at += stride) {
    if (!weights) {
      apply<split, kStream>(dy + at, x + at, Unweighted{}, width, lanes, dx + at);
    } else {
      apply<split, kStream>(dy + at, x + at, OneWeight{weights[r]}, width, lanes, dx + at);
    }
  }
}

template <bool kStream, class DY, class X>
JAXBN_INLINE void slab_of(const DY* dy, const X* x, const float* weights, int64_t size,
                          const float* numbers, X* dx) {
  if (!weights) {
    apply<kSplit<DY, X>, kStream>(dy, x, Unweighted{}, size, Same{numbers}, dx);
  } else {
    apply<false, kStream>(dy, x, EachWeight{weights}, size, Same{numbers}, dx);
  }
}

}  // namespace

// Templates cannot have clones.
#define JAXBN_OF_ELEMENTS(DY, X, STREAM)                                              \
  JAXBN_CLONES void apply_rows(const DY* dy, const X* x, const float* weights,        \
                               int64_t rows, int64_t stride, int64_t width,           \
                               const float* const* vectors, bool stream, X* dx) {     \
    if (STREAM && stream) {                                                           \
      rows_of<STREAM>(dy, x, weights, rows, stride, width, vectors, dx);              \
    } else {                                                                          \
      rows_of<false>(dy, x, weights, rows, stride, width, vectors, dx);               \
    }                                                                                 \
  }                                                                                   \
  JAXBN_CLONES void apply_slab(const DY* dy, const X* x, const float* weights,        \
                               int64_t size, const float* numbers, bool stream,       \
                               X* dx) {                                               \
    if (STREAM && stream) {                                                           \
      slab_of<STREAM>(dy, x, weights, size, numbers, dx);                             \
    } else {                                                                          \
      slab_of<false>(dy, x, weights, size, numbers, dx);                              \
    }                                                                                 \
  }

void finish_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

JAXBN_OF_ELEMENTS(float, float, true)
JAXBN_OF_ELEMENTS(BFloat16, float, true)
JAXBN_OF_ELEMENTS(float, BFloat16, false)
JAXBN_OF_ELEMENTS(BFloat16, BFloat16, false)

}  // namespace jaxbn
