// Forward of varlen_attn: blocked online softmax over packed sequences.
//
// One task: a run of query rows of one sequence, for the query heads that share one key head.
//
//   for a panel of keys (K and V packed once, sized for half of L2)
//     for each head of the group, for each tile of kLanes queries (Q^T packed in lanes)
//       for a block of kKeyBlock keys within the panel that some query of the tile sees
//         S^T = K Q^T          [keys][kLanes], L1
//         m, l, P^T            vertical over the rows of S^T; biases and dropout in its layout
//         O^T += V^T P^T       [D][kLanes], L1
//     after the last panel: out = O / l, lse = m + log l
//
// Traffic: per tile every packed key and value is read once, from L1 or L2; Q and out move once.
// With more than one panel the tiles' O^T, m and l wait in the workspace, which is therefore
// bounded by the panel and the task whatever the sequence length.
//
// Panels and key blocks lie at multiples of their size from the sequence start, and tiles at
// multiples of theirs, so a row's sums are formed in one order whichever task it falls into.
#pragma once
#include "attn_softmax.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <class Tiles>
class Forward {
 public:
  static int64_t workspace_bytes(const VarlenAttnGeometry& g) {
    return Workspace(nullptr, g).bytes;
  }

  // `next`: the task this thread takes afterwards, if known; its rows are fetched on the way.
  static void run(const VarlenAttnFwdParams& p, const VarlenAttnTask& task,
                  const VarlenAttnTask* next, void* workspace) {
    Tiles::begin();
    Forward forward(p, task, workspace);
    if (next) forward.expect(*next);
    forward.run_task();
    end_streams();
    Tiles::end();
  }

 private:
  using Unit = ScoreUnit<Tiles::kExact>;
  template <int kVecs>
  using Softmax = RunningSoftmax<kVecs, Unit>;

  static constexpr int kKeyBlock = Tiles::kKeyBlock;
  // 64 Ki words of keys and as many of values: 512 KiB.
  static constexpr int64_t kPanel = round_up(65536 / Tiles::kRowWords, kKeyBlock);
  // Rows of each tensor fetched ahead, four times per tile and key block: many at once would fill
  // the line fill buffers and stop the core.
  static constexpr int kPrefetchRows = kLanes / 4;
  // A tile from panel to panel: O^T, then maxima and sums.
  static constexpr int64_t kTileWords = (Tiles::kHeadWidth + 2) * kLanes;

  struct Workspace {
    float *keys, *values, *rows, *lanes, *scores, *weights, *bias, *keep, *tiles;
    int64_t bytes;

    Workspace(void* base, const VarlenAttnGeometry& g) {
      Arena arena(base);
      const int64_t longest = round_up(g.max_seqlen_k, kKeyBlock);
      const int64_t panel = longest < kPanel ? longest : kPanel;
      keys = arena.take(panel * Tiles::kRowWords);
      values = arena.take(panel * Tiles::kRowWords);
      rows = arena.take(kLanes * Tiles::kRowWords);
      lanes = arena.take(kLanes * Tiles::kRowWords);
      scores = arena.take(kKeyBlock * kLanes);
      weights = Tiles::kRowsServeAll ? scores : arena.take(kKeyBlock / 2 * kLanes);
      bias = arena.take(BiasBlock<kKeyBlock>::words(g));
      keep = arena.take(g.dropout.threshold > 0 ? kKeyBlock * kLanes : 0);
      tiles = arena.take(tile_count(g) * kTileWords);
      bytes = arena.used();
    }

    // Tiles that wait while another panel is packed; one if there is no other.
    static int64_t tile_count(const VarlenAttnGeometry& g) {
      if (g.max_seqlen_k <= kPanel) return 1;
      const int64_t least = g.H / g.Hk * kTaskRowBlock;
      return (least > kTaskRows ? least : kTaskRows) / kLanes;
    }
  };

