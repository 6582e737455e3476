// Runs the linear_cross_entropy core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const LinearCrossEntropyKernels& kKernels = ENCFAST_ISA::kLinearCrossEntropy;
constexpr int64_t kRows = 90, kRowsPerTask = 16, kFirst = 40;

float* floats(std::vector<char>& x) { return reinterpret_cast<float*>(x.data()); }

// Both kernels, the gradient into memory of its own and over the logits; everything promised must
// be written.
bool check(DType t, int64_t columns, bool biased, float softcap) {
  Values values;
  auto logits = values.make(t, kRows * columns);
  const auto bias = values.make(DType::kFloat32, columns);
  auto stats = values.make(DType::kFloat32, kVocabStats * kRows);
  const auto coefficients = values.make(DType::kFloat32, kVocabCoefficients * kRows);
  std::vector<int64_t> targets(kRows);  // before, in and behind the slice
  for (int64_t i = 0; i < kRows; ++i) targets[static_cast<size_t>(i)] = i % 3 ? kFirst + i % 4 : i;
  const VocabSlice s{kRows,
                     columns,
                     kFirst,
                     kRowsPerTask,
                     biased ? reinterpret_cast<const float*>(bias.data()) : nullptr,
                     softcap,
                     targets.data()};
  auto grad = nan_filled(kRows * columns, size_of(t));
  ThreadPool pool{4};
  const auto* of_rows = reinterpret_cast<const float*>(coefficients.data());
  kKernels.scan({s, {logits.data(), columns, t}, floats(stats)}, pool.pool());
  for (auto* out : {&grad, &logits}) {
    kKernels.grad({s, {logits.data(), columns, t}, of_rows, {out->data(), columns, t}},
                  pool.pool());
  }
  const bool ok = all_written(DType::kFloat32, stats) && all_written(t, grad) && grad == logits;
  std::printf("dtype %d columns %-5d bias %d softcap %.1f %s\n", static_cast<int>(t),
              static_cast<int>(columns), biased, static_cast<double>(softcap),
              ok ? "" : "NaN in the results, or not the same in place");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t columns : {1, 15, 201, 512}) {
      for (bool biased : {false, true}) {
        for (float softcap : {0.0f, 3.0f}) ok &= check(t, columns, biased, softcap);
      }
    }
  }
  return ok ? 0 : 1;
}
