// out [N, F] = epilogue(x [N, C] W^T), W packed in panels of 32 columns of the result.
//
//            chunk: columns of one task           W is read block by block of C: for each block,
//            +-------+-------+-------+            a group of rows of x meets the panels of the
//   rows     |       |       |       |            chunk one after another; their sums wait in C,
//   of one   |  C [rows][chunk] fp32 |            in L2, for the next block. With one block they
//   task     |       |       |       |            wait for the epilogue only, and C has the rows
//            +-------+-------+-------+            of a group.
//
// Rows of x are read where they lie, or packed first: if they are to be converted, have a rest, or
// would all fall into the same few cache sets.
//
// Per task and block of C, L2 holds the chunk of C, the panels' block and x's rows; each word of W
// comes from L3 once per task, each row of x once per chunk. The epilogue runs over the rows of a
// group when their last block is done.
//
// A norm needs whole rows: its tasks take all columns. With fewer such tasks than threads, tasks of
// chunks put C into one shared buffer instead, and the epilogue runs over it afterwards.
#include "packed_linear.h"

#include "isa.h"
#include "linear_epilogue.h"
#include "linear_product.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kRowsPerTask = 256;
// x is read once per chunk of columns. Quantising it costs so much that int8 takes wider chunks
// on fewer rows; its weights are small enough to be read more often.
constexpr int64_t kColumnsPerTask = 512, kInt8ColumnsPerTask = 1536;
constexpr int64_t kFloatsPerTask = 128 * 1024;  // of C: a quarter of an L2 of 2 MiB
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kScaleFloats = sizeof(RowScale) / 4;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How the result is cut into tasks. It depends on the machine's threads, results do not.
struct Plan {
  int64_t width;    // columns of the result
  int64_t rows;     // per task, a multiple of the group
  int64_t columns;  // per task, a multiple of a panel
  int64_t row_blocks, chunks;
  bool shared;   // C of all tasks in one buffer, epilogue afterwards
  int64_t b_at;  // where the gate's other half begins in a row of C
  int64_t ldc;   // an odd number of cache lines: rows fall into different sets
  int64_t held;  // rows of C of a task: all, or those of a group
  int64_t c_at;  // of a thread's workspace: packed rows of x, their scales, C
  int64_t slot_floats;

  template <class Product>
  static Plan make(const PackedLinearParams& p, int threads) {
    Plan plan;
    plan.width = p.gated ? p.F / 2 : p.F;
    const int64_t padded = round_up(larger(plan.width, 1), kPanel);
    const int64_t groups = (p.N + Product::kGroupRows - 1) / Product::kGroupRows;
    const int64_t wanted = kTasksPerThread * threads;
    const int64_t ranges = p.gated ? 2 : 1;
    const int64_t columns =
        Product::kFormat == LinearFormat::kInt8 ? kInt8ColumnsPerTask : kColumnsPerTask;
    plan.columns = smaller(padded, even_share(padded, columns / ranges));
    plan.shared = p.norm != Norm::kNone && groups < threads;
    if (p.norm != Norm::kNone && !plan.shared) plan.columns = padded;
    const bool one_block = linear_words(p.format, p.C) <= Product::kBlockWords && !plan.shared;
    const int64_t fit =
        one_block ? kRowsPerTask : smaller(kRowsPerTask, kFloatsPerTask / (plan.columns * ranges));
    plan.rows = larger(fit / Product::kGroupRows, 1) * Product::kGroupRows;
    // Few rows: smaller tasks, rather than threads without one.
    while (threads > 1 && plan.rows > Product::kGroupRows && plan.tasks(p.N, padded) < wanted) {
      plan.rows -= Product::kGroupRows;
    }
    const bool whole_rows = p.norm != Norm::kNone && !plan.shared;
    while (threads > 1 && !whole_rows && plan.columns > kPanel &&
           plan.tasks(p.N, padded) < wanted) {
      plan.columns = round_up(plan.columns / 2, kPanel);
    }
    plan.row_blocks = (p.N + plan.rows - 1) / plan.rows;
    plan.chunks = (padded + plan.columns - 1) / plan.columns;
    plan.held = one_block ? Product::kGroupRows : plan.rows;
    const int64_t range = plan.shared ? padded : plan.columns;
    plan.b_at = range;
    // The second range of a gate may begin inside a panel.
    plan.ldc = range + (p.gated ? range + kPanel : 0) + 16;
    plan.c_at = Product::kGroupRows * Product::kBlockWords + round_up(plan.rows, 16) * kScaleFloats;
    plan.slot_floats = plan.c_at + (plan.shared ? 0 : plan.held * plan.ldc);
    return plan;
  }

