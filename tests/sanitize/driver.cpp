// Runs the CPU cores of one instruction set without PyTorch, for AddressSanitizer, UBSan and
// ThreadSanitizer: std::thread instead of OpenMP, whose barriers TSan cannot see, and heap blocks
// of exact size, so that one element too far is an error.
//
// Each case runs with 1 and with 4 threads; outputs start as NaN, must all be written, and must be
// equal bit by bit. Exit status 0 when all cases pass.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "common/schedule.h"
#include "cpu/isa.h"

namespace {

using namespace encfast;

constexpr const VarlenAttnKernels& kAttn = ENCFAST_ISA::kVarlenAttn;
constexpr const PadKernels& kPadKernels = ENCFAST_ISA::kPad;

struct ThreadPool {
  int count;

  Pool pool() { return {run, threads, this}; }
  static int threads(void* self) { return static_cast<ThreadPool*>(self)->count; }
  static void run(void* self, int64_t n_tasks, void (*fn)(int64_t, int, void*), void* ctx) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> workers;
    for (int slot = 0; slot < threads(self); ++slot) {
      workers.emplace_back([&, slot] {
        for (int64_t task; (task = next.fetch_add(1)) < n_tasks;) fn(task, slot, ctx);
      });
    }
    for (std::thread& w : workers) w.join();
  }
};

// Heap memory of exactly `bytes`, aligned to 64, freed at scope end.
struct Block {
  void* data;
  size_t bytes;

  explicit Block(size_t n) : data(std::aligned_alloc(64, (n + 63) / 64 * 64)), bytes(n) {}
  Block(const Block&) = delete;
  ~Block() { std::free(data); }
};

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

int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// Deterministic values in [-1, 1): a multiplicative generator. bf16 and fp16 patterns of the same
// range.
class Values {
 public:
  std::vector<char> make(DType t, int64_t n) {
    std::vector<char> out(static_cast<size_t>(n * size_of(t)));
    for (int64_t i = 0; i < n; ++i) write(t, out.data() + i * size_of(t));
    return out;
  }

 private:
  void write(DType t, char* at) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const float x = static_cast<float>(state_ >> 40) / (1 << 23) - 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t bf16 = static_cast<uint16_t>(bits >> 16);
    // fp16 of sign and 0.5..1: any mantissa will do.
    const uint16_t fp16 =
        static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x3800 | (bits >> 10 & 0x3ff));
    if (t == DType::kFloat32) std::memcpy(at, &x, 4);
    if (t == DType::kBFloat16) std::memcpy(at, &bf16, 2);
    if (t == DType::kFloat16) std::memcpy(at, &fp16, 2);
  }
  uint64_t state_ = 1;
};

bool is_nan(DType t, const char* at) {
  if (t == DType::kFloat32) {
    float x;
    std::memcpy(&x, at, 4);
    return std::isnan(x);
  }
  uint16_t h;
  std::memcpy(&h, at, 2);
  return (h & 0x7fff) > (t == DType::kBFloat16 ? 0x7f80 : 0x7c00);
}

bool all_written(DType t, const std::vector<char>& x) {
  for (size_t i = 0; i < x.size(); i += static_cast<size_t>(size_of(t))) {
    if (is_nan(t, x.data() + i)) return false;
  }
  return true;
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

  const auto nan_filled = [&](int64_t elements, int64_t size) {
    return std::vector<char>(static_cast<size_t>(elements * size), static_cast<char>(0xff));
  };
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

bool check_gather() {
  constexpr int64_t kRows = 3000, kBytes = 200;
  std::vector<char> src(kRows * kBytes);
  for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<char>(i * 31 % 127 + 1);
  std::vector<int64_t> index;
  for (int64_t i = 0; i < 2 * kRows; ++i) index.push_back(i % 3 == 0 ? -1 : i * 7 % kRows);
  const auto n = static_cast<int64_t>(index.size());
  std::vector<char> out(static_cast<size_t>(n * kBytes), 0x7f);
  ThreadPool pool{4};
  kPadKernels.gather_rows({src.data(), index.data(), out.data(), n, kBytes, kBytes, kBytes},
                          pool.pool());
  const std::vector<char> zero(kBytes, 0);
  bool ok = true;
  for (size_t i = 0; i < index.size(); ++i) {
    const char* want = index[i] < 0 ? zero.data() : src.data() + index[i] * kBytes;
    ok &= std::memcmp(out.data() + i * kBytes, want, kBytes) == 0;
  }
  std::printf("%-28s %s\n", "gather_rows", ok ? "" : "wrong rows");
  return ok;
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
  bool ok = check_gather();
  for (const Case& c : cases) ok &= check_attention(c);
  return ok ? 0 : 1;
}
