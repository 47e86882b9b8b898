// Parallel loops on torch's own thread pool: they obey torch.set_num_threads and need no OpenMP of the compiler's.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <atomic>

namespace somnium {

// Calls body(begin, end) on disjoint ranges that cover [0, count), at least `grain` long where possible.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body));
}

inline int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// Calls body(task) once for each of `count` tasks, each on whichever thread is free: for tasks of unequal length, and
// for machines with other work on them.
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = thread_count() < count ? thread_count() : count;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) body(task);
  });
}

}  // namespace somnium
