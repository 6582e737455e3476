// rel_bias, bias and dropout of varlen_attn: checked, and laid out as the cores read them.
#pragma once
#include <algorithm>
#include <vector>

#include "bind/tensor_util.h"
#include "cpu/varlen_attn.h"

namespace encfast {

struct RelBiasArgument {
  std::optional<Tensor> tensor;  // keeps the memory alive
  RelBias core{};

  // `given`: [H, R] or [Nq, H, R], R odd.
  RelBiasArgument(const char* op, const std::optional<Tensor>& given, int64_t heads,
                  int64_t rows_q) {
    if (!given) return;
    const Tensor& x = *given;
    const char* name = "rel_bias";
    check_cpu(op, name, x);
    core.dtype = core_dtype(op, name, x);
    core.per_query = x.dim() == 3;
    STD_TORCH_CHECK((x.dim() == 2 && x.size(0) == heads) ||
                        (x.dim() == 3 && x.size(0) == rows_q && x.size(1) == heads),
                    op, ": ", name, " has shape ", shape_text(x), ", expected (", heads,
                    ", R) or (", rows_q, ", ", heads, ", R)");
    const int64_t entries = x.size(x.dim() - 1);
    STD_TORCH_CHECK(entries % 2 == 1, op, ": ", name, " has ", entries,
                    " entries for each head, expected an odd number, 2 r + 1");
    core.radius = entries / 2;
    tensor = core.per_query ? with_inner_contiguous(x, 2) : reversed(x);
    if (!core.per_query) core.dtype = DType::kFloat32;
    core.data = tensor->const_data_ptr();
    core.row_stride = core.per_query ? tensor->stride(0) : 0;
    core.head_stride = tensor->stride(core.per_query ? 1 : 0);
  }

 private:
  // [H, R] in fp32, rows back to front: the order of a core's lanes.
  static Tensor reversed(const Tensor& x) {
    const Tensor table = torch::stable::contiguous(to_dtype(x, ScalarType::Float));
    Tensor out = new_contiguous(x, x.sizes(), ScalarType::Float);
    const float* src = table.const_data_ptr<float>();
    float* dst = out.mutable_data_ptr<float>();
    const int64_t entries = x.size(1);
    for (int64_t h = 0; h < x.size(0); ++h, src += entries, dst += entries) {
      std::reverse_copy(src, src + entries, dst);
    }
    return out;
  }
};

struct PairBiasArgument {
  std::optional<Tensor> tensor, offsets;  // keep the memory alive
  std::vector<int64_t> computed_offsets;
  PairBias core{};

  // `given`: [T] or [H, T], the matrices of the sequences whose lengths g holds.
  PairBiasArgument(const char* op, const std::optional<Tensor>& given,
                   const std::optional<Tensor>& given_offsets, const VarlenAttnGeometry& g) {
    STD_TORCH_CHECK(given || !given_offsets, op, ": bias_offsets came without bias");
    if (!given) return;
    const Tensor& x = *given;
    const char* name = "bias";
    check_cpu(op, name, x);
    core.visibility = x.scalar_type() == ScalarType::Bool;
    core.dtype = core.visibility ? DType::kFloat32 : core_dtype(op, name, x);
    core.offsets = given_offsets ? read_offsets(op, *given_offsets, g.B) : compute_offsets(g);
    check_offsets(op, g);
    const int64_t pairs = core.offsets[g.B];
    STD_TORCH_CHECK(
        (x.dim() == 1 || (x.dim() == 2 && x.size(0) == g.H)) && x.size(x.dim() - 1) == pairs, op,
        ": ", name, " has shape ", shape_text(x), ", expected (", pairs, ",) or (", g.H, ", ",
        pairs, ")");
    tensor = with_inner_contiguous(x, x.dim() - 1);
    core.data = tensor->const_data_ptr();
    core.head_stride = x.dim() == 2 ? tensor->stride(0) : 0;
  }

 private:
  static int64_t pairs_of(const VarlenAttnGeometry& g, int64_t b) {
    return static_cast<int64_t>(g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b]) *
           (g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b]);
  }

  const int64_t* read_offsets(const char* op, const Tensor& x, int64_t batch) {
    const char* name = "bias_offsets";
    check_cpu(op, name, x);
    check_dtype(op, name, x, ScalarType::Long, "int64");
    STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == batch + 1, op, ": ", name, " has shape ",
                    shape_text(x), ", expected (", batch + 1, ",)");
    offsets = torch::stable::contiguous(x);
    return offsets->const_data_ptr<int64_t>();
  }

  const int64_t* compute_offsets(const VarlenAttnGeometry& g) {
    computed_offsets = {0};
    for (int64_t b = 0; b < g.B; ++b) {
      computed_offsets.push_back(computed_offsets.back() + pairs_of(g, b));
    }
    return computed_offsets.data();
  }

  void check_offsets(const char* op, const VarlenAttnGeometry& g) const {
    const int64_t* at = core.offsets;
    STD_TORCH_CHECK(at[0] == 0, op, ": bias_offsets starts at ", at[0], ", expected 0");
    for (int64_t b = 0; b < g.B; ++b) {
      STD_TORCH_CHECK(at[b + 1] - at[b] == pairs_of(g, b), op, ": bias_offsets gives sequence ", b,
                      " ", at[b + 1] - at[b], " elements, expected queries times keys, ",
                      pairs_of(g, b));
    }
  }
};

