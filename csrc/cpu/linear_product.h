// The product of packed_linear on one group of rows and one panel of 32 columns, per format and
// instruction set:
//
//   C [rows][32]  (+)=  A [rows][kBlockWords]  .  B [words][32]
//
// A was packed for the group (linear_words.h), or is rows of x as they lie. AMX takes 32 packed
// rows at once in 2 x 2 tiles; the others kTileRows rows and two vectors in registers
// (gemm_tile.h).
//
// Each result is one chain of additions in the order of the words, whatever tile it falls into, so
// that it does not depend on the other rows.
#pragma once
#include "gemm_amx.h"
#include "gemm_tile.h"
#include "linear_words.h"

namespace encfast::ENCFAST_ISA {
namespace {

#if !defined(__AVX512BF16__)
// Pairs of bf16 as two fp32 products.
struct DotBf16Widened : FloatSums {
  static ENCFAST_INLINE Vec apply(Vec acc, Vec a, Vec b) {
    const int32_t kHigh = static_cast<int32_t>(0xffff0000);
    acc = fma((Vec)((IntVec)a << 16), (Vec)((IntVec)b << 16), acc);
    return fma((Vec)((IntVec)a & kHigh), (Vec)((IntVec)b & kHigh), acc);
  }
};
#endif

// Four unsigned bytes of a times four signed ones of b. Without VNNI in 16-bit halves, whose
// products and sums of two are exact; the byte instruction (pmaddubsw) would saturate.
struct DotInt8 {
  static ENCFAST_INLINE Vec add(Vec a, Vec b) { return (Vec)((IntVec)a + (IntVec)b); }
  static ENCFAST_INLINE Vec apply(Vec acc, Vec a, Vec b) {
#if defined(__AVX512VNNI__)
    // Not the intrinsic: GCC 12 copies the sums of a tile about for it, and spills half of them.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#elif defined(__AVX512F__)
    const __m512i x = (__m512i)a, w = (__m512i)b;
    const __m512i even = _mm512_madd_epi16(_mm512_srli_epi16(_mm512_slli_epi16(x, 8), 8),
                                           _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
    return (Vec)((IntVec)acc + (IntVec)even + (IntVec)odd);
#elif defined(__AVX2__)
    const __m256i x = (__m256i)a, w = (__m256i)b;
    const __m256i even = _mm256_madd_epi16(_mm256_srli_epi16(_mm256_slli_epi16(x, 8), 8),
                                           _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return (Vec)((IntVec)acc + (IntVec)even + (IntVec)odd);
#elif defined(__x86_64__)
    const __m128i x = (__m128i)a, w = (__m128i)b;
    const __m128i even = _mm_madd_epi16(_mm_srli_epi16(_mm_slli_epi16(x, 8), 8),
                                        _mm_srai_epi16(_mm_slli_epi16(w, 8), 8));
    const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(w, 8));
    return (Vec)((IntVec)acc + (IntVec)even + (IntVec)odd);
#else
    const IntVec x = (IntVec)a, w = (IntVec)b;
    IntVec total = (IntVec)acc + (x >> 24 & 255) * (w >> 24);
    for (int shift = 0; shift < 24; shift += 8) {
      total += (x >> shift & 255) * (w << (24 - shift) >> 24);
    }
    return (Vec)total;
#endif
  }
};

// Rows of words; the distance in bytes.
struct WordRows {
  const char* data;
  int64_t stride;
};

// By vectors: two at a time of the 32 / kW that make a panel. A block is so long that most sums are
// whole after one, and A and the panel's block come from L2 rather than L1, which costs nothing:
// each of their cache lines serves 16 words times the rows or panels it meets.
template <LinearFormat kF, class X, class Weight, class Dot>
struct VectorProduct {
  static constexpr LinearFormat kFormat = kF;
  using XWords = X;
  using WeightWords = Weight;
  static constexpr int kElements = X::kElements;
  static constexpr int kBlockWords = 384;
  static constexpr bool kTakesAnyRows = true;      // else packed ones only
  static constexpr int kRowStep = kShortTileRows;  // rows of A and C are rounded up to this
  static constexpr int kGroupRows = 4 * kTileRows;

  static void begin() {}
  static void end() {}
  static void run(WordRows a, int rows, const float* b, int words, float* c, int ldc,
                  bool accumulate) {
    for (int j = 0; j < kPanel; j += 2 * kW) {
      gemm_rows<Dot, 2>(StridedA(a.data, a.stride), rows, b + j, kPanel, words, c + j, ldc,
                        accumulate);
    }
  }
};

using Fp32Product = VectorProduct<LinearFormat::kFp32, Fp32Words, Fp32Words, DotF32>;

#if defined(__AMX_BF16__)

template <LinearFormat kF, class X, class Weight, TileTerms kTerms>
struct AmxProduct {
  static constexpr LinearFormat kFormat = kF;
  using XWords = X;
  using WeightWords = Weight;
  static constexpr int kElements = X::kElements;
  // 16 KiB of A, read for every panel, and a panel's block of 16 KiB share an L1 of 48 KiB.
  static constexpr int kBlockWords = 128;
  static constexpr bool kTakesAnyRows = false;
  static constexpr int kRowStep = 16;
  static constexpr int kGroupRows = 32;

  static void begin() { amx_begin(); }
  static void end() { amx_end(); }
  static void run(WordRows a, int rows, const float* b, int words, float* c, int ldc,
                  bool accumulate) {
    const float* packed = reinterpret_cast<const float*>(a.data);
    amx_gemm<kTerms>({packed, kBlockWords, 16 * kBlockWords, 16}, {b, kPanel, 16, 16 * kPanel},
                     rows, kPanel, words / 16, c, ldc, accumulate);
  }
};
using Bf16Product = AmxProduct<LinearFormat::kBf16, Bf16Words, Bf16Words, TileTerms::kBf16>;
using Int8Product = AmxProduct<LinearFormat::kInt8, Uint8Words, Int8Words, TileTerms::kInt8>;

#else

#if defined(__AVX512BF16__)
using DotBf16Words = DotBf16;
#else
using DotBf16Words = DotBf16Widened;
#endif
using Bf16Product = VectorProduct<LinearFormat::kBf16, Bf16Words, Bf16Words, DotBf16Words>;
using Int8Product = VectorProduct<LinearFormat::kInt8, Uint8Words, Int8Words, DotInt8>;

#endif

}  // namespace
}  // namespace encfast::ENCFAST_ISA
