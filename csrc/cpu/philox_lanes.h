// Philox on vectors: every lane is a generator of its own.
//
// On AVX-512 a round is 4 multiplications, 6 shuffles and 2 ternary xors, half of them on each of
// two ports.
#pragma once
#include "../common/philox.h"
#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

typedef uint32_t UIntVec __attribute__((vector_size(4 * kW)));

struct PhiloxLanes {
  UIntVec v;

  PhiloxLanes() = default;
  ENCFAST_INLINE explicit PhiloxLanes(uint32_t word) : v(UIntVec{} + word) {}
  ENCFAST_INLINE explicit PhiloxLanes(UIntVec words) : v(words) {}
  ENCFAST_INLINE PhiloxLanes operator^(PhiloxLanes o) const { return PhiloxLanes(v ^ o.v); }
};

#if defined(__AVX512F__)
constexpr _MM_PERM_ENUM kOddToEven = _MM_PERM_DDBB, kEvenToOdd = _MM_PERM_CCAA;
#elif defined(__AVX2__)
constexpr int kOddToEven = 0xf5, kEvenToOdd = 0xa0;
#endif

// Products of even and of odd lanes are formed apart, 64 bits each, and their halves sorted out.
ENCFAST_INLINE void philox_multiply(PhiloxLanes a, uint32_t m, PhiloxLanes* high,
                                    PhiloxLanes* low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32((__m512i)a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_shuffle_epi32((__m512i)a.v, kOddToEven), factor);
  high->v = (UIntVec)_mm512_mask_shuffle_epi32(odd, 0x5555, even, kOddToEven);
  low->v = (UIntVec)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, kEvenToOdd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32((__m256i)a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_shuffle_epi32((__m256i)a.v, kOddToEven), factor);
  high->v = (UIntVec)_mm256_blend_epi32(_mm256_shuffle_epi32(even, kOddToEven), odd, 0xaa);
  low->v = (UIntVec)_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, kEvenToOdd), 0xaa);
#elif defined(__x86_64__)
  const __m128i factor = _mm_set1_epi32(static_cast<int>(m));
  const __m128i even = _mm_mul_epu32((__m128i)a.v, factor);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a.v, 32), factor);
  const __m128i odd_lanes = _mm_set_epi32(-1, 0, -1, 0);
  high->v = (UIntVec)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_and_si128(odd, odd_lanes));
  low->v = (UIntVec)_mm_or_si128(_mm_andnot_si128(odd_lanes, even), _mm_slli_epi64(odd, 32));
#else
  for (int i = 0; i < kW; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * m;
    high->v[i] = static_cast<uint32_t>(product >> 32);
    low->v[i] = static_cast<uint32_t>(product);
  }
#endif
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
