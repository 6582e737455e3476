// What the drivers share: heap blocks of exact size and wanted alignment, and a main that runs the
// checks under several seeds: `driver SEEDS`.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "simt.h"

namespace check {

// n poisoned elements, `offset` bytes behind an address that is aligned to 64. The block ends with
// the last of them, so that one more is out of bounds.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, size_t offset = 0) : n_(n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    if (posix_memalign(&block_, 64, offset + bytes) != 0) std::abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(block_) + offset);
    simt::poison(data_, bytes);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(block_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void* block_ = nullptr;
  T* data_;
  int64_t n_;
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : engine_(seed) {}
  // One of low..high.
  int64_t operator()(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937_64 engine_;
};

// A number that T holds exactly, as a T.
template <class T>
T element_of(double value) {
  return static_cast<T>(value);
}
template <>
inline __nv_bfloat16 element_of(double value) {
  return __float2bfloat16_rn(static_cast<float>(value));
}
template <>
inline __half element_of(double value) {
  return __float2half_rn(static_cast<float>(value));
}

template <class T>
bool equal(const char* what, const Array<T>& got, const std::vector<T>& want) {
  for (int64_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &want[static_cast<size_t>(i)], sizeof(T)) == 0) continue;
    std::fprintf(stderr, "%s: element %lld of %lld is wrong under seed %llu\n", what,
                 static_cast<long long>(i), static_cast<long long>(got.size()),
                 static_cast<unsigned long long>(simt::runtime().seed));
    return false;
  }
  return true;
}

// Exit code of a driver: 0 if `all_pass` holds under every seed.
template <class Check>
int under_seeds(char** args, Check all_pass) {
  const uint64_t seeds = std::strtoull(args[1], nullptr, 10);
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    simt::reseed(seed);
    Draw draw(seed);
    if (!all_pass(draw)) return 1;
  }
  return seeds == 0;
}

}  // namespace check
