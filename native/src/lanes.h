// Thirty-two numbers at a time, as two vectors of floats, from float32 and bfloat16.
//
// The types are GCC's and Clang's vector extension: the compiler makes of them what the
// machine has, AVX-512, AVX2 or less, chosen at run time (JAXBN_CLONES).
//
// The clones are for levels of the instruction set. Named by a processor ("haswell"),
// they would be taken on that maker's processors only.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef JAXBN_HAS_CLONES
#define JAXBN_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAXBN_CLONES
#endif
#define JAXBN_INLINE inline __attribute__((always_inline))
// After a lambda's parameters: one that is not inlined is compiled for the oldest machine.
#define JAXBN_INLINED __attribute__((always_inline))

namespace jaxbn {

constexpr int64_t kWidth = 16;         // Floats in a vector.
constexpr int64_t kStep = 2 * kWidth;  // Elements that are taken at once.

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
// Half as many, which is what AVX2 has in a register. Of twice as many GCC makes good code
// where they are added and multiplied. What is compared or carried through a loop, it keeps
// in memory and takes apart.
constexpr int64_t kHalf = kWidth / 2;
typedef float HalfFloats __attribute__((vector_size(32), aligned(4)));
typedef uint32_t HalfWords __attribute__((vector_size(32), aligned(4)));
typedef uint16_t Quarters __attribute__((vector_size(16), aligned(2)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

// A bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
JAXBN_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class To>
JAXBN_INLINE To load(const void* p) {
  To v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
JAXBN_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

JAXBN_INLINE uint32_t as_bits(float x) { return as<uint32_t>(x); }
JAXBN_INLINE HalfWords as_bits(HalfFloats v) { return as<HalfWords>(v); }
JAXBN_INLINE Words as_bits(Floats v) { return as<Words>(v); }

JAXBN_INLINE float widen(float x) { return x; }
JAXBN_INLINE float widen(BFloat16 x) {
  return as<float>(static_cast<uint32_t>(x.bits) << 16);
}

JAXBN_INLINE Floats load_in_order(const float* p) { return load<Floats>(p); }
JAXBN_INLINE Floats load_in_order(const BFloat16* p) {
  return as<Floats>(__builtin_convertvector(load<Halves>(p), Words) << 16);
}

// One number, or several next to each other.
template <class V>
JAXBN_INLINE V load_as(const float* p) {
  return load<V>(p);
}
template <class V>
JAXBN_INLINE V load_as(const BFloat16* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return widen(*p);
  } else {
    static_assert(sizeof(V) == sizeof(HalfFloats));
    return as<V>(__builtin_convertvector(load<Quarters>(p), HalfWords) << 16);
  }
}

// One number in all lanes.
JAXBN_INLINE Floats filled(float x) {
  HalfFloats halves[2];
  for (HalfFloats& half : halves) half = HalfFloats{} + x;
  return load<Floats>(halves);
}

// All bits where those of a word are not all 0. (See `HalfFloats` for why not `!= 0`.)
template <class Bits>
JAXBN_INLINE Bits where_any(Bits bits) {
  return -((bits | -bits) >> 31);
}

// Of numbers that are not 0, and of finite ones.
template <class V>
JAXBN_INLINE auto where_not_zero(V v) {
  return where_any(as_bits(v) << 1);
}
template <class V>
JAXBN_INLINE auto where_finite(V v) {
  return where_any((as_bits(v) & 0x7f800000u) ^ 0x7f800000u);
}

// v in some of the lanes, and 0 in the others.
template <class V>
JAXBN_INLINE V only(decltype(as_bits(V{})) where, V v) {
  return as<V>(as_bits(v) & where);
}

// The bits of a float, or of several, rounded to those of the nearest bfloat16, and of two
// to the even one, in the upper half of each word. What arithmetic makes of NaN has the
// quiet bit: it stays NaN unless the sum overflows into the sign.
template <class Bits>
JAXBN_INLINE Bits rounded(Bits bits) {
  const Bits up = bits + 0x7fffu + (bits >> 16 & 1u);
  return up | (((up ^ bits) >> 31) * 0x7fc00000u);
}

template <class X>
JAXBN_INLINE X narrow(float x) {
  if constexpr (std::is_same_v<X, float>) {
    return x;
  } else {
    return {static_cast<uint16_t>(rounded(as<uint32_t>(x)) >> 16)};
  }
}

// Whether the lanes of these types are split: two bfloat16 in each word.
template <class... Ts>
constexpr bool kSplit = (std::is_same_v<Ts, BFloat16> && ...);

// The step at p, in order or, if lanes are split, its even elements and then its odd ones:
// the two halves of words, which are cheaper to take apart than to put in order.
template <bool split>
JAXBN_INLINE void load_step(const float* p, Floats* v) {
  static_assert(!split);
  for (int i = 0; i < 2; ++i) v[i] = load_in_order(p + i * kWidth);
}

template <bool split>
JAXBN_INLINE void load_step(const BFloat16* p, Floats* v) {
  if constexpr (split) {
    Words w = load<Words>(p);
    v[0] = as<Floats>(w << 16);
    v[1] = as<Floats>(w & 0xffff0000u);
  } else {
    for (int i = 0; i < 2; ++i) v[i] = load_in_order(p + i * kWidth);
  }
}

// The element of a row that is in a lane. After the last whole step they are in order.
template <bool split>
constexpr int64_t element_of(int64_t lane, int64_t width) {
  if (!split || lane >= width / kStep * kStep) return lane;
  const int64_t at = lane % kStep;
  return lane - at + (at < kWidth ? 2 * at : 2 * (at - kWidth) + 1);
}

// The lane that an element of a row is in.
template <bool split>
constexpr int64_t lane_of(int64_t element, int64_t width) {
  if (!split || element >= width / kStep * kStep) return element;
  const int64_t at = element % kStep;
  return element - at + at / 2 + (at % 2 ? kWidth : 0);
}

}  // namespace jaxbn
