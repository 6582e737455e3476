// varlen_attn for short sequences, forward and backward: whole sequences, all heads, in L1.
//
// One task: one sequence. The blocked passes give it a task per key head, a panel, statistics that
// run over blocks, and outputs formed in lanes; here all keys are one block, and the outputs are
// formed in rows, so that nothing is transposed on the way out.
//
//   for each key head (K and V packed), for each query head of its group
//     forward, for each tile of kLanes queries (Q^T packed in lanes)
//       S^T = K Q^T             [keys][kLanes]
//       m, l, P^T               one maximum, one pass of exponentials
//       O = P V                 [queries][D], stored times 1 / l
//     backward (attn_query_block.h)
//       for each tile P^T, dS^T, and from it dQ = dS K, stored
//       dV += P^T dO, dK += dS^T Q
//     backward: store dk and dv
//
// Traffic: every row of every tensor moves once. While a sequence is computed, the rows of the next
// one are fetched with all their heads, in the order in which they lie in memory: head by head they
// are pieces of D elements, H * D apart, where no hardware prefetcher follows.
//
// Which sequences: those of at most Tiles::kShortRows queries and keys (common/schedule.h),
// whatever the options of the call. In bf16 32: two vectors of queries. In fp32 16: measured on
// Zen 4 (bench/results/NOTES.md), the blocked passes are as fast from 24 on, and faster forward.
// AMX has none: the products that form outputs in rows broadcast single words of the weights, and
// it reads rows of 16.
#pragma once
#include "attn_query_block.h"
#include "attn_softmax.h"

namespace encfast::ENCFAST_ISA {
namespace {

struct ShortSequence {
  int64_t b, q_start, k_start;
  int len_q, len_k;

  ShortSequence(const VarlenAttnGeometry& g, int64_t b_)
      : b(b_),
        q_start(g.cu_seqlens_q[b]),
        k_start(g.cu_seqlens_k[b]),
        len_q(static_cast<int>(g.cu_seqlens_q[b + 1] - q_start)),
        len_k(static_cast<int>(g.cu_seqlens_k[b + 1] - k_start)) {}
};

// Fetches rows of one tensor with all their heads, a share per step. Heads that do not lie side by
// side are left alone.
class WholeRowPrefetcher {
 public:
  WholeRowPrefetcher() = default;
  template <class Tensor>
  WholeRowPrefetcher(const Tensor& t, const VarlenAttnGeometry& g, int64_t heads, int64_t row,
                     int64_t n, int64_t steps) {
    if (t.head_stride != g.D) return;
    const RowsView rows = view_of(t, g.dtype, row, 0);
    if (rows.streamed) return;
    row_ = rows.data;
    stride_ = rows.stride;
    left_ = n;
    bytes_ = heads * g.D * element_bytes(g.dtype);
    share_ = n * (bytes_ / 64 + 1) / steps + 1;
  }

