// Products of 16 x 16 results by AMX:
//
//   C [16][16] words  +=  A [16 rows][16 words]  .  B [16 words][16 columns]
//
// A word of A and of B is a pair of bf16 (C is fp32) or four bytes, unsigned of A and signed of B
// (C is int32). Four accumulators (2 x 2) are held while two A and two B tiles are read per step,
// so that loads stay hidden under the multiplications. Tiles are always full.
//
// Tile configuration is state of the thread that others (oneDNN) use too: amx_begin() loads it when
// a task starts, amx_end() releases it.
#pragma once
#include "vec.h"

#if defined(__AMX_TILE__)

namespace encfast::ENCFAST_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kFullTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

inline void amx_begin() { _tile_loadconfig(&kFullTiles); }
inline void amx_end() { _tile_release(); }

enum class TileTerms { kBf16, kInt8 };

// A macro because the intrinsics spell the tile numbers into the instruction.
#define ENCFAST_TILE_DOT(c, a, b)               \
  do {                                          \
    if constexpr (kTerms == TileTerms::kBf16) { \
      _tile_dpbf16ps(c, a, b);                  \
    } else {                                    \
      _tile_dpbusd(c, a, b);                    \
    }                                           \
  } while (false)

// One factor of a product: addresses of its 16-row (or 16-column) tiles. Strides in words.
struct TileOperand {
  const float* data;
  int row_stride;    // between the 16 rows of a tile
  int tile_stride;   // to the tile of the next 16 rows (A) or columns (B) of the result
  int64_t k_stride;  // to the tile of the next 64 bytes of terms
};

// The intrinsics that read tiles do not tell the compiler that they read memory.
ENCFAST_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// kM x kN tiles of C (+)= A B over k_tiles steps of 64 bytes of terms.
template <TileTerms kTerms, int kM, int kN>
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
    ENCFAST_TILE_DOT(0, 4, 6);
    if constexpr (kN > 1) {
      _tile_loadd(7, b_k + b.tile_stride, b_bytes);
      ENCFAST_TILE_DOT(1, 4, 7);
    }
    if constexpr (kM > 1) {
      _tile_loadd(5, a_k + a.tile_stride, a_bytes);
      ENCFAST_TILE_DOT(2, 5, 6);
    }
    if constexpr (kM > 1 && kN > 1) ENCFAST_TILE_DOT(3, 5, 7);
  }
  _tile_stored(0, c, ldc_bytes);
  if constexpr (kN > 1) _tile_stored(1, c + 16, ldc_bytes);
  if constexpr (kM > 1) _tile_stored(2, c10, ldc_bytes);
  if constexpr (kM > 1 && kN > 1) _tile_stored(3, c10 + 16, ldc_bytes);
}

// m x n results (multiples of 16).
template <TileTerms kTerms>
inline void amx_gemm(TileOperand a, TileOperand b, int m, int n, int k_tiles, float* c, int ldc,
                     bool accumulate) {
  memory_barrier();
  for (int i = 0; i < m; i += 32) {
    TileOperand b_j = b;
    for (int j = 0; j < n; j += 32) {
      float* c_ij = c + i * static_cast<int64_t>(ldc) + j;
      if (m - i > 16) {
        if (n - j > 16) {
          amx_tiles<kTerms, 2, 2>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        } else {
          amx_tiles<kTerms, 2, 1>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        }
      } else {
        if (n - j > 16) {
          amx_tiles<kTerms, 1, 2>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        } else {
          amx_tiles<kTerms, 1, 1>(a, b_j, k_tiles, c_ij, ldc, accumulate);
        }
      }
      b_j.data += 2 * b.tile_stride;
    }
    a.data += 2 * a.tile_stride;
  }
  memory_barrier();
}

// m x 32 results (m a multiple of 16) over two steps of terms: the four tiles of B are loaded once
// and stay while the rows of A pass by.
template <TileTerms kTerms>
inline void amx_gemm_held(TileOperand a, const TileOperand& b, int m, float* c, int ldc) {
  const int64_t a_bytes = 4 * static_cast<int64_t>(a.row_stride);
  const int64_t b_bytes = 4 * static_cast<int64_t>(b.row_stride);
  const int64_t c_bytes = 4 * static_cast<int64_t>(ldc);
  memory_barrier();
  _tile_loadd(4, b.data, b_bytes);
  _tile_loadd(5, b.data + b.tile_stride, b_bytes);
  _tile_loadd(6, b.data + b.k_stride, b_bytes);
  _tile_loadd(7, b.data + b.k_stride + b.tile_stride, b_bytes);
  for (int i = 0; i < m; i += 16, a.data += a.tile_stride, c += 16 * static_cast<int64_t>(ldc)) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, a.data, a_bytes);
    _tile_loadd(3, a.data + a.k_stride, a_bytes);
    ENCFAST_TILE_DOT(0, 2, 4);
    ENCFAST_TILE_DOT(1, 2, 5);
    ENCFAST_TILE_DOT(0, 3, 6);
    ENCFAST_TILE_DOT(1, 3, 7);
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
  }
  memory_barrier();
}

#undef ENCFAST_TILE_DOT

}  // namespace
}  // namespace encfast::ENCFAST_ISA

#endif  // __AMX_TILE__
