// Runs the varlen_attn core of one instruction set without PyTorch (sanitize.h).
//
// Each case runs with 1 and with 4 threads; outputs start as NaN, must all be written, and must be
// equal bit by bit. Dropout is compared with the scalar generator. Exit status 0 when all pass.
#include "common/schedule.h"
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const VarlenAttnKernels& kAttn = ENCFAST_ISA::kVarlenAttn;

enum class Rel { kNone, kTable, kPerQuery };
enum class Pairs { kNone, kShared, kPerHead, kVisibility };

struct Case {
  const char* name;
  DType dtype;
  int64_t heads, key_heads, head_size;
  std::vector<int32_t> lengths_q, lengths_k;
  int64_t left = -1, right = -1;
  float softcap = 0;
  bool alibi = false;
  Rel rel = Rel::kNone;
  int64_t radius = 0;
  Pairs pairs = Pairs::kNone;
  int32_t dropout_threshold = 0;
};

constexpr PhiloxKey kDropoutKey = {{0x12345678u, 0x9abcdef0u}};

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
  std::vector<char> out, lse, dq, dk, dv, drel, dbias;
  DType dbias_dtype;

  bool operator==(const Outputs& o) const {
    return out == o.out && lse == o.lse && dq == o.dq && dk == o.dk && dv == o.dv &&
           drel == o.drel && dbias == o.dbias;
  }
};

// The biases and dropout of a case, and their gradients' memory but for the results.
struct Terms {
  std::vector<char> rel, bias, partials;
  std::vector<int64_t> offsets = {0}, partial_starts = {0};
  int64_t drel_elements = 0, dbias_elements = 0;
  DType dbias_dtype = DType::kFloat32;

  Terms(const Case& c, VarlenAttnGeometry& g) {
    const int64_t entries = 2 * c.radius + 1;
    for (int64_t b = 0; b < g.B; ++b) {
      const int64_t len_q = c.lengths_q[b], len_k = c.lengths_k[b];
      offsets.push_back(offsets.back() + len_q * len_k);
      partial_starts.push_back(partial_starts.back() +
                               g.H * RelSpan::of(len_q, len_k, c.radius).size());
    }
    Values values;
    if (c.rel == Rel::kTable) {
      rel = values.make(DType::kFloat32, g.H * entries);
      g.rel_bias = {rel.data(), DType::kFloat32, false, c.radius, 0, entries};
      drel_elements = g.H * entries;
      partials = nan_filled(partial_starts.back(), 4);
    }
    if (c.rel == Rel::kPerQuery) {
      rel = values.make(c.dtype, g.Nq * g.H * entries);
      g.rel_bias = {rel.data(), c.dtype, true, c.radius, g.H * entries, entries};
      drel_elements = g.Nq * g.H * entries;
    }
    if (c.pairs == Pairs::kNone) return;
    const int64_t heads = c.pairs == Pairs::kPerHead ? g.H : 1;
    if (c.pairs == Pairs::kVisibility) {
      for (int64_t i = 0; i < offsets.back(); ++i) bias.push_back(i % 3 == 0);
    } else {
      bias = values.make(c.dtype, heads * offsets.back());
      dbias_elements = heads * offsets.back();
      if (heads > 1) dbias_dtype = c.dtype;
    }
    g.bias = {bias.data(), c.pairs == Pairs::kVisibility, c.dtype, offsets.data(),
              heads > 1 ? offsets.back() : 0};
  }

  BiasGrads grads(const Case& c, Outputs& o) {
    BiasGrads grads{};
    if (dbias_elements > 0) grads.bias = o.dbias.data();
    grads.bias_dtype = dbias_dtype;
    if (c.pairs == Pairs::kPerHead) grads.bias_head_stride = offsets.back();
    if (drel_elements > 0) grads.rel_bias = reinterpret_cast<float*>(o.drel.data());
    grads.rel_partials = reinterpret_cast<float*>(partials.data());
    grads.partial_starts = partial_starts.data();
    return grads;
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
  g.dropout = {c.dropout_threshold, 65536.0f / (65536 - c.dropout_threshold), kDropoutKey};
  Terms terms(c, g);

  const int64_t size = size_of(c.dtype);
  Outputs o{nan_filled(rows_q * c.heads * D, size),
            nan_filled(rows_q * c.heads, 4),
            nan_filled(rows_q * c.heads * D, size),
            nan_filled(rows_k * c.key_heads * D, size),
            nan_filled(rows_k * c.key_heads * D, size),
            nan_filled(terms.drel_elements, 4),
            nan_filled(terms.dbias_elements, size_of(terms.dbias_dtype)),
            terms.dbias_dtype};
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

  g.short_rows = kAttn.short_rows(g);
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
             result(o.dk, c.key_heads), result(o.dv, c.key_heads), nullptr, terms.grads(c, o)},
            pool.pool());
  return o;
}

