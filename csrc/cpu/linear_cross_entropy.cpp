// Cross entropy of logits that exist a slice of the vocabulary at a time, [rows][columns] in L2.
//
//   scan   reads a slice: running maximum, sum of exponentials, sum of logits and the target's
//          logit of each row. A row is read from memory once and from L1 a second time, when the
//          maximum is known.
//   grad   reads a slice again and writes the gradient of its logits, into the same memory or not.
//
// Bias and softcap are applied on the way, in fp32. A row belongs to one task: results do not
// depend on the number of threads.
#include "linear_cross_entropy.h"

#include "isa.h"
#include "vocab_row.h"

namespace encfast::ENCFAST_ISA {
namespace {

// The logits of a row as the loss sees them.
template <DType kT>
struct LogitsOfRow {
  const char* row;
  const float* bias;
  float softcap;

  LogitsOfRow(const ConstMatrix& m, const VocabSlice& s, int64_t i)
      : row(row_of<kT>(m, i)), bias(s.bias), softcap(s.softcap) {}

  template <class At>
  ENCFAST_INLINE Vec at(At at) const {
    Vec v = load_at<kT>(row, at);
    if (bias) v += load_at<DType::kFloat32>(bias, at);
    return softcap > 0 ? splat(softcap) * tanh(v / splat(softcap)) : v;
  }
  float at_column(int64_t c) const { return at(Tail{c, 1})[0]; }

  // Derivative by the logit in front of the softcap.
  ENCFAST_INLINE Vec slope(Vec z) const {
    const Vec t = z / splat(softcap);
    return splat(1.0f) - t * t;
  }
};

// Where the target of row i lies in the slice; negative or beyond it where it lies elsewhere.
int64_t target_column(const VocabSlice& s, int64_t i) { return s.targets[i] - s.first; }

bool in_slice(const VocabSlice& s, int64_t column) { return column >= 0 && column < s.columns; }

template <DType kT>
struct Kernels {
  static void scan_row(const VocabScanParams& p, int64_t i) {
    const auto stat = [&](VocabStat which) -> float& { return p.stats[which * p.s.rows + i]; };
    const LogitsOfRow<kT> z(p.logits, p.s, i);
    Maximum largest;
    for_columns(p.s.columns,
                [&](auto at, int k) ENCFAST_INLINE_LAMBDA { largest.take(z.at(at), at, k); });
    const float before = stat(kMaxLogit), now = largest.with(before), from = finite_or_zero(now);
    Accumulator exps, logits;
    for_columns(p.s.columns, [&](auto at, int k) ENCFAST_INLINE_LAMBDA {
      const Vec v = z.at(at);
      exps.parts[k] += keep(exp_minus(v, from), at);
      logits.parts[k] += keep(v, at);
    });
    stat(kMaxLogit) = now;
    stat(kSumOfExp) = stat(kSumOfExp) * exp_minus(before, from) + exps.total();
    stat(kSumOfLogits) += logits.total();
    const int64_t column = target_column(p.s, i);
    if (in_slice(p.s, column)) stat(kTargetLogit) = z.at_column(column);
  }

  static void grad_row(const VocabGradParams& p, int64_t i) {
    const auto of = [&](VocabCoefficient which) { return p.coefficients[which * p.s.rows + i]; };
    const float lse = of(kLogSumExp), factor = of(kFactor), everywhere = of(kEverywhere);
    const LogitsOfRow<kT> z(p.logits, p.s, i);
    const auto grad = [&](Vec v, float added) ENCFAST_INLINE_LAMBDA {
      const Vec g = fma(splat(factor), exp_minus(v, lse), splat(added));
      return z.softcap > 0 ? g * z.slope(v) : g;
    };
    // Of its own, not added to what is rounded: p - 1 may be far smaller than p. Before the logits
    // are overwritten.
    const int64_t column = target_column(p.s, i);
    const bool met = in_slice(p.s, column);
    Vec at_target = zeros();
    if (met) at_target = grad(splat(z.at_column(column)), everywhere + of(kAtTarget));
    char* out = row_of<kT>(p.grad, i);
    for_columns(p.s.columns, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      store_at<kT>(out, at, grad(z.at(at), everywhere));
    });
    if (met) store_at<kT>(out, Tail{column, 1}, at_target);
  }
};

template <class Params, void (*kRow)(const Params&, int64_t)>
void run_rows(const Params& p, const Pool& pool) {
  const int64_t tasks = (p.s.rows + p.s.rows_per_task - 1) / p.s.rows_per_task;
  const auto task = [](int64_t index, int, void* ctx) {
    const Params& q = *static_cast<const Params*>(ctx);
    const int64_t begin = index * q.s.rows_per_task, end = begin + q.s.rows_per_task;
    for (int64_t i = begin; i < end && i < q.s.rows; ++i) kRow(q, i);
  };
  pool.run(pool.self, tasks, task, const_cast<Params*>(&p));
}

void scan(const VocabScanParams& p, const Pool& pool) {
  with_dtype(p.logits.dtype, [&](auto tag) {
    run_rows<VocabScanParams, Kernels<decltype(tag)::value>::scan_row>(p, pool);
  });
}

void grad(const VocabGradParams& p, const Pool& pool) {
  with_dtype(p.logits.dtype, [&](auto tag) {
    run_rows<VocabGradParams, Kernels<decltype(tag)::value>::grad_row>(p, pool);
  });
}

}  // namespace

extern const LinearCrossEntropyKernels kLinearCrossEntropy = {scan, grad};

}  // namespace encfast::ENCFAST_ISA
