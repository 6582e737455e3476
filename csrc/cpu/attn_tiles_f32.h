// Attention products in fp32 on the vector units; bf16 and fp16 inputs are widened while packing.
//
// Every packed format is the same row-major array of floats, so keys, values and queries are packed
// once and serve all products:
//
//   scores        S^T[key][query]  = K[key][d]      . Q^T[d][query]
//   weighted_sum  O^T[d][query]   += V[key][d]^T    . P^T[key][query]      (dQ^T: K and dS^T)
//   outer_sum     dV[key][d]      += P^T[key][query]. dO[query][d]         (dK: dS^T and Q)
//
// The left factor is broadcast from memory, the right one is loaded as vectors (gemm_tile.h).
#pragma once
#include "attn_pack.h"
#include "gemm_tile.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <int kD>
struct F32Tiles {
  static constexpr int kHeadWidth = kD;  // head size rounded up
  static constexpr int kRowWords = kD;   // of a packed row
  static constexpr int kKeyBlock = 96;   // S^T of a block and its keys stay in L1
  static constexpr int kBackwardKeyBlock = 96;
  static constexpr int kKeyStep = kShortTileRows;  // products round keys up to this
  static constexpr int kQueryBlock = 2 * kLanes;   // backward: queries per pass over dK and dV
  static constexpr int kShortRows = 16;            // varlen_attn_short.h
  static constexpr int kQueryStep = 1;             // outer_sum rounds queries up to this
  static constexpr bool kExact = true;             // weights keep fp32 precision
  static constexpr int kExp2Degree = 6;
  static constexpr bool kRowsServeAll = true;  // columns() and pairs() would copy rows unchanged
  static constexpr int kWeightRowWords = kQueryBlock;  // row stride of the backward's P and dS

  static void pack_rows(const RowsView& src, int n, int n_padded, int D, float* dst) {
    pack_rows_f32<kD>(src, n, n_padded, D, dst);
  }
  static void pack_values(const RowsView& src, int n, int n_padded, int D, float* dst) {
    pack_rows_f32<kD>(src, n, n_padded, D, dst);
  }
  static void pack_lanes(const float* rows, int vecs, int D, float* lanes) {
    transpose_to_lanes(rows, kRowWords, vecs, static_cast<int>(round_up(D, kW)), lanes);
  }
  static const float* columns(const float* rows, int, float*) { return rows; }
  static const float* pairs(const float* rows, int, float*) { return rows; }

  // First word of key `i` (a multiple of kKeyBlock) in columns and packed values.
  static int64_t column_offset(int64_t i) { return i * kD; }

  template <int kVecs>
  static void scores(const float* rows, int n, const float* lanes, int D, float* s) {
    gemm_rows<DotF32, kVecs, kRowWords, 1>(rows, n, lanes, kLanes, D, s, kLanes, false);
  }

  template <int kVecs>
  static void weighted_sum(const float* cols, const float* weights, int ld, int n, int D,
                           float* out, bool accumulate) {
    for (int d = 0; d < D; d += kHeadTileRows) {
      gemm_tile<DotF32, kHeadTileRows, kVecs>(FixedA<1, kD>{cols + d}, weights, ld, n,
                                              out + d * kLanes, kLanes, accumulate);
    }
  }

  static void outer_sum(const float* weights, int n, const float* rows, int queries, int D,
                        float* out, bool accumulate) {
    for (int d = 0; d < D; d += kLanes) {
      gemm_rows<DotF32, 2, kWeightRowWords, 1>(weights, n, rows + d, kD, queries, out + d, kD,
                                               accumulate);
    }
  }

  // The transpose of weighted_sum for queries [0, n): sums[query][d], by rows of kD.
  template <int kLd>
  static void weighted_rows(const float* weights, int n, const float* cols, int keys, int D,
                            float* sums) {
    const int rows = static_cast<int>(round_up(n, kShortTileRows));
    for (int d = 0; d < D; d += kLanes) {
      gemm_rows<DotF32, 2, 1, kLd>(weights, rows, cols + d, kD, keys, sums + d, kD, false);
    }
  }

  // Two neighbouring keys' weights of query vector v, as the right factor of weighted_sum.
  static ENCFAST_INLINE void put_weights(float* w, int key, int v, Vec even, Vec odd) {
    store(w + key * kLanes + v * kW, even);
    store(w + (key + 1) * kLanes + v * kW, odd);
  }
  // The same as the left factor of outer_sum.
  static ENCFAST_INLINE void put_weight_rows(float* w, int key, int lane, Vec even, Vec odd) {
    store(w + key * kWeightRowWords + lane, even);
    store(w + (key + 1) * kWeightRowWords + lane, odd);
  }

  // Brackets of a task, for tiles that keep state in the core.
  static void begin() {}
  static void end() {}
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
