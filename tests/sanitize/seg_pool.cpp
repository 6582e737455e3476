// Runs the seg_pool core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const SegPoolKernels& kKernels = ENCFAST_ISA::kSegPool;
constexpr int64_t kRowsPerTask = 7;
const std::vector<int32_t> kEnds = {0, 3, 3, 4, 44, 44, 61};

float* floats(std::vector<char>& x) { return reinterpret_cast<float*>(x.data()); }

// Forward and backward; everything promised must be written.
bool check(DType t, SegPoolHow how, bool weighted, bool normalize, int64_t C) {
  const int64_t B = static_cast<int64_t>(kEnds.size()) - 1, N = kEnds.back();
  const int64_t stride = (C + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const bool max = how == SegPoolHow::kMax;
  Values values;
  const auto x = values.make(t, N * C), dout = values.make(t, B * C);
  auto weights = values.make(DType::kFloat32, N);
  auto out = nan_filled(B * C, size_of(t)), dx = nan_filled(N * C, size_of(t));
  auto norm = nan_filled(B, 4), dweights = nan_filled(N, 4);
  std::vector<int32_t> rows(static_cast<size_t>(max ? B * C : 0), -7);
  Block share(static_cast<size_t>(4 * N)), wide(static_cast<size_t>(4 * B * stride));
  float* const w = weighted ? floats(weights) : nullptr;
  float* const length = normalize ? floats(norm) : nullptr;
  auto* shares = static_cast<float*>(share.data);
  auto* workspace = static_cast<float*>(wide.data);
  ThreadPool pool{4};
  kKernels.fwd({how,
                {x.data(), C, t},
                kEnds.data(),
                w,
                {out.data(), C, t},
                max ? rows.data() : nullptr,
                length,
                B,
                C,
                shares,
                workspace,
                stride},
               pool.pool());
  kKernels.bwd({how,
                {dout.data(), C, t},
                {x.data(), C, t},
                {out.data(), C, t},
                kEnds.data(),
                w,
                max ? rows.data() : nullptr,
                length,
                {dx.data(), C, t},
                weighted ? floats(dweights) : nullptr,
                B,
                N,
                C,
                kRowsPerTask,
                shares,
                workspace,
                stride},
               pool.pool());
  bool ok = all_written(t, out) && all_written(t, dx);
  ok &= !normalize || all_written(DType::kFloat32, norm);
  ok &= !weighted || all_written(DType::kFloat32, dweights);
  for (int32_t row : rows) ok &= row >= -1 && row < N;
  std::printf("dtype %d how %d weighted %d normalize %d C %-5d %s\n", static_cast<int>(t),
              static_cast<int>(how), weighted, normalize, static_cast<int>(C),
              ok ? "" : "NaN in the results");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t C : {1, 37, 130, 700}) {
      for (bool normalize : {false, true}) {
        for (SegPoolHow how : {SegPoolHow::kMean, SegPoolHow::kSum, SegPoolHow::kMax,
                               SegPoolHow::kFirst, SegPoolHow::kLast}) {
          ok &= check(t, how, false, normalize, C);
        }
        for (SegPoolHow how : {SegPoolHow::kMean, SegPoolHow::kSum, SegPoolHow::kAttention}) {
          ok &= check(t, how, true, normalize, C);
        }
      }
    }
  }
  return ok ? 0 : 1;
}