  void step() {
    for (int64_t i = 0; i < share_ && left_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --left_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, left_ = 0, bytes_ = 0, share_ = 0, at_ = 0;
};

template <class Tiles>
class ShortForward {
 public:
  static int64_t workspace_bytes(const VarlenAttnGeometry& g) {
    return Workspace(nullptr, g).bytes;
  }

  // `next`: the task this thread takes afterwards, if known; its rows are fetched on the way.
  static void run(const VarlenAttnFwdParams& p, const VarlenAttnTask& task,
                  const VarlenAttnTask* next, void* workspace) {
    ShortForward forward(p, task, workspace);
    if (next) forward.expect({p.g, next->b});
    for (int64_t hk = 0; hk < p.g.Hk; ++hk) forward.run_key_head(hk);
    end_streams();
  }

 private:
  using Unit = ScoreUnit<Tiles::kExact>;
  static constexpr int kRows = Tiles::kShortRows;

  struct Workspace {
    float *keys, *values, *rows, *lanes, *scores, *weights, *sums, *bias, *keep;
    int64_t bytes;

    Workspace(void* base, const VarlenAttnGeometry& g) {
      Arena arena(base);
      keys = arena.take(kRows * Tiles::kRowWords);
      values = arena.take(kRows * Tiles::kRowWords);
      rows = arena.take(kLanes * Tiles::kRowWords);
      lanes = arena.take(kLanes * Tiles::kRowWords);
      scores = arena.take(kRows * kLanes);
      weights = Tiles::kRowsServeAll ? scores : arena.take(kRows / 2 * kLanes);
      sums = arena.take(kLanes * Tiles::kHeadWidth);
      bias = arena.take(BiasBlock<kRows>::words(g));
      keep = arena.take(g.dropout.threshold > 0 ? kRows * kLanes : 0);
      bytes = arena.used();
    }
  };

  ShortForward(const VarlenAttnFwdParams& p, const VarlenAttnTask& task, void* workspace)
      : p_(p),
        g_(p.g),
        at_(p.g, task.b),
        ws_(workspace, p.g),
        D_(static_cast<int>(p.g.D)),
        padded_(static_cast<int>(round_up(at_.len_k, Tiles::kKeyStep))),
        bias_(p.g, task.b, at_.len_q, at_.len_k, Unit::kPerNatural, ws_.bias) {}

  void expect(const ShortSequence& next) {
    const int64_t steps = 2 * g_.H;
    next_rows_[0] = {p_.k, g_, g_.Hk, next.k_start, next.len_k, steps};
    next_rows_[1] = {p_.v, g_, g_.Hk, next.k_start, next.len_k, steps};
    next_rows_[2] = {p_.q, g_, g_.H, next.q_start, next.len_q, steps};
    next_rows_[3] = {p_.out, g_, g_.H, next.q_start, next.len_q, steps};
  }

  void prefetch() {
    for (WholeRowPrefetcher& r : next_rows_) r.step();
  }

  void run_key_head(int64_t hk) {
    const int n = at_.len_k;
    Tiles::pack_rows(view_of(p_.k, g_.dtype, at_.k_start, hk), n, padded_, D_, ws_.keys);
    Tiles::pack_values(view_of(p_.v, g_.dtype, at_.k_start, hk), n, padded_, D_, ws_.values);
    const int64_t group = g_.H / g_.Hk;
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      for (int i = 0; i < at_.len_q; i += kLanes) {
        const int lanes = at_.len_q - i < kLanes ? at_.len_q - i : kLanes;
        if (lanes > kW) {
          run_tile<2>(h, i, lanes);
        } else {
          run_tile<1>(h, i, lanes);
        }
      }
    }
  }

  template <int kVecs>
  void run_tile(int64_t head, int row, int lanes) {
    const RowsView q = view_of(p_.q, g_.dtype, at_.q_start + row, head);
    Tiles::pack_rows(q, lanes, kVecs * kW, D_, ws_.rows);
    Tiles::pack_lanes(ws_.rows, kVecs, D_, ws_.lanes);
    prefetch();
    Tiles::template scores<kVecs>(ws_.keys, padded_, ws_.lanes, D_, ws_.scores);
    prefetch();
    RunningSoftmax<kVecs, Unit> softmax;
    softmax.reset();
    fill_weights<kVecs>(head, row, lanes, softmax);
    Tiles::template weighted_rows<kLanes>(ws_.weights, lanes, ws_.values, padded_, D_, ws_.sums);
    finish<kVecs>(head, row, lanes, softmax);
  }

  template <int kVecs>
  void fill_weights(int64_t head, int row, int lanes, RunningSoftmax<kVecs, Unit>& softmax) {
    const ScoreRule rule(g_, at_.b, head, at_.len_q, at_.len_k);
    const KeyRange common = rule.common(row, row + lanes);
    const bool masked = common.begin > 0 || common.end < at_.len_k;
    const int n = at_.len_k;
    float factor = rule.scale * Unit::kPerNatural;
    Vec top[kVecs];
    if (masked || !rule.is_linear()) {
      const LaneRows bias =
          rule.biased ? bias_.template fill<kVecs>(head, row, lanes, 0, n) : kNoBias;
      apply_rule<kVecs>(rule, masked, Unit::kPerNatural, row, 0, n, bias, ws_.scores, top);
      factor = 1.0f;
    } else {
      max_over_keys<kVecs>(ws_.scores, n, top);
    }
    softmax.raise(top, factor, D_, nullptr);
    if (g_.dropout.threshold > 0) {
      fill_dropout<kVecs>(g_.dropout, at_.b, head, row, 0, n, ws_.keep);
      exponentiate<Tiles, true>(ws_.scores, ws_.keep, n, padded_, factor, softmax, ws_.weights);
    } else {
      exponentiate<Tiles, false>(ws_.scores, nullptr, n, padded_, factor, softmax, ws_.weights);
    }
  }

  template <int kVecs>
  void finish(int64_t head, int row, int n, const RunningSoftmax<kVecs, Unit>& softmax) {
    float lse[kLanes], factor[kLanes];
    for (int v = 0; v < kVecs; ++v) {
      store(factor + v * kW, softmax.normaliser(v));
      store(lse + v * kW, softmax.log_sum_exp(v));
    }
    store_rows(ws_.sums, Tiles::kHeadWidth, factor, 1, n, D_,
               view_of(p_.out, g_.dtype, at_.q_start + row, head));
    std::memcpy(p_.lse + head * g_.Nq + at_.q_start + row, lse, sizeof(float) * n);
  }

  const VarlenAttnFwdParams& p_;
  const VarlenAttnGeometry& g_;
  const ShortSequence at_;
  const Workspace ws_;
  const int D_, padded_;
  BiasBlock<kRows> bias_;
  WholeRowPrefetcher next_rows_[4];
};

template <class Tiles>
class ShortBackward {
 public:
  static int64_t workspace_bytes(const VarlenAttnGeometry& g) {
    return Workspace(nullptr, g).bytes;
  }

