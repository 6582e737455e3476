// Random numbers of a router: which words of Philox they come from, and how (the same as
// encfast/ref/moe_noise.py, bit for bit).
//
// Written once for scalars and vectors. An Arithmetic has the types Float and Int (32 bits, with
// the operators of an integer) and
//
//   splat(float), to_float(Int)   exact
//   times(a, b), plus(a, b)       rounded by themselves: a compiler may not fuse them
//   bits(Float), from_bits(Int)   the same bits
#pragma once
#include "philox.h"

// On a GPU, device code alone: an Arithmetic may have no other.
#if defined(__CUDACC__)
#define ENCFAST_DRAWS static __device__ __forceinline__
#else
#define ENCFAST_DRAWS ENCFAST_PHILOX
#endif

namespace encfast {

constexpr uint32_t kGumbelDraws = 1, kPriorityDraws = 2, kJitterDraws = 3;

// The words of columns 4 group .. 4 group + 3 of a row.
template <class Word>
ENCFAST_DRAWS void draw_words(PhiloxKey key, Word group, uint32_t row, uint32_t purpose,
                              Word words[4]) {
  words[0] = group;
  words[1] = Word(row);
  words[2] = Word(0);
  words[3] = Word(purpose);
  philox4x32(key, words);
}

// In (0, 1), from the upper 23 bits of a word.
template <class A>
ENCFAST_DRAWS typename A::Float uniform_of(typename A::Int upper) {
  return A::times(A::to_float(upper * 2 + 1), A::splat(0x1p-24f));
}

// Natural logarithm of a positive normal number: the single-precision one of the Cephes library (S.
// Moshier).
template <class A>
ENCFAST_DRAWS typename A::Float log_of(typename A::Float x) {
  constexpr float kPolynomial[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                   1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                   -2.4999993993e-1f, 3.3333331174e-1f};
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const typename A::Int bits = A::bits(x) - kSqrtHalf;
  const typename A::Float exponent = A::to_float(bits >> 23);
  const typename A::Float m = A::plus(A::from_bits((bits & 0x7fffff) + kSqrtHalf), A::splat(-1.0f));
  typename A::Float p = A::splat(7.0376836292e-2f);
  for (float c : kPolynomial) p = A::plus(A::times(p, m), A::splat(c));
  const typename A::Float square = A::times(m, m);
  typename A::Float low = A::times(A::times(m, square), p);
  low = A::plus(low, A::times(exponent, A::splat(-2.12194440e-4f)));
  low = A::plus(low, A::times(square, A::splat(-0.5f)));
  return A::plus(A::plus(m, low), A::times(exponent, A::splat(0.693359375f)));
}

// Of the standard Gumbel distribution.
template <class A>
ENCFAST_DRAWS typename A::Float gumbel_of(typename A::Int upper) {
  return -log_of<A>(-log_of<A>(uniform_of<A>(upper)));
}

// In (1 - amount, 1 + amount).
template <class A>
ENCFAST_DRAWS typename A::Float jitter_of(typename A::Int upper, typename A::Float amount) {
  const typename A::Float centred =
      A::plus(A::times(uniform_of<A>(upper), A::splat(2.0f)), A::splat(-1.0f));
  return A::plus(A::times(centred, amount), A::splat(1.0f));
}

// Choices an expert has room for: max(ceil(tokens / experts * factor), least), in float64.
ENCFAST_DRAWS int64_t capacity_of(int64_t tokens, int64_t experts, double factor, int64_t least) {
  const double load = static_cast<double>(tokens) / static_cast<double>(experts) * factor;
  int64_t room = tokens;  // more than that come to no expert
  if (load < static_cast<double>(tokens)) {
    room = static_cast<int64_t>(load);
    if (static_cast<double>(room) < load) ++room;
  }
  return room > least ? room : least;
}

}  // namespace encfast
