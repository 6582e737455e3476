// Runs the add_norm core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const AddNormKernels& kKernels = ENCFAST_ISA::kAddNorm;
constexpr int64_t kRows = 90, kRowsPerTask = 16;

struct Floats {
  std::vector<char> bytes;
  explicit Floats(int64_t n) : bytes(nan_filled(n, 4)) {}
  float* data() { return reinterpret_cast<float*>(bytes.data()); }
};

// Forward and backward with every optional tensor; everything promised must be written.
bool check(DType t, NormKind kind, int64_t C) {
  Values values;
  const auto x = values.make(t, kRows * C), residual = values.make(t, kRows * C);
  const auto dy = values.make(t, kRows * C), past = values.make(t, kRows * C);
  const auto weight = values.make(DType::kFloat32, C), bias = values.make(DType::kFloat32, C);
  const auto scale = values.make(DType::kFloat32, C);
  auto y = nan_filled(kRows * C, size_of(t)), total = y, dtotal = y, dx = y;
  const int64_t stride = (C + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  Floats mean(kRows), rstd(kRows), sums(3 * stride);
  ThreadPool pool{4};
  Block workspace(static_cast<size_t>(4 * stride * pool.count));
  const auto floats = [](const std::vector<char>& v) {
    return reinterpret_cast<const float*>(v.data());
  };
  const bool centred = kind == NormKind::kLayerNorm;
  kKernels.fwd({kind,
                1e-5f,
                kRows,
                C,
                kRowsPerTask,
                {x.data(), C, t},
                {residual.data(), C, t},
                floats(weight),
                floats(bias),
                floats(scale),
                {y.data(), C, t},
                {total.data(), C, t},
                centred ? mean.data() : nullptr,
                rstd.data(),
                static_cast<float*>(workspace.data),
                stride},
               pool.pool());
  const int64_t tasks = (kRows + kRowsPerTask - 1) / kRowsPerTask;
  Block partials(static_cast<size_t>(4 * tasks * 3 * stride));
  kKernels.bwd({kind,
                kRows,
                C,
                kRowsPerTask,
                {dy.data(), C, t},
                {past.data(), C, t},
                {total.data(), C, t},
                {x.data(), C, t},
                mean.data(),
                rstd.data(),
                floats(weight),
                floats(scale),
                {dtotal.data(), C, t},
                {dx.data(), C, t},
                true,
                true,
                true,
                stride,
                static_cast<float*>(partials.data),
                sums.data()},
               pool.pool());
  bool ok = true;
  for (const auto* out : {&y, &total, &dtotal, &dx}) ok &= all_written(t, *out);
  for (int i = 0; i < 3; ++i) {
    const char* section = sums.bytes.data() + 4 * i * stride;
    ok &= all_written(DType::kFloat32, std::vector<char>(section, section + 4 * C));
  }
  std::printf("dtype %d kind %d C %-5d %s\n", static_cast<int>(t), static_cast<int>(kind),
              static_cast<int>(C), ok ? "" : "NaN in the results");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (NormKind kind : {NormKind::kLayerNorm, NormKind::kRmsNorm}) {
      for (int64_t C : {1, 15, 64, 201}) ok &= check(t, kind, C);
    }
  }
  return ok ? 0 : 1;
}