bool check_attention(const Case& c) {
  const Outputs one = run_attention(c, 1), four = run_attention(c, 4);
  bool written = all_written(DType::kFloat32, one.lse) && all_written(DType::kFloat32, one.drel) &&
                 all_written(one.dbias_dtype, one.dbias);
  for (const auto* x : {&one.out, &one.dq, &one.dk, &one.dv}) written &= all_written(c.dtype, *x);
  const bool equal = one == four;
  std::printf("%-32s %s%s\n", c.name, written ? "" : "NaN or unwritten ",
              equal ? "" : "threads differ");
  return written && equal;
}

// The answers that the authors of Philox publish for two counters.
bool check_philox() {
  uint32_t zero[4] = {}, ones[4] = {~0u, ~0u, ~0u, ~0u};
  philox4x32({{0, 0}}, zero);
  philox4x32({{~0u, ~0u}}, ones);
  const uint32_t of_zero[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  const uint32_t of_ones[4] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
  const bool ok = std::memcmp(zero, of_zero, sizeof(zero)) == 0 &&
                  std::memcmp(ones, of_ones, sizeof(ones)) == 0;
  std::printf("%-32s %s\n", "philox", ok ? "" : "differs from the published answers");
  return ok;
}

// Where the core drops what the scalar generator says: with q = 0 and v[j] = e_j, out[i][j] is 0
// exactly where key j is dropped.
bool check_dropout() {
  constexpr int64_t kRows = 70, kHeads = 2;
  constexpr int32_t kThreshold = 20000;
  const std::vector<float> q(kRows * kHeads * kRows, 0.0f);
  std::vector<float> v = q, out = q, lse(kRows * kHeads);
  for (int64_t j = 0; j < kRows; ++j) {
    for (int64_t h = 0; h < kHeads; ++h) v[static_cast<size_t>((j * kHeads + h) * kRows + j)] = 1;
  }
  const std::vector<int32_t> ends = {0, 0, kRows};
  VarlenAttnGeometry g{};
  g.dtype = DType::kFloat32;
  g.B = 2;
  g.H = g.Hk = kHeads;
  g.D = g.Nq = g.max_seqlen_q = g.max_seqlen_k = kRows;
  g.cu_seqlens_q = g.cu_seqlens_k = ends.data();
  g.scale = 1.0f;
  g.left = g.right = -1;
  g.dropout = {kThreshold, 65536.0f / (65536 - kThreshold), kDropoutKey};
  g.short_rows = kAttn.short_rows(g);
  const std::vector<VarlenAttnTask> tasks = plan_fwd(g, 1);
  g.tasks = tasks.data();
  g.n_tasks = static_cast<int64_t>(tasks.size());
  g.workspace_bytes = kAttn.fwd_workspace_bytes(g);
  const Block workspace(static_cast<size_t>(g.workspace_bytes));
  g.workspace = workspace.data;
  const auto rows = [&](const std::vector<float>& x) {
    return ConstRows{x.data(), kHeads * kRows, kRows};
  };
  ThreadPool pool{1};
  kAttn.fwd({g, rows(q), rows(q), rows(v), {out.data(), kHeads * kRows, kRows}, lse.data()},
            pool.pool());
  int64_t wrong = 0;
  for (int64_t at = 0; at < kRows * kHeads * kRows; ++at) {
    const int64_t j = at % kRows, h = at / kRows % kHeads, i = at / kRows / kHeads;
    uint32_t words[4];
    philox_dropout_words(kDropoutKey, static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i),
                         static_cast<uint32_t>(h), 1, words);
    const uint32_t half = words[j % 8 / 2] >> (16 * (j % 2)) & 0xffff;
    wrong += (half >= kThreshold) != (out[static_cast<size_t>(at)] > 0);
  }
  std::printf("%-32s %s\n", "dropout", wrong ? "differs from the scalar generator" : "");
  return wrong == 0;
}

}  // namespace

