// The one register tile behind every product of the vector (non-AMX) kernels.
//
//                    b(k): kVecs vectors
//                       [ b0 ][ b1 ]
//   a(i, k): a word  -> c[i][0] c[i][1]        A: FixedA or StridedA
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

// A where words lie at distances known to the compiler: word k of row i at first[i * kRowStride + k
// * kColStride].
template <int kRowStride, int kColStride>
struct FixedA {
  const float* first;

  ENCFAST_INLINE FixedA from(int i) const { return {first + i * kRowStride}; }
  ENCFAST_INLINE Vec word(int i, int k) const {
    return broadcast(first + i * kRowStride + k * kColStride);
  }
  ENCFAST_INLINE void next() {}
};

// A of rows that lie `stride` bytes apart, such as a caller's. Every third row has a pointer, which
// goes from word to word: an x86 address reaches the two rows behind it, and twelve pointers would
// be more than there are registers.
struct StridedA {
  const char* first;
  int64_t stride;
  const char* third[(kTileRows + 2) / 3];

  ENCFAST_INLINE StridedA(const char* first_in, int64_t stride_in)
      : first(first_in), stride(stride_in) {
#pragma GCC unroll 4
    for (int i = 0; i < (kTileRows + 2) / 3; ++i) third[i] = first + 3 * i * stride;
  }
  ENCFAST_INLINE StridedA from(int i) const { return {first + i * stride, stride}; }
  ENCFAST_INLINE Vec word(int i, int) const {
    return broadcast(reinterpret_cast<const float*>(third[i / 3] + i % 3 * stride));
  }
  ENCFAST_INLINE void next() {
#pragma GCC unroll 4
    for (int i = 0; i < (kTileRows + 2) / 3; ++i) {
      third[i] += sizeof(float);
      asm("" : "+r"(third[i]));  // else GCC makes a pointer of each row again
    }
  }
};

// C[i][0:kVecs] (+)= sum over k < n_k of a(i, k) * b[k * ldb + 0:kVecs], then + bias[0:kVecs], if
// there is one.
template <class Dot, int kRows, int kVecs, class A>
ENCFAST_INLINE void gemm_tile(A a, const float* b, int ldb, int n_k, float* c, int ldc,
                              bool accumulate, const float* bias = nullptr) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = zeros();
  }
#pragma GCC unroll 2
  for (int k = 0; k < n_k; ++k, a.next()) {
    Vec b_k[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) b_k[v] = load(b + static_cast<int64_t>(k) * ldb + v * kW);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec a_ik = a.word(i, k);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Dot::apply(acc[i][v], a_ik, b_k[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* p = c + i * ldc + v * kW;
      Vec sum = accumulate ? Dot::add(load(p), acc[i][v]) : acc[i][v];
      if (bias) sum = Dot::add(sum, load(bias + v * kW));
      store(p, sum);
    }
  }
}

// All rows [0, rows) of C, `rows` a multiple of kShortTileRows.
template <class Dot, int kVecs, class A>
inline void gemm_rows(A a, int rows, const float* b, int ldb, int n_k, float* c, int ldc,
                      bool accumulate, const float* bias = nullptr) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    gemm_tile<Dot, kTileRows, kVecs>(a.from(i), b, ldb, n_k, c + i * ldc, ldc, accumulate, bias);
  }
  for (; i < rows; i += kShortTileRows) {
    gemm_tile<Dot, kShortTileRows, kVecs>(a.from(i), b, ldb, n_k, c + i * ldc, ldc, accumulate,
                                          bias);
  }
}

template <class Dot, int kVecs, int kRowStride, int kColStride>
inline void gemm_rows(const float* a, int rows, const float* b, int ldb, int n_k, float* c, int ldc,
                      bool accumulate) {
  gemm_rows<Dot, kVecs>(FixedA<kRowStride, kColStride>{a}, rows, b, ldb, n_k, c, ldc, accumulate);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
