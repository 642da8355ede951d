// Team: one group of threads through a sequence of phases, each of independent tasks. Where a step consists of hundreds of
// short loops, waking threads for each would cost more than the work.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

#include "threads.h"

namespace lt {

// How far one phase has come: tasks handed out of each member's stretch, and tasks that are done.
struct Progress {
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value;
  };
  static std::int64_t counters(int members) { return members + 1; }
};

// Members pass the same phases in the same order. A phase ends when all its tasks are done, so it does not matter how many
// members there are: one that comes late finds nothing left to do, and one alone does everything.
class Team {
 public:
  // `counters`: phases * Progress::counters(members), all zero.
  Team(int members, Progress::Counter* counters) : members_(members), counters_(counters) {}

  class Member {
   public:
    explicit Member(Team& team) : team_(team), own_(team.arrived_.fetch_add(1) % team.members_) {}

    // From 0, each another.
    int number() const { return own_; }

    // fn(task) for each task in [0, tasks), by all members, who all return when every task is done. A member begins with
    // a stretch of neighbouring tasks, so that what follows can be prefetched. fn must not throw.
    template <class Fn>
    void each(std::int64_t tasks, Fn&& fn) {
      Progress::Counter* counters = team_.counters_ + phase_++ * Progress::counters(team_.members_);
      std::int64_t finished = 0;
      for (int i = 0; i < team_.members_; ++i) {
        const int stretch = (own_ + i) % team_.members_;
        const std::int64_t first = tasks * stretch / team_.members_, count = tasks * (stretch + 1) / team_.members_ - first;
        if (counters[stretch].value.load(std::memory_order_relaxed) >= count) continue;
        for (std::int64_t n; (n = counters[stretch].value.fetch_add(1, std::memory_order_relaxed)) < count; ++finished) {
          fn(first + n);
        }
      }
      std::atomic<std::int64_t>& done = counters[team_.members_].value;
      if (finished > 0) done.fetch_add(finished, std::memory_order_release);
      for (int spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins) spins < kSpins ? pause() : void(sched_yield());
    }

   private:
    Team& team_;
    int own_;
    std::int64_t phase_ = 0;
  };

  // body(member) on every thread that comes.
  template <class Fn>
  void run(Fn&& body) {
    struct Context {
      Team& team;
      Fn& body;
    } context{*this, body};
    const auto enter = [](void* raw) {
      Context& c = *static_cast<Context*>(raw);
      Member member(c.team);
      c.body(member);
    };
    if (members_ == 1) return enter(&context);
    run_on_threads(members_, enter, &context);
  }

 private:
  static constexpr int kSpins = 4000;  // about 40 microseconds
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  const int members_;
  Progress::Counter* counters_;
  std::atomic<int> arrived_{0};
};

}  // namespace lt
