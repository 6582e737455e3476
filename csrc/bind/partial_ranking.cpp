// encfast::hard_negatives, candidate_dots, partial_ranking and their backwards on the CPU: checks
// everything the cores rely on, allocates and dispatches.
#include "cpu/partial_ranking.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "bind/row_index.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

// A product with a row anywhere in memory takes about as long as so many of a dense product
// (AVX-512, D = 256, 8192 rows).
constexpr int64_t kDenseFrom = 8;

// a [B, D] and b [M, D], known to fit; keeps their memory alive.
struct Features {
  int64_t B, M, D;
  RowsIn a, b;

  Features(const char* op, const Tensor& a_in, const Tensor& b_in)
      : B(rows_of(op, "a", a_in)),
        M(rows_of(op, "b", b_in)),
        D(a_in.size(1)),
        a(op, "a", a_in),
        b(op, "b", b_in) {
    STD_TORCH_CHECK(b_in.size(1) == D, op, ": b has shape ", shape_text(b_in), ", a has ", D,
                    " channels");
    STD_TORCH_CHECK(a_in.scalar_type() == b_in.scalar_type(), op, ": b is not of a's dtype");
    STD_TORCH_CHECK(M <= INT32_MAX, op, ": b has ", M, " rows, expected at most 2^31 - 1");
  }

 private:
  static int64_t rows_of(const char* op, const char* name, const Tensor& x) {
    check_dim(op, name, x, 2);
    STD_TORCH_CHECK(x.size(0) > 0, op, ": ", name, " has no rows, expected at least one");
    return x.size(0);
  }
};

// int64 of this shape with entries in [low, high], contiguous.
Tensor checked_integers(const char* op, const char* name, const Tensor& x, int64_t B, int64_t K,
                        int64_t low, int64_t high) {
  check_cpu(op, name, x);
  check_dim(op, name, x, K < 0 ? 1 : 2);
  check_dtype(op, name, x, ScalarType::Long, "int64");
  STD_TORCH_CHECK(x.size(0) == B && (K < 0 || x.size(1) == K), op, ": ", name, " has shape ",
                  shape_text(x), ", expected ", B, " rows");
  Tensor contiguous = torch::stable::contiguous(x);
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  // Least and largest first: a loop that compilers vectorise.
  const int64_t n = contiguous.numel();
  int64_t least = high, most = low;
  for (int64_t i = 0; i < n; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  STD_TORCH_CHECK(least >= low && most <= high, op, ": ", name, " holds ",
                  least < low ? least : most, ", expected ", low, "..", high);
  return contiguous;
}

// A float32 tensor of n elements as contiguous memory.
Tensor checked_floats(const char* op, const char* name, const Tensor& x, int64_t n) {
  check_cpu(op, name, x);
  check_dtype(op, name, x, ScalarType::Float, "float32");
  STD_TORCH_CHECK(x.numel() == n, op, ": ", name, " has shape ", shape_text(x), ", expected ", n,
                  " elements");
  return torch::stable::contiguous(x);
}

Tensor hard_negatives_cpu(const Tensor& a, const Tensor& b, int64_t k, const Tensor& positives_in) {
  constexpr const char* kOp = "encfast::hard_negatives";
  const Features f(kOp, a, b);
  const Tensor positives = checked_integers(kOp, "positives", positives_in, f.B, -1, -1, f.M - 1);
  const int64_t* of_row = positives.const_data_ptr<int64_t>();
  int64_t candidates = f.M;
  for (int64_t i = 0; i < f.B; ++i) candidates = of_row[i] >= 0 ? f.M - 1 : candidates;
  STD_TORCH_CHECK(k >= 1 && k <= candidates, kOp, ": k is ", k, ", expected 1..", candidates,
                  ", the number of candidates");
  Tensor found = new_contiguous(a, {f.B, k}, ScalarType::Long);
  HardNegativesParams p{f.B,          f.M,          f.D,    k,
                        f.a.matrix(), f.b.matrix(), of_row, found.mutable_data_ptr<int64_t>(),
                        nullptr};
  TorchPool pool;
  const PartialRankingKernels& kernels = cpu_kernels().partial_ranking;
  const Workspace workspace(a, kernels.hard_negatives_bytes(p, pool.threads()));
  p.workspace = workspace.data();
  kernels.hard_negatives(p, pool.pool());
  return found;
}

// Features and their candidates, known to fit.
struct Candidates {
  Features f;
  Tensor tensor;
  CandidateProblem q;

  Candidates(const char* op, const Tensor& a, const Tensor& b, const Tensor& candidates)
      : f(op, a, b), tensor(checked(op, candidates, f)) {
    const int64_t K = tensor.size(1);
    q = {f.B,
         f.M,
         f.D,
         K,
         f.a.matrix(),
         f.b.matrix(),
         tensor.const_data_ptr<int64_t>(),
         kDenseFrom * K >= f.M};
  }

 private:
  static Tensor checked(const char* op, const Tensor& x, const Features& f) {
    check_dim(op, "candidates", x, 2);
    STD_TORCH_CHECK(x.size(1) > 0, op, ": candidates has shape ", shape_text(x),
                    ", expected at least one a row");
    return checked_integers(op, "candidates", x, f.B, x.size(1), 0, f.M - 1);
  }
};

Tensor candidate_dots_cpu(const Tensor& a, const Tensor& b, const Tensor& candidates) {
  const Candidates c("encfast::candidate_dots", a, b, candidates);
  Tensor dots = new_contiguous(a, {c.q.B, c.q.K}, ScalarType::Float);
  TorchPool pool;
  const PartialRankingKernels& kernels = cpu_kernels().partial_ranking;
  const Workspace workspace(a, kernels.dots_bytes(c.q, pool.threads()));
  kernels.dots({c.q, dots.mutable_data_ptr<float>(), workspace.data()}, pool.pool());
  return dots;
}

std::tuple<Tensor, Tensor> candidate_dots_bwd_cpu(const Tensor& ddots_in, const Tensor& a,
                                                  const Tensor& b, const Tensor& candidates,
                                                  bool want_da, bool want_db) {
  constexpr const char* kOp = "encfast::candidate_dots_bwd";
  const Candidates c(kOp, a, b, candidates);
  const CandidateProblem& q = c.q;
  const Tensor ddots = checked_floats(kOp, "ddots", ddots_in, q.B * q.K);
  const ScalarType dtype = a.scalar_type();
  const Tensor da = want_da ? new_contiguous(a, {q.B, q.D}, dtype) : new_empty_vector(a, dtype);
  const Tensor db = want_db ? new_contiguous(b, {q.M, q.D}, dtype) : new_empty_vector(b, dtype);
  const bool sorted = want_db && !q.dense;
  const RowGroups groups(q.candidates, sorted ? q.B * q.K : 0, q.M);
  const Matrix none{nullptr, 0, core_dtype(kOp, "a", a)};
  CandidateDotsBwdParams p{q,
                           ddots.const_data_ptr<float>(),
                           groups.begin.data(),
                           groups.order.data(),
                           want_da ? matrix_of(kOp, da) : none,
                           want_db ? matrix_of(kOp, db) : none,
                           nullptr};
  TorchPool pool;
  const PartialRankingKernels& kernels = cpu_kernels().partial_ranking;
  const Workspace workspace(a, kernels.dots_bwd_bytes(p, pool.threads()));
  p.workspace = workspace.data();
  kernels.dots_bwd(p, pool.pool());
  return {da, db};
}

// Products, their scale and valid prefixes, known to fit.
struct Ranking {
  Tensor dots, valid;
  RankingProblem q;

  Ranking(const char* op, const Tensor& dots_in, const Tensor& scale_in, const Tensor& valid_in)
      : dots(checked_dots(op, dots_in)),
        valid(checked_integers(op, "valid", valid_in, dots.size(0), -1, 0, dots.size(1))) {
    check_cpu(op, "logit_scale", scale_in);
    check_dim(op, "logit_scale", scale_in, 0);
    core_dtype(op, "logit_scale", scale_in);
    const float scale = *to_dtype(scale_in, ScalarType::Float).const_data_ptr<float>();
    STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, op, ": logit_scale is ", scale,
                    ", expected a positive finite number");
    q = {dots.size(0), dots.size(1), dots.const_data_ptr<float>(), valid.const_data_ptr<int64_t>(),
         scale};
  }

 private:
  static Tensor checked_dots(const char* op, const Tensor& x) {
    check_dim(op, "dots", x, 2);
    STD_TORCH_CHECK(x.numel() > 0, op, ": dots has shape ", shape_text(x),
                    ", expected at least one row and one candidate");
    return checked_floats(op, "dots", x, x.numel());
  }
};

