// An array of shape (outer, channels, inner), divided along its outer axis.
//
// Which part of the array is whose depends on its shape and the number of threads, and on
// nothing else: so do the results, to the bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace jaxbn {

struct Shape {
  int64_t outer, channels, inner;
};

// How many parts the work on so many arrays is divided into, along their outer axis:
// several for each thread, since threads are late now and then.
template <class Pool>
int64_t parts_of(Shape shape, int arrays, Pool& pool) {
  constexpr int64_t worth_while = 1 << 18, for_each_thread = 4;
  const int64_t size = arrays * shape.outer * shape.channels * shape.inner;
  const int64_t most = std::min<int64_t>(for_each_thread * pool.num_threads(), shape.outer);
  return std::clamp<int64_t>(size / worth_while, 1, std::max<int64_t>(most, 1));
}

// The results of all parts, in their order. `f` makes that of some of the outer axis.
template <class Pool, class F>
auto in_parts(Shape shape, int arrays, Pool& pool, F f) {
  using Result = decltype(f(int64_t{0}, Shape{}));
  const int64_t parts = parts_of(shape, arrays, pool);
  std::vector<Result> results(parts, Result(shape.channels));
  parallel_for(pool, parts, [=, &results](int64_t i) {
    const int64_t begin = shape.outer * i / parts, end = shape.outer * (i + 1) / parts;
    results[i] = f(begin, Shape{end - begin, shape.channels, shape.inner});
  });
  return results;
}

}  // namespace jaxbn
