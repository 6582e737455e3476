// Matrices as the row-wise cores see them: N rows of contiguous elements, any distance apart.
#pragma once
#include <cstdint>

#include "varlen_attn.h"

namespace encfast {

struct ConstMatrix {
  const void* data;    // nullptr: absent
  int64_t row_stride;  // in elements; 0 and negative are legal
  DType dtype;
};

struct Matrix {
  void* data;
  int64_t row_stride;
  DType dtype;
};

// Rows of fp32 words in workspaces are this many apart at least: whole vectors on every ISA.
constexpr int64_t kMaxLanes = 16;

}  // namespace encfast