  Forward(const VarlenAttnFwdParams& p, const VarlenAttnTask& task, void* workspace)
      : p_(p),
        g_(p.g),
        task_(task),
        ws_(workspace, p.g),
        D_(static_cast<int>(p.g.D)),
        q_start_(g_.cu_seqlens_q[task.b]),
        k_start_(g_.cu_seqlens_k[task.b]),
        len_q_(g_.cu_seqlens_q[task.b + 1] - q_start_),
        len_k_(g_.cu_seqlens_k[task.b + 1] - k_start_),
        bias_(p.g, task.b, len_q_, len_k_, Unit::kPerNatural, ws_.bias) {}

  void expect(const VarlenAttnTask& next) {
    const int64_t q_row = g_.cu_seqlens_q[next.b] + next.q_begin, k_row = g_.cu_seqlens_k[next.b];
    const int64_t keys = g_.cu_seqlens_k[next.b + 1] - k_row;
    const int64_t head = next.hk * (g_.H / g_.Hk);
    next_rows_[0] = {view_of(p_.k, g_.dtype, k_row, next.hk), keys, D_};
    next_rows_[1] = {view_of(p_.v, g_.dtype, k_row, next.hk), keys, D_};
    next_rows_[2] = {view_of(p_.q, g_.dtype, q_row, head), next.q_end - next.q_begin, D_};
  }

  void prefetch(int rows) {
    for (RowPrefetcher& r : next_rows_) r.step(rows);
  }

  void run_task() {
    const int64_t group = g_.H / g_.Hk;
    const int64_t first_head = task_.hk * group;
    const KeyRange seen =
        ScoreRule(g_, task_.b, first_head, len_q_, len_k_).visible(task_.q_begin, task_.q_end);
    const int64_t first_panel = seen.empty() ? 0 : seen.begin / kPanel * kPanel;
    const bool one_panel = seen.end <= first_panel + kPanel;
    int64_t panel = first_panel;
    do {  // at least once: rows that see no key are written too
      pack_panel(intersect(seen, {panel, panel + kPanel}));
      int64_t index = 0;
      for (int64_t h = first_head; h < first_head + group; ++h) {
        for (int64_t i = task_.q_begin; i < task_.q_end; i += kLanes, ++index) {
          const int n = static_cast<int>(task_.q_end - i < kLanes ? task_.q_end - i : kLanes);
          float* state = ws_.tiles + (one_panel ? 0 : index * kTileWords);
          if (n > kW) {
            run_tile<2>(h, i, n, panel, panel + kPanel >= seen.end, state);
          } else {
            run_tile<1>(h, i, n, panel, panel + kPanel >= seen.end, state);
          }
        }
      }
      panel += kPanel;
    } while (panel < seen.end);
  }

  // Packs keys from the first block of `keys` on. packed_begin_ is the key at the buffers' start.
  void pack_panel(KeyRange keys) {
    if (keys.empty()) return;
    packed_begin_ = keys.begin / kKeyBlock * kKeyBlock;
    const int n = static_cast<int>(keys.end - packed_begin_);
    const int padded = static_cast<int>(round_up(n, Tiles::kKeyStep));
    const int64_t row = k_start_ + packed_begin_;
    Tiles::pack_rows(view_of(p_.k, g_.dtype, row, task_.hk), n, padded, D_, ws_.keys);
    Tiles::pack_values(view_of(p_.v, g_.dtype, row, task_.hk), n, padded, D_, ws_.values);
  }

  template <int kVecs>
  void run_tile(int64_t head, int64_t row, int n, int64_t panel, bool last_panel, float* state) {
    const ScoreRule rule(g_, task_.b, head, len_q_, len_k_);
    const KeyRange visible = rule.visible(row, row + n);
    const KeyRange common = rule.common(row, row + n);
    const KeyRange here = intersect(visible, {panel, panel + kPanel});
    const int64_t first_block = visible.begin / kKeyBlock * kKeyBlock;
    float* out = state;
    float* stats = state + Tiles::kHeadWidth * kLanes;
    Softmax<kVecs> softmax;
    if (visible.empty() || visible.begin >= panel) {
      softmax.reset();
    } else {
      softmax.load_from(stats);
    }
    if (!here.empty()) {
      if (last_panel) {
        prefetch_for_write(view_of(p_.out, g_.dtype, q_start_ + row, head), n, D_);
      }
      pack_queries<kVecs>(head, row, n);
      for (int64_t key = here.begin / kKeyBlock * kKeyBlock; key < here.end; key += kKeyBlock) {
        const int keys = static_cast<int>(here.end - key < kKeyBlock ? here.end - key : kKeyBlock);
        const bool masked = key < common.begin || key + keys > common.end;
        run_block<kVecs>(rule, head, row, n, key, keys, masked, key == first_block, softmax, out);
      }
    }
    if (last_panel) {
      finish<kVecs>(head, row, n, visible.empty(), softmax, out);
    } else {
      softmax.store_to(stats);
    }
  }