  int64_t tasks(int64_t N, int64_t padded) const {
    return (N + rows - 1) / rows * ((padded + columns - 1) / columns);
  }
  // The largest multiple of a panel that cuts `n` into equal parts of at most `most`.
  static int64_t even_share(int64_t n, int64_t most) {
    const int64_t parts = (n + most - 1) / most;
    return round_up((n + parts - 1) / parts, kPanel);
  }
  int64_t c_floats() const { return row_blocks * rows * ldc; }
  int64_t shared_floats() const {
    return shared ? c_floats() + row_blocks * rows * kScaleFloats : 0;
  }
};

// The parts of a packed buffer.
struct Packed {
  const float* panels;
  int64_t words;       // of a row
  const float* scale;  // int8 only, like sum
  const int32_t* sum;

  Packed(LinearFormat format, int64_t F, int64_t C, const void* data)
      : panels(reinterpret_cast<const float*>(static_cast<const char*>(data) + kLinearHeaderBytes)),
        words(linear_words(format, C)),
        scale(panels + linear_panels(F) * kPanel * words),
        sum(reinterpret_cast<const int32_t*>(scale + linear_panels(F) * kPanel)) {}
};

template <class Product>
struct Linear {
  static constexpr bool kInt8 = Product::kFormat == LinearFormat::kInt8;
  static constexpr int64_t kBlock = Product::kBlockWords;

  struct Job {
    const PackedLinearParams& p;
    const Plan plan;
    const Packed w;
    float* slots;
    float* shared_c;
    RowScale* shared_scales;
  };

  static int64_t workspace_bytes(const PackedLinearParams& p, int threads) {
    const Plan plan = Plan::make<Product>(p, threads);
    return 4 * (threads * plan.slot_floats + plan.shared_floats());
  }

  static void run(const PackedLinearParams& p, const Pool& pool) {
    const int threads = pool.threads(pool.self);
    const Plan plan = Plan::make<Product>(p, threads);
    float* slots = static_cast<float*>(p.workspace);
    float* shared = slots + threads * plan.slot_floats;
    Job job{p,     plan,   Packed(p.format, p.F, p.C, p.packed),
            slots, shared, reinterpret_cast<RowScale*>(shared + plan.c_floats())};
    pool.run(pool.self, plan.row_blocks * plan.chunks, run_task, &job);
    if (plan.shared) pool.run(pool.self, p.N, epilogue_row, &job);
  }

 private:
  // Rows [row, row + rows) and columns [begin, begin + width) of the result, and their workspace.
  struct Task {
    int64_t row, rows, begin, width;
    float* packed_x;
    RowScale* scales;  // [rows], int8 only
    float* c;
  };

  static void run_task(int64_t index, int slot, void* ctx) {
    const Job& job = *static_cast<const Job*>(ctx);
    const Plan& plan = job.plan;
    Task t;
    // Neighbours share a chunk of W, which stays in L2.
    t.row = index % plan.row_blocks * plan.rows;
    t.begin = index / plan.row_blocks * plan.columns;
    t.rows = smaller(plan.rows, job.p.N - t.row);
    t.width = smaller(plan.columns, plan.width - t.begin);
    t.packed_x = job.slots + slot * plan.slot_floats;
    t.scales = reinterpret_cast<RowScale*>(t.packed_x + Product::kGroupRows * kBlock);
    t.c = t.packed_x + plan.c_at;
    if (plan.shared) {
      // In a shared row of C columns stand where they stand in the result.
      t.c = job.shared_c + t.row * plan.ldc + t.begin;
      if (t.begin == 0) t.scales = job.shared_scales + t.row;  // other chunks' would be the same
    }
    if constexpr (kInt8) row_scales(job, t);
    Product::begin();
    for (int64_t k = 0; k == 0 || k < job.w.words; k += kBlock) {
      for (int64_t r = 0; r < t.rows; r += Product::kGroupRows) multiply_group(job, t, k, r);
    }
    Product::end();
  }

