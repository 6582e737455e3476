// Choices in the order of their experts, and which of them find room: a stable counting sort of the
// choices in the order (rank j, token), where place i is choice i % n * k + i / n.
//
//   tile = 512 places, one warp: 16 rounds of 32
//   +-----------------+-----------------+
//   | w0: r0 r1 ..    | w1: r0 r1 ..    |    count   a histogram [experts] of each tile
//   +-----------------+-----------------+    starts  one block: histograms become first places;
//                                                    loads, room, cu_seqlens
//                                            place   each tile again, in order
//
// Lanes of a round that have the same expert find each other by ballots over the bits of its id;
// the first of them moves the counter, which no other warp touches. Histograms are in global memory
// (L1 or L2), so the number of experts has no limit.
//
// With random priority `place` sorts without a limit, and one block per expert selects: the rank at
// which the expert fills up keeps the choices with the least 31-bit keys, whose threshold is found
// by bisection and counting.
//
// Bytes moved per choice: its id twice, 4 written to rows and to slots each; 8 more written and
// read a few times with random priority.
#pragma once
#include <cassert>

#include "moe_draws.h"
#include "moe_route.h"
#include "rows.h"
#include "warp.h"

namespace encfast {
namespace {

constexpr int kTileRounds = 16;
constexpr int64_t kTileChoices = kTileRounds * kWarpSize;

struct SortScratch {
  int64_t tiles, choices;
  int32_t* histograms;   // [tiles][experts]
  int32_t* all_seqlens;  // [experts + 1], dropped choices included
  int32_t* sorted;       // [choices], random only
  int32_t* keys;         // [choices], random only

  SortScratch(int32_t* memory, int64_t n, int64_t experts, int64_t k)
      : tiles(ceil_div(n * k, kTileChoices)),
        choices(n * k),
        histograms(memory),
        all_seqlens(memory + tiles * experts),
        sorted(all_seqlens + experts + 1),
        keys(sorted + n * k) {}

