// Packed bf16 blocks, common to the vdpbf16ps and the AMX products. A word is a pair of bf16; both
// instructions multiply pairs and add into one fp32 lane.
//
//   row      [D / 2] words: the tensor's own row, pairs along d
//   lanes    [D / 2][kLanes] words: rows transposed word by word (query tiles)
//   pairs    [rows / 2][D] words: element d of rows 2i and 2i + 1 side by side
//   weights  P^T or dS^T, [keys / 2][kLanes] words: pairs along keys
//   weight rows  the same, [keys][kQueryBlock / 2] words: pairs along queries
#pragma once
#include "attn_pack.h"

#if defined(__AVX512BF16__)

namespace encfast::ENCFAST_ISA {
namespace {

template <int kD>
struct Bf16Format {
  static constexpr int kHeadWidth = kD;
  static constexpr int kRowWords = kD / 2;
  static constexpr int kExp2Degree = 3;
  static constexpr bool kExact = false;
  static constexpr bool kRowsServeAll = false;
  static constexpr int kQueryBlock = 2 * kLanes;
  static constexpr int kWeightRowWords = kQueryBlock / 2;

  static void pack_rows(const RowsView& src, int n, int n_padded, int D, float* dst) {
    constexpr int kRowBytes = 2 * kD;
    char* out = reinterpret_cast<char*>(dst);
    const int whole = 2 * D / 64 * 64;
    const __mmask32 tail = static_cast<__mmask32>((1ull << (2 * D - whole) / 2) - 1);
    for (int i = 0; i < n; ++i, out += kRowBytes) {
      const char* row = src.data + i * src.stride;
      for (int at = 0; at < whole; at += 64) store(out + at, load(row + at));
      if (whole == kRowBytes) continue;
      _mm512_storeu_si512(out + whole, _mm512_maskz_loadu_epi16(tail, row + whole));
      for (int at = whole + 64; at < kRowBytes; at += 64) store(out + at, zeros());
    }
    std::memset(out, 0, static_cast<int64_t>(kRowBytes) * (n_padded - n));
  }

  static void pack_lanes(const float* rows, int vecs, int D, float* lanes) {
    transpose_to_lanes(rows, kRowWords, vecs, static_cast<int>(round_up(D, 2 * kW)) / 2, lanes);
  }

  // Words d .. d + 15 of the pair of packed rows at `even` and its successor.
  static ENCFAST_INLINE Vec pair_of_rows(const float* even, int d) {
    const auto* a = reinterpret_cast<const __m256i*>(reinterpret_cast<const char*>(even) + 2 * d);
    const auto* b = reinterpret_cast<const __m256i*>(reinterpret_cast<const char*>(a) + 2 * kD);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(b)), 16);
    return (Vec)_mm512_or_si512(low, high);
  }

  static const float* pairs(const float* rows, int n, float* dst) {
    for (int i = 0; i < n; i += 2) {
      for (int d = 0; d < kD; d += kW) {
        store(dst + i / 2 * static_cast<int64_t>(kD) + d,
              pair_of_rows(rows + i * static_cast<int64_t>(kRowWords), d));
      }
    }
    return dst;
  }

  static ENCFAST_INLINE void put_weights(float* w, int key, int v, Vec even, Vec odd) {
    alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both);
    _mm512_storeu_si512(w + key / 2 * kLanes + v * kW, words);
  }

  static ENCFAST_INLINE void put_weight_rows(float* w, int key, int lane, Vec even, Vec odd) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    float* row = w + key * kWeightRowWords + lane / 2;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + kWeightRowWords),
                        _mm512_extracti64x4_epi64(both, 1));
  }
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA

#endif  // __AVX512BF16__
