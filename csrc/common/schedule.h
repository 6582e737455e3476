// Work lists for the varlen_attn cores: which thread-sized pieces there are, most expensive first.
//
// Ragged batches scale badly when cut into equal halves, since cost grows with length squared. A
// task list in falling order of cost, taken dynamically, keeps all threads busy until the small
// tasks at its end. The lists depend only on the geometry (and, forward, on the number of threads);
// results do not depend on them at all, because kernels block keys by absolute position.
//
// Baseline code, used by the binding: the standard library is allowed here, unlike in csrc/cpu.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../cpu/varlen_attn.h"

namespace encfast {

namespace schedule {

// Work of a key or query row outside the products (packing, storing), in (query, key) pairs.
constexpr int64_t kRowCost = 24;

struct Piece {
  int64_t cost;
  int32_t b, q_begin, q_end;
};

// Number of (query, key) pairs that row block [q_begin, q_end) of sequence b computes, counted per
// kTaskRowBlock rows as the kernels do, plus the fixed cost of its rows and keys.
inline int64_t piece_cost(const VarlenAttnGeometry& g, int32_t b, int64_t q_begin, int64_t q_end) {
  const int64_t len_q = g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b];
  const int64_t len_k = g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b];
  int64_t pairs = 0, first_key = len_k, last_key = -1;
  for (int64_t i = q_begin; i < q_end; i += kTaskRowBlock) {
    const int64_t end = std::min(i + kTaskRowBlock, q_end);
    const int64_t lo = g.left < 0 ? 0 : std::max<int64_t>(0, i + len_k - len_q - g.left);
    const int64_t hi =
        g.right < 0 ? len_k - 1 : std::min<int64_t>(len_k - 1, end - 1 + len_k - len_q + g.right);
    if (hi < lo) continue;
    pairs += (end - i) * (hi - lo + 1);
    first_key = std::min(first_key, lo);
    last_key = std::max(last_key, hi);
  }
  const int64_t group = g.H / g.Hk;
  const int64_t keys = std::max<int64_t>(0, last_key - first_key + 1);
  return group * (pairs + kRowCost * (q_end - q_begin)) + kRowCost * keys;
}

// Whether sequence b is planned whole. Depends on its own lengths, never on other sequences.
inline bool is_short(const VarlenAttnGeometry& g, int32_t b) {
  return g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b] <= g.short_rows &&
         g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b] <= g.short_rows;
}

// Sorts pieces (ties keep their order) and gives one task per key head to each. Short sequences,
// one task each, come last, in the order in which they lie in memory; so every run of Hk tasks from
// a multiple of Hk on holds the heads of one sequence or short sequences alone.
inline std::vector<VarlenAttnTask> expand(const VarlenAttnGeometry& g, std::vector<Piece> pieces) {
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& x, const Piece& y) { return x.cost > y.cost; });
  std::vector<VarlenAttnTask> tasks;
  tasks.reserve(pieces.size() * static_cast<size_t>(g.Hk) + static_cast<size_t>(g.B));
  for (const Piece& p : pieces) {
    for (int64_t hk = 0; hk < g.Hk; ++hk) {
      tasks.push_back({p.b, static_cast<int32_t>(hk), p.q_begin, p.q_end});
    }
  }
  for (int32_t b = 0; b < g.B; ++b) {
    const int32_t len_q = g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b];
    const int32_t len_k = g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b];
    if (is_short(g, b) && len_q + len_k > 0) tasks.push_back({b, kAllHeads, 0, len_q});
  }
  return tasks;
}

inline std::vector<Piece> split_rows(const VarlenAttnGeometry& g, int64_t rows) {
  std::vector<Piece> pieces;
  for (int32_t b = 0; b < g.B; ++b) {
    if (is_short(g, b)) continue;
    const int64_t len_q = g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b];
    for (int64_t i = 0; i < len_q; i += rows) {
      const int64_t end = std::min(i + rows, len_q);
      pieces.push_back(
          {piece_cost(g, b, i, end), b, static_cast<int32_t>(i), static_cast<int32_t>(end)});
    }
  }
  return pieces;
}

}  // namespace schedule

// Forward: runs of query rows of one sequence and key head. A task packs its keys and values once,
// which kTaskRows query rows make a few percent of its work; runs are shortened only when there
// would be fewer than four tasks per thread. Reads B, H, Hk, cu_seqlens_*, left, right and
// short_rows of `g`.
inline std::vector<VarlenAttnTask> plan_fwd(const VarlenAttnGeometry& g, int64_t threads) {
  int64_t rows = kTaskRows / (g.H / g.Hk) / kTaskRowBlock * kTaskRowBlock;
  rows = std::max(rows, kTaskRowBlock);
  std::vector<schedule::Piece> pieces = schedule::split_rows(g, rows);
  while (rows > kTaskRowBlock && static_cast<int64_t>(pieces.size()) * g.Hk < 4 * threads) {
    rows = std::max(rows / 2 / kTaskRowBlock * kTaskRowBlock, kTaskRowBlock);
    pieces = schedule::split_rows(g, rows);
  }
  return schedule::expand(g, std::move(pieces));
}

// Backward: one task per sequence and key head, which owns dk and dv of that head and dq of the
// query heads that share it. Sequences without queries but with keys have a task too: their dk and
// dv are 0.
inline std::vector<VarlenAttnTask> plan_bwd(const VarlenAttnGeometry& g) {
  std::vector<schedule::Piece> pieces;
  for (int32_t b = 0; b < g.B; ++b) {
    const int32_t len_q = g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b];
    const int32_t len_k = g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b];
    if (schedule::is_short(g, b) || (len_q == 0 && len_k == 0)) continue;
    pieces.push_back({schedule::piece_cost(g, b, 0, len_q), b, 0, len_q});
  }
  return schedule::expand(g, std::move(pieces));
}

}  // namespace encfast
