// Reductions of a warp; every lane gets the result.
#pragma once
#include "common/gpu.h"
#include "rows.h"

namespace encfast {
namespace {

template <typename T, typename F>
__device__ T warp_reduce(T x, F combine) {
  for (unsigned bits = kWarpSize / 2; bits > 0; bits /= 2) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, bits));
  }
  return x;
}

__device__ inline float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// Of the warps of a grid of blocks of kThreads, the number of this one and how many there are.
__device__ inline int64_t warp_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int64_t>(threadIdx.x) / kWarpSize;
}
__device__ inline int64_t warps_in_grid() { return static_cast<int64_t>(gridDim.x) * kWarps; }

}  // namespace
}  // namespace encfast
