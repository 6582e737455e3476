// A CUDA grid on one CPU thread: every CUDA thread is a fiber with a stack of its own.
//
// A fiber runs until it meets a barrier or exchanges values with its warp; then the scheduler goes
// on with another one, drawn by the seed. So do blocks: a few are resident at a time, in an order
// drawn by the seed. A correct kernel gives the same result under every seed.
//
// Reported, with an exit by abort(): a launch that the CUDA runtime would refuse, barriers that not
// all live threads of a block reach, or reach on different lines, warp operations whose lanes
// differ or have exited, and waiting without end. AddressSanitizer adds accesses out of bounds, of
// shared memory too; UBSan misaligned vectors; ThreadSanitizer, which takes each fiber for a thread
// ordered by barriers, __syncwarp and launches alone, races on shared and global memory. Shared
// memory starts as what no result is, so that reading it unwritten shows.
//
// Not modelled: the GPU's memory model beyond that (fences, volatile), interleaving between
// barriers (races are the sanitizer's to find), more than one stream.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// What the runtime does between two fibers is no access of the kernel's.
#define SIMT_UNWATCHED __attribute__((no_sanitize_thread, noinline))
#define SIMT_KEEPS_BLOCKS true
#else
#define SIMT_UNWATCHED
#define SIMT_KEEPS_BLOCKS false
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kResident = 3;  // blocks that run at a time
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 64 << 10;  // a block's arena: all kernels' arrays and red zones

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

struct Block;

// What a fiber runs on, used again by fibers of later launches: the host orders those after these.
struct Seat {
  void* stack;
#if defined(__SANITIZE_THREAD__)
  void* tsan;
#endif
};

struct Fiber {
  ucontext_t context;
  Seat seat;
  Block* block;
  uint3 index;
  unsigned place;  // in the block
  State state = State::kReady;
  unsigned mask = 0;           // the lanes it waits for
  const char* operation = "";  // in which it waits, and on which line
  int line = 0;
  uint64_t offer = 0;  // the value it hands to its warp
  char tag = 0;        // what TSan orders by a __syncwarp of which it is the lowest lane
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  char* shared;
  unsigned live;
  char tag = 0;  // what TSan orders the block's threads by
};

struct Runtime {
  std::mt19937_64 draw;
  uint64_t seed = 0;
  dim3 grid, block;
  std::function<void()> body;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::vector<Seat> seats;  // free ones
  char start_tag = 0;  // what TSan orders threads after the host by, and the host after threads
  char end_tag = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

SIMT_UNWATCHED inline Runtime& runtime() {
  static Runtime r;
  return r;
}
SIMT_UNWATCHED inline Fiber& self() { return *runtime().current; }

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  std::fprintf(stderr, "SIMT: ");
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  if (const Fiber* f = runtime().current) {
    std::fprintf(stderr, " (block %u,%u,%u thread %u,%u,%u, seed %llu)", f->block->index.x,
                 f->block->index.y, f->block->index.z, f->index.x, f->index.y, f->index.z,
                 static_cast<unsigned long long>(runtime().seed));
  }
  std::fprintf(stderr, "\n");
  std::abort();
}

// Orders, for TSan, what happened before release(tag) before what happens after acquire(tag).
SIMT_UNWATCHED inline void release([[maybe_unused]] char& tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&tag);
#endif
}
SIMT_UNWATCHED inline void acquire([[maybe_unused]] char& tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&tag);
#endif
}

SIMT_UNWATCHED inline void switch_to_scheduler() {
  Runtime& r = runtime();
  Fiber& f = self();
#if defined(__SANITIZE_ADDRESS__)
  // Without a place for it, the fake stack of a fiber that is done is freed.
  __sanitizer_start_switch_fiber(f.state == State::kDone ? nullptr : &f.fake_stack, r.stack,
                                 r.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(r.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&f.context, &r.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

SIMT_UNWATCHED inline void switch_to(Fiber& f) {
  Runtime& r = runtime();
  r.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&r.fake_stack, f.seat.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.seat.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&r.scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(r.fake_stack, nullptr, nullptr);
#endif
  r.current = nullptr;
}

SIMT_UNWATCHED inline void fiber_main() {
  Runtime& r = runtime();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &r.stack, &r.stack_bytes);
#endif
  acquire(r.start_tag);
  r.body();
  release(r.end_tag);
  self().state = State::kDone;
  switch_to_scheduler();
  std::abort();
}

// Fills memory with what no result is: NaN in any floating type, 0x7fff7fff in any integer type.
SIMT_UNWATCHED inline void poison(void* memory, size_t bytes) {
  auto* byte = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) byte[i] = i % 2 ? 0x7f : 0xff;
}

SIMT_UNWATCHED inline Seat take_seat() {
  std::vector<Seat>& free = runtime().seats;
  if (!free.empty()) {
    const Seat seat = free.back();
    free.pop_back();
    return seat;
  }
  Seat seat;
  seat.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (seat.stack == MAP_FAILED) report("no memory for a stack");
#if defined(__SANITIZE_THREAD__)
  seat.tsan = __tsan_create_fiber(0);
#endif
  return seat;
}

SIMT_UNWATCHED inline void start_fiber(Fiber& f) {
  f.seat = take_seat();
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.seat.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
}

SIMT_UNWATCHED inline std::unique_ptr<Block> new_block(uint64_t number) {
  Runtime& r = runtime();
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(number % r.grid.x),
                  static_cast<unsigned>(number / r.grid.x % r.grid.y),
                  static_cast<unsigned>(number / r.grid.x / r.grid.y)};
  block->live = r.block.x * r.block.y * r.block.z;
  block->fibers = std::vector<Fiber>(block->live);
  block->shared = new (std::align_val_t(1024)) char[kSharedBytes];
  poison(block->shared, kSharedBytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block->shared, kSharedBytes);
#endif
  for (unsigned i = 0; i < block->fibers.size(); ++i) {
    Fiber& f = block->fibers[i];
    f.block = block.get();
    f.place = i;
    f.index = {i % r.block.x, i / r.block.x % r.block.y, i / r.block.x / r.block.y};
    start_fiber(f);
  }
  release(r.start_tag);
  return block;
}

