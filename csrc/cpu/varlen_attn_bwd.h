// Backward of varlen_attn: probabilities are recomputed from lse, nothing of size Lq x Lk is kept.
//
// One task: one sequence and one key head with all query heads that share it. It owns dk and dv of
// that head and dq of those query heads, so every gradient is summed by one thread in one order.
//
//   for a panel of keys (K, V packed; dK, dV fp32 accumulators in the workspace)
//     for each head of the group, for kQueryBlock queries (Q, dO packed as rows and in lanes)
//       for a block of kKeyBlock keys that some of these queries see
//         for each tile of kLanes queries
//           P^T and dS^T                                   attn_query_block.h
//           dQ^T += K^T dS^T                               [D][kLanes]
//         dV += P^T dO, dK += dS^T Q                       [keys][D], once per kQueryBlock queries
//     store dk and dv of the panel
//
// Workspace: the panel, one query block, and, only when a sequence spans several panels, an fp32 dQ
// accumulator of the group's queries: O(Lq + Lk) per thread.
#pragma once
#include "attn_query_block.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <class Tiles>
class Backward {
 public:
  static int64_t workspace_bytes(const VarlenAttnGeometry& g) {
    return Workspace(nullptr, g).bytes;
  }

  // `next`: the task this thread takes afterwards, if known; its rows are fetched on the way.
  static void run(const VarlenAttnBwdParams& p, const VarlenAttnTask& task,
                  const VarlenAttnTask* next, void* workspace) {
    Tiles::begin();
    Backward backward(p, task, workspace);
    if (next) backward.expect(*next);
    backward.run_task();
    end_streams();
    Tiles::end();
  }

 private:
  using Queries = QueryBlock<Tiles>;

  static constexpr int kKeyBlock = Tiles::kBackwardKeyBlock;
  static constexpr int kQueryBlock = Tiles::kQueryBlock;
  static constexpr int kTiles = kQueryBlock / kLanes;
  // Rows of each tensor fetched ahead, twice per tile and key block.
  static constexpr int kPrefetchRows = kLanes / 2;
  static constexpr int64_t kTileWords = Tiles::kHeadWidth * kLanes;  // dQ^T of one tile
  // 32 Ki words each of packed keys and values and their gradients: at most 1 MiB.
  static constexpr int64_t kPanel = round_up(32768 / Tiles::kHeadWidth, kKeyBlock);

  struct Workspace {
    float *keys, *key_columns, *values, *dk, *dv, *dq;
    typename Queries::Memory queries;
    int64_t bytes;

    Workspace(void* base, const VarlenAttnGeometry& g) : Workspace(Arena(base), g) {}

   private:
    Workspace(Arena arena, const VarlenAttnGeometry& g) : queries(arena, g) {
      const int64_t longest = round_up(g.max_seqlen_k, kKeyBlock);
      const int64_t panel = longest < kPanel ? longest : kPanel;
      keys = arena.take(panel * Tiles::kRowWords);
      values = arena.take(panel * Tiles::kRowWords);
      key_columns = Tiles::kRowsServeAll ? nullptr : arena.take(panel * Tiles::kRowWords);
      dk = arena.take(panel * Tiles::kHeadWidth);
      dv = arena.take(panel * Tiles::kHeadWidth);
      dq = arena.take(dq_tiles(g) * kTileWords);
      bytes = arena.used();
    }

    static int64_t dq_tiles(const VarlenAttnGeometry& g) {
      if (g.max_seqlen_k <= kPanel) return kTiles;
      return round_up(g.max_seqlen_q, kQueryBlock) / kLanes * (g.H / g.Hk);
    }
  };

  Backward(const VarlenAttnBwdParams& p, const VarlenAttnTask& task, void* workspace)
      : p_(p),
        g_(p.g),
        task_(task),
        ws_(workspace, p.g),
        D_(static_cast<int>(p.g.D)),
        q_start_(g_.cu_seqlens_q[task.b]),
        k_start_(g_.cu_seqlens_k[task.b]),
        len_q_(g_.cu_seqlens_q[task.b + 1] - q_start_),
        len_k_(g_.cu_seqlens_k[task.b + 1] - k_start_),
        queries_(p, task.b, len_q_, len_k_, ws_.queries) {}

