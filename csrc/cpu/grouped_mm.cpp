// One matrix product per group of rows, C = A B, for the result and for both gradients.
//
//                        columns of a task
//                        panel   panel
//                      +-------+-------+
//     384 words of k   |   B   |   B   |   packed as [k][panel] once for all rows of the task, each
//                      +-------+-------+   panel when it first meets rows
//        +------+      +-------+-------+
//   rows |  A   |      |   C   |   C   |   48 rows meet all panels, then the next 48
//        +------+      +-------+-------+
//
//   product        A                       B             how B becomes [k][panel]
//   forward        rows of x, in place     rows of W     transposed in registers
//   grad of x      rows of dout, in place  rows of W     as it lies
//   grad of W      dout^T, packed          rows of x     as it lies
//
// A's 48 rows and B's block are read from L2 and L3 in long pieces; a tile of the result is asked
// for before its products. For the gradient of x panels are short pieces of rows far apart,
// which no prefetcher of the machine foresees: the next panel's are asked for while one is packed.
// For the gradient of W both operands are packed sixteen rows at a time, along the rows.
//
// Words are fp32, or pairs of bf16 along k where one instruction multiplies them. fp32 sums wait
// for the next block of k in the result itself; others, and those at the edges, in a buffer. Sums
// run over blocks of k in order, the bias is added last: results do not depend on tasks.
#include "grouped_mm.h"

#include "attn_pack.h"
#include "gemm_pack.h"
#include "gemm_tile.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int kBlock = 384;  // words of k: a longer chain of sums would lose a digit
constexpr int kPanel = kLanes, kGroup = 4 * kTileRows;
constexpr int64_t kSumColumns = 256, kSumRows = 16;

// One thread's workspace, in floats: A, B, C.
struct Slot {
  int64_t a, b, c;

  static Slot make(const GroupedMmParams& p) {
    int64_t rows = 0, columns = 0;
    for (int64_t i = 0; i < p.n_tasks; ++i) {
      const GroupedMmTask& t = p.tasks[i];
      rows = larger(rows, round_up(t.m_end - t.m, kGroup));
      columns = larger(columns, round_up(t.n_end - t.n, kPanel));
    }
    const bool of_weight = p.product == GroupedProduct::kGradWeight;
    return {(of_weight ? rows : kGroup) * kBlock, columns * kBlock, rows * columns};
  }
  int64_t floats() const { return a + b + c; }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

struct Job {
  const GroupedMmParams& p;
  Slot sizes;
};

template <class Word, GroupedProduct kProduct>
class Grouped {
 public:
  static void run_task(int64_t index, int slot, void* ctx) {
    const Job& job = *static_cast<const Job*>(ctx);
    float* workspace = static_cast<float*>(job.p.workspace) + slot * job.sizes.floats();
    Grouped(job.p, job.p.tasks[index], workspace, job.sizes).run();
  }

 private:
  static constexpr bool kOfWeight = kProduct == GroupedProduct::kGradWeight;
  static constexpr bool kForward = kProduct == GroupedProduct::kForward;
  static constexpr int64_t kBytes = element_bytes(Word::kT);
  static constexpr int64_t kStep = kBlock * Word::kElements;  // terms

  Grouped(const GroupedMmParams& p, const GroupedMmTask& t, float* workspace, Slot sizes)
      : p_(p),
        t_(t),
        a_(workspace),
        b_(a_ + sizes.a),
        c_(b_ + sizes.b),
        first_(p.cu_seqlens[t.group]),
        terms_(kOfWeight ? p.cu_seqlens[t.group + 1] - first_ : p.terms),
        rows_(t.m_end - t.m),
        // With one block of terms sums wait for nothing, and C holds a group of rows.
        held_(terms_ <= kStep ? kGroup : round_up(rows_, kGroup)) {}

  void run() {
    for (int64_t k = 0; k == 0 || k < terms_; k += kStep) {
      const int64_t n_k = smaller(kStep, terms_ - k);
      if constexpr (kOfWeight) pack_for_weight(k, n_k);
      for (int64_t r = 0; r < rows_; r += kGroup) {
        if constexpr (kOfWeight) {
          multiply_group(FixedA<1, kGroup>{a_ + r * kBlock}, k, n_k, r);
        } else {
          multiply_group(rows_of_a(k, n_k, r), k, n_k, r);
        }
      }
    }
  }