  // The group of rows at r of the task meets words [k, k + kBlock) of the task's columns; with the
  // last of them it is finished, while it is in L1 or L2.
  static void multiply_group(const Job& job, const Task& t, int64_t k, int64_t r) {
    const int64_t group = smaller(Product::kGroupRows, t.rows - r);
    const WordRows x = rows_of_x(job, t, r, group, k);
    const bool last = k + kBlock >= job.w.words && !job.plan.shared;
    for (int64_t j = 0; j < t.width; j += kPanel) {
      multiply_panel(job, t, x, k, r, group, t.begin + j, j);
    }
    if (job.p.gated) {
      const int64_t from = job.p.F / 2 + t.begin, lead = from % kPanel;
      // In a shared C the panel that reaches into the next chunk is that chunk's.
      const bool next_has_rest = job.plan.shared && t.begin + t.width < job.plan.width;
      const int64_t width = t.width + (next_has_rest ? 0 : lead);
      for (int64_t j = 0; j < width; j += kPanel) {
        multiply_panel(job, t, x, k, r, group, from - lead + j, job.plan.b_at + j);
      }
    }
    if (last) {
      epilogue(job, row_of_c(job, t, r), t.scales + r, t.row + r, group, t.begin, t.width);
    }
  }

  static float* row_of_c(const Job& job, const Task& t, int64_t r) {
    return t.c + r % job.plan.held * job.plan.ldc;
  }

  // Words [k, k + kBlock) of a group's rows, which are packed if that is needed.
  static WordRows rows_of_x(const Job& job, const Task& t, int64_t r, int64_t group, int64_t k) {
    const MatrixView& x = job.p.x;
    const int64_t bytes = element_bytes(x.dtype), stride = x.stride * bytes;
    if (are_words(job.p, stride) && group % Product::kRowStep == 0) {
      const char* data = static_cast<const char*>(x.data);
      return {data + (t.row + r) * stride + 4 * k, stride};
    }
    pack_group(job, t, r, group, k);
    return {reinterpret_cast<const char*>(t.packed_x), 4 * kBlock};
  }

  // Whether rows of x are words without a rest, `stride` bytes apart and not all in the same sets
  // of L1.
  static bool are_words(const PackedLinearParams& p, int64_t stride) {
    constexpr DType kWordsOf =
        Product::kFormat == LinearFormat::kFp32 ? DType::kFloat32 : DType::kBFloat16;
    constexpr int64_t kPadded = 16 * Product::kElements, kSets = 4096;
    return Product::kTakesAnyRows && !kInt8 && p.x.dtype == kWordsOf && p.C % kPadded == 0 &&
           stride % kSets != 0;
  }

  // `column` is a multiple of the panel's width, `at` its place in a row of C.
  static void multiply_panel(const Job& job, const Task& t, const WordRows& x, int64_t k, int64_t r,
                             int64_t group, int64_t column, int64_t at) {
    const int64_t words = job.w.words;
    const int64_t padded = round_up(group, Product::kRowStep);
    const float* panel = job.w.panels + column * words;
    Product::run(x, static_cast<int>(padded), panel + k * kPanel,
                 static_cast<int>(smaller(kBlock, words - k)), row_of_c(job, t, r) + at,
                 static_cast<int>(job.plan.ldc), k > 0);
  }

  // Words [k, k + kBlock) of `rows` rows of x from the task's row r on, then rows of zeros.
  static void pack_group(const Job& job, const Task& t, int64_t r, int64_t rows, int64_t k) {
    const MatrixView& x = job.p.x;
    const int64_t n = smaller(kBlock, job.w.words - k), from = k * Product::kElements;
    const int64_t elements = smaller(n * Product::kElements, job.p.C - from);
    with_dtype(x.dtype, [&](auto tag) {
      constexpr DType kT = decltype(tag)::value;
      for (int64_t i = 0; i < rows; ++i) {
        const char* src = static_cast<const char*>(x.data) +
                          ((t.row + r + i) * x.stride + from) * element_bytes(kT);
        pack_words<typename Product::XWords, kT>(
            src, elements, n, kInt8 ? t.scales[r + i] : RowScale{}, t.packed_x + i * kBlock);
      }
    });
    for (int64_t i = rows; i < round_up(rows, Product::kRowStep); ++i) {
      std::memset(t.packed_x + i * kBlock, 0, 4 * n);
    }
  }

