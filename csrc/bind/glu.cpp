// encfast::glu on the CPU: checks everything a core relies on, allocates and dispatches.
#include "cpu/glu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr const char* kOp = "encfast::glu";

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "relu", kOp, ": activation is '", name,
                  "', expected 'gelu', 'gelu_tanh', 'silu' or 'relu'");
  return Activation::kRelu;
}

GluGeometry geometry_of(const Tensor& x, const std::string& activation, bool gated, bool second) {
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(!gated || width % 2 == 0, kOp, ": x has ", width,
                  " channels, expected an even number, two halves");
  GluGeometry g{};
  g.activation = activation_of(activation);
  g.gated = gated;
  g.F = gated ? width / 2 : width;
  g.N = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) g.N *= x.size(i);
  g.activated = gated && second ? g.F : 0;
  g.factor = second ? 0 : g.F;
  return g;
}

std::vector<int64_t> output_sizes(const Tensor& x, int64_t F) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = F;
  return sizes;
}

Tensor glu_cpu(const Tensor& x, const OptTensor& bias, std::string activation, bool gated,
               bool activate_second) {
  const RowsIn rows(kOp, "x", x);
  const Vector biases(kOp, "bias", bias, x.size(x.dim() - 1));
  GluGeometry g = geometry_of(x, activation, gated, activate_second);
  g.rows_per_task = rows_per_task(g.F);
  Tensor out = new_contiguous(x, output_sizes(x, g.F), x.scalar_type());
  if (g.N == 0) return out;
  TorchPool pool;
  cpu_kernels().glu.fwd({g, rows.matrix(), biases.data(), matrix_of(kOp, out)}, pool.pool());
  return out;
}

std::tuple<Tensor, Tensor> glu_bwd_cpu(const Tensor& dout, const Tensor& x, const OptTensor& bias,
                                       std::string activation, bool gated, bool activate_second,
                                       bool want_dbias) {
  const RowsIn rows(kOp, "x", x), dout_rows(kOp, "dout", dout);
  const int64_t channels = x.size(x.dim() - 1);
  const Vector biases(kOp, "bias", bias, channels);
  GluGeometry g = geometry_of(x, activation, gated, activate_second);
  const std::vector<int64_t> sizes = output_sizes(x, g.F);
  STD_TORCH_CHECK(
      dout.scalar_type() == x.scalar_type() &&
          std::equal(sizes.begin(), sizes.end(), dout.sizes().begin(), dout.sizes().end()),
      kOp, ": dout has shape ", shape_text(dout), ", expected shape and dtype of the output");
  g.rows_per_task = want_dbias ? rows_per_partial(g.N) : rows_per_task(g.F);

  Tensor dx = new_contiguous(x, x.sizes(), x.scalar_type());
  const int64_t width = want_dbias ? round_up_lanes(channels) : 0;
  const Tensor sums = new_contiguous(x, {width}, ScalarType::Float);
  Tensor dbias = new_contiguous(x, {want_dbias ? channels : 0}, ScalarType::Float);
  if (g.N == 0) return {dx, torch::stable::fill_(dbias, 0.0)};
  TorchPool pool;
  const int64_t tasks = (g.N + g.rows_per_task - 1) / g.rows_per_task;
  const Workspace partials(x, tasks * width * static_cast<int64_t>(sizeof(float)));
  cpu_kernels().glu.bwd(
      {g, dout_rows.matrix(), rows.matrix(), biases.data(), matrix_of(kOp, dx), width,
       static_cast<float*>(partials.data()), sums.mutable_data_ptr<float>()},
      pool.pool());
  std::copy_n(sums.const_data_ptr<float>(), dbias.numel(), dbias.mutable_data_ptr<float>());
  return {dx, dbias};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("glu", TORCH_BOX(&encfast::glu_cpu));
  m.impl("glu_bwd", TORCH_BOX(&encfast::glu_bwd_cpu));
}
