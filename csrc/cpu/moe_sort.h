// Choices in the order of their experts, and which of them find room.
//
// A stable counting sort of the choices in the order (rank j, token), where place i is choice
// i % N * K + i / N:
//
//   count    each tile of choices, its histogram over the experts
//   starts   histograms become the first place of each tile at each expert; loads, room, cu_seqlens
//   place    each tile again: a choice takes the next place of its expert, or finds no room
//
// With random priority `place` sorts without a limit, and for each expert whose load exceeds its
// room the rank at which it fills up keeps the choices with the least keys (least_keys.h).
//
// Memory traffic: expert_ids twice, 4 bytes written to rows and to slots each; histograms are
// tiles * E numbers. Everything is a function of the shape: a place belongs to one tile, whatever
// the number of threads.
#pragma once
#include "least_keys.h"
#include "moe_draws.h"
#include "moe_route.h"

namespace encfast::ENCFAST_ISA {
namespace {

// f(i, choice) for the choices of a tile in the order (rank, token).
template <class F>
ENCFAST_INLINE void for_choices(const MoeSortParams& p, int64_t tile, F f) {
  const int64_t begin = tile * p.choices_per_tile, choices = p.N * p.K;
  const int64_t end = begin + p.choices_per_tile < choices ? begin + p.choices_per_tile : choices;
  int64_t j = begin / p.N, t = begin % p.N;
  for (int64_t i = begin; i < end; ++i) {
    f(i, t * p.K + j);
    if (++t == p.N) {
      t = 0;
      ++j;
    }
  }
}

void count_task(int64_t tile, int, void* ctx) {
  const MoeSortParams& p = *static_cast<const MoeSortParams*>(ctx);
  int32_t* histogram = p.histograms + tile * p.E;
  std::memset(histogram, 0, p.E * sizeof(int32_t));
  for_choices(p, tile, [&](int64_t, int64_t choice) ENCFAST_INLINE_LAMBDA {
    const int32_t e = p.expert_ids[choice];
    if (e >= 0) ++histogram[e];
  });
}

void find_starts(const MoeSortParams& p) {
  for (int64_t e = 0; e <= p.E; ++e) p.all_seqlens[e] = 0;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    int32_t* histogram = p.histograms + tile * p.E;
    for (int64_t e = 0; e < p.E; ++e) {
      const int32_t here = histogram[e];
      histogram[e] = p.all_seqlens[e + 1];
      p.all_seqlens[e + 1] += here;
    }
  }
  int64_t choices = 0;
  for (int64_t e = 0; e < p.E; ++e) choices += p.all_seqlens[e + 1];
  int64_t room = choices;
  if (p.limited) room = capacity_of(choices / p.K, p.E, p.capacity_factor, p.min_capacity);
  p.cu_seqlens[0] = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    const int32_t load = p.all_seqlens[e + 1];
    p.cu_seqlens[e + 1] = p.cu_seqlens[e] + (load < room ? load : static_cast<int32_t>(room));
    p.all_seqlens[e + 1] += p.all_seqlens[e];
  }
}

ENCFAST_INLINE void put(const MoeSortParams& p, int32_t slot, int64_t choice) {
  p.rows[slot] = static_cast<int32_t>(choice);
  p.slots[choice] = slot;
}

void place_task(int64_t tile, int, void* ctx) {
  const MoeSortParams& p = *static_cast<const MoeSortParams*>(ctx);
  int32_t* next = p.histograms + tile * p.E;
  const int32_t kept = p.cu_seqlens[p.E];
  for_choices(p, tile, [&](int64_t i, int64_t choice) ENCFAST_INLINE_LAMBDA {
    const int32_t e = p.expert_ids[choice];
    if (i >= kept) p.rows[i] = -1;
    p.slots[choice] = -1;
    if (e < 0) return;
    const int32_t place = next[e]++;
    if (p.random) {
      p.sorted[p.all_seqlens[e] + place] = static_cast<int32_t>(choice);
    } else if (place < p.cu_seqlens[e + 1] - p.cu_seqlens[e]) {
      put(p, p.cu_seqlens[e] + place, choice);
    }
  });
}

// Of one expert's choices the first `room` in the order (rank, key, token), in that of (rank,
// token).
void select_task(int64_t e, int slot, void* ctx) {
  const MoeSortParams& p = *static_cast<const MoeSortParams*>(ctx);
  const int32_t* sorted = p.sorted + p.all_seqlens[e];
  const int64_t load = p.all_seqlens[e + 1] - p.all_seqlens[e];
  const int64_t room = p.cu_seqlens[e + 1] - p.cu_seqlens[e];
  int32_t to = p.cu_seqlens[e];
  if (room == load || room == 0) {
    for (int64_t i = 0; i < room; ++i) put(p, to++, sorted[i]);
    return;
  }
  // The rank at which the expert fills up is begin .. end - 1.
  const int64_t rank = sorted[room] % p.K;
  int64_t begin = room, end = room;
  while (begin > 0 && sorted[begin - 1] % p.K == rank) --begin;
  while (end < load && sorted[end] % p.K == rank) ++end;
  for (int64_t i = 0; i < begin; ++i) put(p, to++, sorted[i]);
  if (begin == room) return;
  int32_t* keys = p.keys + slot * p.keys_stride;
  const int64_t n = end - begin;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = priority_key(p.key, sorted[begin + i] / p.K, rank);
  }
  for (int64_t i = n; i % kCountStep; ++i) keys[i] = kLastKey;
  const Threshold limit = find_threshold(keys, n, room - begin);
  int64_t ties = limit.ties;
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = keys[i] == limit.key;
    if (keys[i] < limit.key || (equal && ties-- > 0)) put(p, to++, sorted[begin + i]);
  }
}

void sort(const MoeSortParams& p, const Pool& pool) {
  void* ctx = const_cast<MoeSortParams*>(&p);
  pool.run(pool.self, p.tiles, count_task, ctx);
  find_starts(p);
  pool.run(pool.self, p.tiles, place_task, ctx);
  if (p.random) pool.run(pool.self, p.E, select_task, ctx);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
