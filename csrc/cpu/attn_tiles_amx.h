// Attention products in bf16 by AMX, fp32 accumulation. Products of 16 x 16 results:
//
//   C [16][16] fp32  +=  A [16 rows][32 bf16]  .  B [16 pairs][16 columns]     tdpbf16ps
//
//   scores        A = key rows as packed               B = Q^T in lanes         C = S^T
//   weighted_sum  A = V^T, 16 d x 32 keys (columns)    B = P^T, pairs of keys   C = O^T
//   outer_sum     A = P^T, pairs of queries            B = dO, pairs of queries C = dV
//
// Four accumulators (2 x 2) are held while two A and two B tiles are read per 32 terms, so that
// loads stay hidden under the multiplications. Tiles are always full: keys are padded to 32, d to
// 32 as a summed dimension, and padding is zero on at least one side of every product.
//
// Tile configuration is state of the thread that others (oneDNN) use too: begin() loads it when a
// task starts, end() releases it.
#pragma once
#include "attn_format_bf16.h"

#if defined(__AMX_BF16__)

namespace encfast::ENCFAST_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kFullTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// One factor of a product: addresses of its 16-row (or 16-column) tiles. Strides in words.
struct TileOperand {
  const float* data;
  int row_stride;    // between the 16 rows of a tile
  int tile_stride;   // to the tile of the next 16 rows (A) or columns (B) of the result
  int64_t k_stride;  // to the tile of the next 32 terms
};

// The intrinsics that read tiles do not tell the compiler that they read memory.
ENCFAST_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// kM x kN tiles of C (+)= A B over k_tiles steps of 32 terms.
template <int kM, int kN>
ENCFAST_INLINE void amx_tiles(const TileOperand& a, const TileOperand& b, int k_tiles, float* c,
                              int ldc, bool accumulate) {
  const int64_t ldc_bytes = 4 * static_cast<int64_t>(ldc);
  float* c10 = c + 16 * static_cast<int64_t>(ldc);
  if (accumulate) {
    _tile_loadd(0, c, ldc_bytes);
    if constexpr (kN > 1) _tile_loadd(1, c + 16, ldc_bytes);
    if constexpr (kM > 1) _tile_loadd(2, c10, ldc_bytes);
    if constexpr (kM > 1 && kN > 1) _tile_loadd(3, c10 + 16, ldc_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN > 1) _tile_zero(1);
    if constexpr (kM > 1) _tile_zero(2);
    if constexpr (kM > 1 && kN > 1) _tile_zero(3);
  }
  const int64_t a_bytes = 4 * static_cast<int64_t>(a.row_stride);
  const int64_t b_bytes = 4 * static_cast<int64_t>(b.row_stride);
  const float *a_k = a.data, *b_k = b.data;
  for (int k = 0; k < k_tiles; ++k, a_k += a.k_stride, b_k += b.k_stride) {
    _tile_loadd(4, a_k, a_bytes);
    _tile_loadd(6, b_k, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN > 1) {
      _tile_loadd(7, b_k + b.tile_stride, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kM > 1) {
      _tile_loadd(5, a_k + a.tile_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kM > 1 && kN > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc_bytes);
  if constexpr (kN > 1) _tile_stored(1, c + 16, ldc_bytes);
  if constexpr (kM > 1) _tile_stored(2, c10, ldc_bytes);
  if constexpr (kM > 1 && kN > 1) _tile_stored(3, c10 + 16, ldc_bytes);
}

// m x n results (multiples of 16).
inline void amx_gemm(TileOperand a, TileOperand b, int m, int n, int k_tiles, float* c, int ldc,
                     bool accumulate) {
  memory_barrier();
  for (int i = 0; i < m; i += 32) {
    TileOperand b_j = b;
    for (int j = 0; j < n; j += 32) {
      float* c_ij = c + i * static_cast<int64_t>(ldc) + j;
      if (m - i > 16) {
        if (n - j > 16) {
          amx_tiles<2, 2>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        } else {
          amx_tiles<2, 1>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        }
      } else {
        if (n - j > 16) {
          amx_tiles<1, 2>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        } else {
          amx_tiles<1, 1>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        }
      }
      b_j.data += 2 * b.tile_stride;
    }
    a.data += 2 * a.tile_stride;
  }
  memory_barrier();
}

template <int kD>
struct AmxTiles : Bf16Format<kD> {
  using Format = Bf16Format<kD>;
  static constexpr int kRowWords = Format::kRowWords;
  static constexpr int kKeyBlock = 128;
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
    amx_gemm({rows, kRowWords, 16 * kRowWords, 16}, {lanes, kLanes, 16, 16 * kLanes}, n, kVecs * kW,
             (D + 31) / 32, s, kLanes, false);
  }

  template <int kVecs>
  static void weighted_sum(const float* cols, const float* weights, int ld, int n, int D,
                           float* out, bool accumulate) {
    amx_gemm({cols, 16, 16 * 16, 16 * kD}, {weights, ld, 16, 16 * ld},
             static_cast<int>(round_up(D, 16)), kVecs * kW, n / 32, out, kLanes, accumulate);
  }

  static void outer_sum(const float* weights, int n, const float* pairs, int queries, int D,
                        float* out) {
    constexpr int kLd = Format::kWeightRowWords;
    amx_gemm({weights, kLd, 16 * kLd, 16}, {pairs, kD, 16, 16 * kD}, n,
             static_cast<int>(round_up(D, 16)), (queries + 31) / 32, out, kD, true);
  }

  static void begin() { _tile_loadconfig(&kFullTiles); }
  static void end() { _tile_release(); }
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA

#endif  // __AMX_BF16__
