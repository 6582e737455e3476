// Rows of tokens to their experts and back on a GPU: POD parameters and torch-free launchers.
// Places outside of their range stop a kernel with an assertion. Strides are in elements.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace encfast {

// out[s] = x[rows[s] / k], 0 where rows[s] is -1.
struct CudaMoePermuteParams {
  DType type;
  const void* x;        // [n, channels]
  const int32_t* rows;  // [n * k]
  void* out;            // [n * k, channels] contiguous
  int64_t n, k, channels;
  int64_t x_stride;
};

// out[t] = sum over j of gates[t, j] * y[slots[t, j]].
struct CudaMoeUnpermuteParams {
  DType type;
  const void* y;         // [n * k, channels]
  const float* gates;    // [n, k] or null: 1
  const int32_t* slots;  // [n, k]
  void* out;             // [n, channels] contiguous
  int64_t n, k, channels;
  int64_t y_stride;
};

// dy[s] = gate * dout[token], dgates = <dout[token], y[s]>; 0 for what was dropped.
struct CudaMoeUnpermuteBwdParams {
  DType type;
  const void* dout;      // [n, channels]
  const void* y;         // [n * k, channels]
  const float* gates;    // [n, k]
  const int32_t* rows;   // [n * k]
  const int32_t* slots;  // [n, k]
  void* dy;              // [n * k, channels] contiguous
  float* dgates;         // [n, k]
  int64_t n, k, channels;
  int64_t dout_stride, y_stride;
};

// out = x times numbers in (1 - amount, 1 + amount).
struct CudaMoeJitterParams {
  DType type;
  const void* x;  // [n, channels]
  const int64_t* rng;
  float amount;
  void* out;  // [n, channels] contiguous
  int64_t n, channels;
  int64_t x_stride;
};

int moe_permute_cuda(const CudaMoePermuteParams& p, void* stream);
int moe_unpermute_cuda(const CudaMoeUnpermuteParams& p, void* stream);
int moe_unpermute_bwd_cuda(const CudaMoeUnpermuteBwdParams& p, void* stream);
int moe_jitter_cuda(const CudaMoeJitterParams& p, void* stream);

}  // namespace encfast
