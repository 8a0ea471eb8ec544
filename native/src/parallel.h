// A fixed number of parts of the work, run by whichever threads are free.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

namespace jaxbn {

// Runs f(0), ..., f(parts - 1) on the threads of a pool and on this one, and returns when
// all are done. This thread is often one of the pool's own: it takes parts as the others
// do, and never waits for one that nobody has begun, so that a busy pool is no deadlock.
// With it, no more threads than the pool has: one too many would wait for a core with a
// part begun.
template <class Pool, class F>
void parallel_for(Pool& pool, int64_t parts, F f) {
  struct State {
    explicit State(F f, int64_t parts) : f(std::move(f)), parts(parts) {}

    void run() {
      for (int64_t i; (i = next.fetch_add(1)) < parts;) {
        f(i);
        std::lock_guard<std::mutex> lock(mutex);
        if (++done == parts) all_done.notify_all();
      }
    }

    F f;
    const int64_t parts;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };

  auto state = std::make_shared<State>(std::move(f), parts);
  const int64_t threads = std::min<int64_t>(parts, pool.num_threads());
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([state] { state->run(); });
  state->run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == parts; });
}

}  // namespace jaxbn
