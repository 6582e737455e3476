// exp2, log, tanh and the normal distribution on vectors. Coefficients of exp2 are minimax in
// relative error on [0, 1); those of log and tanh are the single-precision ones of the Cephes
// library (S. Moshier); those of the normal distribution are minimax in its error.
#pragma once
#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

// 2^f for f in [0, 1]. Relative error: degree 3 7.5e-5 (results to be rounded to bf16 themselves,
// which loses 2e-3), degree 4 2.6e-6 (values to be computed with before that), degree 6 2e-9 plus
// fp32 rounding.
template <int kDegree>
ENCFAST_INLINE Vec exp2_fraction(Vec f) {
  static_assert(kDegree == 3 || kDegree == 4 || kDegree == 6, "no coefficients of this degree");
  Vec p;
  if constexpr (kDegree == 3) {
    p = fma(splat(0.0780245215f), f, splat(0.226067156f));
    p = fma(p, f, splat(0.695833564f));
    return fma(p, f, splat(0.999925196f));
  } else if constexpr (kDegree == 4) {
    p = fma(splat(0.0135341678f), f, splat(0.0520114601f));
    p = fma(p, f, splat(0.241442755f));
    p = fma(p, f, splat(0.693003833f));
    return fma(p, f, splat(1.00000262f));
  } else {
    p = fma(splat(0.000217022554f), f, splat(0.00124396884f));
    p = fma(p, f, splat(0.00967884064f));
    p = fma(p, f, splat(0.0554833412f));
    p = fma(p, f, splat(0.24022983f));
    p = fma(p, f, splat(0.693147004f));
    return fma(p, f, splat(1.0f));
  }
}

// Smaller powers of two count as 0: beside 1 they vanish, and their products with numbers of common
// size would be subnormal, which costs an assist of hundreds of cycles each.
constexpr float kLeastExponent = -100.0f;

// 2^x; 0 for x below kLeastExponent (-inf included), NaN for NaN.
template <int kDegree>
ENCFAST_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // Toward -inf, exceptions suppressed. scalef takes the same floor of x itself.
  const Vec f = _mm512_reduce_ps(x, 0x09);
  const __mmask16 counts = _mm512_cmp_ps_mask(x, splat(kLeastExponent), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(counts, exp2_fraction<kDegree>(f), x);
#else
  // 2^-127 is spelled 0 below.
  const IntVec small = (IntVec)(x < splat(kLeastExponent));
  const Vec t = (Vec)(((IntVec)x & ~small) | ((IntVec)splat(-127.0f) & small));
#if defined(__AVX2__)
  const Vec n = _mm256_floor_ps(t);
  const IntVec k = (IntVec)_mm256_cvtps_epi32(n);
#else
  IntVec k = __builtin_convertvector(t, IntVec);
  k += (IntVec)(__builtin_convertvector(k, Vec) > t);  // truncation to floor; true is -1
  const Vec n = __builtin_convertvector(k, Vec);
#endif
  return exp2_fraction<kDegree>(t - n) * (Vec)((k + 127) << 23);
#endif
}

// Natural logarithm of x >= 1 (finite); NaN for NaN.
ENCFAST_INLINE Vec log(Vec x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): subtract before splitting off the exponent.
  const int32_t kSqrtHalf = 0x3f3504f3;
  const IntVec bits = (IntVec)x - kSqrtHalf;
  const Vec e = __builtin_convertvector(bits >> 23, Vec);
  const Vec m = (Vec)((bits & 0x007fffff) + kSqrtHalf) - splat(1.0f);
  Vec p = fma(splat(7.0376836292e-2f), m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  const Vec m2 = m * m;
  p = fma(p * m, m2, fma(e, splat(-2.12194440e-4f), m2 * splat(-0.5f))) + m;
  // x - x is 0, or NaN where x is not finite.
  return fma(e, splat(0.693359375f), p) + (x - x);
}

ENCFAST_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  // Small arguments by a polynomial: 1 - 2 / (e^2a + 1) would lose their relative accuracy.
  const Vec z = a * a;
  Vec p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(p * z, a, a);
  const Vec e = exp2<6>(a * splat(2.0f * kLog2e));
  // From 10 on the quotient rounds to 1; the cut keeps e finite on every path.
  const Vec quotient = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  const Vec large = select_within(splat(10.0f), a, splat(__builtin_inff()), splat(1.0f), quotient);
  const Vec t = select_within(zeros(), a, splat(0.625f), small, large);
  return (Vec)((IntVec)t | ((IntVec)x & (int32_t)0x80000000));
}

// (1 + erf(x / sqrt(2))) / 2, as 2^q(|x|) for negative x, so that the lower tail keeps its relative
// accuracy; q falls without end past its interval [0, 6]. Absolute error: kExact 2e-8 plus fp32
// rounding, else 3e-6 of the value plus 5e-7 (results to be rounded to bf16 or fp16).
template <bool kExact>
ENCFAST_INLINE Vec normal_cdf(Vec x) {
  const Vec a = abs(x);
  Vec q;
  if constexpr (kExact) {
    q = fma(splat(-1.695378536e-8f), a, splat(5.522405886e-7f));
    q = fma(q, a, splat(-7.667424473e-6f));
    q = fma(q, a, splat(5.724815277e-5f));
    q = fma(q, a, splat(-2.140417055e-4f));
    q = fma(q, a, splat(-1.337437485e-4f));
    q = fma(q, a, splat(7.105489949e-3f));
    q = fma(q, a, splat(-5.254373460e-2f));
    q = fma(q, a, splat(-4.591890948e-1f));
    q = fma(q, a, splat(-1.151107775f));
    q = fma(q, a, splat(-9.999999396e-1f));
  } else {
    q = fma(splat(-1.475317990e-6f), a, splat(5.448662480e-5f));
    q = fma(q, a, splat(-8.762768873e-4f));
    q = fma(q, a, splat(8.308460297e-3f));
    q = fma(q, a, splat(-5.360052312e-2f));
    q = fma(q, a, splat(-4.587508607e-1f));
    q = fma(q, a, splat(-1.151172849f));
    q = fma(q, a, splat(-9.999984661e-1f));
  }
  const Vec lower = exp2<kExact ? 6 : 4>(q);
  return select_within(zeros(), x, splat(__builtin_inff()), splat(1.0f) - lower, lower);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
