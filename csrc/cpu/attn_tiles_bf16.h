// Attention products in bf16 by vdpbf16ps, fp32 accumulation: the tiles of attn_tiles_f32.h with
// two multiply-adds per lane and instruction. Twice the fp32 rate on Zen 4; on Intel cores, which
// run it at half that, AMX takes over (attn_tiles_amx.h).
#pragma once
#include "attn_format_bf16.h"
#include "gemm_tile.h"

#if defined(__AVX512BF16__)

namespace encfast::ENCFAST_ISA {
namespace {

template <int kD>
struct Bf16Tiles : Bf16Format<kD> {
  using Format = Bf16Format<kD>;
  static constexpr int kRowWords = Format::kRowWords;
  static constexpr int kKeyBlock = 96;
  static constexpr int kShortRows = 32;  // varlen_attn_short.h
  static constexpr int kBackwardKeyBlock = 96;
  static constexpr int kKeyStep = kShortTileRows;
  static constexpr int kQueryStep = 2;

  // The left factor of weighted_sum is broadcast word by word: pairs of rows serve it.
  static void pack_values(const RowsView& src, int n, int n_padded, int D, float* dst) {
    alignas(64) float rows[kKeyBlock * kRowWords];
    for (int i = 0; i < n_padded; i += kKeyBlock) {
      const int padded = n_padded - i < kKeyBlock ? n_padded - i : kKeyBlock;
      const int present = n - i < padded ? n - i : padded;
      Format::pack_rows(src.from(i), present, padded, D, rows);
      Format::pairs(rows, padded, dst + column_offset(i));
    }
  }
  static const float* columns(const float* rows, int n, float* dst) {
    return Format::pairs(rows, n, dst);
  }
  static int64_t column_offset(int64_t i) { return i / 2 * kD; }

  template <int kVecs>
  static void scores(const float* rows, int n, const float* lanes, int D, float* s) {
    gemm_rows<DotBf16, kVecs, kRowWords, 1>(rows, n, lanes, kLanes, (D + 1) / 2, s, kLanes, false);
  }

  template <int kVecs>
  static void weighted_sum(const float* cols, const float* weights, int ld, int n, int D,
                           float* out, bool accumulate) {
    for (int d = 0; d < D; d += kHeadTileRows) {
      gemm_tile<DotBf16, kHeadTileRows, kVecs>(FixedA<1, kD>{cols + d}, weights, ld, n / 2,
                                               out + d * kLanes, kLanes, accumulate);
    }
  }

  static void outer_sum(const float* weights, int n, const float* pairs, int queries, int D,
                        float* out, bool accumulate) {
    for (int d = 0; d < D; d += kLanes) {
      gemm_rows<DotBf16, 2, Format::kWeightRowWords, 1>(weights, n, pairs + d, kD,
                                                        (queries + 1) / 2, out + d, kD, accumulate);
    }
  }

  // The transpose of weighted_sum for queries [0, n): sums[query][d], by rows of kD.
  template <int kLd>
  static void weighted_rows(const float* weights, int n, const float* cols, int keys, int D,
                            float* sums) {
    const int rows = static_cast<int>(round_up(n, kShortTileRows));
    for (int d = 0; d < D; d += kLanes) {
      gemm_rows<DotBf16, 2, 1, kLd>(weights, rows, cols + d, kD, keys / 2, sums + d, kD, false);
    }
  }

  static void begin() {}
  static void end() {}
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA

#endif  // __AVX512BF16__
