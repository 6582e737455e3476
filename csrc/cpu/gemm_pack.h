// Rows of three dtypes as the operands of gemm_tile: words that lie along a row or across rows.
//
// A word is a float, or a pair of bf16 along the dimension that is summed over.
#pragma once
#include "attn_pack.h"
#include "gemm_tile.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n <= kW elements at p as floats, zeros behind them.
template <DType kT>
ENCFAST_INLINE Vec load_up_to(const char* p, int64_t n) {
  if (n >= kW) return load_as<kT>(p);
  return n > 0 ? load_partial_as<kT>(p, static_cast<int>(n)) : zeros();
}

template <DType kType>
struct FloatWord {
  static constexpr DType kT = kType;
  static constexpr int64_t kElements = 1;
  using Dot = DotF32;

  static ENCFAST_INLINE Vec along_row(const char* p, int64_t n) { return load_up_to<kT>(p, n); }
  static ENCFAST_INLINE Vec across_rows(const char* p, int64_t, int64_t, int64_t n) {
    return load_up_to<kT>(p, n);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pair {
  static constexpr DType kT = DType::kBFloat16;
  static constexpr int64_t kElements = 2;
  using Dot = DotBf16;

  static ENCFAST_INLINE Vec along_row(const char* p, int64_t n) {
    if (n >= 2 * kW) return load(p);
    alignas(64) char words[4 * kW] = {};
    if (n > 0) std::memcpy(words, p, n * 2);
    return load(words);
  }
  // Lane j: element j of this row and of the next, if there is one.
  static ENCFAST_INLINE Vec across_rows(const char* p, int64_t stride, int64_t rows, int64_t n) {
    const IntVec low = (IntVec)load_up_to<kT>(p, n) >> 16 & 0xffff;
    return rows > 1 ? (Vec)(low | (IntVec)load_up_to<kT>(p + stride, n)) : (Vec)low;
  }
};
#endif

// What rows of a dtype are multiplied as: pairs of bf16 where one instruction does that, else
// floats.
template <DType kT>
struct WordOf {
  using Type = FloatWord<kT>;
};
#if defined(__AVX512BF16__)
template <>
struct WordOf<DType::kBFloat16> {
  using Type = Bf16Pair;
};
#endif
template <DType kT>
using ProductWord = typename WordOf<kT>::Type;

template <class Word>
constexpr int64_t kWordBytes = Word::kElements * element_bytes(Word::kT);

// Words [0, words) along each of `rows` rows of `n` elements, dst[padded][kStride].
template <class Word, int64_t kStride>
void pack_along(const char* src, int64_t stride, int64_t rows, int64_t n, int64_t words,
                float* dst) {
  for (int64_t i = 0; i < rows; ++i, src += stride) {
    for (int64_t w = 0; w < words; w += kW) {
      const int64_t left = n - w * Word::kElements;
      store(dst + i * kStride + w, Word::along_row(src + w * kWordBytes<Word>, left));
    }
  }
  for (int64_t i = rows; i < round_up(rows, kShortTileRows); ++i) {
    std::memset(dst + i * kStride, 0, 4 * round_up(words, kW));
  }
}

// The same words of up to kLanes rows side by side, dst[words][kLanes].
template <class Word>
void pack_transposed(const char* src, int64_t stride, int64_t rows, int64_t n, int64_t words,
                     float* dst) {
  for (int64_t v = 0; v < kLanes; v += kW) {
    for (int64_t w = 0; w < words; w += kW) {
      const int64_t left = n - w * Word::kElements;
      const char* at = src + v * stride + w * kWordBytes<Word>;
      Vec r[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        r[i] = v + i < rows ? Word::along_row(at + i * stride, left) : zeros();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(dst + (w + i) * kLanes + v, r[i]);
    }
  }
}

// Words whose elements come from consecutive ones of `rows` rows, `n` columns, dst[words][width];
// columns up to the next vector are 0.
template <class Word, int64_t kWidth>
void pack_across(const char* src, int64_t stride, int64_t rows, int64_t n, float* dst) {
  for (int64_t i = 0; i < rows; i += Word::kElements, dst += kWidth) {
    const char* row = src + i * stride;
    for (int64_t j = 0; j < n; j += kW) {
      const char* at = row + j * element_bytes(Word::kT);
      store(dst + j, Word::across_rows(at, stride, rows - i, n - j));
    }
    for (int64_t j = round_up(n, kW); j < smaller(round_up(n, kLanes), kWidth); j += kW) {
      store(dst + j, zeros());
    }
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