  static int64_t size(int64_t n, int64_t experts, int64_t k, bool random) {
    return ceil_div(n * k, kTileChoices) * experts + experts + 1 + (random ? 2 * n * k : 0);
  }
};

// The choice of place i, and its expert; -1 behind the last.
struct Placed {
  int64_t choice;
  int32_t expert;
};

__device__ inline Placed choice_at(const CudaMoeSortParams& p, int64_t i) {
  if (i >= p.n * p.k) return {0, -1};
  const int64_t choice = i % p.n * p.k + i / p.n;
  const int32_t e = p.expert_ids[choice];
  assert(e >= -1 && e < p.experts && "encfast::moe_sort: expert id out of range");
  return {choice, e};
}

// The lanes whose expert is this lane's.
__device__ inline unsigned same_lanes(int32_t expert, int64_t experts) {
  unsigned same = kAllLanes;
  for (int64_t bit = 1; bit <= experts; bit *= 2) {  // -1 counts as `experts`
    const int64_t id = expert < 0 ? experts : expert;
    const unsigned set = __ballot_sync(kAllLanes, (id & bit) != 0);
    same &= id & bit ? set : ~set;
  }
  return same;
}

// f(place, the choice there, lanes with its expert) for each round of a tile, by all lanes.
template <typename F>
__device__ void for_rounds(const CudaMoeSortParams& p, int64_t tile, F f) {
  const int lane = lane_of_thread();
  for (int round = 0; round < kTileRounds; ++round) {
    const int64_t i = tile * kTileChoices + round * kWarpSize + lane;
    const Placed at = choice_at(p, i);
    const unsigned same = same_lanes(at.expert, p.experts);
    f(i, at, same);
    __syncwarp();  // counters of this round, before another lane moves them in the next
  }
}

__global__ void __launch_bounds__(kThreads)
    count_choices_kernel(CudaMoeSortParams p, SortScratch s) {
  const int lane = lane_of_thread();
  for (int64_t tile = warp_of_grid(); tile < s.tiles; tile += warps_in_grid()) {
    int32_t* histogram = s.histograms + tile * p.experts;
    for (int64_t e = lane; e < p.experts; e += kWarpSize) histogram[e] = 0;
    __syncwarp();
    for_rounds(p, tile, [&](int64_t i, Placed at, unsigned same) {
      if (i < s.choices) p.rows[i] = -1;  // until a choice is placed there
      if (at.expert >= 0 && lane == __ffs(static_cast<int>(same)) - 1) {
        histogram[at.expert] += __popc(same);
      }
    });
  }
}

// One block. histograms[tile][e] becomes the number of choices of e in the tiles before.
__global__ void __launch_bounds__(kThreads) find_starts_kernel(CudaMoeSortParams p, SortScratch s) {
  int choices = 0, kept = 0, total;
  for (int64_t first = 0; first < p.experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    int load = 0;
    for (int64_t tile = 0; tile < s.tiles && e < p.experts; ++tile) {
      int32_t& count = s.histograms[tile * p.experts + e];
      const int here = count;
      count = load;
      load += here;
    }
    const int through = inclusive_scan(load, total);
    if (e < p.experts) s.all_seqlens[e + 1] = choices + through;
    choices += total;
  }
  if (threadIdx.x == 0) s.all_seqlens[0] = p.cu_seqlens[0] = 0;
  __syncthreads();
  int64_t room = choices;
  if (p.limited) room = capacity_of(choices / p.k, p.experts, p.capacity_factor, p.min_capacity);
  for (int64_t first = 0; first < p.experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    const int load = e < p.experts ? s.all_seqlens[e + 1] - s.all_seqlens[e] : 0;
    const int through = inclusive_scan(load < room ? load : static_cast<int>(room), total);
    if (e < p.experts) p.cu_seqlens[e + 1] = kept + through;
    kept += total;
  }
}

__device__ inline void put(const CudaMoeSortParams& p, int32_t slot, int32_t choice) {
  p.rows[slot] = choice;
  p.slots[choice] = slot;
}

__global__ void __launch_bounds__(kThreads)
    place_choices_kernel(CudaMoeSortParams p, SortScratch s) {
  const int lane = lane_of_thread();
  const unsigned lanes_before = (1u << lane) - 1;
  for (int64_t tile = warp_of_grid(); tile < s.tiles; tile += warps_in_grid()) {
    int32_t* next = s.histograms + tile * p.experts;
    for_rounds(p, tile, [&](int64_t i, Placed at, unsigned same) {
      const int leader = __ffs(static_cast<int>(same)) - 1;
      int base = 0;
      if (at.expert >= 0 && lane == leader) {
        base = next[at.expert];
        next[at.expert] = base + __popc(same);
      }
      const int place = __shfl_sync(kAllLanes, base, leader) + __popc(same & lanes_before);
      if (i >= s.choices) return;
      const auto choice = static_cast<int32_t>(at.choice);
      const int32_t e = at.expert;
      if (e >= 0 && !p.random && place < p.cu_seqlens[e + 1] - p.cu_seqlens[e]) {
        put(p, p.cu_seqlens[e] + place, choice);
        return;
      }
      p.slots[choice] = -1;
      if (e < 0 || !p.random) return;
      const int64_t to = s.all_seqlens[e] + place;
      s.sorted[to] = choice;
      const uint32_t word = draw_word(key_from(p.rng), choice / p.k, choice % p.k, kPriorityDraws);
      s.keys[to] = static_cast<int32_t>(word >> 1);
    });
  }
}

// How many of n keys are at most `limit`; all threads of the block take part.
__device__ inline int count_up_to(const int32_t* keys, int n, int32_t limit) {
  int count = 0, total;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) count += keys[i] <= limit;
  inclusive_scan(count, total);
  return total;
}

// The first of `load` sorted choices whose rank is at least `rank`.
__device__ inline int first_of_rank(const int32_t* sorted, int load, int64_t k, int64_t rank) {
  int low = 0, high = load;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (sorted[middle] % k < rank) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Places the `keep` of n choices with the least keys from `slot` on, in their own order.
__device__ inline void place_least(const CudaMoeSortParams& p, const int32_t* sorted,
                                   const int32_t* keys, int n, int keep, int32_t slot) {
  int32_t low = 0, high = INT32_MAX;  // the keep-th smallest key is in low..high
  int ties = keep;                    // keys that are kept if they equal low
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const int count = count_up_to(keys, n, middle);
    if (count == keep) {
      low = high = middle;
      ties = n;
    } else if (count > keep) {
      high = middle;
    } else {
      low = middle + 1;
      ties = keep - count;
    }
  }
  int seen_below = 0, seen_equal = 0;
  for (int first = 0; first < n; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool less = i < n && keys[i] < low, equal = i < n && keys[i] == low;
    constexpr int kShift = 16;  // two counts of at most kThreads in one scan
    int total;
    const int before = inclusive_scan(less + (equal << kShift), total) - less - (equal << kShift);
    const int equal_before = seen_equal + (before >> kShift);
    const int less_before = seen_below + (before & ((1 << kShift) - 1));
    if (less || (equal && equal_before < ties)) {
      put(p, slot + less_before + (equal_before < ties ? equal_before : ties), sorted[i]);
    }
    seen_below += total & ((1 << kShift) - 1);
    seen_equal += total >> kShift;
  }
}

// One block an expert: of its choices the first `room` in the order (rank, key, token).
__global__ void __launch_bounds__(kThreads)
    select_choices_kernel(CudaMoeSortParams p, SortScratch s) {
  for (int64_t e = blockIdx.x; e < p.experts; e += gridDim.x) {
    const int32_t first = s.all_seqlens[e], slot = p.cu_seqlens[e];
    const int32_t* sorted = s.sorted + first;
    const int load = s.all_seqlens[e + 1] - first, room = p.cu_seqlens[e + 1] - slot;
    int sure = room, end = room;  // kept whatever their keys; the choices of the last rank
    if (room > 0 && room < load) {
      const int64_t rank = sorted[room] % p.k;
      sure = first_of_rank(sorted, load, p.k, rank);
      end = first_of_rank(sorted, load, p.k, rank + 1);
    }
    for (int i = static_cast<int>(threadIdx.x); i < sure; i += kThreads)
      put(p, slot + i, sorted[i]);
    if (sure < room) {
      place_least(p, sorted + sure, s.keys + first + sure, end - sure, room - sure, slot + sure);
    }
  }
}

inline void sort_choices(const CudaMoeSortParams& p, cudaStream_t stream) {
  const SortScratch s(p.scratch, p.n, p.experts, p.k);
  const unsigned blocks = s.tiles ? blocks_for(s.tiles, kWarps) : 1;
  ENCFAST_LAUNCH((count_choices_kernel), blocks, kThreads, stream, p, s);
  ENCFAST_LAUNCH((find_starts_kernel), 1, kThreads, stream, p, s);
  ENCFAST_LAUNCH((place_choices_kernel), blocks, kThreads, stream, p, s);
  if (p.random) {
    ENCFAST_LAUNCH((select_choices_kernel), blocks_for(p.experts, 1), kThreads, stream, p, s);
  }
}

}  // namespace
}  // namespace encfast
