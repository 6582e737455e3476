// Runs the rotary core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const RotaryKernels& kRotaryKernels = ENCFAST_ISA::kRotary;

struct Case {
  const char* name;
  DType dtype, table_dtype;
  int64_t rows, heads, kv_heads, D, pairs;
  bool positions, interleaved;
};

// Heads of q and k beside each other in one block of exact size, as a fused projection has them.
std::vector<char> run(const Case& c, int threads) {
  constexpr int64_t kTableRows = 11;
  Values values;
  const int64_t size = size_of(c.dtype), heads = c.heads + c.kv_heads, row = heads * c.D;
  const std::vector<char> x = values.make(c.dtype, c.rows * row);
  const int64_t table_rows = c.positions ? kTableRows : c.rows;
  const std::vector<char> cos = values.make(c.table_dtype, table_rows * c.pairs);
  const std::vector<char> sin = values.make(c.table_dtype, table_rows * c.pairs);
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < c.rows; ++i) positions.push_back(i * 7 % kTableRows);
  std::vector<char> out = nan_filled(c.rows * row, size);
  const auto heads_from = [&](int64_t first, int64_t count) {
    return RotaryHeads{{x.data() + first * c.D * size, row, c.D},
                       {out.data() + first * c.D * size, row, c.D},
                       count};
  };
  RotaryParams p{};
  p.dtype = c.dtype;
  p.q = heads_from(0, c.heads);
  p.k = heads_from(c.heads, c.kv_heads);
  p.table_dtype = c.table_dtype;
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_stride = p.sin_stride = c.pairs;
  p.positions = c.positions ? positions.data() : nullptr;
  p.N = c.rows;
  p.D = c.D;
  p.pairs = c.pairs;
  p.interleaved = c.interleaved;
  ThreadPool pool{threads};
  kRotaryKernels.rotate(p, pool.pool());
  return out;
}

bool check(const Case& c) {
  const std::vector<char> one = run(c, 1), four = run(c, 4);
  const char* wrong = "";
  if (!all_written(c.dtype, one)) wrong = "not all written";
  if (one != four) wrong = "1 thread differs from 4";
  std::printf("%-28s %s\n", c.name, wrong);
  return !*wrong;
}

constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
constexpr Case kCases[] = {
    {"bf16", kBF16, kF32, 700, 3, 2, 64, 32, true, false},
    {"bf16 interleaved", kBF16, kF32, 700, 3, 2, 64, 32, true, true},
    {"fp32, overlapping vectors", kF32, kF32, 200, 2, 1, 40, 20, false, false},
    {"fp16 interleaved, partial", kF16, kF16, 50, 2, 0, 47, 21, true, true},
    {"fp32, narrow, bf16 tables", kF32, kBF16, 50, 1, 1, 5, 1, true, false},
    {"fp16, widest", kF16, kF32, 9, 1, 1, 256, 128, true, false},
    {"fp32 interleaved, widest", kF32, kF32, 9, 1, 1, 256, 128, true, true},
};

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : kCases) ok &= check(c);
  return ok ? 0 : 1;
}