  // Rows [r, r + kGroup) of the task meet all its panels.
  template <class A>
  void multiply_group(A a, int64_t k, int64_t n_k, int64_t r) {
    const int64_t rows = smaller(kGroup, rows_ - r), width = t_.n_end - t_.n;
    const int words = static_cast<int>((n_k + Word::kElements - 1) / Word::kElements);
    const int padded = static_cast<int>(round_up(rows, kShortTileRows));
    const bool more = k > 0, last = k + kStep >= terms_;
    const bool whole_rows = Word::kT == DType::kFloat32 && rows == padded;
    for (int64_t j = 0; j < width; j += kPanel) {
      float* b = b_ + j * kBlock;
      if (!kOfWeight && r == 0) pack_panel(k, n_k, j, smaller(kPanel, width - j), b);
      if (whole_rows && j + kPanel <= width) {
        multiply_in_place(a, padded, b, words, result(r, j), more, last ? bias(j) : nullptr);
        continue;
      }
      float* c = c_ + j * held_ + r % held_ * kPanel;
      gemm_rows<typename Word::Dot, 2>(a, padded, b, kPanel, words, c, kPanel, more);
      if (last) finish(c, r, rows, j, smaller(kPanel, width - j));
    }
  }

  // Tile by tile: what is there of each tile's sums, or the lines to write them to, is asked for
  // before its products.
  template <class A>
  void multiply_in_place(A a, int rows, const float* b, int words, char* out, bool more,
                         const float* bias) {
    const int64_t stride = p_.out.row_stride * kBytes;
    for (int i = 0; i < rows; i += kTileRows, out += kTileRows * stride) {
      const int tile = static_cast<int>(smaller(kTileRows, rows - i));
      fetch<true>(out, stride, tile);
      gemm_rows<typename Word::Dot, 2>(a.from(i), tile, b, kPanel, words,
                                       reinterpret_cast<float*>(out),
                                       static_cast<int>(p_.out.row_stride), more, bias);
    }
  }

  // Of column j of the task, or nullptr.
  const float* bias(int64_t j) const {
    return p_.bias ? p_.bias + t_.group * p_.columns + t_.n + j : nullptr;
  }

  // Row r and column j of the task in the result. It is not streamed, though weights' gradients are
  // far larger than the caches: they are fresh pages, whose lines the system has just cleared
  // (copy_row.h).
  char* result(int64_t r, int64_t j) const {
    const int64_t first = kOfWeight ? t_.group * p_.out_group_stride : first_ * p_.out.row_stride;
    const int64_t at = first + (t_.m + r) * p_.out.row_stride + t_.n + j;
    return static_cast<char*>(p_.out.data) + at * kBytes;
  }

  // Sums of a panel's rows become results.
  void finish(const float* c, int64_t r, int64_t rows, int64_t j, int64_t width) {
    const char* from = reinterpret_cast<const char*>(bias(j));
    char* out = result(r, j);
    for (int64_t v = 0; v < width; v += kW) {
      const int64_t n = width - v;
      const Vec add = from ? load_up_to<DType::kFloat32>(from + 4 * v, n) : zeros();
      for (int64_t i = 0; i < rows; ++i) {
        char* at = out + (i * p_.out.row_stride + v) * kBytes;
        const Vec sum = load(c + i * kPanel + v) + add;
        if (n >= kW) {
          store_as<Word::kT>(at, sum);
        } else {
          store_partial_as<Word::kT>(at, sum, static_cast<int>(n));
        }
      }
    }
  }

  static const char* at(const ConstMatrix& x, int64_t row, int64_t column) {
    return static_cast<const char*>(x.data) + (row * x.row_stride + column) * kBytes;
  }

  // Terms [k, k + n_k) of the group of rows at r, where they lie if they are words, whole tiles of
  // rows and not all in the same few cache sets; else packed.
  StridedA rows_of_a(int64_t k, int64_t n_k, int64_t r) {
    constexpr int64_t kSets = 4096;
    const int64_t stride = p_.a.row_stride * kBytes, rows = smaller(kGroup, rows_ - r);
    const char* first = at(p_.a, first_ + t_.m + r, k);
    const bool words = kWordBytes<Word> == 4 && n_k % Word::kElements == 0;
    if (words && rows % kShortTileRows == 0 && stride % kSets != 0) return {first, stride};
    const int64_t n_words = (n_k + Word::kElements - 1) / Word::kElements;
    pack_along<Word, kBlock>(first, stride, rows, n_k, n_words, a_);
    return {reinterpret_cast<const char*>(a_), 4 * kBlock};
  }

  // Terms [k, k + n_k) of columns [j, j + width) of the task.
  void pack_panel(int64_t k, int64_t n_k, int64_t j, int64_t width, float* b) {
    const int64_t stride = p_.b.row_stride * kBytes;
    const char* weight =
        static_cast<const char*>(p_.b.data) + t_.group * p_.b_group_stride * kBytes;
    if constexpr (kForward) {
      const int64_t words = (n_k + Word::kElements - 1) / Word::kElements;
      const char* panel = weight + (t_.n + j) * stride + k * kBytes;
      pack_transposed<Word>(panel, stride, width, n_k, words, b);
    } else {
      const char* panel = weight + k * stride + (t_.n + j) * kBytes;
      if (t_.n + j + kPanel < t_.n_end) fetch<false>(panel + kPanel * kBytes, stride, n_k);
      pack_across<Word, kPanel>(panel, stride, n_k, width, b);
    }
  }

