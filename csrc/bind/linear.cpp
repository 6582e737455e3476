// encfast::linear and its gradients on the CPU: products of grouped_mm's core over one group.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "bind/grouped_tasks.h"
#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

// A matrix contiguous along its last dimension.
struct Operand {
  Tensor tensor;
  ConstMatrix matrix;

  Operand(const char* op, const char* name, const Tensor& x)
      : tensor(checked_operand(op, name, x, 2)),
        matrix{tensor.const_data_ptr(), tensor.stride(0), core_dtype(op, name, tensor)} {}
  int64_t size(int64_t dim) const { return tensor.size(dim); }
};

void check_fits(const char* op, const char* name, const Operand& given, int64_t rows,
                int64_t columns, DType dtype) {
  STD_TORCH_CHECK(given.size(0) == rows && given.size(1) == columns, op, ": ", name, " has shape ",
                  shape_text(given.tensor), ", expected (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(given.matrix.dtype == dtype, op, ": ", name, " is not of x's dtype");
}

// Rows and their number as the one group there is.
struct OneGroup {
  int32_t ends[2];

  OneGroup(const char* op, int64_t n) : ends{0, static_cast<int32_t>(n)} {
    STD_TORCH_CHECK(n <= INT32_MAX, op, ": x has ", n, " rows, expected at most 2^31 - 1");
  }
};

// [rows, columns] results with `terms` terms a sum, of `tokens` rows of x and dout.
Tensor multiply(const char* op, GroupedProduct product, const Operand& a, const Operand& b,
                int64_t tokens, int64_t rows, int64_t columns, int64_t terms, const float* bias) {
  Tensor out = new_contiguous(a.tensor, {rows, columns}, a.tensor.scalar_type());
  if (rows == 0 || columns == 0) return out;
  const OneGroup group(op, tokens);
  GroupedMmParams p{product, group.ends,         a.matrix, b.matrix, 0, terms,  bias,
                    columns, matrix_of(op, out), 0,        nullptr,  0, nullptr};
  multiply_groups(
      p, a.tensor,
      grouped_tasks(
          product, 1, columns, [&](int64_t) { return rows; }, [&](int64_t) { return terms; }));
  return out;
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  constexpr const char* kOp = "encfast::linear";
  const Operand a(kOp, "x", x), w(kOp, "weight", weight);
  const int64_t N = a.size(0), C = a.size(1), F = w.size(0);
  check_fits(kOp, "weight", w, F, C, a.matrix.dtype);
  const Vector b(kOp, "bias", bias, F);
  return multiply(kOp, GroupedProduct::kForward, a, w, N, N, F, C, b.data());
}

Tensor sum_of_rows(const char* op, const Operand& dout) {
  Tensor sum = new_contiguous(dout.tensor, {dout.size(1)}, ScalarType::Float);
  if (dout.size(1) == 0) return sum;
  const OneGroup group(op, dout.size(0));
  TorchPool pool;
  cpu_kernels().grouped_mm.sum_rows(
      {group.ends, 1, dout.size(1), dout.matrix, sum.mutable_data_ptr<float>()}, pool.pool());
  return sum;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd_cpu(const Tensor& dout, const Tensor& x,
                                                  const Tensor& weight, bool want_dx,
                                                  bool want_dweight, bool want_dbias) {
  constexpr const char* kOp = "encfast::linear_bwd";
  using P = GroupedProduct;
  const Operand d(kOp, "dout", dout), a(kOp, "x", x), w(kOp, "weight", weight);
  const int64_t N = a.size(0), C = a.size(1), F = w.size(0);
  check_fits(kOp, "weight", w, F, C, a.matrix.dtype);
  check_fits(kOp, "dout", d, N, F, a.matrix.dtype);
  const ScalarType dtype = a.tensor.scalar_type();
  return {want_dx ? multiply(kOp, P::kGradInput, d, w, N, N, C, F, nullptr)
                  : new_empty_vector(a.tensor, dtype),
          want_dweight ? multiply(kOp, P::kGradWeight, d, a, N, F, C, N, nullptr)
                       : new_empty_vector(a.tensor, dtype),
          want_dbias ? sum_of_rows(kOp, d) : new_empty_vector(a.tensor, ScalarType::Float)};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("linear", TORCH_BOX(&encfast::linear_cpu));
  m.impl("linear_bwd", TORCH_BOX(&encfast::linear_bwd_cpu));
}
