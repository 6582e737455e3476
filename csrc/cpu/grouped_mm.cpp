// One matrix product per group of rows, C = A B, for the result and for both gradients.
//
//                        columns (task: up to 256; of W's gradient 1024)
//                        panel   panel
//                      +-------+-------+
//     256 words of k   |   B   |       |   one panel at a time, packed in L1 as [k][panel]
//                      +-------+-------+
//        +------+      +-------+-------+
//   rows |  A   |      |   C   |       |   A's words and the fp32 sums wait in L2
//        +------+      +-------+-------+
//
//   product        A           B             how B becomes [k][panel]
//   forward        rows of x   rows of W     transposed in registers
//   grad of x      dout        rows of W     as it lies
//   grad of W      dout^T      rows of x     as it lies, and so does A
//
// A task reads its columns of W once for up to 192 rows of the group, so that W comes from memory
// once where groups are small. For the gradient of x these are short pieces of rows far apart,
// which no prefetcher of the machine foresees: the next panel's are asked for while one is packed.
// Words are fp32, or pairs of bf16 along k where one instruction multiplies them. Sums run over
// blocks of k in order: results do not depend on tasks.
#include "grouped_mm.h"

#include "attn_pack.h"
#include "gemm_pack.h"
#include "gemm_tile.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kBlock = 256;  // words of k
constexpr int64_t kPanel = kLanes;
constexpr GroupedProduct kAnyRows = GroupedProduct::kForward, kOfW = GroupedProduct::kGradWeight;
constexpr int64_t kFloatsOfA = grouped_rows(kAnyRows) * kBlock, kFloatsOfB = kBlock * kPanel;
constexpr int64_t kFloatsOfC = grouped_rows(kAnyRows) * grouped_columns(kAnyRows);
constexpr int64_t kSlotFloats = kFloatsOfA + kFloatsOfB + kFloatsOfC;
static_assert(grouped_rows(kOfW) <= grouped_rows(kAnyRows), "A has no room");
static_assert(grouped_rows(kOfW) * grouped_columns(kOfW) <= kFloatsOfC, "C has no room");
constexpr int64_t kSumColumns = 256, kSumRows = 64;

template <class Word, GroupedProduct kProduct>
struct Grouped {
  static constexpr bool kOfWeight = kProduct == GroupedProduct::kGradWeight;
  static constexpr int64_t kBytes = element_bytes(Word::kT);
  static constexpr int64_t kRows = grouped_rows(kProduct);
  static constexpr int64_t kStep = kBlock * Word::kElements;  // terms

  static void run_task(int64_t index, int slot, void* ctx) {
    const GroupedMmParams& p = *static_cast<const GroupedMmParams*>(ctx);
    const GroupedMmTask& t = p.tasks[index];
    float* a = static_cast<float*>(p.workspace) + slot * kSlotFloats;
    float *b = a + kFloatsOfA, *c = b + kFloatsOfB;
    const int64_t terms = kOfWeight ? p.cu_seqlens[t.group + 1] - p.cu_seqlens[t.group] : p.terms;
    const RowsView out = result_of(p, t);
    for (int64_t k = 0; k == 0 || k < terms; k += kStep) {
      const int64_t n_k = smaller(kStep, terms - k);
      pack_a(p, t, k, n_k, a);
      for (int64_t j = t.n; j < t.n_end; j += kPanel) {
        const int64_t width = smaller(kPanel, t.n_end - j);
        const int64_t words = (n_k + Word::kElements - 1) / Word::kElements;
        pack_b(p, t, k, n_k, j, width, b);
        if (is_final(p, t, width, terms)) {
          float* whole = reinterpret_cast<float*>(out.data) + j;
          multiply(a, t.m_end - t.m, b, words, whole, p.out.row_stride, false);
          continue;
        }
        float* c_panel = c + (j - t.n) * kRows;
        multiply(a, t.m_end - t.m, b, words, c_panel, kPanel, k > 0);
        if (k + kStep >= terms) finish(p, t, j, width, c_panel, out);
      }
    }
  }

 private:
  // Whole panels of fp32 whose sums are done after one block need not wait anywhere.
  static bool is_final(const GroupedMmParams& p, const GroupedMmTask& t, int64_t width,
                       int64_t terms) {
    return kOfWeight && Word::kT == DType::kFloat32 && width == kPanel && terms <= kStep &&
           (t.m_end - t.m) % kShortTileRows == 0 && !p.bias;
  }

  static const char* at(const ConstMatrix& x, int64_t row, int64_t column) {
    return static_cast<const char*>(x.data) + (row * x.row_stride + column) * kBytes;
  }

  // Rows from the task's first on, from column 0.
  static RowsView result_of(const GroupedMmParams& p, const GroupedMmTask& t) {
    const int64_t first = kOfWeight ? 0 : p.cu_seqlens[t.group];
    const int64_t from =
        (kOfWeight ? t.group * p.out_group_stride : 0) + (first + t.m) * p.out.row_stride;
    char* data = static_cast<char*>(p.out.data) + from * kBytes;
    const int64_t stride = p.out.row_stride * kBytes;
    // Not streamed, though weights' gradients are far larger than the caches: they are fresh pages,
    // whose lines the system has just cleared (copy_row.h).
    return {data, stride, Word::kT, false};
  }

  static void pack_a(const GroupedMmParams& p, const GroupedMmTask& t, int64_t k, int64_t n_k,
                     float* a) {
    const int64_t first = p.cu_seqlens[t.group], stride = p.a.row_stride * kBytes;
    if constexpr (kOfWeight) {
      pack_across<Word, kRows>(at(p.a, first + k, t.m), stride, n_k, t.m_end - t.m, a);
    } else {
      const int64_t words = (n_k + Word::kElements - 1) / Word::kElements;
      pack_along<Word, kBlock>(at(p.a, first + t.m, k), stride, t.m_end - t.m, n_k, words, a);
    }
  }

