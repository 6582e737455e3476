// Pieces of a log-sum-exp over a row of logits that comes in slices.
#pragma once
#include "columns.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr float kMinusInf = -__builtin_inff();

// e^(z - m). The difference first: z alone may be so large that its product with log2(e) is rounded
// to a multiple of 2^-10.
ENCFAST_INLINE Vec exp_minus(Vec z, float m) { return exp2<6>((z - splat(m)) * splat(kLog2e)); }
ENCFAST_INLINE float exp_minus(float z, float m) { return exp_minus(splat(z), m)[0]; }

// -inf in lanes that are no columns.
ENCFAST_INLINE Vec keep_or_least(Vec v, Whole) { return v; }
ENCFAST_INLINE Vec keep_or_least(Vec v, Tail at) {
  return select_within(zeros(), iota(), splat(static_cast<float>(at.count - 1)), v,
                       splat(kMinusInf));
}

struct Maximum {
  Vec parts[kUnroll] = {splat(kMinusInf), splat(kMinusInf), splat(kMinusInf), splat(kMinusInf)};

  template <class At>
  ENCFAST_INLINE void take(Vec v, At at, int i) {
    parts[i] = max(parts[i], keep_or_least(v, at));
  }
  ENCFAST_INLINE float with(float least) const {
    const Vec m = max(max(parts[0], parts[1]), max(parts[2], parts[3]));
    for (int i = 0; i < kW; ++i) least = m[i] > least ? m[i] : least;
    return least;
  }
};

// What logits are measured from: their maximum, or 0 where all are -inf.
ENCFAST_INLINE float finite_or_zero(float m) { return m == kMinusInf ? 0.0f : m; }

}  // namespace
}  // namespace encfast::ENCFAST_ISA
