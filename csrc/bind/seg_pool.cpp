// encfast::seg_pool and encfast::seg_pool_bwd on the CPU.
#include "cpu/seg_pool.h"

#include <torch/csrc/stable/library.h>

#include "bind/matrix.h"
#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr int64_t kFloatBytes = 4;

SegPoolHow how_of(const char* op, const std::string& how) {
  if (how == "mean") return SegPoolHow::kMean;
  if (how == "sum") return SegPoolHow::kSum;
  if (how == "max") return SegPoolHow::kMax;
  if (how == "first") return SegPoolHow::kFirst;
  if (how == "last") return SegPoolHow::kLast;
  STD_TORCH_CHECK(how == "attention", op, ": how is ", how,
                  ", expected mean, sum, max, first, last or attention");
  return SegPoolHow::kAttention;
}

// What both directions read, checked; keeps the memory alive.
struct Segments {
  SegPoolHow how;
  int64_t N, C, B;
  RowsIn x;
  Vector weights;
  Tensor cu_seqlens;

  Segments(const char* op, const Tensor& x_in, const Tensor& cu_seqlens_in,
           const OptTensor& weights_in, const std::string& how_in)
      : how(how_of(op, how_in)),
        N(rows_of(op, x_in)),
        C(x_in.size(1)),
        x(op, "x", x_in),
        weights(op, "weights", weights_in, N),
        cu_seqlens(torch::stable::contiguous(cu_seqlens_in)) {
    check_cpu(op, "cu_seqlens", cu_seqlens);
    check_dim(op, "cu_seqlens", cu_seqlens, 1);
    check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int, "int32");
    B = cu_seqlens.size(0) - 1;
    STD_TORCH_CHECK(B >= 0, op, ": cu_seqlens is empty, expected [B + 1] entries");
    check_ends(op);
    const bool chooses =
        how == SegPoolHow::kMax || how == SegPoolHow::kFirst || how == SegPoolHow::kLast;
    STD_TORCH_CHECK(!(chooses && weights_in), op, ": weights were given, but how is ", how_in);
    STD_TORCH_CHECK(how != SegPoolHow::kAttention || weights_in, op,
                    ": how is attention, expected weights [N]");
  }

  const int32_t* ends() const { return cu_seqlens.const_data_ptr<int32_t>(); }

 private:
  static int64_t rows_of(const char* op, const Tensor& x) {
    check_dim(op, "x", x, 2);
    return x.size(0);
  }

  void check_ends(const char* op) const {
    const int32_t* e = ends();
    STD_TORCH_CHECK(e[0] == 0 && e[B] == N, op, ": cu_seqlens goes from ", e[0], " to ", e[B],
                    ", expected 0 to the number of rows, ", N);
    for (int64_t b = 0; b < B; ++b) {
      STD_TORCH_CHECK(e[b] <= e[b + 1], op, ": cu_seqlens decreases from ", e[b], " to ", e[b + 1],
                      " at sequence ", b);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> seg_pool_cpu(const Tensor& x, const Tensor& cu_seqlens,
                                                const OptTensor& weights, std::string how,
                                                bool normalize) {
  constexpr const char* kOp = "encfast::seg_pool";
  const Segments s(kOp, x, cu_seqlens, weights, how);
  const bool max = s.how == SegPoolHow::kMax;
  const Tensor out = new_contiguous(x, {s.B, s.C}, x.scalar_type());
  const Tensor rows =
      max ? new_contiguous(x, {s.B, s.C}, ScalarType::Int) : new_empty_vector(x, ScalarType::Int);
  const Tensor norm = new_contiguous(x, {normalize ? s.B : 0}, ScalarType::Float);
  if (s.B == 0) return {out, rows, norm};
  const int64_t stride = round_up_lanes(s.C);
  const Workspace share(x, s.weights.data() ? s.N * kFloatBytes : 0);
  const Workspace pooled(x, normalize ? s.B * stride * kFloatBytes : 0);
  TorchPool pool;
  cpu_kernels().seg_pool.fwd(
      {s.how, s.x.matrix(), s.ends(), s.weights.data(), matrix_of(kOp, out),
       max ? rows.mutable_data_ptr<int32_t>() : nullptr,
       normalize ? norm.mutable_data_ptr<float>() : nullptr, s.B, s.C,
       static_cast<float*>(share.data()), static_cast<float*>(pooled.data()), stride},
      pool.pool());
  return {out, rows, norm};
}

std::tuple<Tensor, Tensor> seg_pool_bwd_cpu(const Tensor& dout, const Tensor& x,
                                            const Tensor& cu_seqlens, const OptTensor& weights,
                                            const Tensor& out, const Tensor& rows_in,
                                            const Tensor& norm_in, std::string how, bool normalize,
                                            bool want_dx, bool want_dweights) {
  constexpr const char* kOp = "encfast::seg_pool_bwd";
  const Segments s(kOp, x, cu_seqlens, weights, how);
  const bool max = s.how == SegPoolHow::kMax;
  for (const auto& [name, t] : {std::pair{"dout", dout}, std::pair{"out", out}}) {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(0) == s.B && t.size(1) == s.C && t.scalar_type() == x.scalar_type(),
        kOp, ": ", name, " has shape ", shape_text(t), ", expected (", s.B, ", ", s.C,
        ") of x's dtype");
  }
  const RowsIn dout_rows(kOp, "dout", dout), out_rows(kOp, "out", out);
  const Tensor rows = torch::stable::contiguous(rows_in), norm = torch::stable::contiguous(norm_in);
  check_dtype(kOp, "rows", rows, ScalarType::Int, "int32");
  check_dtype(kOp, "norm", norm, ScalarType::Float, "float32");
  STD_TORCH_CHECK(rows.numel() == (max ? s.B * s.C : 0) && norm.numel() == (normalize ? s.B : 0),
                  kOp, ": rows or norm are not what seg_pool returned for these arguments");
  STD_TORCH_CHECK(!want_dweights || s.weights.data() || s.N == 0, kOp,
                  ": want_dweights is set, but there are no weights");
  const Tensor dx = want_dx ? new_rows(x, s.N) : new_empty_vector(x, x.scalar_type());
  const Tensor dweights = new_contiguous(x, {want_dweights ? s.N : 0}, ScalarType::Float);
  if (s.N == 0) return {dx, dweights};
  const int64_t stride = round_up_lanes(s.C);
  const Workspace share(x, s.weights.data() ? s.N * kFloatBytes : 0);
  const Workspace grad(x, s.B * stride * kFloatBytes);
  TorchPool pool;
  cpu_kernels().seg_pool.bwd({s.how, dout_rows.matrix(), s.x.matrix(), out_rows.matrix(), s.ends(),
                              s.weights.data(), max ? rows.const_data_ptr<int32_t>() : nullptr,
                              normalize ? norm.const_data_ptr<float>() : nullptr,
                              want_dx ? matrix_of(kOp, dx) : Matrix{nullptr, 0, DType::kFloat32},
                              want_dweights ? dweights.mutable_data_ptr<float>() : nullptr, s.B,
                              s.N, s.C, rows_per_task(s.C), static_cast<float*>(share.data()),
                              static_cast<float*>(grad.data()), stride},
                             pool.pool());
  return {dx, dweights};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("seg_pool", TORCH_BOX(&encfast::seg_pool_cpu));
  m.impl("seg_pool_bwd", TORCH_BOX(&encfast::seg_pool_bwd_cpu));
}
