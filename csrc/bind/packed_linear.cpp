// encfast::pack_linear and encfast::packed_linear on the CPU: checks everything a core relies on,
// then plans and runs it.
#include "cpu/packed_linear.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <iterator>

#include "bind/pool.h"
#include "bind/tensor_util.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

using OptTensor = std::optional<Tensor>;
using OptString = std::optional<std::string>;

// What stands in front of a packed weight.
struct Header {
  int64_t layout, format, F, C, reserved[4];
};
static_assert(sizeof(Header) == kLinearHeaderBytes);
constexpr int64_t kLayout = 0x656e632d637075;  // "enc-cpu"

// int8 sums of products up to 255 * 127 stay below 2^31.
constexpr int64_t kMaxInt8Terms = 65536;

template <class Enum, size_t kCount>
Enum parse(const char* op, const char* name, const std::string& value,
           const char* const (&names)[kCount], int first) {
  for (size_t i = 0; i < kCount; ++i) {
    if (value == names[i]) return static_cast<Enum>(static_cast<int>(i) + first);
  }
  std::string all;
  for (const char* n : names) all += (all.empty() ? "'" : ", '") + std::string(n) + "'";
  STD_TORCH_CHECK(false, op, ": ", name, " is '", value, "', expected one of ", all);
}

LinearFormat parse_format(const char* op, const std::string& value) {
  return parse<LinearFormat>(op, "format", value, {"fp32", "bf16", "int8"}, 0);
}
Activation parse_activation(const char* op, const OptString& value) {
  if (!value) return Activation::kNone;
  return parse<Activation>(op, "activation", *value, {"gelu", "gelu_tanh", "silu", "relu"}, 1);
}
Norm parse_norm(const char* op, const OptString& value) {
  return value ? parse<Norm>(op, "norm", *value, {"layernorm", "rmsnorm"}, 1) : Norm::kNone;
}

MatrixView view_of(const char* op, const Tensor& x) {
  return {x.const_data_ptr(), core_dtype(op, "x", x), x.stride(0)};
}

// A vector of `size` floats, or nothing.
OptTensor checked_vector(const char* op, const char* name, const OptTensor& x, int64_t size) {
  if (!x) return std::nullopt;
  check_cpu(op, name, *x);
  core_dtype(op, name, *x);
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == size, op, ": ", name, " has shape ",
                  shape_text(*x), ", expected (", size, ",)");
  return torch::stable::contiguous(to_dtype(*x, ScalarType::Float));
}

const float* floats(const OptTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

void check_terms(const char* op, LinearFormat format, int64_t C) {
  STD_TORCH_CHECK(format != LinearFormat::kInt8 || C <= kMaxInt8Terms, op, ": the weight has ", C,
                  " columns, int8 serves up to ", kMaxInt8Terms);
}

Tensor pack_linear_cpu(const Tensor& weight, const std::string& format_name) {
  constexpr const char* kOp = "encfast::pack_linear";
  const LinearFormat format = parse_format(kOp, format_name);
  const Tensor rows = checked_operand(kOp, "weight", weight, 2);
  const int64_t F = rows.size(0), C = rows.size(1);
  check_terms(kOp, format, C);
  Tensor packed = new_contiguous(rows, {packed_linear_bytes(format, F, C)}, ScalarType::Byte);
  void* data = packed.mutable_data_ptr();
  const Header header{kLayout, static_cast<int64_t>(format), F, C, {}};
  std::memcpy(data, &header, sizeof(header));
  TorchPool pool;
  cpu_kernels().packed_linear.pack({format, view_of(kOp, rows), F, C, data}, pool.pool());
  return packed;
}

// The buffer, known to be one that pack_linear made here for this weight.
Tensor checked_packed(const char* op, const Tensor& packed, LinearFormat format, int64_t F,
                      int64_t C) {
  check_cpu(op, "packed", packed);
  check_dim(op, "packed", packed, 1);
  check_dtype(op, "packed", packed, ScalarType::Byte, "uint8");
  STD_TORCH_CHECK(F >= 0, op, ": out_features is ", F, ", expected >= 0");
  const int64_t bytes = packed_linear_bytes(format, F, C);
  STD_TORCH_CHECK(packed.size(0) == bytes, op, ": packed has ", packed.size(0), " bytes, expected ",
                  bytes, " for a weight (", F, ", ", C, ")");
  Tensor buffer = torch::stable::contiguous(packed);
  Header header;
  std::memcpy(&header, buffer.const_data_ptr(), sizeof(header));
  STD_TORCH_CHECK(header.layout == kLayout && header.format == static_cast<int64_t>(format) &&
                      header.F == F && header.C == C,
                  op, ": packed was not made by pack_linear on this device for this format and ",
                  "shape; pack the weight again where it is used");
  return buffer;
}

Tensor packed_linear_cpu(const Tensor& x, const Tensor& packed, int64_t F,
                         const std::string& format_name, const OptTensor& bias,
                         const OptString& activation, bool gated, const OptTensor& residual,
                         const OptString& norm, const OptTensor& norm_weight,
                         const OptTensor& norm_bias, std::optional<double> norm_eps) {
  constexpr const char* kOp = "encfast::packed_linear";
  const LinearFormat format = parse_format(kOp, format_name);
  const Tensor rows = checked_operand(kOp, "x", x, 2);
  const int64_t N = rows.size(0), C = rows.size(1);
  check_terms(kOp, format, C);
  const Tensor weight = checked_packed(kOp, packed, format, F, C);
  STD_TORCH_CHECK(!gated || F % 2 == 0, kOp, ": out_features is ", F,
                  ", expected an even number for gated");
  const int64_t width = gated ? F / 2 : F;
  const OptTensor b = checked_vector(kOp, "bias", bias, F);
  const OptTensor nw = checked_vector(kOp, "norm_weight", norm_weight, width);
  const OptTensor nb = checked_vector(kOp, "norm_bias", norm_bias, width);
  const double eps = norm_eps.value_or(1e-5);
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0, kOp, ": norm_eps is ", eps,
                  ", expected a finite number >= 0");
  const Norm kind = parse_norm(kOp, norm);
  STD_TORCH_CHECK(kind != Norm::kNone || !(nw || nb || norm_eps), kOp,
                  ": norm is None, but a norm_weight, norm_bias or norm_eps was given");

  OptTensor r;
  if (residual) {
    r = checked_operand(kOp, "residual", *residual, 2);
    STD_TORCH_CHECK(r->size(0) == N && r->size(1) == width, kOp, ": residual has shape ",
                    shape_text(*r), ", expected (", N, ", ", width, ")");
  }
  Tensor out = new_contiguous(rows, {N, width}, rows.scalar_type());
  if (N == 0 || width == 0) return out;
  PackedLinearParams p{format,
                       view_of(kOp, rows),
                       weight.const_data_ptr(),
                       N,
                       C,
                       F,
                       floats(b),
                       parse_activation(kOp, activation),
                       gated,
                       r ? view_of(kOp, *r) : MatrixView{nullptr, DType::kFloat32, 0},
                       kind,
                       floats(nw),
                       floats(nb),
                       static_cast<float>(eps),
                       out.mutable_data_ptr(),
                       nullptr};
  TorchPool pool;
  const PackedLinearKernels& kernels = cpu_kernels().packed_linear;
  const Workspace workspace(rows, kernels.workspace_bytes(p, pool.threads()));
  p.workspace = workspace.data();
  kernels.run(p, pool.pool());
  return out;
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&encfast::pack_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&encfast::packed_linear_cpu));
}
