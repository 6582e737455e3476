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

// What a task may compute at most: the sizes of its workspace. Rows are a multiple of every tile's.
// A weight's gradient is written in long rows: its pages are fresh, and the system clears each as
// it is touched, so that whoever comes back later finds it gone from the caches.
constexpr int64_t grouped_rows(GroupedProduct p) {
  return p == GroupedProduct::kGradWeight ? 48 : 192;
}
constexpr int64_t grouped_columns(GroupedProduct p) {
  return p == GroupedProduct::kGradWeight ? 1024 : 256;
}

// Rows [m, m_end) and columns [n, n_end) of a group's result; n is a multiple of grouped_columns.
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
  void* workspace;
};

struct GroupedSumParams {
  const int32_t* cu_seqlens;
  int64_t groups, columns;
  ConstMatrix rows;
  float* out;  // [groups, columns]
};

struct GroupedMmKernels {
  int64_t (*workspace_bytes)(int threads);
  void (*multiply)(const GroupedMmParams& p, const Pool& pool);
  // out[e] = sum of the rows of group e.
  void (*sum_rows)(const GroupedSumParams& p, const Pool& pool);
};

}  // namespace encfast
