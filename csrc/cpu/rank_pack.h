// Rows of features as the packed operands of the products of rank_loss.
//
// A word is a float, or a pair of bf16 along the dimension that is summed over (gemm_pack.h).
#pragma once
#include "columns.h"
#include "gemm_pack.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kPanel = kLanes;
constexpr int64_t kTerms = 96;   // words of a block of sums: its packed panel is 12 KiB of L1
constexpr int64_t kChunk = 192;  // rows of a task; a multiple of every register tile's

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Elements of a block of sums, and the words of n elements.
template <class Word>
constexpr int64_t kStep = kTerms * Word::kElements;
template <class Word>
constexpr int64_t words(int64_t n) {
  return parts(n, Word::kElements);
}

// A workspace, piece by piece.
struct Carver {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += round_up(floats, kMaxLanes);
    return taken;
  }
};

template <class F>
void run_tasks(const Pool& pool, int64_t n, F f) {
  pool.run(
      pool.self, n, [](int64_t task, int slot, void* ctx) { (*static_cast<F*>(ctx))(task, slot); },
      &f);
}

// One block of words after another, in each the panels of `width` columns.
struct Panels {
  float* data;
  int64_t count;  // panels of a block

  Panels(float* at, int64_t width) : data(at), count(parts(width, kPanel)) {}
  float* at(int64_t block, int64_t panel) const {
    return data + (block * count + panel) * kTerms * kPanel;
  }
  template <class Word>
  static int64_t floats(int64_t terms, int64_t width) {
    return parts(terms, kStep<Word>) * parts(width, kPanel) * kTerms * kPanel;
  }
};

// The size of a workspace, which depends on how a dtype is multiplied: f(tag of the dtype).
template <class F>
int64_t bytes_of(DType dtype, F f) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto tag) { bytes = f(tag); });
  return bytes;
}

// Consecutive rows of a matrix.
template <class Word>
struct RowSpan {
  static constexpr DType kT = Word::kT;

  const ConstMatrix& m;
  int64_t first, n, D;

  int64_t stride() const { return m.row_stride * element_bytes(kT); }
  const char* at(int64_t row, int64_t column) const {
    return row_of<kT>(m, first + row) + column * element_bytes(kT);
  }

  // Panel `panel` of rows side by side: the channels are the terms.
  void pack_transposed_panel(int64_t panel, const Panels& dst) const {
    const int64_t row = panel * kPanel, rows = smaller(kPanel, n - row);
    for (int64_t d = 0; d < D; d += kStep<Word>) {
      pack_transposed<Word>(at(row, d), stride(), rows, D - d, words_from(d),
                            dst.at(d / kStep<Word>, panel));
    }
  }

  // Block `block` of rows, which are the terms, one panel of channels after another.
  void pack_terms(int64_t block, const Panels& dst) const {
    const int64_t row = block * kStep<Word>, rows = smaller(kStep<Word>, n - row);
    for (int64_t d = 0; d < D; d += kPanel) {
      pack_across<Word, kPanel>(at(row, d), stride(), rows, smaller(kPanel, D - d),
                                dst.at(block, d / kPanel));
    }
  }

  // Rows as the left operand, dst[block of channels][kChunk][kTerms].
  void pack_left(float* dst) const {
    for (int64_t d = 0; d < D; d += kStep<Word>, dst += kChunk * kTerms) {
      pack_along<Word, kTerms>(at(0, d), stride(), n, D - d, words_from(d), dst);
    }
  }

 private:
  int64_t words_from(int64_t d) const { return words<Word>(smaller(kStep<Word>, D - d)); }
};

template <class Word>
int64_t left_floats(int64_t D) {
  return parts(D, kStep<Word>) * kChunk * kTerms;
}

// A panel of products of packed rows, c[rows][kPanel].
template <class Word>
void multiply_panel(const float* left, int64_t rows, const Panels& right, int64_t panel, int64_t D,
                    float* c) {
  for (int64_t d = 0; d < D; d += kStep<Word>, left += kChunk * kTerms) {
    const int64_t terms = words<Word>(smaller(kStep<Word>, D - d));
    gemm_rows<typename Word::Dot, 2, kTerms, 1>(
        left, static_cast<int>(round_up(rows, kShortTileRows)), right.at(d / kStep<Word>, panel),
        kPanel, static_cast<int>(terms), c, kPanel, d > 0);
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