  // Asks for the first kPanel elements of rows, to read them or to write.
  template <bool kWrite>
  static ENCFAST_INLINE void fetch(const char* row, int64_t stride, int64_t rows) {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i < rows; ++i, row += stride) {
      for (int64_t byte = 0; byte < kPanel * kBytes; byte += kLine) {
        __builtin_prefetch(row + byte, kWrite);
      }
    }
  }

  // Terms [k, k + n_k) of all rows and columns of the task.
  void pack_for_weight(int64_t k, int64_t n_k) {
    pack_strips<kGroup>(p_.a, first_ + k, n_k, t_.m, rows_, a_);
    pack_strips<kPanel>(p_.b, first_ + k, n_k, t_.n, t_.n_end - t_.n, b_);
  }

  // Columns [j, j + n) of rows as blocks of kWidth, dst[block][kBlock][kWidth], a few rows at a
  // time: they are read along their length.
  template <int kWidth>
  static void pack_strips(const ConstMatrix& x, int64_t row, int64_t rows, int64_t j, int64_t n,
                          float* dst) {
    constexpr int64_t kStrip = 16;
    for (int64_t i = 0; i < rows; i += kStrip) {
      float* words = dst + i / Word::kElements * kWidth;
      for (int64_t w = 0; w < n; w += kWidth) {
        pack_across<Word, kWidth>(at(x, row + i, j + w), x.row_stride * kBytes,
                                  smaller(kStrip, rows - i), smaller(kWidth, n - w),
                                  words + w * kBlock);
      }
    }
  }

  const GroupedMmParams& p_;
  const GroupedMmTask t_;
  float *const a_, *const b_, *const c_;
  const int64_t first_;  // row of the group
  const int64_t terms_, rows_, held_;
};

template <class Word>
void multiply_words(const GroupedMmParams& p, const Pool& pool) {
  using P = GroupedProduct;
  Job job{p, Slot::make(p)};
  switch (p.product) {
    case P::kForward:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, P::kForward>::run_task, &job);
    case P::kGradInput:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, P::kGradInput>::run_task, &job);
    case P::kGradWeight:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, P::kGradWeight>::run_task, &job);
  }
}

void multiply(const GroupedMmParams& p, const Pool& pool) {
  with_dtype(p.a.dtype,
             [&](auto tag) { multiply_words<ProductWord<decltype(tag)::value>>(p, pool); });
}

// onto[0, columns) += the sum of rows [begin, end): that of sums of kPart rows each, of which
// those are made of smaller parts, so that no chain of additions is long.
template <DType kT, int64_t kPart>
void add_rows(const char* row, int64_t stride, int64_t begin, int64_t end, int64_t columns,
              float* onto) {
  for (int64_t i = begin; i < end; i += kPart) {
    const int64_t n = smaller(kPart, end - i);
    if constexpr (kPart > kSumRows) {
      alignas(64) float part[kSumColumns] = {};
      add_rows<kT, kPart / kSumRows>(row, stride, i, i + n, columns, part);
      for (int64_t j = 0; j < columns; j += kW) store(onto + j, load(onto + j) + load(part + j));
    } else {
      for (int64_t j = 0; j < columns; j += kW) {
        const char* at = row + i * stride + j * element_bytes(kT);
        Vec sum = zeros();
        for (int64_t r = 0; r < n; ++r) sum = sum + load_up_to<kT>(at + r * stride, columns - j);
        store(onto + j, load(onto + j) + sum);
      }
    }
  }
}

// Up to kSumColumns columns of one group.
template <DType kT>
void sum_task(int64_t index, int, void* ctx) {
  const GroupedSumParams& p = *static_cast<const GroupedSumParams*>(ctx);
  const int64_t chunks = (p.columns + kSumColumns - 1) / kSumColumns;
  const int64_t group = index / chunks, begin = index % chunks * kSumColumns;
  const int64_t columns = smaller(kSumColumns, p.columns - begin);
  const char* rows = static_cast<const char*>(p.rows.data) + begin * element_bytes(kT);
  alignas(64) float sums[kSumColumns] = {};
  add_rows<kT, kSumRows * kSumRows>(rows, p.rows.row_stride * element_bytes(kT),
                                    p.cu_seqlens[group], p.cu_seqlens[group + 1], columns, sums);
  std::memcpy(p.out + group * p.columns + begin, sums, 4 * columns);
}

void sum_rows(const GroupedSumParams& p, const Pool& pool) {
  const int64_t chunks = (p.columns + kSumColumns - 1) / kSumColumns;
  with_dtype(p.rows.dtype, [&](auto tag) {
    pool.run(pool.self, p.groups * chunks, sum_task<decltype(tag)::value>,
             const_cast<GroupedSumParams*>(&p));
  });
}

int64_t workspace_bytes(const GroupedMmParams& p, int threads) {
  return threads * Slot::make(p).floats() * 4;
}

}  // namespace

extern const GroupedMmKernels kGroupedMm = {workspace_bytes, multiply, sum_rows};

}  // namespace encfast::ENCFAST_ISA