  void expect(const VarlenAttnTask& next) {
    const int64_t q_row = g_.cu_seqlens_q[next.b], k_row = g_.cu_seqlens_k[next.b];
    const int64_t keys = g_.cu_seqlens_k[next.b + 1] - k_row;
    const int64_t head = next.hk * (g_.H / g_.Hk);
    next_rows_[0] = {view_of(p_.k, g_.dtype, k_row, next.hk), keys, D_};
    next_rows_[1] = {view_of(p_.v, g_.dtype, k_row, next.hk), keys, D_};
    next_rows_[2] = {view_of(p_.q, g_.dtype, q_row, head), next.q_end, D_};
    next_rows_[3] = {view_of(p_.dout, g_.dtype, q_row, head), next.q_end, D_};
    next_rows_[4] = {view_of(p_.out, g_.dtype, q_row, head), next.q_end, D_};
  }

  void prefetch(int rows) {
    for (RowPrefetcher& r : next_rows_) r.step(rows);
  }

  void run_task() {
    const int64_t group = g_.H / g_.Hk;
    if (len_k_ == 0) {
      for (int64_t h = task_.hk * group; h < (task_.hk + 1) * group; ++h) {
        store_zero_rows(len_q_, D_, view_of(p_.dq, g_.dtype, q_start_, h));
        queries_.bias_grad.begin(h, 0, len_q_, {0, 0}, {0, 0});
      }
      return;
    }
    for (int64_t panel = 0; panel < len_k_; panel += kPanel) {
      const int64_t end = panel + kPanel < len_k_ ? panel + kPanel : len_k_;
      pack_panel({panel, end});
      float* dq = ws_.dq;
      for (int64_t h = task_.hk * group; h < (task_.hk + 1) * group; ++h) {
        for (int64_t i = 0; i < len_q_; i += kQueryBlock) {
          const int n = static_cast<int>(len_q_ - i < kQueryBlock ? len_q_ - i : kQueryBlock);
          run_queries(h, i, n, {panel, end}, dq);
          if (len_k_ > kPanel) dq += kTiles * kTileWords;
        }
      }
      store_panel({panel, end});
    }
  }

  void pack_panel(KeyRange keys) {
    const int n = static_cast<int>(keys.end - keys.begin);
    const int padded = static_cast<int>(round_up(n, Tiles::kKeyStep));
    const int64_t row = k_start_ + keys.begin;
    prefetch_for_write(view_of(p_.dk, g_.dtype, row, task_.hk), n, D_);
    prefetch_for_write(view_of(p_.dv, g_.dtype, row, task_.hk), n, D_);
    Tiles::pack_rows(view_of(p_.k, g_.dtype, row, task_.hk), n, padded, D_, ws_.keys);
    Tiles::pack_rows(view_of(p_.v, g_.dtype, row, task_.hk), n, padded, D_, ws_.values);
    key_columns_ = Tiles::columns(ws_.keys, padded, ws_.key_columns);
    std::memset(ws_.dk, 0, sizeof(float) * Tiles::kHeadWidth * padded);
    std::memset(ws_.dv, 0, sizeof(float) * Tiles::kHeadWidth * padded);
  }

  void store_panel(KeyRange keys) {
    const float kOne = 1.0f;
    const int n = static_cast<int>(keys.end - keys.begin);
    const int64_t row = k_start_ + keys.begin;
    store_rows(ws_.dk, Tiles::kHeadWidth, &g_.scale, 0, n, D_,
               view_of(p_.dk, g_.dtype, row, task_.hk));
    store_rows(ws_.dv, Tiles::kHeadWidth, &kOne, 0, n, D_, view_of(p_.dv, g_.dtype, row, task_.hk));
  }

