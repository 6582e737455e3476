// Parameters of the add_norm cores: what the binding hands over once everything has been checked.
#pragma once
#include "matrix.h"

namespace encfast {

enum class NormKind : int32_t { kLayerNorm, kRmsNorm };

struct AddNormParams {
  NormKind kind;
  float eps;
  int64_t N;
  int64_t C;
  int64_t rows_per_task;
  ConstMatrix x;
  ConstMatrix residual;  // or absent
  const float* weight;   // [C], as the next two: nullptr is 1, 0 and 1
  const float* bias;
  const float* branch_scale;
  Matrix y;                  // of the dtype that x and residual promote to
  Matrix total;              // of the same; nullptr: not wanted
  float* mean;               // [N]; nullptr for RMSNorm
  float* rstd;               // [N]
  float* workspace;          // [threads][workspace_stride]
  int64_t workspace_stride;  // a multiple of kMaxLanes >= C
};

// dtotal is the gradient of the sum, through the norm and past it.
struct AddNormBwdParams {
  NormKind kind;
  int64_t N;
  int64_t C;
  int64_t rows_per_task;
  ConstMatrix dy;         // of total's dtype
  ConstMatrix dtotal_in;  // of total's dtype, or absent
  ConstMatrix total;
  ConstMatrix x;  // with branch_scale, else absent
  const float* mean;
  const float* rstd;
  const float* weight;
  const float* branch_scale;
  Matrix dtotal;
  Matrix dx;  // with branch_scale: branch_scale * dtotal
  // Per task, then their sum: sections of `section` floats for those of dweight, dbias and
  // dbranch_scale that are wanted, in this order.
  bool want_dweight, want_dbias, want_dbranch_scale;
  int64_t section;  // a multiple of kMaxLanes >= C
  float* partials;  // [tasks][sections * section]
  float* sums;      // [sections * section]
};

struct AddNormKernels {
  void (*fwd)(const AddNormParams&, const Pool&);
  void (*bwd)(const AddNormBwdParams&, const Pool&);
};

}  // namespace encfast
