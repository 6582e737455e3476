// Runs the glu core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const GluKernels& kKernels = ENCFAST_ISA::kGlu;
constexpr int64_t kRows = 90, kRowsPerTask = 16;

// Forward and backward with a bias; everything promised must be written.
bool check(DType t, Activation activation, bool gated, int64_t F) {
  const int64_t width = gated ? 2 * F : F;
  Values values;
  const auto x = values.make(t, kRows * width), dout = values.make(t, kRows * F);
  const auto bias = values.make(DType::kFloat32, width);
  auto out = nan_filled(kRows * F, size_of(t)), dx = nan_filled(kRows * width, size_of(t));
  const int64_t padded = (width + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const int64_t tasks = (kRows + kRowsPerTask - 1) / kRowsPerTask;
  auto sums = nan_filled(padded, 4);
  Block partials(static_cast<size_t>(4 * tasks * padded));
  const auto* b = reinterpret_cast<const float*>(bias.data());
  const GluGeometry g{activation, gated, kRows, F, gated ? F : 0, 0, kRowsPerTask};
  ThreadPool pool{4};
  kKernels.fwd({g, {x.data(), width, t}, b, {out.data(), F, t}}, pool.pool());
  kKernels.bwd({g,
                {dout.data(), F, t},
                {x.data(), width, t},
                b,
                {dx.data(), width, t},
                padded,
                static_cast<float*>(partials.data),
                reinterpret_cast<float*>(sums.data())},
               pool.pool());
  const bool ok = all_written(t, out) && all_written(t, dx) &&
                  all_written(DType::kFloat32, {sums.begin(), sums.begin() + 4 * width});
  std::printf("dtype %d activation %d gated %d F %-5d %s\n", static_cast<int>(t),
              static_cast<int>(activation), gated, static_cast<int>(F),
              ok ? "" : "NaN in the results");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (Activation a :
         {Activation::kGelu, Activation::kGeluTanh, Activation::kSilu, Activation::kRelu}) {
      for (bool gated : {false, true}) {
        for (int64_t F : {1, 15, 201}) ok &= check(t, a, gated, F);
      }
    }
  }
  return ok ? 0 : 1;
}
