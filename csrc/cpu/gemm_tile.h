// The one register tile behind every product of the vector (non-AMX) attention kernels.
//
//                    b(k): kVecs vectors
//                       [ b0 ][ b1 ]
//   a(i, k): a word  -> c[i][0] c[i][1]
//
// C[kRows][kVecs vectors] stays in registers over all k: AVX-512 12 x 2 of 32, AVX2 6 x 2 of 16.
// Per k: kVecs vector loads, kRows words broadcast from memory, and kRows * kVecs multiply-adds,
// which are the bound.
//
// What C held before is added at the end: a sum over many blocks of k is then one of partial sums,
// whose rounding grows with the number of blocks and not with the number of terms.
//
// A word is a float, or a pair of bf16 that one instruction multiplies and adds (DotBf16).
#pragma once
#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

struct FloatSums {
  static ENCFAST_INLINE Vec add(Vec a, Vec b) { return a + b; }
};

struct DotF32 : FloatSums {
  static ENCFAST_INLINE Vec apply(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
struct DotBf16 : FloatSums {
  static ENCFAST_INLINE Vec apply(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Rows of C per tile: a long tile, and a short one for what is left. Three dimensions of C are
// rounded up to the short tile: keys, and the head size when it is the row dimension.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kShortTileRows = 4, kHeadTileRows = 8;
#else
constexpr int kTileRows = 6, kShortTileRows = 2, kHeadTileRows = 4;
#endif

// C[i][0:kVecs] (+)= sum over k < n_k of a[i * kRowStride + k * kColStride] * b[k * ldb + 0:kVecs].
template <class Dot, int kRows, int kVecs, int kRowStride, int kColStride>
ENCFAST_INLINE void gemm_tile(const float* a, const float* b, int ldb, int n_k, float* c, int ldc,
                              bool accumulate) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = zeros();
  }
#pragma GCC unroll 2
  for (int k = 0; k < n_k; ++k) {
    Vec b_k[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) b_k[v] = load(b + static_cast<int64_t>(k) * ldb + v * kW);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec a_ik = broadcast(a + i * kRowStride + k * kColStride);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Dot::apply(acc[i][v], a_ik, b_k[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* p = c + i * ldc + v * kW;
      store(p, accumulate ? Dot::add(load(p), acc[i][v]) : acc[i][v]);
    }
  }
}

// All rows [0, rows) of C, `rows` a multiple of kShortTileRows.
template <class Dot, int kVecs, int kRowStride, int kColStride>
inline void gemm_rows(const float* a, int rows, const float* b, int ldb, int n_k, float* c, int ldc,
                      bool accumulate) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    gemm_tile<Dot, kTileRows, kVecs, kRowStride, kColStride>(a + i * kRowStride, b, ldb, n_k,
                                                             c + i * ldc, ldc, accumulate);
  }
  for (; i < rows; i += kShortTileRows) {
    gemm_tile<Dot, kShortTileRows, kVecs, kRowStride, kColStride>(a + i * kRowStride, b, ldb, n_k,
                                                                  c + i * ldc, ldc, accumulate);
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
