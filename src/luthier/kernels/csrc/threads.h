// parallel_for: one loop over independent tasks on several threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace lt {

constexpr int kMostThreads = 256;

// Calls body(context) on up to `threads` threads at once, the caller among them, and returns when all have ended.
// It may run on fewer. All have the caller's floating-point settings meanwhile: where it flushes denormal numbers, they do
// too, so that results do not depend on which thread computed them. Threads belong to the OpenMP runtime already in the
// process (so that two runtimes do not compete for the cores), or to a pool of our own where there is none, and always in a
// forked child.
void run_on_threads(int threads, void (*body)(void*), void* context);

// fn(task) for each task in [0, tasks). Each thread begins with a stretch of neighbouring tasks, in rising order, so that
// what follows can be prefetched; one that has ended its own takes from the others'. An exception is rethrown here.
template <class Fn>
void parallel_for(std::int64_t tasks, int threads, Fn&& fn) {
  if (tasks < threads) threads = int(tasks);
  if (threads <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) fn(task);
    return;
  }
  struct alignas(64) Stretch {  // a cache line each
    std::int64_t next, end;
  };
  struct Shared {
    Fn& fn;
    const int stretches;
    std::atomic<int> arrived{0};
    std::mutex mutex;
    std::exception_ptr error;
    Stretch of[kMostThreads];  // only the first `stretches` are ever touched
    Shared(Fn& f, int count) : fn(f), stretches(count) {}
  } shared(fn, threads < kMostThreads ? threads : kMostThreads);
  for (int i = 0; i < shared.stretches; ++i) {
    shared.of[i].next = tasks * i / shared.stretches;
    shared.of[i].end = tasks * (i + 1) / shared.stretches;
  }
  auto body = [](void* context) {
    Shared& s = *static_cast<Shared*>(context);
    const int own = s.arrived.fetch_add(1);
    try {
      for (int i = 0; i < s.stretches; ++i) {
        Stretch& stretch = s.of[(own + i) % s.stretches];
        for (std::int64_t task; (task = __atomic_fetch_add(&stretch.next, 1, __ATOMIC_RELAXED)) < stretch.end;) s.fn(task);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(s.mutex);
      s.error = std::current_exception();
    }
  };
  run_on_threads(shared.stretches, body, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace lt
