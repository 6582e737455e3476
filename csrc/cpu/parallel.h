// The thread pool a core runs on is injected by its caller: the LibTorch binding passes
// parallel_for, the sanitizer driver passes std::thread (TSan cannot see the barriers of libgomp).
#pragma once
#include <cstdint>

namespace encfast {

struct Pool {
  // Calls fn(task, slot, ctx) once for each task in [0, n_tasks), in any order, dynamically: a
  // thread takes the next task when it is done with one. `slot` in [0, threads) names the calling
  // thread's workspace; no two tasks run with one slot at the same time.
  void (*run)(void* self, int64_t n_tasks, void (*fn)(int64_t task, int slot, void* ctx),
              void* ctx);
  int (*threads)(void* self);
  void* self;
};

}  // namespace encfast
