// What kernels that move and sum rows share: shapes of blocks, vectors, the scan of a block.
#pragma once
#include <cstdint>

#include "common/gpu.h"

namespace encfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // many waves on any GPU; the kernels stride over the rest
constexpr int kWarpSize = 32, kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = ~0u;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes for a row of `vectors`: the next power of two, within a block.
inline dim3 block_for(int64_t vectors) {
  unsigned lanes = 1;
  while (lanes < vectors && lanes < kThreads) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

inline unsigned blocks_for(int64_t rows, unsigned rows_per_block) {
  const int64_t blocks = ceil_div(rows, rows_per_block);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

inline uint64_t bits_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }
inline uint64_t bits_of(int64_t stride) { return static_cast<uint64_t>(stride); }

// Whether `width` divides all of these addresses and strides in bytes.
template <typename... Places>
bool aligned(int64_t width, Places... places) {
  return (bits_of(places) | ...) % static_cast<uint64_t>(width) == 0;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// The sum of `value` over this thread and those before it in the block; `total` is that of all.
__device__ inline int inclusive_scan(int value, int& total) {
  ENCFAST_SHARED(int, warp_sums, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int reach = 1; reach < kWarpSize; reach *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(reach));
    if (lane >= reach) value += before;
  }
  __syncthreads();  // an earlier scan has been read
  if (lane == kWarpSize - 1) warp_sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) value += total;
    total += warp_sums[w];
  }
  return value;
}

}  // namespace
}  // namespace encfast