  static void row_scales(const Job& job, const Task& t) {
    const MatrixView& x = job.p.x;
    with_dtype(x.dtype, [&](auto tag) {
      constexpr DType kT = decltype(tag)::value;
      for (int64_t r = 0; r < t.rows; ++r) {
        t.scales[r] = asymmetric_scale<kT>(
            static_cast<const char*>(x.data) + (t.row + r) * x.stride * element_bytes(kT), job.p.C);
      }
    });
  }

  static void epilogue_row(int64_t row, int, void* ctx) {
    const Job& job = *static_cast<const Job*>(ctx);
    epilogue(job, job.shared_c + row * job.plan.ldc, job.shared_scales + row, row, 1, 0,
             job.plan.width);
  }

  static void epilogue(const Job& job, float* c, const RowScale* scales, int64_t row, int64_t rows,
                       int64_t begin, int64_t width) {
    const int64_t b_begin = job.p.F / 2 + begin;
    run_epilogue<kInt8>({&job.p,
                         scales,
                         job.w.scale,
                         job.w.sum,
                         c,
                         job.plan.ldc,
                         row,
                         rows,
                         begin,
                         width,
                         job.plan.width,
                         {begin, 0},
                         {b_begin, job.plan.b_at + b_begin % kPanel}});
  }
};

template <class Product>
struct ProductTag {
  using type = Product;
};

template <class F>
auto with_product(LinearFormat format, F f) {
  if (format == LinearFormat::kFp32) return f(ProductTag<Fp32Product>{});
  if (format == LinearFormat::kBf16) return f(ProductTag<Bf16Product>{});
  return f(ProductTag<Int8Product>{});
}

// One panel of a weight: its rows as words, then word k of all 32 side by side.
template <class Words, DType kT>
void pack_panel(const PackLinearParams& p, int64_t panel) {
  constexpr int64_t kAtOnce = 256;
  const int64_t words = linear_words(p.format, p.C);
  const Packed layout(p.format, p.F, p.C, p.packed);
  float* dst = const_cast<float*>(layout.panels) + panel * kPanel * words;
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t f = panel * kPanel + j;
    const bool present = f < p.F;
    const char* src = static_cast<const char*>(p.weight.data) +
                      (present ? f * p.weight.stride * element_bytes(kT) : 0);
    RowScale s{};
    if (present && p.format == LinearFormat::kInt8) s = symmetric_scale<kT>(src, p.C);
    int32_t sum = 0;
    for (int64_t k = 0; k < words; k += kAtOnce) {
      alignas(64) float row[kAtOnce];
      const int64_t n = smaller(kAtOnce, words - k), from = k * Words::kElements;
      const int64_t left = smaller(n * Words::kElements, p.C - from);
      pack_words<Words, kT>(src + from * element_bytes(kT), present ? left : 0, n, s, row);
      for (int64_t i = 0; i < n; ++i) std::memcpy(dst + (k + i) * kPanel + j, row + i, 4);
      for (int64_t i = 0; i < 4 * n; ++i) sum += reinterpret_cast<const int8_t*>(row)[i];
    }
    if (p.format == LinearFormat::kInt8) {
      const_cast<float*>(layout.scale)[f] = s.scale;
      const_cast<int32_t*>(layout.sum)[f] = sum;
    }
  }
}

template <class Words>
void pack_task(int64_t panel, int, void* ctx) {
  const PackLinearParams& p = *static_cast<const PackLinearParams*>(ctx);
  with_dtype(p.weight.dtype, [&](auto tag) { pack_panel<Words, decltype(tag)::value>(p, panel); });
}

void pack(const PackLinearParams& p, const Pool& pool) {
  with_product(p.format, [&](auto tag) {
    pool.run(pool.self, linear_panels(p.F), pack_task<typename decltype(tag)::type::WeightWords>,
             const_cast<PackLinearParams*>(&p));
  });
}

int64_t workspace_bytes(const PackedLinearParams& p, int threads) {
  return with_product(p.format, [&](auto tag) {
    return Linear<typename decltype(tag)::type>::workspace_bytes(p, threads);
  });
}

void run(const PackedLinearParams& p, const Pool& pool) {
  with_product(p.format, [&](auto tag) { Linear<typename decltype(tag)::type>::run(p, pool); });
}

}  // namespace

extern const PackedLinearKernels kPackedLinear = {pack, workspace_bytes, run};

}  // namespace encfast::ENCFAST_ISA