  // `next`: the task this thread takes afterwards, if known; its rows are fetched on the way.
  static void run(const VarlenAttnBwdParams& p, const VarlenAttnTask& task,
                  const VarlenAttnTask* next, void* workspace) {
    ShortBackward backward(p, task, workspace);
    if (next) backward.expect({p.g, next->b});
    for (int64_t hk = 0; hk < p.g.Hk; ++hk) backward.run_key_head(hk);
    end_streams();
  }

 private:
  using Queries = QueryBlock<Tiles>;
  static constexpr int kRows = Tiles::kShortRows;
  static_assert(kRows <= Queries::kQueryBlock && kRows <= Queries::kKeyBlock,
                "a short sequence is one block of queries and one of keys");

  struct Workspace {
    float *keys, *key_columns, *values, *dq, *dk, *dv;
    typename Queries::Memory queries;
    int64_t bytes;

    Workspace(void* base, const VarlenAttnGeometry& g) : Workspace(Arena(base), g) {}

   private:
    Workspace(Arena arena, const VarlenAttnGeometry& g) : queries(arena, g) {
      keys = arena.take(kRows * Tiles::kRowWords);
      values = arena.take(kRows * Tiles::kRowWords);
      key_columns = Tiles::kRowsServeAll ? nullptr : arena.take(kRows * Tiles::kRowWords);
      dq = arena.take(kLanes * Tiles::kHeadWidth);
      dk = arena.take(kRows * Tiles::kHeadWidth);
      dv = arena.take(kRows * Tiles::kHeadWidth);
      bytes = arena.used();
    }
  };

  ShortBackward(const VarlenAttnBwdParams& p, const VarlenAttnTask& task, void* workspace)
      : p_(p),
        g_(p.g),
        at_(p.g, task.b),
        ws_(workspace, p.g),
        D_(static_cast<int>(p.g.D)),
        padded_(static_cast<int>(round_up(at_.len_k, Tiles::kKeyStep))),
        queries_(p, task.b, at_.len_q, at_.len_k, ws_.queries) {}