  // Queries [row, row + n) of one head against the panel's keys. dq: their tiles' dQ^T, which holds
  // what earlier panels gave.
  void run_queries(int64_t head, int64_t row, int n, KeyRange panel, float* dq) {
    const ScoreRule rule(g_, task_.b, head, len_q_, len_k_);
    const KeyRange visible = rule.visible(row, row + n);
    const KeyRange here = intersect(visible, panel);
    if (visible.empty() || visible.begin >= panel.begin) {
      std::memset(dq, 0, sizeof(float) * kTileWords * ((n + kLanes - 1) / kLanes));
    }
    const int64_t first_key = here.begin / kKeyBlock * kKeyBlock;
    queries_.bias_grad.begin(head, row, n, panel,
                             here.empty() ? here : KeyRange{first_key, here.end});
    if (!here.empty()) {
      if (panel.end == len_k_) {
        prefetch_for_write(view_of(p_.dq, g_.dtype, q_start_ + row, head), n, D_);
      }
      queries_.pack(head, row, n);
      for (int64_t key = first_key; key < here.end; key += kKeyBlock) {
        const int keys = static_cast<int>(here.end - key < kKeyBlock ? here.end - key : kKeyBlock);
        run_block(rule, head, row, n, key, keys, key - panel.begin, dq);
      }
    }
    if (panel.end == len_k_) store_dq(head, row, n, dq);
  }

  // One block of keys [key, key + n_keys), `offset` from the panel's start.
  void run_block(const ScoreRule& rule, int64_t head, int64_t row, int n, int64_t key, int n_keys,
                 int64_t offset, float* dq) {
    for (int i = 0; i < n; i += kLanes) {
      const int in_tile = n - i < kLanes ? n - i : kLanes;
      float* dq_tile = dq + i / kLanes * kTileWords;
      if (in_tile > kW) {
        run_tile<2>(rule, head, row, i, in_tile, key, n_keys, offset, dq_tile);
      } else {
        run_tile<1>(rule, head, row, i, in_tile, key, n_keys, offset, dq_tile);
      }
    }
    const int padded = static_cast<int>(round_up(n_keys, Tiles::kKeyStep));
    const int64_t first = offset * Tiles::kHeadWidth;
    Tiles::outer_sum(queries_.p_rows(), padded, queries_.do_pairs(), n, D_, ws_.dv + first, true);
    Tiles::outer_sum(queries_.ds_rows(), padded, queries_.q_pairs(), n, D_, ws_.dk + first, true);
  }

  // Queries [lane, lane + n) of the query block.
  template <int kVecs>
  void run_tile(const ScoreRule& rule, int64_t head, int64_t row, int lane, int n, int64_t key,
                int n_keys, int64_t offset, float* dq) {
    const int padded = static_cast<int>(round_up(n_keys, Tiles::kKeyStep));
    const int64_t first = offset * Tiles::kRowWords;
    prefetch(kPrefetchRows);
    queries_.template differentiate<kVecs>(rule, head, row + lane, lane, n, key, n_keys,
                                           ws_.keys + first, ws_.values + first);
    prefetch(kPrefetchRows);
    Tiles::template weighted_sum<kVecs>(key_columns_ + Tiles::column_offset(offset),
                                        queries_.ds_weights(lane), Queries::kWeightWords, padded,
                                        D_, dq, true);
  }

  void store_dq(int64_t head, int64_t row, int n, const float* dq) {
    const Vec scale[2] = {splat(g_.scale), splat(g_.scale)};
    for (int i = 0; i < n; i += kLanes) {
      const int in_tile = n - i < kLanes ? n - i : kLanes;
      store_from_lanes(dq + i / kLanes * kTileWords, scale, in_tile, D_,
                       view_of(p_.dq, g_.dtype, q_start_ + row + i, head));
    }
  }

  const VarlenAttnBwdParams& p_;
  const VarlenAttnGeometry& g_;
  const VarlenAttnTask& task_;
  const Workspace ws_;
  const int D_;
  const int64_t q_start_, k_start_, len_q_, len_k_;
  Queries queries_;
  RowPrefetcher next_rows_[5];
  const float* key_columns_ = nullptr;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
