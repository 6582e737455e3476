// Each kind of bug the checkers are there for, in a kernel of its own, and the same kernel without
// it: `planted NAME bug|fixed SEED`. The bug is found by the checker that test_simt.py names.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "common/gpu.h"

namespace {

constexpr unsigned kAll = ~0u;

// One element past the end of a global array.
template <bool kBug>
__global__ void global_bounds(int* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (kBug ? i <= n : i < n) out[i] = i;
}

// One element past the end of a shared array.
template <bool kBug>
__global__ void shared_bounds(int* out) {
  ENCFAST_SHARED(int, values, 32);
  int* at = values;  // no array bound is known of it
  at[threadIdx.x + (kBug ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = at[kBug ? 1 : threadIdx.x];
}

// 16 bytes at an address of 4.
template <bool kBug>
__global__ void vector_alignment(int* out) {
  *reinterpret_cast<uint4*>(out + (kBug ? 1 : 0)) = uint4{1, 2, 3, 4};
}

// Other warps' values are read without a barrier.
template <bool kBug>
__global__ void no_barrier(int* out) {
  ENCFAST_SHARED(int, values, 64);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// Values of the own warp, without __syncwarp: lanes need not run in step.
template <bool kBug>
__global__ void no_syncwarp(int* out) {
  ENCFAST_SHARED(int, values, 32);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!kBug) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

// A shuffle between write and read meets the lanes but orders no memory.
template <bool kBug>
__global__ void shuffle_as_barrier(int* out) {
  ENCFAST_SHARED(int, values, 32);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int sum = __shfl_sync(kAll, 1, 0);
  if (!kBug) __syncwarp();
  out[threadIdx.x] = sum + values[31 - threadIdx.x];
}

// Blocks add to one place.
template <bool kBug>
__global__ void sum_of_blocks(int* out) {
  if (threadIdx.x != 0) return;
  if (kBug) {
    *out += 1;
  } else {
    atomicAdd(out, 1);
  }
}

// A second round writes what slower threads of the first still read.
template <bool kBug>
__global__ void buffer_reuse(int* out) {
  ENCFAST_SHARED(int, value, 1);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) value[0] = round;
    __syncthreads();
    sum += value[0];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Shared memory is read before anything was written there.
template <bool kBug>
__global__ void unwritten_shared(int* out) {
  ENCFAST_SHARED(int, values, 64);
  if (!kBug || threadIdx.x < 32) values[threadIdx.x] = 1;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 64; ++i) sum += values[i];
  out[threadIdx.x] = sum;
}

// A place of the result is left out, whose value is that of memory full of ones.
template <bool kBug>
__global__ void unwritten_result(int* out) {
  if (threadIdx.x == 0) {
    out[0] = 5;
  } else if (!kBug) {
    out[threadIdx.x] = -1;
  }
}

// Warps wait at different barriers.
template <bool kBug>
__global__ void divergent_barrier(int* out) {
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// One warp waits at a barrier, the other in a warp operation that half of it never reaches.
template <bool kBug>
__global__ void divergent_ballot(int* out) {
  unsigned votes = kAll;
  if (!kBug || threadIdx.x < 48) votes = __ballot_sync(kAll, 1);
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(votes);
}

// A lane that the mask names has left.
template <bool kBug>
__global__ void exited_lane(int* out) {
  if (kBug && threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}

// Lanes of one warp are in different operations.
template <bool kBug>
__global__ void different_operations(int* out) {
  if (kBug && threadIdx.x % 2) {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kAll, 1));
  } else {
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  }
}

// A lane reads one that takes no part.
template <bool kBug>
__global__ void lane_outside_of_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, kBug ? 20 : 2);
}

// The result depends on which block comes first.
template <bool kBug>
__global__ void order_of_blocks(int* out) {
  if (threadIdx.x != 0) return;
  const int turn = atomicAdd(out, 1);
  out[1 + (kBug ? turn : blockIdx.x)] = static_cast<int>(blockIdx.x);
}

// A block that waits for another's barrier waits for ever.
template <bool kBug>
__global__ void lost_thread(int* out) {
  if (kBug && threadIdx.x == 5) __ballot_sync(1u << 5 | 1u << 6, 1);
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void nothing(int*) {}

struct Case {
  void (*launch)(bool bug, int* out);
  std::vector<int> expected;  // of out, from its beginning
};

#define PLANTED(kernel, grid, block, ...)                                 \
  [](bool bug, int* out) {                                                \
    (void)out;                                                            \
    if (bug) {                                                            \
      ENCFAST_LAUNCH((kernel<true>), grid, block, nullptr, __VA_ARGS__);  \
    } else {                                                              \
      ENCFAST_LAUNCH((kernel<false>), grid, block, nullptr, __VA_ARGS__); \
    }                                                                     \
  }

const std::map<std::string, Case> kCases = {
    {"global_bounds", {PLANTED(global_bounds, 1, 96, out, 64), {0, 1, 2}}},
    {"shared_bounds", {PLANTED(shared_bounds, 1, 32, out), {1, 1}}},
    {"vector_alignment", {PLANTED(vector_alignment, 1, 1, out), {1, 2, 3, 4}}},
    {"no_barrier", {PLANTED(no_barrier, 1, 64, out), {63, 62}}},
    {"no_syncwarp", {PLANTED(no_syncwarp, 1, 32, out), {31, 30}}},
    {"shuffle_as_barrier", {PLANTED(shuffle_as_barrier, 1, 32, out), {32, 31}}},
    {"sum_of_blocks", {PLANTED(sum_of_blocks, 8, 32, out), {8}}},
    {"buffer_reuse", {PLANTED(buffer_reuse, 1, 64, out), {3, 3}}},
    {"unwritten_shared", {PLANTED(unwritten_shared, 1, 64, out), {64, 64}}},
    {"unwritten_result", {PLANTED(unwritten_result, 1, 2, out), {5, -1}}},
    {"divergent_barrier", {PLANTED(divergent_barrier, 1, 64, out), {1, 1}}},
    {"divergent_ballot", {PLANTED(divergent_ballot, 1, 64, out), {-1, -1}}},
    {"exited_lane", {PLANTED(exited_lane, 1, 32, out), {1, 1}}},
    {"different_operations", {PLANTED(different_operations, 1, 32, out), {1, 1}}},
    {"lane_outside_of_mask", {PLANTED(lane_outside_of_mask, 1, 32, out), {1, 1}}},
    {"order_of_blocks", {PLANTED(order_of_blocks, 8, 32, out), {8, 0, 1, 2, 3, 4, 5, 6, 7}}},
    {"lost_thread", {PLANTED(lost_thread, 1, 32, out), {1, 1}}},
    {"grid_too_high", {PLANTED(nothing, (bug ? dim3(1, 65536) : dim3(2, 2)), 1, out), {}}},
    {"block_too_large", {PLANTED(nothing, 1, (bug ? 1025 : 1024), out), {}}},
};

}  // namespace

int main(int, char** args) {
  const Case& one = kCases.at(args[1]);
  simt::reseed(std::strtoull(args[3], nullptr, 10));
  check::Array<int> out(64);
  out[0] = 0;  // where some of them count
  one.launch(std::string(args[2]) == "bug", out.data());
  for (size_t i = 0; i < one.expected.size(); ++i) {
    const int found = out[static_cast<int64_t>(i)];
    if (found == one.expected[i]) continue;
    std::fprintf(stderr, "wrong result: out[%zu] is %d, expected %d\n", i, found, one.expected[i]);
    return 1;
  }
}
