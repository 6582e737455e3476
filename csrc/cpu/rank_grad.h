// Products of the gradients G of a block of logits a b^T with the features: G b and G^T a.
#pragma once
#include "rank_pack.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kSpan = 256;  // channels of a gradient's task
constexpr int64_t kTurnedFloats = kTerms * kChunk;

// What gradients of logits are held in: bf16 where products are of bf16, which rounds them once.
template <class Word>
constexpr DType kGradType = Word::kElements > 1 ? Word::kT : DType::kFloat32;

// G for features in these words, in slices of kStep columns, `side` rows each: the left operand of
// a product as it lies. Columns up to a whole word are written too.
template <class Word>
struct GradBlock {
  using GradWord = ProductWord<kGradType<Word>>;

  float* data;
  int64_t side;

  static int64_t floats(int64_t side, int64_t columns) {
    return parts(columns, kStep<Word>) * side * kTerms;
  }

  float* at(int64_t row, int64_t column) const {
    const int64_t word = column % kStep<Word> / Word::kElements;
    return data + (column / kStep<Word> * side + row) * kTerms + word;
  }

  // Rows [chunk, +kChunk) of the `rows` there are, channels [span, +kSpan) of D, over n columns;
  // sums is [rows][D to whole panels] and is added to if there is `more`.
  void add_times_b(int64_t rows, int64_t chunk, int64_t n, const Panels& b_terms, int64_t span,
                   int64_t D, float* sums, bool more) const {
    const int64_t width = round_up(D, kPanel);
    const int count = static_cast<int>(round_up(smaller(kChunk, rows - chunk), kShortTileRows));
    for (int64_t j = 0; j < n; j += kStep<Word>) {
      const int terms = static_cast<int>(words<Word>(smaller(kStep<Word>, n - j)));
      for (int64_t d = span; d < smaller(span + kSpan, D); d += kPanel) {
        gemm_rows<typename Word::Dot, 2, kTerms, 1>(
            at(chunk, j), count, b_terms.at(j / kStep<Word>, d / kPanel), kPanel, terms,
            sums + chunk * width + d, static_cast<int>(width), more || j > 0);
      }
    }
  }

  // Columns [chunk, +kChunk) of n, over all rows; turned holds kTurnedFloats.
  void add_transposed_times_a(int64_t rows, int64_t chunk, int64_t n, const Panels& a_terms,
                              int64_t span, int64_t D, float* sums, bool more,
                              float* turned) const {
    const int64_t width = round_up(D, kPanel), columns = smaller(kChunk, n - chunk);
    const int count = static_cast<int>(round_up(columns, kShortTileRows));
    for (int64_t i = 0; i < rows; i += kStep<Word>) {
      const int64_t from_here = smaller(kStep<Word>, rows - i);
      for (int64_t j = 0; j < columns; j += kStep<Word>) {
        pack_across<GradWord, kChunk>(reinterpret_cast<const char*>(at(i, chunk + j)), 4 * kTerms,
                                      from_here, smaller(kStep<Word>, columns - j), turned + j);
      }
      for (int64_t d = span; d < smaller(span + kSpan, D); d += kPanel) {
        gemm_rows<typename Word::Dot, 2, 1, kChunk>(
            turned, count, a_terms.at(i / kStep<Word>, d / kPanel), kPanel,
            static_cast<int>(words<Word>(from_here)), sums + chunk * width + d,
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
