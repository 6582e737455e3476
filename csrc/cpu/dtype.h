// Rows of fp32, bf16 and fp16 to and from float vectors. Stores round to nearest even.
#pragma once
#include "varlen_attn.h"
#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t element_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

template <DType kT>
struct DTypeTag {
  static constexpr DType value = kT;
};

// Calls f with the tag of a run-time dtype.
template <class F>
ENCFAST_INLINE void with_dtype(DType t, F f) {
  switch (t) {
    case DType::kFloat32:
      return f(DTypeTag<DType::kFloat32>{});
    case DType::kBFloat16:
      return f(DTypeTag<DType::kBFloat16>{});
    case DType::kFloat16:
      return f(DTypeTag<DType::kFloat16>{});
  }
}

ENCFAST_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
ENCFAST_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// Only the portable build uses the scalar conversions.
[[maybe_unused]] inline float float_from_half(uint16_t h) {
  const uint32_t kExponent = 0x0f800000;
  uint32_t u = (h & 0x7fffu) << 13;
  const uint32_t exponent = u & kExponent;
  u += (127u - 15u) << 23;
  float x;
  if (exponent == kExponent) {  // inf or NaN
    x = float_of(u + ((128u - 16u) << 23));
  } else if (exponent == 0) {  // subnormal: let the subtraction normalise it
    x = float_of(u + (1u << 23)) - float_of(113u << 23);
  } else {
    x = float_of(u);
  }
  return float_of(bits_of(x) | (h & 0x8000u) << 16);
}

[[maybe_unused]] inline uint16_t half_from_float(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  uint32_t u = bits_of(x) & 0x7fffffffu;
  if (u >= 0x47800000u) {  // 65536 and above, inf, NaN
    u = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (u < 0x38800000u) {  // subnormal half: adding 0.5 rounds at the right bit
    u = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
  } else {
    u = (u - ((127u - 15u) << 23) + 0xfffu + (u >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | u);
}

// kW elements of dtype kT at p, as floats.
template <DType kT>
ENCFAST_INLINE Vec load_as(const void* p) {
  if constexpr (kT == DType::kFloat32) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (kT == DType::kFloat16) return _mm512_cvtph_ps(h);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if constexpr (kT == DType::kFloat16) return _mm256_cvtph_ps(h);
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
    uint16_t h[kW];
    std::memcpy(h, p, sizeof(h));
    Vec v;
    for (int i = 0; i < kW; ++i) {
      v[i] = kT == DType::kFloat16 ? float_from_half(h[i]) : float_of(uint32_t{h[i]} << 16);
    }
    return v;
#endif
  }
}

// One element of dtype kT at p.
template <DType kT>
ENCFAST_INLINE float load_element(const void* p) {
  if constexpr (kT == DType::kFloat32) {
    float x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  } else {
    uint16_t h;
    std::memcpy(&h, p, sizeof(h));
    return kT == DType::kFloat16 ? float_from_half(h) : float_of(uint32_t{h} << 16);
  }
}

// bf16 of each lane in its lower half word.
ENCFAST_INLINE IntVec round_to_bf16(Vec v) {
  const IntVec bits = (IntVec)v;
  const IntVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const IntVec nan = (IntVec)(v != v);
  return (rounded & ~nan) | (nan & 0x7fc0);
}

template <DType kT>
ENCFAST_INLINE void store_as(void* p, Vec v) {
  if constexpr (kT == DType::kFloat32) {
    store(p, v);
  } else if constexpr (kT == DType::kBFloat16) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#elif defined(__AVX512F__)
    const __m512i h = (__m512i)round_to_bf16(v);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(h));
#else
    const IntVec h = round_to_bf16(v);
    uint16_t out[kW];
    for (int i = 0; i < kW; ++i) out[i] = static_cast<uint16_t>(h[i]);
    std::memcpy(p, out, sizeof(out));
#endif
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    uint16_t out[kW];
    for (int i = 0; i < kW; ++i) out[i] = half_from_float(v[i]);
    std::memcpy(p, out, sizeof(out));
#endif
  }
}

// Whether stream_as<kT> exists: where one vector fills one cache line. A line stored past
// the caches in several parts may reach memory as several partial writes.
template <DType kT>
constexpr bool kCanStream = kT == DType::kFloat32 && sizeof(Vec) == 64;

// Stores a whole line past the caches, which saves reading it first. p is aligned to 64 bytes.
// end_streams() must follow before another thread may read it.
template <DType kT>
ENCFAST_INLINE void stream_as([[maybe_unused]] void* p, [[maybe_unused]] Vec v) {
  static_assert(kCanStream<kT>, "a vector of this dtype is no whole line");
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#endif
}
inline void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first n < kW elements at p; the other lanes are 0.
template <DType kT>
ENCFAST_INLINE Vec load_partial_as(const void* p, int n) {
  alignas(64) char row[4 * kW] = {};
  std::memcpy(row, p, n * element_bytes(kT));
  return load_as<kT>(row);
}
template <DType kT>
ENCFAST_INLINE void store_partial_as(void* p, Vec v, int n) {
  alignas(64) char row[4 * kW];
  store_as<kT>(row, v);
  std::memcpy(p, row, n * element_bytes(kT));
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
