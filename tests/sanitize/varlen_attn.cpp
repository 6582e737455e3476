// Runs the varlen_attn core of one instruction set without PyTorch (sanitize.h).
//
// Each case runs with 1 and with 4 threads; outputs start as NaN, must all be written, and must be
// equal bit by bit. Exit status 0 when all cases pass.
#include "common/schedule.h"
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const VarlenAttnKernels& kAttn = ENCFAST_ISA::kVarlenAttn;

struct Case {
  const char* name;
  DType dtype;
  int64_t heads, key_heads, head_size;
  std::vector<int32_t> lengths_q, lengths_k;
  int64_t left = -1, right = -1;
  float softcap = 0;
  bool alibi = false;
};

std::vector<int32_t> ends_of(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> ends = {0};
  for (int32_t n : lengths) ends.push_back(ends.back() + n);
  return ends;
}

int32_t longest(const std::vector<int32_t>& lengths) {
  int32_t m = 0;
  for (int32_t n : lengths) m = std::max(m, n);
  return m;
}

struct Outputs {
  std::vector<char> out, lse, dq, dk, dv;

  bool operator==(const Outputs& o) const {
    return out == o.out && lse == o.lse && dq == o.dq && dk == o.dk && dv == o.dv;
  }
};

// q, k, v interleaved as a fused projection leaves them ([row][head][3][D]): strides are not
// compact.
struct Inputs {
  std::vector<char> q, k, v, dout;

  Inputs(const Case& c, int64_t rows_q, int64_t rows_k) {
    Values values;
    q = values.make(c.dtype, rows_q * c.heads * c.head_size);
    k = values.make(c.dtype, rows_k * c.key_heads * 2 * c.head_size);
    v = values.make(c.dtype, rows_k * c.key_heads * c.head_size);
    dout = values.make(c.dtype, rows_q * c.heads * c.head_size);
  }
};

Outputs run_attention(const Case& c, int threads) {
  const std::vector<int32_t> ends_q = ends_of(c.lengths_q), ends_k = ends_of(c.lengths_k);
  const int64_t rows_q = ends_q.back(), rows_k = ends_k.back(), D = c.head_size;
  const Inputs in(c, rows_q, rows_k);
  std::vector<float> slopes(static_cast<size_t>(c.heads), 0.25f);

  VarlenAttnGeometry g{};
  g.dtype = c.dtype;
  g.B = static_cast<int64_t>(c.lengths_q.size());
  g.H = c.heads;
  g.Hk = c.key_heads;
  g.D = D;
  g.Nq = rows_q;
  g.cu_seqlens_q = ends_q.data();
  g.cu_seqlens_k = ends_k.data();
  g.scale = 1.0f / std::sqrt(static_cast<float>(D));
  g.softcap = c.softcap;
  g.left = c.left;
  g.right = c.right;
  g.alibi_slopes = c.alibi ? slopes.data() : nullptr;
  g.max_seqlen_q = longest(c.lengths_q);
  g.max_seqlen_k = longest(c.lengths_k);

  const int64_t size = size_of(c.dtype);
  Outputs o{nan_filled(rows_q * c.heads * D, size), nan_filled(rows_q * c.heads, 4),
            nan_filled(rows_q * c.heads * D, size), nan_filled(rows_k * c.key_heads * D, size),
            nan_filled(rows_k * c.key_heads * D, size)};
  const auto plain = [&](const std::vector<char>& x, int64_t heads) {
    return ConstRows{x.data(), heads * D, D};
  };
  const auto result = [&](std::vector<char>& x, int64_t heads) {
    return Rows{x.data(), heads * D, D};
  };
  const ConstRows q = plain(in.q, c.heads), v = plain(in.v, c.key_heads);
  const ConstRows k = {in.k.data(), c.key_heads * 2 * D, 2 * D};
  float* lse = reinterpret_cast<float*>(o.lse.data());
  ThreadPool pool{threads};

  const std::vector<VarlenAttnTask> forward = plan_fwd(g, threads);
  g.tasks = forward.data();
  g.n_tasks = static_cast<int64_t>(forward.size());
  g.workspace_bytes = kAttn.fwd_workspace_bytes(g);
  {
    const Block workspace(static_cast<size_t>(g.workspace_bytes * threads));
    g.workspace = workspace.data;
    kAttn.fwd({g, q, k, v, result(o.out, c.heads), lse}, pool.pool());
  }
  const std::vector<VarlenAttnTask> backward = plan_bwd(g);
  g.tasks = backward.data();
  g.n_tasks = static_cast<int64_t>(backward.size());
  g.workspace_bytes = kAttn.bwd_workspace_bytes(g);
  const Block workspace(static_cast<size_t>(g.workspace_bytes * threads));
  g.workspace = workspace.data;
  kAttn.bwd({g, q, k, v, plain(o.out, c.heads), plain(in.dout, c.heads), lse, result(o.dq, c.heads),
             result(o.dk, c.key_heads), result(o.dv, c.key_heads), nullptr},
            pool.pool());
  return o;
}

bool check_attention(const Case& c) {
  const Outputs one = run_attention(c, 1), four = run_attention(c, 4);
  bool written = all_written(DType::kFloat32, one.lse);
  for (const auto* x : {&one.out, &one.dq, &one.dk, &one.dv}) written &= all_written(c.dtype, *x);
  const bool equal = one == four;
  std::printf("%-28s %s%s\n", c.name, written ? "" : "NaN or unwritten ",
              equal ? "" : "threads differ");
  return written && equal;
}

}  // namespace

int main() {
  const std::vector<int32_t> ragged = {0, 1, 2, 17, 33, 0, 49, 64, 97, 129};
  const std::vector<int32_t> other = {3, 0, 20, 17, 1, 0, 130, 64, 31, 200};
  const Case cases[] = {
      {"f32 D40", DType::kFloat32, 2, 2, 40, ragged, ragged},
      {"f32 D40 cross GQA causal", DType::kFloat32, 4, 2, 40, ragged, other, -1, 0},
      {"f32 D256 several panels", DType::kFloat32, 2, 1, 256, {300, 5}, {290, 300}, 200, 20},
      {"f32 D64 softcap alibi", DType::kFloat32, 2, 2, 64, ragged, other, 16, 3, 20.0f, true},
      {"bf16 D1", DType::kBFloat16, 1, 1, 1, ragged, ragged},
      {"bf16 D64 cross alibi window", DType::kBFloat16, 2, 2, 64, other, ragged, 7, 7, 0.0f, true},
      {"bf16 D80 causal", DType::kBFloat16, 2, 1, 80, ragged, ragged, -1, 0},
      {"fp16 D33 softcap", DType::kFloat16, 2, 2, 33, ragged, other, -1, -1, 30.0f},
  };
  bool ok = true;
  for (const Case& c : cases) ok &= check_attention(c);
  return ok ? 0 : 1;
}
