// One matrix product per group of rows, C = A B, for the result and for both gradients.
//
//                        columns (task: up to 256)
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
// A task reads its columns of W once for up to kGroupedRows rows of the group, so that W comes from
// memory once where groups are small. Words are fp32, or pairs of bf16 along k where one
// instruction multiplies them. Sums run over blocks of k in order: results do not depend on tasks.
#include "grouped_mm.h"

#include "attn_pack.h"
#include "gemm_tile.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kBlock = 256;  // words of k
constexpr int64_t kPanel = kLanes;
constexpr int64_t kFloatsOfA = kGroupedRows * kBlock, kFloatsOfB = kBlock * kPanel;
constexpr int64_t kSlotFloats = kFloatsOfA + kFloatsOfB + kGroupedRows * kGroupedColumns;
constexpr int64_t kSumColumns = 256, kSumRows = 64;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n <= kW elements at p as floats, zeros behind them.
template <DType kT>
ENCFAST_INLINE Vec load_up_to(const char* p, int64_t n) {
  if (n >= kW) return load_as<kT>(p);
  return n > 0 ? load_partial_as<kT>(p, static_cast<int>(n)) : zeros();
}

template <DType kType>
struct FloatWord {
  static constexpr DType kT = kType;
  static constexpr int64_t kElements = 1;
  using Dot = DotF32;

  static ENCFAST_INLINE Vec along_row(const char* p, int64_t n) { return load_up_to<kT>(p, n); }
  static ENCFAST_INLINE Vec across_rows(const char* p, int64_t, int64_t, int64_t n) {
    return load_up_to<kT>(p, n);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pair {
  static constexpr DType kT = DType::kBFloat16;
  static constexpr int64_t kElements = 2;
  using Dot = DotBf16;

  static ENCFAST_INLINE Vec along_row(const char* p, int64_t n) {
    if (n >= 2 * kW) return load(p);
    alignas(64) char words[4 * kW] = {};
    if (n > 0) std::memcpy(words, p, n * 2);
    return load(words);
  }
  // Lane j: element j of this row and of the next, if there is one.
  static ENCFAST_INLINE Vec across_rows(const char* p, int64_t stride, int64_t rows, int64_t n) {
    const IntVec low = (IntVec)load_up_to<kT>(p, n) >> 16 & 0xffff;
    return rows > 1 ? (Vec)(low | (IntVec)load_up_to<kT>(p + stride, n)) : (Vec)low;
  }
};
#endif

template <class Word>
constexpr int64_t kWordBytes = Word::kElements * element_bytes(Word::kT);

// Words [0, words) along each of `rows` rows of `n` elements, dst[padded][kBlock].
template <class Word>
void pack_along(const char* src, int64_t stride, int64_t rows, int64_t n, int64_t words,
                float* dst) {
  for (int64_t i = 0; i < rows; ++i, src += stride) {
    for (int64_t w = 0; w < words; w += kW) {
      const int64_t left = n - w * Word::kElements;
      store(dst + i * kBlock + w, Word::along_row(src + w * kWordBytes<Word>, left));
    }
  }
  for (int64_t i = rows; i < round_up(rows, kShortTileRows); ++i) {
    std::memset(dst + i * kBlock, 0, 4 * round_up(words, kW));
  }
}

// The same words of up to kPanel rows side by side, dst[words][kPanel].
template <class Word>
void pack_transposed(const char* src, int64_t stride, int64_t rows, int64_t n, int64_t words,
                     float* dst) {
  for (int64_t v = 0; v < kPanel; v += kW) {
    for (int64_t w = 0; w < words; w += kW) {
      const int64_t left = n - w * Word::kElements;
      const char* at = src + v * stride + w * kWordBytes<Word>;
      Vec r[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        r[i] = v + i < rows ? Word::along_row(at + i * stride, left) : zeros();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(dst + (w + i) * kPanel + v, r[i]);
    }
  }
}

// Words whose elements come from consecutive ones of `rows` rows, `n` columns, dst[words][width];
// columns up to the next vector are 0.
template <class Word, int64_t kWidth>
void pack_across(const char* src, int64_t stride, int64_t rows, int64_t n, float* dst) {
  for (int64_t i = 0; i < rows; i += Word::kElements, dst += kWidth) {
    const char* row = src + i * stride;
    for (int64_t j = 0; j < n; j += kW) {
      const char* at = row + j * element_bytes(Word::kT);
      store(dst + j, Word::across_rows(at, stride, rows - i, n - j));
    }
    for (int64_t j = round_up(n, kW); j < smaller(round_up(n, kPanel), kWidth); j += kW) {
      store(dst + j, zeros());
    }
  }
}

template <class Word, GroupedProduct kProduct>
struct Grouped {
  static constexpr bool kOfWeight = kProduct == GroupedProduct::kGradWeight;
  static constexpr int64_t kBytes = element_bytes(Word::kT);

  static void run_task(int64_t index, int slot, void* ctx) {
    const GroupedMmParams& p = *static_cast<const GroupedMmParams*>(ctx);
    const GroupedMmTask& t = p.tasks[index];
    float* a = static_cast<float*>(p.workspace) + slot * kSlotFloats;
    float *b = a + kFloatsOfA, *c = b + kFloatsOfB;
    const int64_t terms = kOfWeight ? p.cu_seqlens[t.group + 1] - p.cu_seqlens[t.group] : p.terms;
    const RowsView out = result_of(p, t);
    constexpr int64_t kStep = kBlock * Word::kElements;
    for (int64_t k = 0; k == 0 || k < terms; k += kStep) {
      const int64_t n_k = smaller(kStep, terms - k);
      pack_a(p, t, k, n_k, a);
      for (int64_t j = t.n; j < t.n_end; j += kPanel) {
        const int64_t width = smaller(kPanel, t.n_end - j);
        float* c_panel = c + (j - t.n) * kGroupedRows;
        pack_b(p, t, k, n_k, j, width, b);
        multiply(a, t.m_end - t.m, b, (n_k + Word::kElements - 1) / Word::kElements, c_panel,
                 k > 0);
        if (k + kStep >= terms) finish(p, t, j, width, c_panel, out);
      }
    }
  }

 private:
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
      pack_across<Word, kGroupedRows>(at(p.a, first + k, t.m), stride, n_k, t.m_end - t.m, a);
    } else {
      const int64_t words = (n_k + Word::kElements - 1) / Word::kElements;
      pack_along<Word>(at(p.a, first + t.m, k), stride, t.m_end - t.m, n_k, words, a);
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
      pack_across<Word, kPanel>(group + k * stride + j * kBytes, stride, n_k, width, b);
    }
  }

  static void multiply(const float* a, int64_t rows, const float* b, int64_t words, float* c,
                       bool accumulate) {
    constexpr int kRowStride = kOfWeight ? 1 : kBlock, kColStride = kOfWeight ? kGroupedRows : 1;
    gemm_rows<typename Word::Dot, 2, kRowStride, kColStride>(
        a, static_cast<int>(round_up(rows, kShortTileRows)), b, kPanel, static_cast<int>(words), c,
        kPanel, accumulate);
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
#if defined(__AVX512BF16__)
  if (p.a.dtype == DType::kBFloat16) return multiply_words<Bf16Pair>(p, pool);
#endif
  with_dtype(p.a.dtype,
             [&](auto tag) { multiply_words<FloatWord<decltype(tag)::value>>(p, pool); });
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
