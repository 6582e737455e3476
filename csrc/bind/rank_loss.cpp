// encfast::info_nce, encfast::siglip and their backwards on the CPU: checks everything the core
// relies on, allocates and dispatches.
#include "cpu/rank_loss.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

float scalar_of(const char* op, const char* name, const Tensor& x) {
  check_cpu(op, name, x);
  check_dim(op, name, x, 0);
  core_dtype(op, name, x);
  return *to_dtype(x, ScalarType::Float).const_data_ptr<float>();
}

// A row of b, or -1, for each row of a: of int64 [B], which it keeps alive.
class Choices {
 public:
  Choices(const char* op, const char* name, const OptTensor& x, int64_t B, int64_t M) {
    if (!x) return;
    check_cpu(op, name, *x);
    check_dim(op, name, *x, 1);
    check_dtype(op, name, *x, ScalarType::Long, "int64");
    STD_TORCH_CHECK(x->size(0) == B, op, ": ", name, " has ", x->size(0), " entries, a has ", B,
                    " rows");
    tensor_ = torch::stable::contiguous(*x);
    for (int64_t i = 0; i < B; ++i) {
      STD_TORCH_CHECK(data()[i] >= -1 && data()[i] < M, op, ": ", name, " holds ", data()[i],
                      ", expected -1 or one of the ", M, " rows of b");
    }
  }

  const int64_t* data() const { return tensor_ ? tensor_->const_data_ptr<int64_t>() : nullptr; }

 private:
  OptTensor tensor_;
};

// Features, scalars and positives, known to fit; keeps their memory alive.
class Features {
 public:
  RankProblem q;
  const char* op;

  Features(const char* op_in, RankLoss loss, const Tensor& a, const Tensor& b, const Tensor& scale,
           const OptTensor& bias, const Tensor& positives, const OptTensor& excluded)
      : op(op_in), a_(op, "a", a), b_(op, "b", b) {
    check_dim(op, "a", a, 2);
    check_dim(op, "b", b, 2);
    q = {loss, a.size(0), b.size(0), a.size(1), a_.matrix(), b_.matrix(), nullptr, nullptr, 0, 0};
    STD_TORCH_CHECK(q.B > 0 && q.M > 0, op, ": a has ", q.B, " rows and b ", q.M,
                    ", expected at least one");
    STD_TORCH_CHECK(b.size(1) == q.D, op, ": b has shape ", shape_text(b), ", a has ", q.D,
                    " channels");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": b is not of a's dtype");
    q.scale = scalar_of(op, "logit_scale", scale);
    STD_TORCH_CHECK(std::isfinite(q.scale) && q.scale > 0, op, ": logit_scale is ", q.scale,
                    ", expected a positive finite number");
    if (bias) q.bias = scalar_of(op, "logit_bias", *bias);
    STD_TORCH_CHECK(std::isfinite(q.bias), op, ": logit_bias is ", q.bias,
                    ", expected a finite number");
    choices_.emplace_back(op, "positives", positives, q.B, q.M);
    choices_.emplace_back(op, "excluded", excluded, q.B, q.M);
    q.positives = choices_[0].data();
    q.excluded = choices_[1].data();
    if (q.excluded) check_excluded();
  }

 private:
  void check_excluded() const {
    for (int64_t i = 0; i < q.B; ++i) {
      STD_TORCH_CHECK(q.excluded[i] < 0 || q.excluded[i] != q.positives[i], op,
                      ": excluded holds row ", i, "'s positive, ", q.excluded[i]);
    }
  }

  RowsIn a_, b_;
  std::vector<Choices> choices_;
};

// A float32 tensor of known size as contiguous memory.
class Floats {
 public:
  Floats(const char* op, const char* name, const Tensor& x, int64_t n) {
    check_cpu(op, name, x);
    check_dtype(op, name, x, ScalarType::Float, "float32");
    int64_t count = 1;
    for (int64_t i = 0; i < x.dim(); ++i) count *= x.size(i);
    STD_TORCH_CHECK(count == n, op, ": ", name, " has shape ", shape_text(x), ", expected ", n,
                    " elements");
    tensor_ = torch::stable::contiguous(x);
  }

  const float* data() const { return tensor_->const_data_ptr<float>(); }
  // Of [2, n]: what the core reads and does not write.
  LogSums log_sums() const {
    float* first = const_cast<float*>(data());
    return {first, first + tensor_->numel() / 2};
  }

 private:
  OptTensor tensor_;
};

Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_contiguous(like, sizes, ScalarType::Float);
}

LogSums log_sums_of(const Tensor& x) {
  float* first = x.mutable_data_ptr<float>();
  return {first, first + x.numel() / 2};
}

