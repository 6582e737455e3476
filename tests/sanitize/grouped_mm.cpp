// Runs the grouped_mm core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const GroupedMmKernels& kKernels = ENCFAST_ISA::kGroupedMm;
constexpr DType kF = DType::kFloat32, kB = DType::kBFloat16, kH = DType::kFloat16;

struct Case {
  const char* name;
  DType dtype;
  int64_t C, F;
  std::vector<int32_t> ends;
};

const Case kCases[] = {
    {"fp32 odd", kF, 45, 37, {0, 5, 5, 38}},    {"bf16 odd", kB, 45, 37, {0, 5, 5, 38}},
    {"fp16 odd", kH, 45, 37, {0, 5, 5, 38}},    {"fp32 whole lines", kF, 64, 32, {0, 16}},
    {"bf16 blocks", kB, 530, 270, {0, 3, 203}}, {"fp32 one value", kF, 1, 1, {0, 1}},
    {"fp32 wide", kF, 1100, 300, {0, 3, 9}},    {"fp32 blocks", kF, 530, 270, {0, 3, 203}},
};

int64_t terms_of(const Case& c, GroupedProduct product) {
  return product == GroupedProduct::kForward     ? c.C
         : product == GroupedProduct::kGradInput ? c.F
                                                 : 0;
}

// Every tensor is a heap block of its exact size, so that one element too far is an error.
std::vector<char> run(const Case& c, GroupedProduct product, int threads) {
  const bool of_weight = product == GroupedProduct::kGradWeight;
  const bool forward = product == GroupedProduct::kForward;
  const int64_t E = static_cast<int64_t>(c.ends.size()) - 1, N = c.ends.back();
  const int64_t columns = forward ? c.F : c.C;
  Values values;
  const std::vector<char> x = values.make(c.dtype, N * c.C), dout = values.make(c.dtype, N * c.F);
  const std::vector<char> weight = values.make(c.dtype, E * c.F * c.C);
  const std::vector<char> bias = values.make(kF, E * c.F);
  const int64_t elements = of_weight ? E * c.F * c.C : N * columns;
  std::vector<GroupedMmTask> tasks;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t rows = of_weight ? c.F : c.ends[e + 1] - c.ends[e];
    const int64_t most_rows = 96, most_columns = 64;  // several tasks
    for (int64_t m = 0; m < rows; m += most_rows) {
      for (int64_t n = 0; n < columns; n += most_columns) {
        tasks.push_back(
            {e, m, std::min(m + most_rows, rows), n, std::min(n + most_columns, columns)});
      }
    }
  }
  const Block out(static_cast<size_t>(elements * size_of(c.dtype)));
  std::memset(out.data, 0xff, out.bytes);
  GroupedMmParams p{
      product,
      c.ends.data(),
      forward ? ConstMatrix{x.data(), c.C, c.dtype} : ConstMatrix{dout.data(), c.F, c.dtype},
      of_weight ? ConstMatrix{x.data(), c.C, c.dtype} : ConstMatrix{weight.data(), c.C, c.dtype},
      c.F * c.C,
      terms_of(c, product),
      forward ? reinterpret_cast<const float*>(bias.data()) : nullptr,
      columns,
      {out.data, columns, c.dtype},
      c.F * c.C,
      tasks.data(),
      static_cast<int64_t>(tasks.size()),
      nullptr};
  const Block workspace(static_cast<size_t>(kKernels.workspace_bytes(p, threads)));
  std::memset(workspace.data, 0xff, workspace.bytes);
  p.workspace = workspace.data;
  ThreadPool pool{threads};
  kKernels.multiply(p, pool.pool());
  const char* bytes = static_cast<const char*>(out.data);
  return {bytes, bytes + out.bytes};
}

std::vector<char> sums(const Case& c, int threads) {
  const int64_t E = static_cast<int64_t>(c.ends.size()) - 1, N = c.ends.back();
  const std::vector<char> rows = Values().make(c.dtype, N * c.F);
  std::vector<char> out = nan_filled(E * c.F, 4);
  ThreadPool pool{threads};
  kKernels.sum_rows(
      {c.ends.data(), E, c.F, {rows.data(), c.F, c.dtype}, reinterpret_cast<float*>(out.data())},
      pool.pool());
  return out;
}

bool check(const char* name, const char* what, DType dtype, const std::vector<char>& one,
           const std::vector<char>& four) {
  const bool written = all_written(dtype, one), equal = one == four;
  std::printf("%-18s %-12s %s%s\n", name, what, written ? "" : "NaN in the result ",
              equal ? "" : "1 thread differs from 4");
  return written && equal;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : kCases) {
    using P = GroupedProduct;
    ok &= check(c.name, "forward", c.dtype, run(c, P::kForward, 1), run(c, P::kForward, 4));
    ok &= check(c.name, "dx", c.dtype, run(c, P::kGradInput, 1), run(c, P::kGradInput, 4));
    ok &= check(c.name, "dweight", c.dtype, run(c, P::kGradWeight, 1), run(c, P::kGradWeight, 4));
    ok &= check(c.name, "dbias", kF, sums(c, 1), sums(c, 4));
  }
  return ok ? 0 : 1;
}
