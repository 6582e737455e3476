// encfast::grouped_mm and its backward on the CPU: checks everything a core relies on, cuts the
// groups into tasks and runs them.
#include "cpu/grouped_mm.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "bind/grouped_tasks.h"
#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

struct Groups {
  Tensor cu_seqlens;  // keeps the memory alive
  const int32_t* ends;
  int64_t E;

  Groups(const char* op, const Tensor& given, int64_t E_in, int64_t N)
      : cu_seqlens(checked(op, given)), ends(cu_seqlens.const_data_ptr<int32_t>()), E(E_in) {
    STD_TORCH_CHECK(cu_seqlens.size(0) == E + 1, op, ": cu_seqlens has ", cu_seqlens.size(0),
                    " entries, expected ", E + 1, " for ", E, " groups of weight");
    STD_TORCH_CHECK(ends[0] == 0, op, ": cu_seqlens starts at ", ends[0], ", expected 0");
    for (int64_t e = 0; e < E; ++e) {
      STD_TORCH_CHECK(ends[e] <= ends[e + 1], op, ": cu_seqlens decreases from ", ends[e], " to ",
                      ends[e + 1], " at group ", e);
    }
    STD_TORCH_CHECK(ends[E] <= N, op, ": cu_seqlens ends at ", ends[E], ", but x has ", N, " rows");
  }

  int64_t rows(int64_t e) const { return ends[e + 1] - ends[e]; }

 private:
  static Tensor checked(const char* op, const Tensor& x) {
    check_cpu(op, "cu_seqlens", x);
    check_dim(op, "cu_seqlens", x, 1);
    check_dtype(op, "cu_seqlens", x, ScalarType::Int, "int32");
    return torch::stable::contiguous(x);
  }
};

// x, weight and the groups, known to fit.
struct Problem {
  const char* op;
  Tensor x, weight;
  int64_t N, C, E, F;
  Groups groups;

  Problem(const char* op_in, const Tensor& x_in, const Tensor& weight_in, const Tensor& cu_seqlens)
      : op(op_in),
        x(checked_operand(op, "x", x_in, 2)),
        weight(checked_operand(op, "weight", weight_in, 3)),
        N(x.size(0)),
        C(x.size(1)),
        E(weight.size(0)),
        F(weight.size(1)),
        groups(op, cu_seqlens, E, N) {
    STD_TORCH_CHECK(weight.size(2) == C, op, ": weight has shape ", shape_text(weight), ", x has ",
                    C, " channels");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight is not of x's dtype");
  }

  ConstMatrix matrix(const Tensor& t) const {
    return {t.const_data_ptr(), t.stride(t.dim() - 2), core_dtype(op, "x", t)};
  }
};

// rows x terms, by the weight of each group.
Tensor by_weight(const Problem& q, GroupedProduct product, const Tensor& rows, int64_t terms,
                 int64_t columns, const float* bias) {
  Tensor out = new_contiguous(q.x, {q.N, columns}, q.x.scalar_type());
  if (columns == 0) return out;
  const Matrix result = matrix_of(q.op, out);
  const int64_t end = q.groups.ends[q.E];
  const int64_t row_bytes = columns * (result.dtype == DType::kFloat32 ? 4 : 2);
  if (end < q.N) {
    std::memset(static_cast<char*>(result.data) + end * row_bytes, 0,
                static_cast<size_t>((q.N - end) * row_bytes));
  }
  GroupedMmParams p{product,
                    q.groups.ends,
                    q.matrix(rows),
                    q.matrix(q.weight),
                    q.weight.stride(0),
                    terms,
                    bias,
                    columns,
                    result,
                    0,
                    nullptr,
                    0,
                    nullptr};
  multiply_groups(p, q.x,
                  grouped_tasks(
                      product, q.E, columns, [&](int64_t e) { return q.groups.rows(e); },
                      [&](int64_t) { return terms; }));
  return out;
}

Tensor grad_weight(const Problem& q, const Tensor& dout) {
  Tensor out = new_contiguous(q.x, {q.E, q.F, q.C}, q.x.scalar_type());
  if (q.E * q.F * q.C == 0) return out;
  GroupedMmParams p{GroupedProduct::kGradWeight,
                    q.groups.ends,
                    q.matrix(dout),
                    q.matrix(q.x),
                    0,
                    0,
                    nullptr,
                    q.C,
                    matrix_of(q.op, out),
                    q.F * q.C,
                    nullptr,
                    0,
                    nullptr};
  multiply_groups(p, q.x,
                  grouped_tasks(
                      p.product, q.E, q.C, [&](int64_t) { return q.F; },
                      [&](int64_t e) { return q.groups.rows(e); }));
  return out;
}

Tensor grad_bias(const Problem& q, const Tensor& dout) {
  Tensor out = new_contiguous(q.x, {q.E, q.F}, ScalarType::Float);
  if (q.E * q.F == 0) return out;
  TorchPool pool;
  cpu_kernels().grouped_mm.sum_rows(
      {q.groups.ends, q.E, q.F, q.matrix(dout), out.mutable_data_ptr<float>()}, pool.pool());
  return out;
}

Tensor grouped_mm_cpu(const Tensor& x, const Tensor& weight, const Tensor& cu_seqlens,
                      const OptTensor& bias) {
  const Problem q("encfast::grouped_mm", x, weight, cu_seqlens);
  OptTensor b;
  if (bias) {
    check_cpu(q.op, "bias", *bias);
    core_dtype(q.op, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == q.E && bias->size(1) == q.F, q.op,
                    ": bias has shape ", shape_text(*bias), ", expected (", q.E, ", ", q.F, ")");
    b = torch::stable::contiguous(to_dtype(*bias, ScalarType::Float));
  }
  return by_weight(q, GroupedProduct::kForward, q.x, q.C, q.F,
                   b ? b->const_data_ptr<float>() : nullptr);
}

std::tuple<Tensor, Tensor, Tensor> grouped_mm_bwd_cpu(const Tensor& dout, const Tensor& x,
                                                      const Tensor& weight,
                                                      const Tensor& cu_seqlens, bool want_dx,
                                                      bool want_dweight, bool want_dbias) {
  const Problem q("encfast::grouped_mm_bwd", x, weight, cu_seqlens);
  const Tensor d = checked_operand(q.op, "dout", dout, 2);
  STD_TORCH_CHECK(d.size(0) == q.N && d.size(1) == q.F, q.op, ": dout has shape ", shape_text(d),
                  ", expected (", q.N, ", ", q.F, ")");
  STD_TORCH_CHECK(d.scalar_type() == q.x.scalar_type(), q.op, ": dout is not of x's dtype");
  const ScalarType dtype = q.x.scalar_type();
  return {want_dx ? by_weight(q, GroupedProduct::kGradInput, d, q.F, q.C, nullptr)
                  : new_empty_vector(q.x, dtype),
          want_dweight ? grad_weight(q, d) : new_empty_vector(q.x, dtype),
          want_dbias ? grad_bias(q, d) : new_empty_vector(q.x, ScalarType::Float)};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&encfast::grouped_mm_cpu));
  m.impl("grouped_mm_bwd", TORCH_BOX(&encfast::grouped_mm_bwd_cpu));
}
