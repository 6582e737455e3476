// The thread pool of a core, made of PyTorch's: the same threads, the same torch.set_num_threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"

namespace encfast {

// parallel_for hands one contiguous slot range to each thread; tasks are taken from a counter on
// top of it, so that a thread with cheap tasks takes more of them. Inside another parallel region
// parallel_for is serial, and one thread then runs the slots one after another.
class TorchPool {
 public:
  TorchPool() : threads_(static_cast<int>(torch::stable::get_num_threads())) {}

  int threads() const { return threads_; }
  Pool pool() { return {run, count, this}; }

 private:
  static int count(void* self) { return static_cast<TorchPool*>(self)->threads_; }

  static void run(void* self, int64_t n_tasks, void (*fn)(int64_t, int, void*), void* ctx) {
    std::atomic<int64_t> next{0};
    const int64_t slots = std::min<int64_t>(count(self), n_tasks);
    torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) {
          fn(task, static_cast<int>(slot), ctx);
        }
      }
    });
  }

  const int threads_;
};

}  // namespace encfast