  void expect(const ShortSequence& next) {
    const int64_t steps = 4 * g_.H;
    const auto keys = [&](const auto& t) {
      return WholeRowPrefetcher(t, g_, g_.Hk, next.k_start, next.len_k, steps);
    };
    const auto queries = [&](const auto& t) {
      return WholeRowPrefetcher(t, g_, g_.H, next.q_start, next.len_q, steps);
    };
    next_rows_[0] = keys(p_.k);
    next_rows_[1] = keys(p_.v);
    next_rows_[2] = queries(p_.q);
    next_rows_[3] = queries(p_.out);
    next_rows_[4] = queries(p_.dout);
    next_rows_[5] = keys(p_.dk);
    next_rows_[6] = keys(p_.dv);
    next_rows_[7] = queries(p_.dq);
  }

  void prefetch() {
    for (WholeRowPrefetcher& r : next_rows_) r.step();
  }

  void run_key_head(int64_t hk) {
    const int64_t group = g_.H / g_.Hk, first = hk * group;
    const int n = at_.len_k;
    if (n > 0) {
      Tiles::pack_rows(view_of(p_.k, g_.dtype, at_.k_start, hk), n, padded_, D_, ws_.keys);
      Tiles::pack_rows(view_of(p_.v, g_.dtype, at_.k_start, hk), n, padded_, D_, ws_.values);
      key_columns_ = Tiles::columns(ws_.keys, padded_, ws_.key_columns);
    }
    for (int64_t h = first; h < first + group; ++h) {
      queries_.bias_grad.begin(h, 0, at_.len_q, {0, n}, {0, n});
      if (n > 0) {
        run_head(h, h > first);
      } else {
        store_zero_rows(at_.len_q, D_, view_of(p_.dq, g_.dtype, at_.q_start, h));
      }
    }
    const float one = 1.0f;
    store_rows(ws_.dk, Tiles::kHeadWidth, &g_.scale, 0, n, D_,
               view_of(p_.dk, g_.dtype, at_.k_start, hk));
    store_rows(ws_.dv, Tiles::kHeadWidth, &one, 0, n, D_,
               view_of(p_.dv, g_.dtype, at_.k_start, hk));
  }

  // accumulate: dK and dV hold those of other heads already.
  void run_head(int64_t head, bool accumulate) {
    prefetch();
    queries_.pack(head, 0, at_.len_q);
    prefetch();
    for (int i = 0; i < at_.len_q; i += kLanes) {
      const int lanes = at_.len_q - i < kLanes ? at_.len_q - i : kLanes;
      if (lanes > kW) {
        run_tile<2>(head, i, lanes);
      } else {
        run_tile<1>(head, i, lanes);
      }
    }
    prefetch();
    Tiles::outer_sum(queries_.p_rows(), padded_, queries_.do_pairs(), at_.len_q, D_, ws_.dv,
                     accumulate);
    prefetch();
    Tiles::outer_sum(queries_.ds_rows(), padded_, queries_.q_pairs(), at_.len_q, D_, ws_.dk,
                     accumulate);
  }

  template <int kVecs>
  void run_tile(int64_t head, int row, int lanes) {
    const ScoreRule rule(g_, at_.b, head, at_.len_q, at_.len_k);
    queries_.template differentiate<kVecs>(rule, head, row, row, lanes, 0, at_.len_k, ws_.keys,
                                           ws_.values);
    Tiles::template weighted_rows<Queries::kWeightWords>(queries_.ds_weights(row), lanes,
                                                         key_columns_, padded_, D_, ws_.dq);
    store_rows(ws_.dq, Tiles::kHeadWidth, &g_.scale, 0, lanes, D_,
               view_of(p_.dq, g_.dtype, at_.q_start + row, head));
  }

  const VarlenAttnBwdParams& p_;
  const VarlenAttnGeometry& g_;
  const ShortSequence at_;
  const Workspace ws_;
  const int D_, padded_;
  Queries queries_;
  WholeRowPrefetcher next_rows_[8];
  const float* key_columns_ = nullptr;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
