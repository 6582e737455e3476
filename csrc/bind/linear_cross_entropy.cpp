// encfast::vocab_scan and encfast::vocab_grad on the CPU: what linear_cross_entropy does with a
// slice of logits between its matrix products; encfast::vocab_weight_grad: what these write into.
#include "cpu/linear_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

// Float32 or int64 of exactly this shape, contiguous.
void check_table(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                 const char* dtype_name, int64_t tables, int64_t rows) {
  check_cpu(op, name, x);
  check_dtype(op, name, x, dtype, dtype_name);
  STD_TORCH_CHECK(x.numel() == tables * rows && inner_contiguous(x, 0), op, ": ", name,
                  " has shape ", shape_text(x), ", expected ", tables,
                  " contiguous values for each of ", rows, " rows");
}

// A slice of logits with what is known of its rows and columns, checked.
struct Slice {
  const char* op;
  RowsIn logits;
  Vector bias;
  VocabSlice s;

  Slice(const char* op_in, const Tensor& logits_in, const OptTensor& bias_in, const Tensor& targets,
        int64_t first, double softcap)
      : op(op_in), logits(op, "logits", logits_in), bias(op, "bias", bias_in, columns(logits_in)) {
    check_dim(op, "logits", logits_in, 2);
    const int64_t rows = logits_in.size(0);
    check_table(op, "targets", targets, ScalarType::Long, "int64", 1, rows);
    STD_TORCH_CHECK(std::isfinite(softcap) && softcap >= 0, op, ": softcap is ", softcap,
                    ", expected a finite number >= 0");
    s = {rows,
         columns(logits_in),
         first,
         rows_per_task(columns(logits_in)),
         bias.data(),
         static_cast<float>(softcap),
         targets.const_data_ptr<int64_t>()};
  }

 private:
  static int64_t columns(const Tensor& x) { return x.size(x.dim() - 1); }
};

void vocab_scan_cpu(const Tensor& logits, const OptTensor& bias, const Tensor& targets,
                    int64_t first, double softcap, const Tensor& stats) {
  const Slice slice("encfast::vocab_scan", logits, bias, targets, first, softcap);
  check_table(slice.op, "stats", stats, ScalarType::Float, "float32", kVocabStats, slice.s.rows);
  TorchPool pool;
  cpu_kernels().linear_cross_entropy.scan(
      {slice.s, slice.logits.matrix(), stats.mutable_data_ptr<float>()}, pool.pool());
}

void vocab_grad_cpu(const Tensor& logits, const OptTensor& bias, const Tensor& targets,
                    int64_t first, double softcap, const Tensor& coefficients, const Tensor& grad) {
  const Slice slice("encfast::vocab_grad", logits, bias, targets, first, softcap);
  check_table(slice.op, "coefficients", coefficients, ScalarType::Float, "float32",
              kVocabCoefficients, slice.s.rows);
  check_cpu(slice.op, "grad", grad);
  check_same_shape(slice.op, "grad", grad, "logits", logits);
  STD_TORCH_CHECK(grad.scalar_type() == logits.scalar_type() && inner_contiguous(grad, 0), slice.op,
                  ": grad is not contiguous and of the logits' dtype");
  TorchPool pool;
  cpu_kernels().linear_cross_entropy.grad(
      {slice.s, slice.logits.matrix(), coefficients.const_data_ptr<float>(),
       matrix_of(slice.op, grad)},
      pool.pool());
}

// Uninitialised, contiguous, of weight's shape and dtype.
Tensor vocab_weight_grad_cpu(const Tensor& weight) {
  check_dim("encfast::vocab_weight_grad", "weight", weight, 2);
  return new_contiguous(weight, {weight.size(0), weight.size(1)}, weight.scalar_type());
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("vocab_scan", TORCH_BOX(&encfast::vocab_scan_cpu));
  m.impl("vocab_grad", TORCH_BOX(&encfast::vocab_grad_cpu));
  m.impl("vocab_weight_grad", TORCH_BOX(&encfast::vocab_weight_grad_cpu));
}