Tensor partial_ranking_cpu(const Tensor& dots, const Tensor& logit_scale, const Tensor& valid) {
  const Ranking r("encfast::partial_ranking", dots, logit_scale, valid);
  Tensor loss = new_contiguous(dots, {r.q.B}, ScalarType::Float);
  TorchPool pool;
  cpu_kernels().partial_ranking.fwd(r.q, loss.mutable_data_ptr<float>(), pool.pool());
  return loss;
}

std::tuple<Tensor, Tensor> partial_ranking_bwd_cpu(const Tensor& dloss_in, const Tensor& dots,
                                                   const Tensor& logit_scale, const Tensor& valid) {
  constexpr const char* kOp = "encfast::partial_ranking_bwd";
  const Ranking r(kOp, dots, logit_scale, valid);
  const Tensor dloss = checked_floats(kOp, "dloss", dloss_in, r.q.B);
  Tensor ddots = new_contiguous(dots, {r.q.B, r.q.K}, ScalarType::Float);
  Tensor dscale = new_contiguous(dots, {}, ScalarType::Float);
  std::vector<double> of_rows(static_cast<size_t>(r.q.B));
  TorchPool pool;
  constexpr int64_t kBlock = 64;  // of the core
  const int64_t stride = (r.q.K + kBlock - 1) / kBlock * kBlock;
  const Workspace workspace(dots, pool.threads() * 2 * stride * 4);
  cpu_kernels().partial_ranking.bwd(
      {r.q, dloss.const_data_ptr<float>(), ddots.mutable_data_ptr<float>(), of_rows.data(),
       static_cast<float*>(workspace.data())},
      pool.pool());
  double sum = 0;
  for (const double x : of_rows) sum += x;
  *dscale.mutable_data_ptr<float>() = static_cast<float>(sum);
  return {ddots, dscale};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("hard_negatives", TORCH_BOX(&encfast::hard_negatives_cpu));
  m.impl("candidate_dots", TORCH_BOX(&encfast::candidate_dots_cpu));
  m.impl("candidate_dots_bwd", TORCH_BOX(&encfast::candidate_dots_bwd_cpu));
  m.impl("partial_ranking", TORCH_BOX(&encfast::partial_ranking_cpu));
  m.impl("partial_ranking_bwd", TORCH_BOX(&encfast::partial_ranking_bwd_cpu));
}
