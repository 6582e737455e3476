// encfast::add_norm on the CPU: checks everything a core relies on, allocates and dispatches.
#include "cpu/add_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr const char* kOp = "encfast::add_norm";
constexpr double kDefaultEps = 1e-5;

NormKind norm_kind(const std::string& kind) {
  if (kind == "layernorm") return NormKind::kLayerNorm;
  STD_TORCH_CHECK(kind == "rmsnorm", kOp, ": kind is '", kind,
                  "', expected 'layernorm' or 'rmsnorm'");
  return NormKind::kRmsNorm;
}

int64_t rows_in(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  return n;
}

// One float32 value for each row of x, or none.
Tensor new_row_values(const Tensor& x, bool wanted) {
  if (!wanted) return new_empty_vector(x, ScalarType::Float);
  return new_contiguous(x, {x.sizes().begin(), static_cast<size_t>(x.dim() - 1)},
                        ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_cpu(
    const Tensor& x, const OptTensor& residual, const OptTensor& weight, const OptTensor& bias,
    const OptTensor& branch_scale, std::string kind, std::optional<double> eps, bool keep_total) {
  const RowsIn rows(kOp, "x", x), residual_rows(kOp, "residual", residual);
  if (residual) check_same_shape(kOp, "residual", *residual, "x", x);
  const double epsilon = eps.value_or(kDefaultEps);
  STD_TORCH_CHECK(std::isfinite(epsilon) && epsilon >= 0, kOp, ": eps is ", epsilon,
                  ", expected a finite number >= 0");
  const int64_t N = rows_in(x), C = x.size(x.dim() - 1);
  const Vector weights(kOp, "weight", weight, C), biases(kOp, "bias", bias, C);
  const Vector scales(kOp, "branch_scale", branch_scale, C);
  const NormKind norm = norm_kind(kind);

  const bool same = !residual || residual->scalar_type() == x.scalar_type();
  const ScalarType dtype = same ? x.scalar_type() : ScalarType::Float;
  const bool has_total = keep_total && (residual || branch_scale);
  Tensor y = new_contiguous(x, x.sizes(), dtype);
  Tensor total = has_total ? new_contiguous(x, x.sizes(), dtype) : new_empty_vector(x, dtype);
  Tensor mean = new_row_values(x, norm == NormKind::kLayerNorm), rstd = new_row_values(x, true);
  if (N == 0) return {y, total, mean, rstd};

  TorchPool pool;
  const int64_t stride = round_up_lanes(C);
  const Workspace workspace(x, stride * pool.threads() * static_cast<int64_t>(sizeof(float)));
  cpu_kernels().add_norm.fwd(
      {norm, static_cast<float>(epsilon), N, C, rows_per_task(C), rows.matrix(),
       residual_rows.matrix(), weights.data(), biases.data(), scales.data(), matrix_of(kOp, y),
       has_total ? matrix_of(kOp, total) : Matrix{}, mean.mutable_data_ptr<float>(),
       rstd.mutable_data_ptr<float>(), static_cast<float*>(workspace.data()), stride},
      pool.pool());
  return {y, total, mean, rstd};
}

void check_like_total(const char* name, const Tensor& x, const Tensor& total) {
  check_same_shape(kOp, name, x, "total", total);
  STD_TORCH_CHECK(x.scalar_type() == total.scalar_type(), kOp, ": ", name,
                  " and total differ in dtype");
}

Tensor checked_row_values(const char* name, const Tensor& values, int64_t N) {
  check_cpu(kOp, name, values);
  check_dtype(kOp, name, values, ScalarType::Float, "float32");
  STD_TORCH_CHECK(values.numel() == N, kOp, ": ", name, " has shape ", shape_text(values),
                  ", expected one value for each of ", N, " rows");
  return torch::stable::contiguous(values);
}

// Sections of the partial sums as tensors [C], [0] where not wanted.
std::vector<Tensor> sections_of(const Tensor& sums, int64_t section, int64_t C,
                                const std::vector<bool>& wanted) {
  std::vector<Tensor> out;
  int64_t at = 0;
  for (const bool want : wanted) {
    out.push_back(new_contiguous(sums, {want ? C : 0}, ScalarType::Float));
    if (!want) continue;
    const float* source = sums.const_data_ptr<float>() + at;
    std::copy(source, source + C, out.back().mutable_data_ptr<float>());
    at += section;
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_bwd_cpu(
    const Tensor& dy, const OptTensor& dtotal_in, const Tensor& total, const Tensor& mean,
    const Tensor& rstd, const OptTensor& x, const OptTensor& weight, const OptTensor& branch_scale,
    std::string kind, bool want_dweight, bool want_dbias) {
  const RowsIn total_rows(kOp, "total", total), dy_rows(kOp, "dy", dy);
  const RowsIn past_rows(kOp, "dtotal_in", dtotal_in), x_rows(kOp, "x", x);
  check_like_total("dy", dy, total);
  if (dtotal_in) check_like_total("dtotal_in", *dtotal_in, total);
  STD_TORCH_CHECK(x.has_value() == branch_scale.has_value(), kOp,
                  ": x and branch_scale go together");
  if (x) check_same_shape(kOp, "x", *x, "total", total);
  const int64_t N = rows_in(total), C = total.size(total.dim() - 1);
  const Vector weights(kOp, "weight", weight, C);
  const Vector scales(kOp, "branch_scale", branch_scale, C);
  const NormKind norm = norm_kind(kind);
  const bool centred = norm == NormKind::kLayerNorm;
  const Tensor means = checked_row_values("mean", mean, centred ? N : 0);
  const Tensor rstds = checked_row_values("rstd", rstd, N);

  Tensor dtotal = new_contiguous(total, total.sizes(), total.scalar_type());
  Tensor dx = x ? new_contiguous(*x, x->sizes(), x->scalar_type())
                : new_empty_vector(total, total.scalar_type());
  const std::vector<bool> wanted = {want_dweight, want_dbias, branch_scale.has_value()};
  const int64_t section = round_up_lanes(C);
  const int64_t width = section * std::count(wanted.begin(), wanted.end(), true);
  const int64_t rows = rows_per_partial(N);
  Tensor sums = new_contiguous(total, {width}, ScalarType::Float);
  if (N == 0) {
    sums = torch::stable::fill_(sums, 0.0);
  } else {
    TorchPool pool;
    const Workspace partials(total,
                             (N + rows - 1) / rows * width * static_cast<int64_t>(sizeof(float)));
    cpu_kernels().add_norm.bwd({norm,
                                N,
                                C,
                                rows,
                                dy_rows.matrix(),
                                past_rows.matrix(),
                                total_rows.matrix(),
                                x_rows.matrix(),
                                means.const_data_ptr<float>(),
                                rstds.const_data_ptr<float>(),
                                weights.data(),
                                scales.data(),
                                matrix_of(kOp, dtotal),
                                x ? matrix_of(kOp, dx) : Matrix{},
                                wanted[0],
                                wanted[1],
                                wanted[2],
                                section,
                                static_cast<float*>(partials.data()),
                                sums.mutable_data_ptr<float>()},
                               pool.pool());
  }
  const std::vector<Tensor> grads = sections_of(sums, section, C, wanted);
  return {dtotal, dx, grads[0], grads[1], grads[2]};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&encfast::add_norm_cpu));
  m.impl("add_norm_bwd", TORCH_BOX(&encfast::add_norm_bwd_cpu));
}
