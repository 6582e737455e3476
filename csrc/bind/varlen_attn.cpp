// encfast::varlen_attn on the CPU: checks everything a core relies on, then plans and runs it.
//
// The Python function has checked the same with better sentences; this is for compiled graphs and
// direct calls, where malformed values must end in an exception and never in memory of others.
#include "cpu/varlen_attn.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/pool.h"
#include "bind/tensor_util.h"
#include "bind/varlen_attn_bias.h"
#include "common/schedule.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr const char* kOp = "encfast::varlen_attn";
constexpr int64_t kMaxHeadSize = 256;

using OptTensor = std::optional<Tensor>;
using OptInt = std::optional<int64_t>;
using OptDouble = std::optional<double>;

// Any two different ones of the three dtypes promote to float32.
ScalarType promoted(const Tensor& q, const Tensor& k, const Tensor& v) {
  const ScalarType t = q.scalar_type();
  return t == k.scalar_type() && t == v.scalar_type() ? t : ScalarType::Float;
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  const std::pair<const char*, const Tensor&> named[] = {{"q", q}, {"k", k}, {"v", v}};
  for (const auto& [name, x] : named) {
    check_cpu(kOp, name, x);
    check_dim(kOp, name, x, 3);
    core_dtype(kOp, name, x);
  }
  check_same_shape(kOp, "v", v, "k", k);
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= kMaxHeadSize, kOp, ": q has head size ", q.size(2),
                  ", expected 1..", kMaxHeadSize);
  STD_TORCH_CHECK(k.size(2) == q.size(2), kOp, ": k has head size ", k.size(2), ", q has ",
                  q.size(2));
  STD_TORCH_CHECK(k.size(1) >= 1 && q.size(1) >= 1 && q.size(1) % k.size(1) == 0, kOp, ": q has ",
                  q.size(1), " heads and k has ", k.size(1), "; expected a multiple");
}

// The lengths of one side, checked against its rows: no core reads outside of them afterwards.
struct Lengths {
  Tensor cu_seqlens;  // keeps the memory alive
  const int32_t* ends;
  int64_t batch;
  int64_t max;

  Lengths(const char* name, const Tensor& given, const OptInt& bound, int64_t rows)
      : cu_seqlens(checked(name, given)),
        ends(cu_seqlens.const_data_ptr<int32_t>()),
        batch(cu_seqlens.size(0) - 1),
        max(0) {
    STD_TORCH_CHECK(ends[0] == 0, kOp, ": ", name, " starts at ", ends[0], ", expected 0");
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(ends[b + 1] >= ends[b], kOp, ": ", name, " decreases from ", ends[b], " to ",
                      ends[b + 1], " at sequence ", b);
      max = std::max<int64_t>(max, ends[b + 1] - ends[b]);
    }
    STD_TORCH_CHECK(ends[batch] == rows, kOp, ": ", name, " ends at ", ends[batch],
                    ", expected the number of rows, ", rows);
    STD_TORCH_CHECK(!bound || *bound >= max, kOp, ": the bound for ", name, " is max_seqlen ",
                    bound.value_or(0), ", but a sequence has ", max, " rows");
  }

  static Tensor checked(const char* name, const Tensor& given) {
    check_cpu(kOp, name, given);
    check_dim(kOp, name, given, 1);
    check_dtype(kOp, name, given, ScalarType::Int, "int32");
    STD_TORCH_CHECK(given.size(0) >= 1, kOp, ": ", name, " is empty, expected B + 1 entries");
    return torch::stable::contiguous(given);
  }
};

struct Slopes {
  OptTensor tensor;  // keeps the memory alive
  int64_t batch_stride = 0;

  Slopes(const OptTensor& given, int64_t batch, int64_t heads) {
    if (!given) return;
    const char* name = "alibi_slopes";
    check_cpu(kOp, name, *given);
    check_dtype(kOp, name, *given, ScalarType::Float, "float32");
    const bool per_sequence = given->dim() == 2;
    STD_TORCH_CHECK((per_sequence && given->size(0) == batch && given->size(1) == heads) ||
                        (given->dim() == 1 && given->size(0) == heads),
                    kOp, ": ", name, " has shape ", shape_text(*given), ", expected (", heads,
                    ",) or (", batch, ", ", heads, ")");
    tensor = torch::stable::contiguous(*given);
    batch_stride = per_sequence ? heads : 0;
  }