int main() {
  const std::vector<int32_t> ragged = {0, 1, 2, 17, 33, 0, 49, 64, 97, 129};
  const std::vector<int32_t> other = {3, 0, 20, 17, 1, 0, 130, 64, 31, 200};
  // Pairs are short, long and both; with lengths of one vector, of two, and one less and more.
  const std::vector<int32_t> few = {0, 1, 8, 15, 16, 17, 31, 32, 33, 7, 2, 40};
  const std::vector<int32_t> keys = {5, 1, 0, 16, 31, 32, 17, 32, 3, 33, 9, 40};
  const Case cases[] = {
      {"f32 D64 short causal", DType::kFloat32, 3, 3, 64, few, few, -1, 0},
      {"f32 D33 short GQA window", DType::kFloat32, 4, 2, 33, few, keys, 5, 9, 8.0f, true},
      {"bf16 D64 short", DType::kBFloat16, 3, 3, 64, few, few},
      {"bf16 D40 short GQA bias", DType::kBFloat16, 4, 2, 40, few, keys, -1, 3, 0, true,
       Rel::kTable, 6, Pairs::kShared, 9000},
      {"fp16 D100 short by query", DType::kFloat16, 2, 1, 100, few, keys, -1, -1, 0, false,
       Rel::kPerQuery, 4, Pairs::kPerHead},
      {"bf16 D255 short visibility", DType::kBFloat16, 2, 2, 255, few, keys, -1, -1, 0, false,
       Rel::kNone, 0, Pairs::kVisibility},
      {"f32 D40", DType::kFloat32, 2, 2, 40, ragged, ragged},
      {"f32 D40 cross GQA causal", DType::kFloat32, 4, 2, 40, ragged, other, -1, 0},
      {"f32 D256 several panels", DType::kFloat32, 2, 1, 256, {300, 5}, {290, 300}, 200, 20},
      {"f32 D64 softcap alibi", DType::kFloat32, 2, 2, 64, ragged, other, 16, 3, 20.0f, true},
      {"bf16 D1", DType::kBFloat16, 1, 1, 1, ragged, ragged},
      {"bf16 D64 cross alibi window", DType::kBFloat16, 2, 2, 64, other, ragged, 7, 7, 0.0f, true},
      {"bf16 D80 causal", DType::kBFloat16, 2, 1, 80, ragged, ragged, -1, 0},
      {"fp16 D33 softcap", DType::kFloat16, 2, 2, 33, ragged, other, -1, -1, 30.0f},
      {"f32 D40 table GQA", DType::kFloat32, 4, 2, 40, ragged, other, -1, -1, 0, false, Rel::kTable,
       20},
      {"bf16 D64 table bias window", DType::kBFloat16, 2, 2, 64, ragged, ragged, 40, 0, 0, true,
       Rel::kTable, 200, Pairs::kPerHead},
      {"f32 D40 by query R1", DType::kFloat32, 2, 2, 40, ragged, other, -1, -1, 0, false,
       Rel::kPerQuery, 0},
      {"fp16 D24 by query bias softcap", DType::kFloat16, 2, 1, 24, other, ragged, -1, -1, 9.0f,
       false, Rel::kPerQuery, 30, Pairs::kShared},
      {"f32 D32 shared bias GQA", DType::kFloat32, 4, 2, 32, ragged, other, -1, 0, 0, false,
       Rel::kNone, 0, Pairs::kShared},
      {"f32 D256 shared bias panels",
       DType::kFloat32,
       2,
       1,
       256,
       {150, 5},
       {290, 300},
       200,
       20,
       0,
       false,
       Rel::kTable,
       50,
       Pairs::kShared,
       9000},
      {"bf16 D40 visibility", DType::kBFloat16, 2, 2, 40, ragged, other, -1, -1, 0, false,
       Rel::kNone, 0, Pairs::kVisibility},
      {"bf16 D64 dropout", DType::kBFloat16, 2, 2, 64, ragged, ragged, -1, 0, 0, false, Rel::kNone,
       0, Pairs::kNone, 9000},
  };
  bool ok = check_philox() && check_dropout();
  for (const Case& c : cases) ok &= check_attention(c);
  return ok ? 0 : 1;
}
