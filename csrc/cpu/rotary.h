// Rotation of the heads of packed rows: what the binding hands over once everything has been
// checked.
#pragma once
#include <cstdint>

#include "parallel.h"
#include "varlen_attn.h"

namespace encfast {

constexpr int64_t kRotaryMaxHeadSize = 256;

// [N, heads, D] to [N, heads, D]; they must not overlap. heads may be 0.
struct RotaryHeads {
  ConstRows in;
  Rows out;
  int64_t heads;
};

// Row i is rotated by the angles in row positions[i] of the tables, or in row i where there are no
// positions. Pair j of a head is (x[j], x[j + pairs]), interleaved (x[2j], x[2j + 1]); elements
// from 2 * pairs on are copied.
struct RotaryParams {
  DType dtype;
  RotaryHeads q;
  RotaryHeads k;  // rotated like q
  DType table_dtype;
  const void* cos;  // [S, pairs], the last dimension contiguous
  const void* sin;
  int64_t cos_stride;  // in elements
  int64_t sin_stride;
  const int64_t* positions;  // [N], each in [0, S); null: row i
  int64_t N;
  int64_t D;      // at most kRotaryMaxHeadSize
  int64_t pairs;  // 1 <= pairs <= D / 2
  bool interleaved;
  bool conjugate;  // by minus the angle
};

struct RotaryKernels {
  void (*rotate)(const RotaryParams&, const Pool&);
};

}  // namespace encfast
