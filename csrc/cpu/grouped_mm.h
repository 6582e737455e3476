// Parameters of the grouped_mm core: one matrix product per group of rows.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace encfast {

enum class GroupedProduct {
  kForward,     // out[i] = x[i] W[e]^T
  kGradInput,   // dx[i] = dout[i] W[e]
  kGradWeight,  // dW[e] = sum over i of dout[i]^T x[i]
};

// What a task computes at most. Its columns of B are packed once for all its rows, and its rows of
// A once or not at all for its columns: large tasks pack little, small ones leave no thread idle.
constexpr int64_t grouped_rows(GroupedProduct p) {
  return p == GroupedProduct::kGradWeight ? 768 : 960;
}
constexpr int64_t kGroupedColumns = 768;
// What rows and columns of a task are best multiples of.
constexpr int64_t kGroupedRowStep = 48, kGroupedColumnStep = 32;

// Rows [m, m_end) and columns [n, n_end) of a group's result, at most grouped_rows and
// kGroupedColumns.
struct GroupedMmTask {
  int64_t group, m, m_end, n, n_end;
};

struct GroupedMmParams {
  GroupedProduct product;
  const int32_t* cu_seqlens;  // [E + 1], checked
  ConstMatrix a;              // x, or dout for the gradients
  ConstMatrix b;              // W, or x for kGradWeight; a's dtype
  int64_t b_group_stride;     // elements from W[e] to W[e + 1]
  int64_t terms;              // of each sum; the rows of the group for kGradWeight
  const float* bias;          // [E, columns] or nullptr
  int64_t columns;            // of the result
  Matrix out;                 // contiguous, a's dtype
  int64_t out_group_stride;   // of kGradWeight
  const GroupedMmTask* tasks;
  int64_t n_tasks;
  void* workspace;  // workspace_bytes, 64-byte aligned, contents undefined
};

struct GroupedSumParams {
  const int32_t* cu_seqlens;
  int64_t groups, columns;
  ConstMatrix rows;
  float* out;  // [groups, columns]
};

struct GroupedMmKernels {
  int64_t (*workspace_bytes)(const GroupedMmParams& p, int threads);
  void (*multiply)(const GroupedMmParams& p, const Pool& pool);
  // out[e] = sum of the rows of group e.
  void (*sum_rows)(const GroupedSumParams& p, const Pool& pool);
};

}  // namespace encfast
