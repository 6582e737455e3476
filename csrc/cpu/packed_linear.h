// Parameters of the packed_linear cores: what the binding hands over once everything has been
// checked.
#pragma once
#include <cstdint>

#include "activation.h"
#include "parallel.h"
#include "varlen_attn.h"  // DType

namespace encfast {

enum class LinearFormat : int32_t { kFp32, kBf16, kInt8 };
enum class Norm : int32_t { kNone, kLayerNorm, kRmsNorm };

// A packed weight [F, C] is, behind a header of 64 bytes, one panel per 32 rows (output columns):
//
//   panel  [words][32]: word k of a row is 4 bytes of its elements along C: one fp32, two bf16,
//          four int8. Rows are padded with zeros to whole panels, C to 64 bytes.
//
// int8 has behind the panels the fp32 scale and the int32 sum of each row.
constexpr int64_t kLinearHeaderBytes = 64;
constexpr int64_t kPanel = 32;

constexpr int64_t linear_element_bytes(LinearFormat f) {
  return f == LinearFormat::kFp32 ? 4 : f == LinearFormat::kBf16 ? 2 : 1;
}
constexpr int64_t linear_words(LinearFormat f, int64_t C) {
  return (C * linear_element_bytes(f) + 63) / 64 * 16;
}
constexpr int64_t linear_panels(int64_t F) { return (F + kPanel - 1) / kPanel; }
constexpr int64_t packed_linear_bytes(LinearFormat f, int64_t F, int64_t C) {
  const int64_t rows = linear_panels(F) * kPanel;
  return kLinearHeaderBytes + rows * (4 * linear_words(f, C) + (f == LinearFormat::kInt8 ? 8 : 0));
}

// Rows of N x C elements whose last dimension is contiguous; the stride in elements.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t stride;
};

struct PackLinearParams {
  LinearFormat format;
  MatrixView weight;  // [F, C]
  int64_t F, C;
  void* packed;  // packed_linear_bytes, 64-byte aligned; the header is left to the caller
};

struct PackedLinearParams {
  LinearFormat format;
  MatrixView x;  // [N, C]
  const void* packed;
  int64_t N, C, F;
  const float* bias;  // [F] or null
  Activation activation;
  bool gated;           // F = 2 ffn, rows [a; b]: act(a) * b
  MatrixView residual;  // [N, F or ffn], data null for none
  Norm norm;
  const float* norm_weight;  // [F or ffn] or null
  const float* norm_bias;    // likewise
  float norm_eps;
  void* out;        // [N, F or ffn] in x's dtype, contiguous
  void* workspace;  // workspace_bytes, 64-byte aligned, contents undefined
};

struct PackedLinearKernels {
  void (*pack)(const PackLinearParams&, const Pool&);
  int64_t (*workspace_bytes)(const PackedLinearParams&, int threads);
  void (*run)(const PackedLinearParams&, const Pool&);
};

}  // namespace encfast
