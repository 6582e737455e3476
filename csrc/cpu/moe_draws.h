// A router's random numbers (common/moe_noise.h) in vectors: 4 kW columns of a row at a time.
#pragma once
#include "columns.h"
#include "common/moe_noise.h"
#include "philox_lanes.h"

namespace encfast::ENCFAST_ISA {
namespace {

struct VecArithmetic {
  using Float = Vec;
  using Int = IntVec;

  static ENCFAST_INLINE Vec splat(float x) { return ENCFAST_ISA::splat(x); }
  static ENCFAST_INLINE Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }
  // The compiler fuses a product with a sum unless it loses sight of it.
  static ENCFAST_INLINE Vec times(Vec a, Vec b) {
    Vec product = a * b;
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    asm("" : "+m"(product));
#endif
    return product;
  }
  static ENCFAST_INLINE Vec plus(Vec a, Vec b) { return a + b; }
  static ENCFAST_INLINE IntVec bits(Vec x) { return (IntVec)x; }
  static ENCFAST_INLINE Vec from_bits(IntVec x) { return (Vec)x; }
};

constexpr int64_t kDrawStep = 4 * kW;  // columns drawn at a time

// out[i] = map(upper 23 bits of column + i), for kDrawStep columns from a multiple of 4 on.
template <class Map>
ENCFAST_INLINE void draw_columns(PhiloxKey key, int64_t row, int64_t column, uint32_t purpose,
                                 float* out, Map map) {
  UIntVec group{};
  for (int i = 0; i < kW; ++i) group[i] = static_cast<uint32_t>(column / 4 + i);
  PhiloxLanes words[4];
  draw_words(key, PhiloxLanes(group), static_cast<uint32_t>(row), purpose, words);
  float lanes[4][kW];
  for (int w = 0; w < 4; ++w) store(lanes[w], map((IntVec)(words[w].v >> 9)));
  for (int i = 0; i < kW; ++i) {
    for (int w = 0; w < 4; ++w) out[4 * i + w] = lanes[w][i];
  }
}

// Gumbel noise of columns 0 .. n - 1 and on to a multiple of kDrawStep.
inline void draw_gumbel(PhiloxKey key, int64_t row, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += kDrawStep) {
    draw_columns(key, row, c, kGumbelDraws, out + c, [](IntVec upper) ENCFAST_INLINE_LAMBDA {
      return gumbel_of<VecArithmetic>(upper);
    });
  }
}

// The priority of choice j of a token: 31 bits.
ENCFAST_INLINE int32_t priority_key(PhiloxKey key, int64_t token, int64_t j) {
  uint32_t words[4];
  draw_words(key, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(token), kPriorityDraws,
             words);
  return static_cast<int32_t>(words[j % 4] >> 1);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