  const float* data() const { return tensor ? tensor->const_data_ptr<float>() : nullptr; }
};

// All checked arguments that forward and backward share, and the geometry made of them.
struct Problem {
  Lengths lengths_q, lengths_k;
  Slopes slopes;
  RelBiasArgument rel_bias;
  VarlenAttnGeometry g{};
  std::optional<PairBiasArgument> bias;  // its shape follows from g

  Problem(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
          const OptTensor& cu_seqlens_k, const OptInt& max_seqlen_q, const OptInt& max_seqlen_k,
          const OptDouble& scale, bool causal, const std::vector<int64_t>& window,
          const OptTensor& alibi_slopes, const OptTensor& rel_bias_, const OptTensor& bias_,
          const OptTensor& bias_offsets, const OptDouble& softcap, const OptDouble& dropout_p,
          const OptTensor& rng)
      : lengths_q("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.size(0)),
        lengths_k("cu_seqlens_k", cu_seqlens_k.value_or(cu_seqlens_q), max_seqlen_k, k.size(0)),
        slopes(alibi_slopes, lengths_q.batch, q.size(1)),
        rel_bias(kOp, rel_bias_, q.size(1), q.size(0)) {
    STD_TORCH_CHECK(lengths_q.batch == lengths_k.batch, kOp, ": cu_seqlens_k has ",
                    lengths_k.batch + 1, " entries, cu_seqlens_q has ", lengths_q.batch + 1);
    STD_TORCH_CHECK(window.size() == 2 && window[0] >= -1 && window[1] >= -1, kOp,
                    ": window must be two bounds >= -1");
    STD_TORCH_CHECK(!softcap || (std::isfinite(*softcap) && *softcap > 0), kOp, ": softcap is ",
                    softcap.value_or(0), ", expected a number > 0");
    STD_TORCH_CHECK(!scale || std::isfinite(*scale), kOp, ": scale is ", scale.value_or(0),
                    ", expected a finite number");
    g.B = lengths_q.batch;
    g.H = q.size(1);
    g.Hk = k.size(1);
    g.D = q.size(2);
    g.Nq = q.size(0);
    g.cu_seqlens_q = lengths_q.ends;
    g.cu_seqlens_k = lengths_k.ends;
    g.max_seqlen_q = lengths_q.max;
    g.max_seqlen_k = lengths_k.max;
    g.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(g.D))));
    g.softcap = static_cast<float>(softcap.value_or(0));
    g.left = window[0];
    g.right = causal ? 0 : window[1];
    g.alibi_slopes = slopes.data();
    g.alibi_batch_stride = slopes.batch_stride;
    g.rel_bias = rel_bias.core;
    g.bias = bias.emplace(kOp, bias_, bias_offsets, g).core;
    g.dropout = dropout_of(kOp, dropout_p, rng);
  }
};

ConstRows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

Rows mutable_rows_of(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1)}; }

// In the compute dtype, last dimension contiguous; a view of a fused projection is left in place.
Tensor prepared(const Tensor& x, ScalarType dtype) {
  return with_inner_contiguous(to_dtype(x, dtype), 2);
}

// The task list and the scratch memory of one run, written into the geometry that the core reads.
class Plan {
 public:
  Plan(VarlenAttnGeometry& g, std::vector<VarlenAttnTask> tasks, int64_t bytes_per_thread,
       int threads, const Tensor& like)
      : tasks_(std::move(tasks)), workspace_(like, round_up(bytes_per_thread) * threads) {
    g.tasks = tasks_.data();
    g.n_tasks = static_cast<int64_t>(tasks_.size());
    g.workspace = workspace_.data();
    g.workspace_bytes = round_up(bytes_per_thread);
  }

 private:
  static int64_t round_up(int64_t bytes) {
    return (bytes + Workspace::kAlign - 1) / Workspace::kAlign * Workspace::kAlign;
  }

  const std::vector<VarlenAttnTask> tasks_;
  const Workspace workspace_;
};