  template <int kVecs>
  void pack_queries(int64_t head, int64_t row, int n) {
    Tiles::pack_rows(view_of(p_.q, g_.dtype, q_start_ + row, head), n, kVecs * kW, D_, ws_.rows);
    Tiles::pack_lanes(ws_.rows, kVecs, D_, ws_.lanes);
  }

  // One block of keys [key, key + n) for one tile of `lanes` queries.
  template <int kVecs>
  void run_block(const ScoreRule& rule, int64_t head, int64_t row, int lanes, int64_t key, int n,
                 bool masked, bool first, Softmax<kVecs>& softmax, float* out) {
    const int padded = static_cast<int>(round_up(n, Tiles::kKeyStep));
    const int64_t offset = key - packed_begin_;
    if (rule.biased) bias_.prefetch(head, row, lanes, key, n);
    prefetch(kPrefetchRows);
    Tiles::template scores<kVecs>(ws_.keys + offset * Tiles::kRowWords, padded, ws_.lanes, D_,
                                  ws_.scores);
    prefetch(kPrefetchRows);
    float factor = rule.scale * Unit::kPerNatural;
    Vec block_max[kVecs];
    if (masked || !rule.is_linear()) {
      const LaneRows bias =
          rule.biased ? bias_.template fill<kVecs>(head, row, lanes, key, n) : kNoBias;
      apply_rule<kVecs>(rule, masked, Unit::kPerNatural, row, key, n, bias, ws_.scores, block_max);
      factor = 1.0f;
    } else {
      max_over_keys<kVecs>(ws_.scores, n, block_max);
    }
    softmax.raise(block_max, factor, D_, first ? nullptr : out);
    prefetch(kPrefetchRows);
    if (g_.dropout.threshold > 0) {
      fill_dropout<kVecs>(g_.dropout, task_.b, head, row, key, n, ws_.keep);
      exponentiate<Tiles, true>(ws_.scores, ws_.keep, n, padded, factor, softmax, ws_.weights);
    } else {
      exponentiate<Tiles, false>(ws_.scores, nullptr, n, padded, factor, softmax, ws_.weights);
    }
    prefetch(kPrefetchRows);
    Tiles::template weighted_sum<kVecs>(ws_.values + Tiles::column_offset(offset), ws_.weights,
                                        kLanes, padded, D_, out, !first);
  }

  template <int kVecs>
  void finish(int64_t head, int64_t row, int n, bool unseen, const Softmax<kVecs>& softmax,
              const float* out) {
    const RowsView dst = view_of(p_.out, g_.dtype, q_start_ + row, head);
    float lse[kLanes];
    Vec factor[2] = {};
    for (int v = 0; v < kVecs; ++v) {
      factor[v] = softmax.normaliser(v);
      store(lse + v * kW, softmax.log_sum_exp(v));
    }
    if (unseen) {
      store_zero_rows(n, D_, dst);
    } else {
      store_from_lanes(out, factor, n, D_, dst);
    }
    std::memcpy(p_.lse + head * g_.Nq + q_start_ + row, lse, sizeof(float) * n);
  }

  const VarlenAttnFwdParams& p_;
  const VarlenAttnGeometry& g_;
  const VarlenAttnTask& task_;
  const Workspace ws_;
  const int D_;
  const int64_t q_start_, k_start_, len_q_, len_k_;
  BiasBlock<kKeyBlock> bias_;
  int64_t packed_begin_ = 0;
  RowPrefetcher next_rows_[3];
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
