// A router's random numbers (common/moe_noise.h) on a GPU.
#pragma once
#include "common/gpu.h"
#include "common/moe_noise.h"

namespace encfast {
namespace {

struct DeviceArithmetic {
  using Float = float;
  using Int = int;

  static __device__ float splat(float x) { return x; }
  static __device__ float to_float(int x) { return __int2float_rn(x); }
  static __device__ float times(float a, float b) { return __fmul_rn(a, b); }
  static __device__ float plus(float a, float b) { return __fadd_rn(a, b); }
  static __device__ int bits(float x) { return __float_as_int(x); }
  static __device__ float from_bits(int x) { return __int_as_float(x); }
};

__device__ inline PhiloxKey key_from(const int64_t* rng) {
  return {{static_cast<uint32_t>(rng[0]), static_cast<uint32_t>(rng[1])}};
}

// The word of a column of a row.
__device__ inline uint32_t draw_word(PhiloxKey key, int64_t row, int64_t column, uint32_t purpose) {
  uint32_t words[4];
  draw_words(key, static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), purpose, words);
  const int w = static_cast<int>(column % 4);
  return w == 0 ? words[0] : w == 1 ? words[1] : w == 2 ? words[2] : words[3];
}

__device__ inline int upper_bits(uint32_t word) { return static_cast<int>(word >> 9); }

}  // namespace
}  // namespace encfast