SIMT_UNWATCHED inline void delete_block(Block& block) {
  for (Fiber& f : block.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.seat.stack, kStackBytes);
#endif
    runtime().seats.push_back(f.seat);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, kSharedBytes);
#endif
  ::operator delete[](block.shared, std::align_val_t(1024));
}

SIMT_UNWATCHED inline void delete_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& one : blocks) delete_block(*one);
  blocks.clear();
}

// Lets the threads of a block go on once all that live stand at one barrier.
SIMT_UNWATCHED inline bool open_barrier(Block& block) {
  const Fiber* first = nullptr;
  unsigned waiting = 0;
  for (const Fiber& f : block.fibers) {
    if (f.state != State::kAtBarrier) continue;
    first = first ? first : &f;
    ++waiting;
  }
  if (!first || waiting < block.live) return false;
  for (Fiber& f : block.fibers) {
    if (f.state != State::kAtBarrier) continue;
    if (f.line != first->line) {
      runtime().current = &f;
      report("__syncthreads on line %d, other threads of the block on line %d", f.line,
             first->line);
    }
    f.state = State::kReady;
  }
  return true;
}

// Whether all lanes that `f` waits for are in the same operation.
SIMT_UNWATCHED inline bool warp_has_met(Block& block, Fiber& f) {
  const unsigned warp = f.place - f.place % kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(f.mask >> lane & 1)) continue;
    const Fiber& other = block.fibers[warp + lane];
    if (other.state == State::kDone) {
      runtime().current = &f;
      report("%s on line %d waits for lane %u, which has exited", f.operation, f.line, lane);
    }
    if (other.state != State::kInWarp) return false;
    if (other.mask != f.mask || other.line != f.line) {
      runtime().current = &f;
      report("%s of lanes %08x on line %d, lane %u in %s of lanes %08x on line %d", f.operation,
             f.mask, f.line, lane, other.operation, other.mask, other.line);
    }
  }
  return true;
}

SIMT_UNWATCHED inline bool open_warps(Block& block) {
  bool any = false;
  for (Fiber& f : block.fibers) {
    if (f.state != State::kInWarp || !warp_has_met(block, f)) continue;
    const unsigned warp = f.place - f.place % kWarp, mask = f.mask;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) block.fibers[warp + lane].state = State::kReady;
    }
    any = true;
  }
  return any;
}

// Runs every ready fiber of a block once, in an order of the seed. False: nothing could go on.
SIMT_UNWATCHED inline bool advance(Block& block) {
  std::vector<Fiber*> ready;
  for (Fiber& f : block.fibers) {
    if (f.state == State::kReady) ready.push_back(&f);
  }
  std::shuffle(ready.begin(), ready.end(), runtime().draw);
  for (Fiber* f : ready) {
    switch_to(*f);
    block.live -= f->state == State::kDone;
    // A warp whose lanes have met may run ahead of the other warps, or not.
    if (f->state == State::kInWarp && (runtime().draw() & 1)) open_warps(block);
  }
  const bool opened = open_warps(block) | open_barrier(block);
  return opened || !ready.empty();
}

inline void check_launch(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    report("illegal block (%u, %u, %u)", block.x, block.y, block.z);
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    report("illegal grid (%u, %u, %u)", grid.x, grid.y, grid.z);
  }
}

