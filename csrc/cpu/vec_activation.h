// Activations and their derivatives on vectors.
#pragma once
#include "activation.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr float kInvSqrt2Pi = 0.398942280f;   // 1 / sqrt(2 pi)
constexpr float kSqrt2OverPi = 0.797884561f;  // sqrt(2 / pi), of the tanh form of GELU
constexpr float kGeluCubic = 0.044715f;

// An activation and its derivative.
struct Activated {
  Vec value, slope;
};

// kExact: for fp32 results; the others are rounded to half the digits.
template <Activation kA, bool kExact>
struct Act;

template <bool kExact>
struct Act<Activation::kRelu, kExact> {
  static ENCFAST_INLINE Vec value(Vec x) { return max(zeros(), x); }
  static ENCFAST_INLINE Activated both(Vec x) {
    const Vec low = splat(-__builtin_inff());
    return {value(x), select_within(low, x, zeros(), zeros(), splat(1.0f))};
  }
};

template <bool kExact>
struct Act<Activation::kSilu, kExact> {
  // By exp(-|x|), which cannot overflow.
  static ENCFAST_INLINE Vec sigmoid(Vec x) {
    const Vec e = exp2<kExact ? 6 : 4>(abs(x) * splat(-kLog2e));
    const Vec s = splat(1.0f) / (e + splat(1.0f));
    return select_within(zeros(), x, splat(__builtin_inff()), s, e * s);
  }
  static ENCFAST_INLINE Vec value(Vec x) { return x * sigmoid(x); }
  static ENCFAST_INLINE Activated both(Vec x) {
    const Vec s = sigmoid(x), v = x * s;
    return {v, fma(v, splat(1.0f) - s, s)};
  }
};

template <bool kExact>
struct Act<Activation::kGelu, kExact> {
  static ENCFAST_INLINE Vec value(Vec x) { return x * normal_cdf<kExact>(x); }
  static ENCFAST_INLINE Activated both(Vec x) {
    const Vec exponent = x * x * splat(-0.5f * kLog2e), p = normal_cdf<kExact>(x);
    const Vec density = exp2<kExact ? 6 : 4>(exponent) * splat(kInvSqrt2Pi);
    return {x * p, fma(x, density, p)};
  }
};

template <bool kExact>
struct Act<Activation::kGeluTanh, kExact> {
  // From |x| = 10 on the tanh is 1; the bound keeps its cubic argument finite. NaN stays NaN.
  static ENCFAST_INLINE Vec bounded(Vec x) { return -max(splat(-10.0f), -max(splat(-10.0f), x)); }
  static ENCFAST_INLINE Vec curve(Vec x) {
    return tanh(x * fma(x * x, splat(kSqrt2OverPi * kGeluCubic), splat(kSqrt2OverPi)));
  }
  static ENCFAST_INLINE Vec value(Vec x) {
    return x * fma(curve(bounded(x)), splat(0.5f), splat(0.5f));
  }
  static ENCFAST_INLINE Activated both(Vec x) {
    const Vec b = bounded(x), t = curve(b), p = fma(t, splat(0.5f), splat(0.5f));
    const Vec inner = fma(b * b, splat(3 * kSqrt2OverPi * kGeluCubic), splat(kSqrt2OverPi));
    return {x * p, fma(b * splat(0.5f) * inner, fma(-t, t, splat(1.0f)), p)};
  }
};

template <bool kExact>
struct Act<Activation::kNone, kExact> {
  static ENCFAST_INLINE Vec value(Vec x) { return x; }
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