std::tuple<Tensor, Tensor> varlen_attn_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const OptTensor& cu_seqlens_k, const OptInt& max_seqlen_q, const OptInt& max_seqlen_k,
    const OptDouble& scale, bool causal, const std::vector<int64_t>& window,
    const OptTensor& alibi_slopes, const OptTensor& rel_bias, const OptTensor& bias,
    const OptTensor& bias_offsets, const OptDouble& softcap, const OptDouble& dropout_p,
    const OptTensor& rng) {
  check_qkv(q, k, v);
  Problem problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                  window, alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng);
  VarlenAttnGeometry& g = problem.g;

  const ScalarType dtype = promoted(q, k, v);
  const Tensor qc = prepared(q, dtype), kc = prepared(k, dtype), vc = prepared(v, dtype);
  Tensor out = new_contiguous(q, q.sizes(), dtype);
  Tensor lse = new_contiguous(q, {g.H, g.Nq}, ScalarType::Float);
  g.dtype = core_dtype(kOp, "q", qc);

  TorchPool pool;
  const VarlenAttnKernels& kernels = cpu_kernels().varlen_attn;
  g.short_rows = kernels.short_rows(g);
  const Plan plan(g, plan_fwd(g, pool.threads()), kernels.fwd_workspace_bytes(g), pool.threads(),
                  q);
  kernels.fwd({g, rows_of(qc), rows_of(kc), rows_of(vc), mutable_rows_of(out),
               lse.mutable_data_ptr<float>()},
              pool.pool());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> varlen_attn_bwd_cpu(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
    const OptInt& max_seqlen_q, const OptInt& max_seqlen_k, const OptDouble& scale, bool causal,
    const std::vector<int64_t>& window, const OptTensor& alibi_slopes, const OptTensor& rel_bias,
    const OptTensor& bias, const OptTensor& bias_offsets, const OptDouble& softcap,
    const OptDouble& dropout_p, const OptTensor& rng, bool rel_bias_grad, bool bias_grad) {
  check_qkv(q, k, v);
  Problem problem(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                  window, alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng);
  VarlenAttnGeometry& g = problem.g;
  const auto check_like_lse = [&](const char* name, const Tensor& x) {
    check_cpu(kOp, name, x);
    check_dtype(kOp, name, x, ScalarType::Float, "float32");
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == g.H && x.size(1) == g.Nq, kOp, ": ", name,
                    " has shape ", shape_text(x), ", expected (", g.H, ", ", g.Nq, ")");
  };
  check_like_lse("lse", lse);
  if (dlse) check_like_lse("dlse", *dlse);
  check_cpu(kOp, "out", out);
  check_cpu(kOp, "dout", dout);
  check_same_shape(kOp, "out", out, "q", q);
  check_same_shape(kOp, "dout", dout, "q", q);

  const ScalarType dtype = promoted(q, k, v);
  const Tensor qc = prepared(q, dtype), kc = prepared(k, dtype), vc = prepared(v, dtype);
  const Tensor outc = prepared(out, dtype), doutc = prepared(dout, dtype);
  const Tensor lsec = torch::stable::contiguous(lse);
  const OptTensor dlsec = dlse ? OptTensor(torch::stable::contiguous(*dlse)) : std::nullopt;
  Tensor dq = new_contiguous(q, q.sizes(), dtype);
  Tensor dk = new_contiguous(k, k.sizes(), dtype);
  Tensor dv = new_contiguous(v, v.sizes(), dtype);
  const BiasGradients bias_grads(kOp, q, g, rel_bias, rel_bias_grad, bias, bias_grad);
  g.dtype = core_dtype(kOp, "q", qc);

  TorchPool pool;
  const VarlenAttnKernels& kernels = cpu_kernels().varlen_attn;
  g.short_rows = kernels.short_rows(g);
  const Plan plan(g, plan_bwd(g), kernels.bwd_workspace_bytes(g), pool.threads(), q);
  kernels.bwd(
      {g, rows_of(qc), rows_of(kc), rows_of(vc), rows_of(outc), rows_of(doutc),
       lsec.const_data_ptr<float>(), mutable_rows_of(dq), mutable_rows_of(dk), mutable_rows_of(dv),
       dlsec ? dlsec->const_data_ptr<float>() : nullptr, bias_grads.core()},
      pool.pool());
  return {to_dtype(dq, q.scalar_type()), to_dtype(dk, k.scalar_type()),
          to_dtype(dv, v.scalar_type()), bias_grads.rel_bias(), bias_grads.bias()};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("varlen_attn", TORCH_BOX(&encfast::varlen_attn_cpu));
  m.impl("varlen_attn_bwd", TORCH_BOX(&encfast::varlen_attn_bwd_cpu));
}