// Runs body() for every thread of the grid.
SIMT_UNWATCHED inline void launch(dim3 grid, dim3 block, std::function<void()> body) {
  check_launch(grid, block);
  Runtime& r = runtime();
  r.grid = grid;
  r.block = block;
  r.body = std::move(body);
#if defined(__SANITIZE_THREAD__)
  r.tsan = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), r.draw);
  // TSan would take memory that a later block gets again for a race, or for an order between the
  // two: under it blocks are freed after the launch.
  std::vector<std::unique_ptr<Block>> resident, done;
  while (!order.empty() || !resident.empty()) {
    while (!order.empty() && resident.size() < kResident) {
      resident.push_back(new_block(order.back()));
      order.pop_back();
    }
    bool any = false;
    for (auto& one : resident) any |= advance(*one);
    if (!any) {
      for (const Fiber& f : resident[0]->fibers) {
        if (f.state != State::kDone) r.current = const_cast<Fiber*>(&f);
      }
      report("waits for ever in %s on line %d", r.current->operation, r.current->line);
    }
    for (auto& one : resident) {
      if (!one->live) done.push_back(std::move(one));
    }
    resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
    if (!SIMT_KEEPS_BLOCKS) delete_blocks(done);
  }
  acquire(r.end_tag);
  delete_blocks(done);
}

SIMT_UNWATCHED inline void wait_for_block(int line) {
  Fiber& f = self();
  f.operation = "__syncthreads";
  f.line = line;
  f.state = State::kAtBarrier;
  switch_to_scheduler();
}

// A barrier that orders memory. All wait a second time: a thread that ran ahead to its next barrier
// would otherwise seem ordered before those that still come out of this one.
SIMT_UNWATCHED inline void barrier(int line) {
  char& tag = self().block->tag;
  release(tag);
  wait_for_block(line);
  acquire(tag);
  wait_for_block(line);
}

// Meets the lanes of `mask`.
SIMT_UNWATCHED inline void meet(unsigned mask, const char* operation, int line) {
  Fiber& f = self();
  if (!(mask >> f.place % kWarp & 1)) {
    report("%s on line %d by a lane outside of its mask %08x", operation, line, mask);
  }
  const unsigned lanes =
      static_cast<unsigned>(f.block->fibers.size()) - (f.place - f.place % kWarp);
  if (lanes < kWarp && mask >> lanes != 0 && mask != ~0u) {
    report("%s on line %d names lanes %08x of a warp of %u", operation, line, mask, lanes);
  }
  f.mask = lanes < kWarp ? mask & ((1u << lanes) - 1) : mask;
  f.operation = operation;
  f.line = line;
  f.state = State::kInWarp;
  switch_to_scheduler();
}

// The same for the lanes of `mask`.
SIMT_UNWATCHED inline void warp_barrier(unsigned mask, int line) {
  Fiber& f = self();
  const unsigned lowest = mask ? static_cast<unsigned>(__builtin_ctz(mask)) : 0;
  char& tag = f.block->fibers[f.place - f.place % kWarp + lowest].tag;
  release(tag);
  meet(mask, "__syncwarp", line);
  acquire(tag);
  meet(mask, "__syncwarp", line);
}

// The value that another lane of the caller's warp handed over.
template <class T>
SIMT_UNWATCHED T offer_of(unsigned lane) {
  const Fiber& f = self();
  if (!(f.mask >> lane & 1)) {
    report("%s on line %d reads lane %u, which takes no part", f.operation, f.line, lane);
  }
  T value;
  __builtin_memcpy(&value, &f.block->fibers[f.place - f.place % kWarp + lane].offer, sizeof(T));
  return value;
}

// Gives `value` to the warp and returns what `pick(lane, lanes)` makes of the values of the lanes
// that take part. Orders no memory, as on the GPU.
template <class T, class Pick>
SIMT_UNWATCHED auto exchange(unsigned mask, const char* operation, int line, T value, Pick pick) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& f = self();
  __builtin_memcpy(&f.offer, &value, sizeof(T));
  meet(mask, operation, line);
  const auto picked = pick(f.place % kWarp, f.mask);
  meet(mask, operation, line);  // the offers stay until all have read
  return picked;
}

inline size_t take_shared(size_t bytes) {
  static size_t top = 0;
  const size_t begin = top;
  top += (bytes + 255) / 128 * 128;  // a red zone of at least 128 bytes
  if (top > kSharedBytes) report("the kernels' shared memory does not fit the arena");
  return begin;
}

// The block's instance of one shared declaration, which `site`, a lambda of its own type, stands
// for.
template <class T, class Site>
SIMT_UNWATCHED T& shared(Site) {
  static const size_t begin = take_shared(sizeof(T));
  char* at = self().block->shared + begin;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(at, sizeof(T));
#endif
  return *reinterpret_cast<T*>(at);
}

inline void reseed(uint64_t seed) {
  runtime().seed = seed;
  runtime().draw.seed(seed);
}

}  // namespace simt
