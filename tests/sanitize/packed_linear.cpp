// Runs the packed_linear core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const PackedLinearKernels& kKernels = ENCFAST_ISA::kPackedLinear;

struct Case {
  const char* name;
  LinearFormat format;
  DType dtype;
  int64_t N, C, F;
  Activation activation;
  bool gated;
  Norm norm;
};

constexpr LinearFormat kFp32 = LinearFormat::kFp32, kBf16 = LinearFormat::kBf16;
constexpr LinearFormat kInt8 = LinearFormat::kInt8;
constexpr DType kF = DType::kFloat32, kB = DType::kBFloat16, kH = DType::kFloat16;
const Case kCases[] = {
    {"fp32 gelu", kFp32, kF, 67, 45, 70, Activation::kGelu, false, Norm::kNone},
    {"bf16 gelu", kBf16, kB, 67, 45, 70, Activation::kGelu, false, Norm::kNone},
    {"int8 gelu", kInt8, kB, 67, 45, 70, Activation::kGelu, false, Norm::kNone},
    {"bf16 gated, offset panels", kBf16, kB, 35, 130, 86, Activation::kSilu, true, Norm::kNone},
    {"int8 gated, fp16 rows", kInt8, kH, 35, 130, 86, Activation::kGeluTanh, true, Norm::kNone},
    {"bf16 layernorm", kBf16, kF, 300, 40, 70, Activation::kNone, false, Norm::kLayerNorm},
    {"int8 layernorm, few rows", kInt8, kF, 3, 600, 70, Activation::kNone, false, Norm::kLayerNorm},
    {"fp32 rmsnorm, few rows", kFp32, kF, 5, 300, 90, Activation::kRelu, true, Norm::kRmsNorm},
    {"fp32 gated, chunks share panels", kFp32, kB, 8, 2000, 1000, Activation::kRelu, true,
     Norm::kLayerNorm},
    {"fp32 rows in place", kFp32, kF, 51, 448, 70, Activation::kNone, false, Norm::kNone},
    {"bf16 rows in place", kBf16, kB, 51, 832, 70, Activation::kGelu, false, Norm::kLayerNorm},
    {"int8 two blocks", kInt8, kB, 51, 1600, 70, Activation::kNone, true, Norm::kNone},
    {"int8 one value", kInt8, kF, 1, 1, 1, Activation::kNone, false, Norm::kNone},
};

// Every tensor is a heap block of its exact size, so that one element too far is an error.
struct Tensors {
  int64_t width;
  std::vector<char> x, weight, bias, residual, norm;

  explicit Tensors(const Case& c) : width(c.gated ? c.F / 2 : c.F) {
    Values values;
    x = values.make(c.dtype, c.N * c.C);
    weight = values.make(DType::kFloat32, c.F * c.C);
    bias = values.make(DType::kFloat32, c.F);
    residual = values.make(c.dtype, c.N * width);
    norm = values.make(DType::kFloat32, width);
  }
};

const float* floats(const std::vector<char>& x) { return reinterpret_cast<const float*>(x.data()); }

std::vector<char> run(const Case& c, const Tensors& t, int threads) {
  ThreadPool pool{threads};
  const int64_t bytes = packed_linear_bytes(c.format, c.F, c.C);
  const Block packed(static_cast<size_t>(bytes));
  kKernels.pack({c.format, {t.weight.data(), DType::kFloat32, c.C}, c.F, c.C, packed.data},
                pool.pool());
  std::vector<char> out = nan_filled(c.N * t.width, size_of(c.dtype));
  PackedLinearParams p{c.format,
                       {t.x.data(), c.dtype, c.C},
                       packed.data,
                       c.N,
                       c.C,
                       c.F,
                       floats(t.bias),
                       c.activation,
                       c.gated,
                       {t.residual.data(), c.dtype, t.width},
                       c.norm,
                       floats(t.norm),
                       floats(t.norm),
                       1e-5f,
                       out.data(),
                       nullptr};
  const Block workspace(static_cast<size_t>(kKernels.workspace_bytes(p, threads)));
  std::memset(workspace.data, 0xff, workspace.bytes);
  p.workspace = workspace.data;
  kKernels.run(p, pool.pool());
  return out;
}

bool check(const Case& c) {
  const Tensors t(c);
  const std::vector<char> one = run(c, t, 1), four = run(c, t, 4);
  const bool written = all_written(c.dtype, one), equal = one == four;
  std::printf("%-28s %s%s\n", c.name, written ? "" : "NaN in the result ",
              equal ? "" : "1 thread differs from 4");
  return written && equal;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : kCases) ok &= check(c);
  return ok ? 0 : 1;
}
