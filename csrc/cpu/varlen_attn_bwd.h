// Backward of varlen_attn: probabilities are recomputed from lse, nothing of size Lq x Lk is kept.
//
// One task: one sequence and one key head with all query heads that share it. It owns dk and dv of
// that head and dq of those query heads, so every gradient is summed by one thread in one order.
//
//   for a panel of keys (K, V packed; dK, dV fp32 accumulators in the workspace)
//     for each head of the group, for kQueryBlock queries (Q, dO packed as rows and in lanes)
//       delta = rowsum(dO * O) - dlse
//       for a block of kKeyBlock keys that some of these queries see
//         for each tile of kLanes queries
//           S^T = K Q^T, dP^T = V dO^T                     [keys][kLanes], L1
//           P^T = exp(score(S^T) - lse)
//           dS^T = P^T (dP^T - delta) d score / d S        and from it the gradients of biases
//           dQ^T += K^T dS^T                               [D][kLanes]
//         dV += P^T dO, dK += dS^T Q                       [keys][D], once per kQueryBlock queries
//     store dk and dv of the panel
//
// Dropout multiplies dP and, for dV, P by its factors; delta is the same with and without.
//
// Workspace: the panel, one query block, and, only when a sequence spans several panels, an fp32 dQ
// accumulator of the group's queries: O(Lq + Lk) per thread.
#pragma once
#include "attn_bias_grad.h"
#include "attn_dropout.h"
#include "attn_score.h"

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
  using Unit = ScoreUnit<Tiles::kExact>;

  static constexpr int kKeyBlock = Tiles::kBackwardKeyBlock;
  static constexpr int kQueryBlock = Tiles::kQueryBlock;
  static constexpr int kTiles = kQueryBlock / kLanes;
  // Rows of each tensor fetched ahead, twice per tile and key block.
  static constexpr int kPrefetchRows = kLanes / 2;
  static constexpr int64_t kTileWords = Tiles::kHeadWidth * kLanes;  // dQ^T of one tile
  // 32 Ki words each of packed keys and values and their gradients: at most 1 MiB.
  static constexpr int64_t kPanel = round_up(32768 / Tiles::kHeadWidth, kKeyBlock);

  struct Workspace {
    float *keys, *key_columns, *values, *dk, *dv;
    float *q_rows, *do_rows, *q_pairs, *do_pairs, *q_lanes, *do_lanes;
    float *out_rows, *out_lanes, *scores, *dp, *p_rows, *ds_rows, *ds_weights, *lse, *delta, *dq;
    float *bias, *bias_grad, *keep;
    int64_t bytes;

    Workspace(void* base, const VarlenAttnGeometry& g) {
      Arena arena(base);
      const int64_t longest = round_up(g.max_seqlen_k, kKeyBlock);
      const int64_t panel = longest < kPanel ? longest : kPanel;
      keys = arena.take(panel * Tiles::kRowWords);
      values = arena.take(panel * Tiles::kRowWords);
      key_columns = Tiles::kRowsServeAll ? nullptr : arena.take(panel * Tiles::kRowWords);
      dk = arena.take(panel * Tiles::kHeadWidth);
      dv = arena.take(panel * Tiles::kHeadWidth);
      q_rows = arena.take(kQueryBlock * Tiles::kRowWords);
      do_rows = arena.take(kQueryBlock * Tiles::kRowWords);
      q_pairs = Tiles::kRowsServeAll ? nullptr : arena.take(kQueryBlock * Tiles::kRowWords);
      do_pairs = Tiles::kRowsServeAll ? nullptr : arena.take(kQueryBlock * Tiles::kRowWords);
      q_lanes = arena.take(kQueryBlock * Tiles::kRowWords);
      do_lanes = arena.take(kQueryBlock * Tiles::kRowWords);
      out_rows = Tiles::kExact ? arena.take(kLanes * Tiles::kRowWords) : nullptr;
      out_lanes = Tiles::kExact ? arena.take(kLanes * Tiles::kRowWords) : nullptr;
      scores = arena.take(kKeyBlock * kLanes);
      dp = arena.take(kKeyBlock * kLanes);
      p_rows = arena.take(kKeyBlock * Tiles::kWeightRowWords);
      ds_rows = arena.take(kKeyBlock * Tiles::kWeightRowWords);
      ds_weights = Tiles::kRowsServeAll ? nullptr : arena.take(kKeyBlock / 2 * kLanes);
      lse = arena.take(kQueryBlock);
      delta = arena.take(kQueryBlock);
      dq = arena.take(dq_tiles(g) * kTileWords);
      bias = arena.take(BiasBlock<kKeyBlock>::words(g));
      bias_grad = arena.take(BiasGradient<kKeyBlock>::words(g));
      keep = arena.take(g.dropout.threshold > 0 ? kKeyBlock * kLanes : 0);
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
        bias_(p.g, task.b, len_q_, len_k_, Unit::kPerNatural, ws_.bias),
        bias_grad_(p, task.b, len_q_, len_k_, ws_.bias_grad) {}

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
        bias_grad_.begin(h, 0, len_q_, {0, 0}, {0, 0});
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
    const int n = static_cast<int>(keys.end - keys.begin);
    const int64_t row = k_start_ + keys.begin;
    store_rows(ws_.dk, Tiles::kHeadWidth, g_.scale, n, D_, view_of(p_.dk, g_.dtype, row, task_.hk));
    store_rows(ws_.dv, Tiles::kHeadWidth, 1.0f, n, D_, view_of(p_.dv, g_.dtype, row, task_.hk));
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
    bias_grad_.begin(head, row, n, panel, here.empty() ? here : KeyRange{first_key, here.end});
    if (!here.empty()) {
      if (panel.end == len_k_) {
        prefetch_for_write(view_of(p_.dq, g_.dtype, q_start_ + row, head), n, D_);
      }
      pack_queries(head, row, n);
      for (int64_t key = first_key; key < here.end; key += kKeyBlock) {
        const int keys = static_cast<int>(here.end - key < kKeyBlock ? here.end - key : kKeyBlock);
        run_block(rule, head, row, n, key, keys, key - panel.begin, dq);
      }
    }
    if (panel.end == len_k_) store_dq(head, row, n, dq);
  }

  void pack_queries(int64_t head, int64_t row, int n) {
    const RowsView q = view_of(p_.q, g_.dtype, q_start_ + row, head);
    const RowsView grad = view_of(p_.dout, g_.dtype, q_start_ + row, head);
    const int padded =
        static_cast<int>(round_up(n, kW > Tiles::kQueryStep ? kW : Tiles::kQueryStep));
    Tiles::pack_rows(q, n, padded, D_, ws_.q_rows);
    Tiles::pack_rows(grad, n, padded, D_, ws_.do_rows);
    q_pairs_ = Tiles::pairs(ws_.q_rows, padded, ws_.q_pairs);
    do_pairs_ = Tiles::pairs(ws_.do_rows, padded, ws_.do_pairs);
    for (int i = 0; i < n; i += kLanes) {
      const int vecs = n - i > kW ? 2 : 1;
      Tiles::pack_lanes(ws_.q_rows + i * Tiles::kRowWords, vecs, D_, q_lanes(i));
      Tiles::pack_lanes(ws_.do_rows + i * Tiles::kRowWords, vecs, D_, do_lanes(i));
    }
    compute_delta(grad, view_of(p_.out, g_.dtype, q_start_ + row, head), n);
    load_statistics(head, row, n);
  }

  // lse in Unit, and delta less the gradient of lse: d score = P (dP - delta + dlse).
  void load_statistics(int64_t head, int64_t row, int n) {
    const int64_t first = head * g_.Nq + q_start_ + row;
    const float inf = __builtin_inff();
    for (int i = 0; i < n; ++i) {
      ws_.lse[i] = p_.lse[first + i] * Unit::kPerNatural;
      if (p_.dlse) ws_.delta[i] -= p_.dlse[first + i];
    }
    // Probabilities of padding lanes, and of rows that see no key (lse -inf), are 0: lse +inf.
    for (int i = 0; i < round_up(n, kW); ++i) {
      if (i < n && ws_.lse[i] != -inf) continue;
      ws_.lse[i] = inf;
      ws_.delta[i] = 0.0f;
    }
  }

  // delta = rowsum(dO * O). In fp32 it is summed over d in the order in which the products sum dP,
  // so that dP - delta is exactly 0 where it should be (a single visible key), not the difference
  // of two roundings.
  void compute_delta(const RowsView& grad, const RowsView& out, int n) {
    if constexpr (!Tiles::kExact) {
      row_dots(grad, out, n, D_, ws_.delta);
    } else {
      for (int i = 0; i < n; i += kLanes) {
        const int rows = n - i < kLanes ? n - i : kLanes;
        const int vecs = rows > kW ? 2 : 1;
        Tiles::pack_rows(out.from(i), rows, vecs * kW, D_, ws_.out_rows);
        Tiles::pack_lanes(ws_.out_rows, vecs, D_, ws_.out_lanes);
        for (int v = 0; v < vecs; ++v) {
          Vec acc = zeros();
          for (int d = 0; d < D_; ++d) {
            const int at = d * kLanes + v * kW;
            acc = fma(load(ws_.out_lanes + at), load(do_lanes(i) + at), acc);
          }
          store(ws_.delta + i + v * kW, acc);
        }
      }
    }
  }

  float* q_lanes(int i) const { return ws_.q_lanes + i * Tiles::kRowWords; }
  float* do_lanes(int i) const { return ws_.do_lanes + i * Tiles::kRowWords; }

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
    Tiles::outer_sum(ws_.p_rows, padded, do_pairs_, n, D_, ws_.dv + first);
    Tiles::outer_sum(ws_.ds_rows, padded, q_pairs_, n, D_, ws_.dk + first);
  }

  // Queries [lane, lane + n) of the query block.
  template <int kVecs>
  void run_tile(const ScoreRule& rule, int64_t head, int64_t row, int lane, int n, int64_t key,
                int n_keys, int64_t offset, float* dq) {
    const int padded = static_cast<int>(round_up(n_keys, Tiles::kKeyStep));
    const int64_t first = offset * Tiles::kRowWords;
    if (rule.biased) bias_.prefetch(head, row + lane, n, key, n_keys);
    bias_grad_.prefetch(head, row + lane, n, key, n_keys);
    Tiles::template scores<kVecs>(ws_.keys + first, padded, q_lanes(lane), D_, ws_.scores);
    Tiles::template scores<kVecs>(ws_.values + first, padded, do_lanes(lane), D_, ws_.dp);
    prefetch(kPrefetchRows);
    const KeyRange common = rule.common(row + lane, row + lane + n);
    const bool masked = key < common.begin || key + n_keys > common.end;
    const LaneRows bias =
        rule.biased ? bias_.template fill<kVecs>(head, row + lane, n, key, n_keys) : kNoBias;
    const LaneRows keep = dropout_factors<kVecs>(head, row + lane, key, n_keys);
    with_mode(rule, rule.biased || dropped(), masked, [&](auto tag) {
      for (int v = 0; v < kVecs; ++v) {
        const LaneScore<decltype(tag)::value> score(rule, row + lane + v * kW, key,
                                                    Unit::kPerNatural, bias.vec(v));
        differentiate(score, keep.vec(v), lane, v, n_keys, padded);
      }
    });
    if (bias_grad_.wanted()) {
      bias_grad_.template add<kVecs>(head, row + lane, n, key, n_keys, ws_.dp);
    }
    if constexpr (kVecs == 1 && Tiles::kQueryStep > kW) clear_lanes(lane + kW, padded);
    prefetch(kPrefetchRows);
    const float* weights = Tiles::kRowsServeAll ? ws_.ds_rows + lane : ws_.ds_weights;
    constexpr int kLd = Tiles::kRowsServeAll ? Tiles::kWeightRowWords : kLanes;
    Tiles::template weighted_sum<kVecs>(key_columns_ + Tiles::column_offset(offset), weights, kLd,
                                        padded, D_, dq, true);
  }

  bool dropped() const { return g_.dropout.threshold > 0; }

  template <int kVecs>
  LaneRows dropout_factors(int64_t head, int64_t row, int64_t key, int n) {
    if (!dropped()) return kNoDropout;
    fill_dropout<kVecs>(g_.dropout, task_.b, head, row, key, n, ws_.keep);
    return {ws_.keep, kLanes};
  }

  // P^T and dS^T of query vector v of the tile at `lane`, from S^T and dP^T; rows [n, padded)
  // become 0. Biased modes leave d score, which is dS less the softcap's derivative, in dP^T.
  template <class Score>
  void differentiate(const Score& score, LaneRows keep, int lane, int v, int n, int padded) {
    const Vec minus_lse = -load(ws_.lse + lane + v * kW);
    const Vec delta = load(ws_.delta + lane + v * kW);
    const float* s = ws_.scores + v * kW;
    float* dp = ws_.dp + v * kW;
    const auto one = [&](int j, Vec* p, Vec* ds) {
      Vec tanh = zeros();
      const Vec x = score(load(s + j * kLanes), j, minus_lse, &tanh);
      *p = Unit::template exp<Tiles::kExp2Degree>(x);
      if constexpr (Score::kBiased) {
        *ds = *p * fma(load(dp + j * kLanes), keep.at(j), -delta);
        *p *= keep.at(j);
        store(dp + j * kLanes, *ds);
      } else {
        *ds = *p * (load(dp + j * kLanes) - delta);
      }
      if constexpr (Score::kSoftcap) *ds *= fma(-tanh, tanh, splat(1.0f));
    };
    for (int j = 0; j < padded; j += 2) {
      Vec p[2] = {zeros(), zeros()}, ds[2] = {zeros(), zeros()};
      if (j < n) one(j, &p[0], &ds[0]);
      if (j + 1 < n) one(j + 1, &p[1], &ds[1]);
      Tiles::put_weight_rows(ws_.p_rows, j, lane + v * kW, p[0], p[1]);
      Tiles::put_weight_rows(ws_.ds_rows, j, lane + v * kW, ds[0], ds[1]);
      if constexpr (!Tiles::kRowsServeAll) Tiles::put_weights(ws_.ds_weights, j, v, ds[0], ds[1]);
    }
  }

  // Zero weights for a vector of lanes that outer_sum reads and no tile computed.
  void clear_lanes(int lane, int n_keys) {
    for (int j = 0; j < n_keys; j += 2) {
      Tiles::put_weight_rows(ws_.p_rows, j, lane, zeros(), zeros());
      Tiles::put_weight_rows(ws_.ds_rows, j, lane, zeros(), zeros());
    }
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
  BiasBlock<kKeyBlock> bias_;
  BiasGradient<kKeyBlock> bias_grad_;
  RowPrefetcher next_rows_[5];
  const float *key_columns_ = nullptr, *q_pairs_ = nullptr, *do_pairs_ = nullptr;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