void run_forward(const Tensor& like, RankFwdParams p) {
  TorchPool pool;
  const RankLossKernels& kernels = cpu_kernels().rank_loss;
  const Workspace workspace(like, kernels.fwd_bytes(p.q, pool.threads()));
  p.workspace = workspace.data();
  kernels.fwd(p, pool.pool());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_cpu(const Tensor& a, const Tensor& b,
                                                                const Tensor& logit_scale,
                                                                const Tensor& positives,
                                                                const OptTensor& excluded,
                                                                bool both) {
  const Features f("encfast::info_nce", both ? RankLoss::kBoth : RankLoss::kRows, a, b, logit_scale,
                   std::nullopt, positives, excluded);
  const RankProblem& q = f.q;
  Tensor row_loss = new_floats(a, {q.B}), col_loss = new_floats(a, {both ? q.B : 0});
  Tensor positive = new_floats(a, {q.B});
  Tensor rows = new_floats(a, {2, q.B}), columns = new_floats(a, {2, both ? q.M : 0});
  run_forward(
      a, {q, row_loss.mutable_data_ptr<float>(), col_loss.mutable_data_ptr<float>(),
          positive.mutable_data_ptr<float>(), log_sums_of(rows), log_sums_of(columns), nullptr});
  return {row_loss, col_loss, positive, rows, columns};
}

Tensor siglip_cpu(const Tensor& a, const Tensor& b, const Tensor& logit_scale,
                  const Tensor& logit_bias, const Tensor& positives) {
  const Features f("encfast::siglip", RankLoss::kSigmoid, a, b, logit_scale, logit_bias, positives,
                   std::nullopt);
  Tensor loss = new_floats(a, {f.q.B}), positive = new_floats(a, {f.q.B});
  run_forward(a, {f.q,
                  loss.mutable_data_ptr<float>(),
                  nullptr,
                  positive.mutable_data_ptr<float>(),
                  {},
                  {},
                  nullptr});
  return loss;
}

struct Grads {
  Tensor da, db, dscale, dbias;
};

Grads run_backward(const Tensor& a, const Tensor& b, RankBwdParams p, const char* op, bool want_da,
                   bool want_db) {
  const ScalarType dtype = a.scalar_type();
  Grads g{want_da ? new_contiguous(a, {p.q.B, p.q.D}, dtype) : new_empty_vector(a, dtype),
          want_db ? new_contiguous(b, {p.q.M, p.q.D}, dtype) : new_empty_vector(b, dtype),
          new_floats(a, {}), new_floats(a, {})};
  const Matrix none{nullptr, 0, core_dtype(op, "a", a)};
  p.da = want_da ? matrix_of(op, g.da) : none;
  p.db = want_db ? matrix_of(op, g.db) : none;
  double dscale, dbias;
  p.dscale = &dscale;
  p.dbias = &dbias;
  TorchPool pool;
  const RankLossKernels& kernels = cpu_kernels().rank_loss;
  const Workspace workspace(a, kernels.bwd_bytes(p.q, pool.threads()));
  p.workspace = workspace.data();
  kernels.bwd(p, pool.pool());
  *g.dscale.mutable_data_ptr<float>() = static_cast<float>(dscale);
  *g.dbias.mutable_data_ptr<float>() = static_cast<float>(dbias);
  return g;
}

std::tuple<Tensor, Tensor, Tensor> info_nce_bwd_cpu(
    const Tensor& drow, const Tensor& dcol, const Tensor& dpositive, const Tensor& a,
    const Tensor& b, const Tensor& logit_scale, const Tensor& positives, const OptTensor& excluded,
    const Tensor& row_stats, const Tensor& col_stats, bool both, bool want_da, bool want_db) {
  const char* op = "encfast::info_nce_bwd";
  const Features f(op, both ? RankLoss::kBoth : RankLoss::kRows, a, b, logit_scale, std::nullopt,
                   positives, excluded);
  const RankProblem& q = f.q;
  const Floats of_row(op, "drow", drow, q.B), of_positive(op, "dpositive", dpositive, q.B);
  const Floats of_col(op, "dcol", dcol, both ? q.B : 0);
  const Floats rows(op, "row_stats", row_stats, 2 * q.B);
  const Floats columns(op, "col_stats", col_stats, both ? 2 * q.M : 0);
  std::vector<float> of_rows(q.B, 0), of_positives(q.B, 0), of_columns(both ? q.M : 0, 0);
  for (int64_t i = 0; i < q.B; ++i) {
    if (q.positives[i] < 0) continue;
    of_rows[i] = of_row.data()[i];
    of_positives[i] = of_positive.data()[i] - (both ? of_col.data()[i] : 0);
    if (both) of_columns[q.positives[i]] += of_col.data()[i];
  }
  Grads g = run_backward(a, b,
                         {q,
                          of_rows.data(),
                          of_positives.data(),
                          of_columns.data(),
                          rows.log_sums(),
                          columns.log_sums(),
                          {},
                          {},
                          nullptr,
                          nullptr,
                          nullptr},
                         op, want_da, want_db);
  return {g.da, g.db, g.dscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_bwd_cpu(
    const Tensor& dloss, const Tensor& a, const Tensor& b, const Tensor& logit_scale,
    const Tensor& logit_bias, const Tensor& positives, bool want_da, bool want_db) {
  const char* op = "encfast::siglip_bwd";
  const Features f(op, RankLoss::kSigmoid, a, b, logit_scale, logit_bias, positives, std::nullopt);
  const Floats of_row(op, "dloss", dloss, f.q.B);
  Grads g = run_backward(
      a, b, {f.q, of_row.data(), nullptr, nullptr, {}, {}, {}, {}, nullptr, nullptr, nullptr}, op,
      want_da, want_db);
  return {g.da, g.db, g.dscale, g.dbias};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&encfast::info_nce_cpu));
  m.impl("info_nce_bwd", TORCH_BOX(&encfast::info_nce_bwd_cpu));
  m.impl("siglip", TORCH_BOX(&encfast::siglip_cpu));
  m.impl("siglip_bwd", TORCH_BOX(&encfast::siglip_bwd_cpu));
}
