// Fixed-width float vectors: 16 lanes with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON, plain
// C++).
//
// Arithmetic uses the compilers' vector extensions (`a + b`, `a > b ? a : b` on whole vectors, GCC
// >= 10 and clang); what they cannot express well stands here once per width. A vector also carries
// 32-bit words that are not floats (pairs of bf16): loads, stores, broadcasts and transpositions
// move bits.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 takes the undefined merge operand of its own AVX-512 intrinsics for an uninitialised
// variable.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ENCFAST_INLINE inline __attribute__((always_inline))

namespace encfast::ENCFAST_ISA {
namespace {

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kW = 16;
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kW = 8;
#elif defined(__x86_64__)
using Vec = __m128;
constexpr int kW = 4;
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int kW = 4;
#endif
typedef int32_t IntVec __attribute__((vector_size(4 * kW)));

ENCFAST_INLINE Vec load(const void* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ENCFAST_INLINE void store(void* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

ENCFAST_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__x86_64__)
  return _mm_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
ENCFAST_INLINE Vec zeros() { return splat(0.0f); }

// All lanes = the word at p, whatever its type.
ENCFAST_INLINE Vec broadcast(const float* p) {
  float word;
  std::memcpy(&word, p, sizeof(word));
  return splat(word);
}

// 0, 1, 2, ...
ENCFAST_INLINE Vec iota() {
  Vec v;
  for (int i = 0; i < kW; ++i) v[i] = static_cast<float>(i);
  return v;
}

// a * b + c
ENCFAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN, so a NaN in b survives and one in a does not.
ENCFAST_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

ENCFAST_INLINE Vec abs(Vec a) { return (Vec)((IntVec)a & 0x7fffffff); }

// Any lane with a > b.
ENCFAST_INLINE bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0;
#else
  IntVec m = (IntVec)(a > b);
  return (m[0] | m[1] | m[2] | m[3]) != 0;
#endif
}

// lo <= x <= hi ? v : otherwise
ENCFAST_INLINE Vec select_within(Vec lo, Vec x, Vec hi, Vec v, Vec otherwise) {
#if defined(__AVX512F__)
  __mmask16 m = _mm512_cmp_ps_mask(lo, x, _CMP_LE_OQ);
  m = _mm512_mask_cmp_ps_mask(m, x, hi, _CMP_LE_OQ);
  return _mm512_mask_mov_ps(otherwise, m, v);
#else
  IntVec m = (IntVec)(lo <= x) & (IntVec)(x <= hi);
  return (Vec)(((IntVec)v & m) | ((IntVec)otherwise & ~m));
#endif
}

// Lanes of v moved up by one; lane 0 is the last lane of `below`.
ENCFAST_INLINE Vec shift_in(Vec v, Vec below) {
#if defined(__AVX512F__)
  return (Vec)_mm512_alignr_epi32((__m512i)v, (__m512i)below, kW - 1);
#elif defined(__AVX2__)
  const __m256i middle = (__m256i)_mm256_permute2f128_ps(below, v, 0x21);
  return (Vec)_mm256_alignr_epi8((__m256i)v, middle, 12);
#else
  return Vec{below[3], v[0], v[1], v[2]};
#endif
}

ENCFAST_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float t = 0;
  for (int i = 0; i < kW; ++i) t += v[i];
  return t;
#endif
}

// Neighbours change places: 1, 0, 3, 2, ...
ENCFAST_INLINE Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(v, 0xb1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(v, 0xb1);
#elif defined(__x86_64__)
  return _mm_shuffle_ps(v, v, 0xb1);
#else
  return Vec{v[1], v[0], v[3], v[2]};
#endif
}

// ---- Transposition of a kW x kW block of words held in kW vectors ----

#if defined(__AVX512F__)
ENCFAST_INLINE void transpose(Vec r[kW]) {
  Vec t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = (__m512d)t[i], b = (__m512d)t[i + 1];
    const __m512d c = (__m512d)t[i + 2], d = (__m512d)t[i + 3];
    r[i] = (Vec)_mm512_unpacklo_pd(a, c);
    r[i + 1] = (Vec)_mm512_unpackhi_pd(a, c);
    r[i + 2] = (Vec)_mm512_unpacklo_pd(b, d);
    r[i + 3] = (Vec)_mm512_unpackhi_pd(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#elif defined(__AVX2__)
ENCFAST_INLINE void transpose(Vec r[kW]) {
  Vec t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#else
ENCFAST_INLINE void transpose(Vec r[kW]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
}
#endif

}  // namespace
}  // namespace encfast::ENCFAST_ISA
