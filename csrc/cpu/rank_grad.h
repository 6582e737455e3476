// Products of the gradients G of a block of logits a b^T with the features: G b and G^T a.
#pragma once
#include "rank_pack.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kSpan = 256;  // channels of a gradient's task
constexpr int64_t kTurnedFloats = kTerms * kChunk;

// G in slices of kTerms columns, `side` rows each: the left operand of a product as it lies.
struct GradBlock {
  float* data;
  int64_t side;

  float* at(int64_t row, int64_t column) const {
    return data + (column / kTerms * side + row) * kTerms + column % kTerms;
  }

  // Rows [chunk, +kChunk) of the `rows` there are, channels [span, +kSpan) of D, over n columns;
  // sums is [rows][D to whole panels] and is added to if there is `more`.
  void add_times_b(int64_t rows, int64_t chunk, int64_t n, const Panels& b_terms, int64_t span,
                   int64_t D, float* sums, bool more) const {
    const int64_t width = round_up(D, kPanel);
    const int count = static_cast<int>(round_up(smaller(kChunk, rows - chunk), kShortTileRows));
    for (int64_t j = 0; j < n; j += kTerms) {
      for (int64_t d = span; d < smaller(span + kSpan, D); d += kPanel) {
        gemm_rows<DotF32, 2, kTerms, 1>(at(chunk, j), count, b_terms.at(j / kTerms, d / kPanel),
                                        kPanel, static_cast<int>(smaller(kTerms, n - j)),
                                        sums + chunk * width + d, static_cast<int>(width),
                                        more || j > 0);
      }
    }
  }

  // Columns [chunk, +kChunk) of n, over all rows; turned holds kTurnedFloats.
  void add_transposed_times_a(int64_t rows, int64_t chunk, int64_t n, const Panels& a_terms,
                              int64_t span, int64_t D, float* sums, bool more,
                              float* turned) const {
    const int64_t width = round_up(D, kPanel), columns = smaller(kChunk, n - chunk);
    const int count = static_cast<int>(round_up(columns, kShortTileRows));
    for (int64_t i = 0; i < rows; i += kTerms) {
      const int64_t terms = smaller(kTerms, rows - i);
      for (int64_t j = 0; j < columns; j += kTerms) {
        pack_across<FloatWord<DType::kFloat32>, kChunk>(
            reinterpret_cast<const char*>(at(i, chunk + j)), 4 * kTerms, terms,
            smaller(kTerms, columns - j), turned + j);
      }
      for (int64_t d = span; d < smaller(span + kSpan, D); d += kPanel) {
        gemm_rows<DotF32, 2, 1, kChunk>(turned, count, a_terms.at(i / kTerms, d / kPanel), kPanel,
                                        static_cast<int>(terms), sums + chunk * width + d,
                                        static_cast<int>(width), more || i > 0);
      }
    }
  }
};

// Where fp32 sums of a gradient are held: the gradient itself where whole tiles fit into it.
bool sums_in_place(const Matrix& grad, int64_t rows, int64_t D) {
  return grad.dtype == DType::kFloat32 && rows % kShortTileRows == 0 && D % kPanel == 0;
}

// Sums [n][D to whole panels] as rows [row, +n) of a gradient.
template <DType kT>
void write_sums(const Pool& pool, const float* sums, const Matrix& grad, int64_t row, int64_t n,
                int64_t D) {
  run_tasks(pool, parts(n, kChunk), [&](int64_t chunk, int) {
    for (int64_t i = chunk * kChunk; i < smaller((chunk + 1) * kChunk, n); ++i) {
      char* out = row_of<kT>(grad, row + i);
      const float* from = sums + i * round_up(D, kPanel);
      for_columns(D, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
        store_at<kT>(out, at, load_at<DType::kFloat32>(from, at));
      });
    }
  });
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
