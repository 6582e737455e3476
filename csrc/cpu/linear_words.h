// Rows of x or of a weight as the words that the products of packed_linear take: one fp32, two bf16
// or four int8 to 4 bytes.
#pragma once
#include "dtype.h"
#include "packed_linear.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Nearest integer, half to even, in each lane.
ENCFAST_INLINE IntVec round_to_int(Vec v) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtps_epi32(v);
#elif defined(__x86_64__)
  return (IntVec)_mm_cvtps_epi32(v);
#else
  return (IntVec)vcvtnq_s32_f32((float32x4_t)v);
#endif
}

// How a row is quantised: integers are round(x * inverse) + zero, x is about (integer - zero) *
// scale. A row that holds NaN or infinity has a scale that is NaN.
struct RowScale {
  float inverse, scale;
  int32_t zero, reserved;
};

struct Fp32Words {
  static constexpr int kElements = 1;
  static ENCFAST_INLINE void put(char* dst, Vec v, Vec, IntVec) { store(dst, v); }
};

struct Bf16Words {
  static constexpr int kElements = 2;
  static ENCFAST_INLINE void put(char* dst, Vec v, Vec, IntVec) {
    store_as<DType::kBFloat16>(dst, v);
  }
};

// -127..127, of weights.
struct Int8Words {
  static constexpr int kElements = 4;
  static ENCFAST_INLINE void put(char* dst, Vec v, Vec inverse, IntVec) {
    const IntVec q = round_to_int(v * inverse);
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_cvtsepi32_epi8((__m512i)q));
#else
    for (int i = 0; i < kW; ++i) dst[i] = static_cast<char>(q[i]);
#endif
  }
};

// 0..255, of x: the sum of two roundings may fall one outside.
struct Uint8Words {
  static constexpr int kElements = 4;
  static ENCFAST_INLINE void put(char* dst, Vec v, Vec inverse, IntVec zero) {
    const IntVec q = round_to_int(v * inverse) + zero;
#if defined(__AVX512F__)
    const __m512i positive = _mm512_max_epi32((__m512i)q, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_cvtusepi32_epi8(positive));
#else
    for (int i = 0; i < kW; ++i) {
      dst[i] = static_cast<char>(q[i] < 0 ? 0 : q[i] > 255 ? 255 : q[i]);
    }
#endif
  }
};

// n elements at src, then zeros, as `words` words at dst.
template <class Words, DType kT>
inline void pack_words(const char* src, int64_t n, int64_t words, RowScale s, float* dst) {
  constexpr int kBytes = 4 / Words::kElements;
  char* out = reinterpret_cast<char*>(dst);
  const Vec inverse = splat(s.inverse);
  const IntVec zero = IntVec{} + s.zero;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    Words::put(out + i * kBytes, load_as<kT>(src + i * element_bytes(kT)), inverse, zero);
  }
  if (i < n) {
    char tail[4 * kW];
    const Vec v = load_partial_as<kT>(src + i * element_bytes(kT), static_cast<int>(n - i));
    Words::put(tail, v, inverse, zero);
    std::memcpy(out + i * kBytes, tail, (n - i) * kBytes);
  }
  if (n * kBytes < 4 * words) std::memset(out + n * kBytes, 0, 4 * words - n * kBytes);
}

// Least and greatest of a row and 0; both NaN if it holds NaN or infinity.
struct Range {
  float low, high;
};

template <DType kT>
inline Range row_range(const char* src, int64_t n) {
  Vec high = zeros(), low = zeros(), poison = zeros();  // low: the greatest of -x
  for (int64_t i = 0; i < n; i += kW) {
    const char* at = src + i * element_bytes(kT);
    const Vec v = n - i >= kW ? load_as<kT>(at) : load_partial_as<kT>(at, static_cast<int>(n - i));
    high = max(high, v);
    low = max(low, zeros() - v);
    poison = fma(v, zeros(), poison);  // NaN from the first value on that is not finite
  }
  Range r{0, 0};
  for (int i = 0; i < kW; ++i) {
    r.high = high[i] > r.high ? high[i] : r.high;
    r.low = -low[i] < r.low ? -low[i] : r.low;
  }
  const float not_finite = sum(poison);
  return {r.low + not_finite, r.high + not_finite};
}

// Spans up to this quantise to nothing but zeros: their inverse would overflow.
constexpr float kTinySpan = 1e-30f;

// Of a weight's row: -127..127 for -top..top.
template <DType kT>
inline RowScale symmetric_scale(const char* src, int64_t n) {
  const Range r = row_range<kT>(src, n);
  const float top = -r.low > r.high ? -r.low : r.high;
  if (!(top > kTinySpan)) return {0, top * 0, 0, 0};
  return {127.0f / top, top / 127.0f, 0, 0};
}

// Of a row of x: 0..255 for low..high.
template <DType kT>
inline RowScale asymmetric_scale(const char* src, int64_t n) {
  const Range r = row_range<kT>(src, n);
  const float span = r.high - r.low;
  if (!(span > kTinySpan && span < __builtin_inff())) return {0, (span - span) * 0, 0, 0};
  const float inverse = 255.0f / span;
  return {inverse, span / 255.0f, static_cast<int32_t>(__builtin_rintf(-r.low * inverse)), 0};
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
