// Parameters of the glu cores: what the binding hands over once everything has been checked.
#pragma once
#include "activation.h"
#include "matrix.h"

namespace encfast {

// F is the width of the output. Ungated rows of x are the F activated columns; gated ones have 2F,
// the activated ones from column `activated` on, the factors from column `factor` on.
struct GluGeometry {
  Activation activation;
  bool gated;
  int64_t N;
  int64_t F;
  int64_t activated;
  int64_t factor;
  int64_t rows_per_task;
};

// All matrices are of x's dtype.
struct GluParams {
  GluGeometry g;
  ConstMatrix x;      // [N, F] or [N, 2F]
  const float* bias;  // of x's width; nullptr: none
  Matrix out;         // [N, F]
};

struct GluBwdParams {
  GluGeometry g;
  ConstMatrix dout;  // [N, F]
  ConstMatrix x;
  const float* bias;
  Matrix dx;  // of x's shape
  // Of dbias, where it is wanted: of each task, then their sum.
  int64_t width;    // a multiple of kMaxLanes, at least that of x; 0: not wanted
  float* partials;  // [tasks][width]
  float* sums;      // [width]
};

struct GluKernels {
  void (*fwd)(const GluParams&, const Pool&);
  void (*bwd)(const GluBwdParams&, const Pool&);
};

}  // namespace encfast
