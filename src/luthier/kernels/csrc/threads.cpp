#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <link.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "luthier.h"

namespace lt {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#ifdef __linux__
// The path of a loaded OpenMP runtime that has libgomp's entry point; torch's own copy is preferred.
int note_openmp(dl_phdr_info* info, std::size_t, void* found) {
  const char* name = info->dlpi_name;
  if (name == nullptr) return 0;
  if (!std::strstr(name, "gomp") && !std::strstr(name, "libiomp") && !std::strstr(name, "libomp")) return 0;
  std::string& path = *static_cast<std::string*>(found);
  if (path.empty() || std::strstr(name, "torch")) path = name;
  return 0;
}

GompParallel find_openmp() {
  std::string path;
  dl_iterate_phdr(note_openmp, &path);
  if (path.empty()) return nullptr;
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return handle == nullptr ? nullptr : reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
}
#else
GompParallel find_openmp() { return nullptr; }
#endif

// Threads that sleep until there is work. One job runs at a time; a second caller does its work alone. Where the system
// gives no further thread, those that exist do the work.
class Pool {
 public:
  void run(int threads, void (*body)(void*), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return body(context);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      body_ = body;
      context_ = context;
      wanted_ = running_ = std::min(threads - 1, int(workers_.size()));
      ++generation_;
    }
    wake_.notify_all();
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void grow(int wanted) {
    try {
      while (int(workers_.size()) < wanted) workers_.emplace_back(&Pool::work, this, workers_.size(), generation_);
    } catch (const std::system_error&) {  // no more to be had: those that run share the tasks
    }
  }

  void work(std::size_t index, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (int(index) >= wanted_) continue;
      lock.unlock();
      body_(context_);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
};

GompParallel openmp = nullptr;
Pool* pool = nullptr;

// A forked child has none of its parent's threads, and libgomp would wait for them for ever: it starts a pool of its
// own. The parent's pool object is left alone, never destroyed: its threads and locks are not ours.
void in_child() {
  openmp = nullptr;
  pool = new Pool;
}

// At load, so that a fork before the first call is seen too.
__attribute__((constructor)) void start() {
  openmp = find_openmp();
  pool = new Pool;
  pthread_atfork(nullptr, nullptr, in_child);
}

// How this thread rounds, and whether it flushes denormal numbers.
std::uint64_t float_settings() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
  std::uint64_t settings;
  __asm__ volatile("mrs %0, fpcr" : "=r"(settings));
  return settings;
#else
  return 0;
#endif
}

void set_float_settings(std::uint64_t settings) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(unsigned(settings));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(settings));
#else
  (void)settings;
#endif
}

// A body to be run with the settings of the thread that asked for it.
struct Settled {
  void (*body)(void*);
  void* context;
  std::uint64_t settings;
};

void run_settled(void* context) {
  const Settled& job = *static_cast<const Settled*>(context);
  const std::uint64_t own = float_settings();
  set_float_settings(job.settings);
  job.body(job.context);
  set_float_settings(own);
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* context) {
  Settled job{body, context, float_settings()};
  if (openmp != nullptr) {
    openmp(run_settled, &job, unsigned(threads), 0);
  } else {
    pool->run(threads, run_settled, &job);
  }
}

}  // namespace lt

LT_API int lt_thread_backend() { return lt::openmp != nullptr ? 1 : 0; }