  static void pack_b(const GroupedMmParams& p, const GroupedMmTask& t, int64_t k, int64_t n_k,
                     int64_t j, int64_t width, float* b) {
    const int64_t stride = p.b.row_stride * kBytes;
    const char* group =
        static_cast<const char*>(p.b.data) +
        (kOfWeight ? p.cu_seqlens[t.group] * p.b.row_stride : t.group * p.b_group_stride) * kBytes;
    if constexpr (kProduct == GroupedProduct::kForward) {
      const int64_t words = (n_k + Word::kElements - 1) / Word::kElements;
      pack_transposed<Word>(group + j * stride + k * kBytes, stride, width, n_k, words, b);
    } else {
      const char* panel = group + k * stride + j * kBytes;
      if (!kOfWeight && j + kPanel < t.n_end) fetch(panel + kPanel * kBytes, stride, n_k);
      if (!kOfWeight && j + kPanel >= t.n_end && k + kStep < p.terms) {
        fetch(group + (k + kStep) * stride + t.n * kBytes, stride,
              smaller(kStep, p.terms - k - kStep));
      }
      pack_across<Word, kPanel>(panel, stride, n_k, width, b);
    }
  }

  // Asks for the first kPanel elements of rows.
  static ENCFAST_INLINE void fetch(const char* row, int64_t stride, int64_t rows) {
    constexpr int64_t kLine = 64;
    for (int64_t i = 0; i < rows; ++i, row += stride) {
      for (int64_t byte = 0; byte < kPanel * kBytes; byte += kLine) __builtin_prefetch(row + byte);
    }
  }

  static void multiply(const float* a, int64_t rows, const float* b, int64_t words, float* c,
                       int64_t c_stride, bool accumulate) {
    constexpr int kRowStride = kOfWeight ? 1 : kBlock, kColStride = kOfWeight ? kRows : 1;
    gemm_rows<typename Word::Dot, 2, kRowStride, kColStride>(
        a, static_cast<int>(round_up(rows, kShortTileRows)), b, kPanel, static_cast<int>(words), c,
        static_cast<int>(c_stride), accumulate);
  }

  static void finish(const GroupedMmParams& p, const GroupedMmTask& t, int64_t j, int64_t width,
                     float* c, RowsView out) {
    const int64_t rows = t.m_end - t.m;
    if (p.bias) {
      const char* bias = reinterpret_cast<const char*>(p.bias + t.group * p.columns + j);
      for (int64_t v = 0; v < width; v += kW) {
        const Vec add = load_up_to<DType::kFloat32>(bias + 4 * v, width - v);
        for (int64_t i = 0; i < rows; ++i) {
          store(c + i * kPanel + v, load(c + i * kPanel + v) + add);
        }
      }
    }
    out.data += j * kBytes;
    const float one = 1;
    store_rows(c, kPanel, &one, 0, static_cast<int>(rows), static_cast<int>(width), out);
  }
};

template <class Word>
void multiply_words(const GroupedMmParams& p, const Pool& pool) {
  void* ctx = const_cast<GroupedMmParams*>(&p);
  switch (p.product) {
    case GroupedProduct::kForward:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, GroupedProduct::kForward>::run_task, ctx);
    case GroupedProduct::kGradInput:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, GroupedProduct::kGradInput>::run_task,
                      ctx);
    case GroupedProduct::kGradWeight:
      return pool.run(pool.self, p.n_tasks, Grouped<Word, GroupedProduct::kGradWeight>::run_task,
                      ctx);
  }
}

void multiply(const GroupedMmParams& p, const Pool& pool) {
  with_dtype(p.a.dtype,
             [&](auto tag) { multiply_words<ProductWord<decltype(tag)::value>>(p, pool); });
}

// Up to kSumColumns columns of one group: sums of kSumRows rows each, then of these.
template <DType kT>
void sum_task(int64_t index, int, void* ctx) {
  const GroupedSumParams& p = *static_cast<const GroupedSumParams*>(ctx);
  const int64_t chunks = (p.columns + kSumColumns - 1) / kSumColumns;
  const int64_t group = index / chunks, begin = index % chunks * kSumColumns;
  const int64_t end = smaller(begin + kSumColumns, p.columns);
  const int64_t first = p.cu_seqlens[group], last = p.cu_seqlens[group + 1];
  const char* rows = static_cast<const char*>(p.rows.data);
  for (int64_t j = begin; j < end; j += kW) {
    Vec total = zeros();
    for (int64_t from = first; from < last; from += kSumRows) {
      Vec part = zeros();
      for (int64_t i = from; i < smaller(from + kSumRows, last); ++i) {
        part =
            part + load_up_to<kT>(rows + (i * p.rows.row_stride + j) * element_bytes(kT), end - j);
      }
      total = total + part;
    }
    const int n = static_cast<int>(smaller(kW, end - j));
    store_partial_as<DType::kFloat32>(p.out + group * p.columns + j, total, n);
  }
}

void sum_rows(const GroupedSumParams& p, const Pool& pool) {
  const int64_t chunks = (p.columns + kSumColumns - 1) / kSumColumns;
  with_dtype(p.rows.dtype, [&](auto tag) {
    pool.run(pool.self, p.groups * chunks, sum_task<decltype(tag)::value>,
             const_cast<GroupedSumParams*>(&p));
  });
}

int64_t workspace_bytes(int threads) { return threads * kSlotFloats * 4; }

}  // namespace

extern const GroupedMmKernels kGroupedMm = {workspace_bytes, multiply, sum_rows};

}  // namespace encfast::ENCFAST_ISA
