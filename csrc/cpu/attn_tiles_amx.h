// Attention products in bf16 by AMX, fp32 accumulation (gemm_amx.h).
//
//   scores        A = key rows as packed               B = Q^T in lanes         C = S^T
//   weighted_sum  A = V^T, 16 d x 32 keys (columns)    B = P^T, pairs of keys   C = O^T
//   outer_sum     A = P^T, pairs of queries            B = dO, pairs of queries C = dV
//
// Tiles are always full: keys are padded to 32, d to 32 as a summed dimension, and padding is zero
// on at least one side of every product. begin() and end() of a task own the tile configuration.
#pragma once
#include "attn_format_bf16.h"
#include "gemm_amx.h"

#if defined(__AMX_BF16__)

namespace encfast::ENCFAST_ISA {
namespace {

template <int kD>
struct AmxTiles : Bf16Format<kD> {
  using Format = Bf16Format<kD>;
  static constexpr int kRowWords = Format::kRowWords;
  static constexpr int kKeyBlock = 128;
  static constexpr int kShortRows = 0;  // left factors are rows of 16 words: varlen_attn_short.h
  static constexpr int kBackwardKeyBlock = 64;
  static constexpr int kKeyStep = 32;
  static constexpr int kQueryStep = 32;

  // Columns: [keys / 32][kD] rows of 32 keys each, so that a tile is 1 KiB in one piece.
  static void pack_values(const RowsView& src, int n, int n_padded, int D, float* dst) {
    alignas(64) float rows[32 * kRowWords];
    for (int i = 0; i < n_padded; i += 32) {
      Format::pack_rows(src.from(i), n - i < 32 ? n - i : 32, 32, D, rows);
      columns(rows, 32, dst + column_offset(i));
    }
  }
  static const float* columns(const float* rows, int n, float* dst) {
    for (int i = 0; i < n; i += 32) {
      for (int d = 0; d < kD; d += kW) {
        Vec r[kW];
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) {
          r[j] = Format::pair_of_rows(rows + static_cast<int64_t>(i + 2 * j) * kRowWords, d);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) store(dst + column_offset(i) + (d + j) * 16, r[j]);
      }
    }
    return dst;
  }
  static int64_t column_offset(int64_t i) { return i * kRowWords; }

  template <int kVecs>
  static void scores(const float* rows, int n, const float* lanes, int D, float* s) {
    const TileOperand keys = {rows, kRowWords, 16 * kRowWords, 16};
    const TileOperand queries = {lanes, kLanes, 16, 16 * kLanes};
    const int k_tiles = (D + 31) / 32;
    if (kVecs == 2 && k_tiles == 2) {
      amx_gemm_held<TileTerms::kBf16>(keys, queries, n, s, kLanes);
    } else {
      amx_gemm<TileTerms::kBf16>(keys, queries, n, kVecs * kW, k_tiles, s, kLanes, false);
    }
  }

  template <int kVecs>
  static void weighted_sum(const float* cols, const float* weights, int ld, int n, int D,
                           float* out, bool accumulate) {
    amx_gemm<TileTerms::kBf16>({cols, 16, 16 * 16, 16 * kD}, {weights, ld, 16, 16 * ld},
                               static_cast<int>(round_up(D, 16)), kVecs * kW, n / 32, out, kLanes,
                               accumulate);
  }

  static void outer_sum(const float* weights, int n, const float* pairs, int queries, int D,
                        float* out, bool accumulate) {
    constexpr int kLd = Format::kWeightRowWords;
    amx_gemm<TileTerms::kBf16>({weights, kLd, 16 * kLd, 16}, {pairs, kD, 16, 16 * kD}, n,
                               static_cast<int>(round_up(D, 16)), (queries + 31) / 32, out, kD,
                               accumulate);
  }

  static void begin() { amx_begin(); }
  static void end() { amx_end(); }
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA

#endif  // __AMX_BF16__
