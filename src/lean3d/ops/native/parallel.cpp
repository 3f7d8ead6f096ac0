#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace lean3d {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
const GompParallel gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

struct Job {
  int64_t pieces;
  detail::Task task;
  const void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};

  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    const int thread = job.threads.fetch_add(1);
    for (int64_t piece; (piece = job.next.fetch_add(1)) < job.pieces;) job.task(job.context, piece, thread);
  }
};

// One job at a time; the caller works too.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::lock_guard<std::mutex> one(busy_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back([this] { serve(); });
      job_ = &job;
      wanted_ = threads - 1;
      running_ = 0;
    }
    wake_.notify_all();
    Job::work(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    job_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || wanted_ > 0; });
      if (stop_) return;
      --wanted_;
      ++running_;
      Job* job = job_;
      lock.unlock();
      Job::work(job);
      lock.lock();
      if (--running_ == 0) done_.notify_all();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  bool stop_ = false;
};

Pool& pool() {
  static Pool instance;
  return instance;
}

constexpr size_t LARGE_PAGE = 2 << 20;  // bytes

struct Scratch {
  struct Slot {
    float* data = nullptr;
    size_t count = 0;
  };
  Slot slots[8];
  ~Scratch() {
    for (auto& slot : slots) std::free(slot.data);
  }
};

}  // namespace

void detail::run(int64_t pieces, int threads, Task task, const void* context) {
  Job job{pieces, task, context};
  if (pieces < threads) threads = static_cast<int>(pieces);
  if (threads <= 1)
    Job::work(&job);
  else if (gomp_parallel)
    gomp_parallel(&Job::work, &job, static_cast<unsigned>(threads), 0);
  else
    pool().run(job, threads);
}

float* scratch(int slot, size_t count) {
  thread_local Scratch mine;
  auto& place = mine.slots[slot];
  if (place.count < count) {
    std::free(place.data);
    place.count = 0;
    const size_t bytes = count * sizeof(float), unit = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
    place.data = static_cast<float*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
#ifdef MADV_HUGEPAGE
    if (place.data && unit == LARGE_PAGE) madvise(place.data, bytes, MADV_HUGEPAGE);
#endif
    if (!place.data) throw std::bad_alloc();
    place.count = count;
  }
  return place.data;
}

const char* thread_pool() { return gomp_parallel ? "libgomp" : "threads"; }

}  // namespace lean3d
