// Rows of a segment reduced to one: means, sums, largest values, single rows.
#pragma once
#include "matrix.h"
#include "parallel.h"

namespace encfast {

enum class SegPoolHow : int32_t { kMean, kSum, kMax, kFirst, kLast, kAttention };

// Segment b owns rows ends[b] .. ends[b + 1] - 1 of x [N, C].
struct SegPoolParams {
  SegPoolHow how;
  ConstMatrix x;
  const int32_t* ends;   // [B + 1]
  const float* weights;  // [N]; nullptr: ones
  Matrix out;            // [B, C], of x's dtype
  int32_t* rows;         // [B, C]: kMax only, the row of each value, -1 for none
  float* norm;  // [B]: length of each result before it is divided by it; nullptr: it is not
  int64_t B, C;
  float* share;           // workspace [N]: what a row counts; used if there are weights
  float* pooled;          // workspace [B][pooled_stride]; used if there is norm
  int64_t pooled_stride;  // a multiple of kMaxLanes, C at least
};

// dx [N, C] of x's dtype and dweights [N], either absent where not wanted.
struct SegPoolBwdParams {
  SegPoolHow how;
  ConstMatrix dout, x, out;
  const int32_t* ends;
  const float* weights;
  const int32_t* rows;
  const float* norm;
  Matrix dx;
  float* dweights;
  int64_t B, N, C;
  int64_t rows_per_task;
  float* share;  // workspace [N], used if there are weights
  float* grad;   // workspace [B][grad_stride]: gradient of each result before it was normalised
  int64_t grad_stride;
};

struct SegPoolKernels {
  void (*fwd)(const SegPoolParams&, const Pool&);
  void (*bwd)(const SegPoolBwdParams&, const Pool&);
};

}  // namespace encfast