inline Dropout dropout_of(const char* op, const std::optional<double>& p,
                          const std::optional<Tensor>& rng) {
  const double probability = p.value_or(0);
  STD_TORCH_CHECK(probability >= 0 && probability < 1, op, ": dropout_p is ", probability,
                  ", expected 0 <= dropout_p < 1");
  Dropout dropout{};
  dropout.threshold = std::min(static_cast<int32_t>(probability * 65536 + 0.5), 65535);
  dropout.scale = static_cast<float>(65536.0 / (65536 - dropout.threshold));
  if (probability == 0) return dropout;
  STD_TORCH_CHECK(rng, op, ": dropout_p is ", probability, " and rng is None");
  check_cpu(op, "rng", *rng);
  check_dtype(op, "rng", *rng, ScalarType::Long, "int64");
  STD_TORCH_CHECK(rng->dim() == 1 && rng->size(0) == 2, op, ": rng has shape ", shape_text(*rng),
                  ", expected (2,)");
  const Tensor key = torch::stable::contiguous(*rng);
  for (int i = 0; i < 2; ++i) {
    dropout.key.word[i] = static_cast<uint32_t>(key.const_data_ptr<int64_t>()[i]);
  }
  return dropout;
}

// The gradients of rel_bias and bias; those not asked for are empty. The core sums in fp32 and
// writes a bias per head, which needs no sum, in its own dtype.
class BiasGradients {
 public:
  BiasGradients(const char* op, const Tensor& q, const VarlenAttnGeometry& g,
                const std::optional<Tensor>& rel_bias, bool rel_bias_grad,
                const std::optional<Tensor>& bias, bool bias_grad)
      : rel_bias_(new_grad(op, "rel_bias", q, rel_bias, rel_bias_grad, false)),
        bias_(new_grad(op, "bias", q, bias, bias_grad, bias_grad && bias && bias->dim() == 2)),
        rel_bias_dtype_((rel_bias_grad ? *rel_bias : q).scalar_type()),
        bias_dtype_((bias_grad ? *bias : q).scalar_type()) {
    if (bias_grad) {
      core_.bias = bias_.mutable_data_ptr();
      core_.bias_dtype = core_dtype(op, "bias", bias_);
      core_.bias_head_stride = bias_.dim() == 2 ? bias_.size(1) : 0;
    }
    if (!rel_bias_grad) return;
    core_.rel_bias = rel_bias_.mutable_data_ptr<float>();
    if (!g.rel_bias.per_query) make_partials(q, g);
  }

  const BiasGrads& core() const { return core_; }

  Tensor rel_bias() const { return to_dtype(rel_bias_, rel_bias_dtype_); }
  Tensor bias() const { return to_dtype(bias_, bias_dtype_); }

 private:
  static Tensor new_grad(const char* op, const char* name, const Tensor& q,
                         const std::optional<Tensor>& x, bool wanted, bool own_dtype) {
    if (!wanted) return new_contiguous(q, {0}, ScalarType::Float);
    STD_TORCH_CHECK(x, op, ": the gradient of ", name, " is asked for, but ", name, " is None");
    STD_TORCH_CHECK(x->scalar_type() != ScalarType::Bool, op, ": a bool ", name,
                    " has no gradient");
    return new_contiguous(q, x->sizes(), own_dtype ? x->scalar_type() : ScalarType::Float);
  }

  void make_partials(const Tensor& q, const VarlenAttnGeometry& g) {
    starts_ = {0};
    for (int64_t b = 0; b < g.B; ++b) {
      const RelSpan span =
          RelSpan::of(g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b],
                      g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b], g.rel_bias.radius);
      starts_.push_back(starts_.back() + g.H * span.size());
    }
    partials_ = new_contiguous(q, {starts_.back()}, ScalarType::Float);
    core_.rel_partials = partials_->mutable_data_ptr<float>();
    core_.partial_starts = starts_.data();
  }

  const Tensor rel_bias_, bias_;
  const ScalarType rel_bias_dtype_, bias_dtype_;
  std::optional<Tensor> partials_;
  std::vector<int64_t> starts_;
  BiasGrads core_{};
};

}  // namespace encfast
