// Where the entries of each row start in a sorted index.
#pragma once
#include <cassert>
#include <cstdint>

#include "common/gpu.h"
#include "rows.h"

namespace encfast {
namespace {

// begin[r] = how many of `sorted` are below r, for r in 0..n. sorted: [m] ascending, in -1..n - 1.
__global__ void row_starts_kernel(const int64_t* sorted, int64_t m, int64_t* begin, int64_t n) {
  assert((m == 0 || (sorted[0] >= -1 && sorted[m - 1] < n)) &&
         "encfast: a row index is out of range");
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r <= n; r += step) {
    int64_t low = 0, high = m;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted[middle] < r) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    begin[r] = low;
  }
}

inline void find_row_starts(const int64_t* sorted, int64_t m, int64_t* begin, int64_t n,
                            cudaStream_t stream) {
  ENCFAST_LAUNCH((row_starts_kernel), blocks_for(n + 1, kThreads), kThreads, stream, sorted, m,
                 begin, n);
}

}  // namespace
}  // namespace encfast
