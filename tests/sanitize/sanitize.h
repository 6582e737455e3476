// What the sanitizer drivers share: std::thread instead of OpenMP, whose barriers TSan cannot see,
// heap blocks of exact size, so that one element too far is an error, and deterministic values.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/isa.h"

namespace encfast {

struct ThreadPool {
  int count;

  Pool pool() { return {run, threads, this}; }
  static int threads(void* self) { return static_cast<ThreadPool*>(self)->count; }
  static void run(void* self, int64_t n_tasks, void (*fn)(int64_t, int, void*), void* ctx) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> workers;
    for (int slot = 0; slot < threads(self); ++slot) {
      workers.emplace_back([&, slot] {
        for (int64_t task; (task = next.fetch_add(1)) < n_tasks;) fn(task, slot, ctx);
      });
    }
    for (std::thread& w : workers) w.join();
  }
};

// Heap memory of exactly `bytes`, aligned to 64, freed at scope end.
struct Block {
  void* data;
  size_t bytes;

  explicit Block(size_t n) : data(std::aligned_alloc(64, (n + 63) / 64 * 64)), bytes(n) {}
  Block(const Block&) = delete;
  ~Block() { std::free(data); }
};

inline int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// Deterministic values in [-1, 1): a multiplicative generator. bf16 and fp16 patterns of the same
// range.
class Values {
 public:
  std::vector<char> make(DType t, int64_t n) {
    std::vector<char> out(static_cast<size_t>(n * size_of(t)));
    for (int64_t i = 0; i < n; ++i) write(t, out.data() + i * size_of(t));
    return out;
  }

 private:
  void write(DType t, char* at) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const float x = static_cast<float>(state_ >> 40) / (1 << 23) - 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t bf16 = static_cast<uint16_t>(bits >> 16);
    // fp16 of sign and 0.5..1: any mantissa will do.
    const uint16_t fp16 =
        static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x3800 | (bits >> 10 & 0x3ff));
    if (t == DType::kFloat32) std::memcpy(at, &x, 4);
    if (t == DType::kBFloat16) std::memcpy(at, &bf16, 2);
    if (t == DType::kFloat16) std::memcpy(at, &fp16, 2);
  }
  uint64_t state_ = 1;
};

inline bool is_nan(DType t, const char* at) {
  if (t == DType::kFloat32) {
    float x;
    std::memcpy(&x, at, 4);
    return std::isnan(x);
  }
  uint16_t h;
  std::memcpy(&h, at, 2);
  return (h & 0x7fff) > (t == DType::kBFloat16 ? 0x7f80 : 0x7c00);
}

inline bool all_written(DType t, const std::vector<char>& x) {
  for (size_t i = 0; i < x.size(); i += static_cast<size_t>(size_of(t))) {
    if (is_nan(t, x.data() + i)) return false;
  }
  return true;
}

// `elements` of `size` bytes, all NaN in any float type.
inline std::vector<char> nan_filled(int64_t elements, int64_t size) {
  return std::vector<char>(static_cast<size_t>(elements * size), static_cast<char>(0xff));
}

}  // namespace encfast
