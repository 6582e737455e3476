// One block of queries in the backward: packed rows, statistics, and P and dS of their scores.
//
//   delta = rowsum(dO * O) - dlse
//   S^T = K Q^T, dP^T = V dO^T                           [keys][kLanes], L1
//   P^T = exp(score(S^T) - lse)
//   dS^T = P^T (dP^T - delta) d score / d S              and from it the gradients of biases
//
// Dropout multiplies dP and, for dV, P by its factors; delta is the same with and without.
#pragma once
#include "attn_bias_grad.h"
#include "attn_dropout.h"
#include "attn_score.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <class Tiles>
class QueryBlock {
 public:
  static constexpr int kKeyBlock = Tiles::kBackwardKeyBlock;
  static constexpr int kQueryBlock = Tiles::kQueryBlock;

  struct Memory {
    float *q_rows, *do_rows, *q_pairs, *do_pairs, *q_lanes, *do_lanes;
    float *out_rows, *out_lanes, *scores, *dp, *p_rows, *ds_rows, *ds_weights, *lse, *delta;
    float *bias, *bias_grad, *keep;

    Memory(Arena& arena, const VarlenAttnGeometry& g) {
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
      bias = arena.take(BiasBlock<kKeyBlock>::words(g));
      bias_grad = arena.take(BiasGradient<kKeyBlock>::words(g));
      keep = arena.take(g.dropout.threshold > 0 ? kKeyBlock * kLanes : 0);
    }
  };

  QueryBlock(const VarlenAttnBwdParams& p, int64_t b, int64_t len_q, int64_t len_k,
             const Memory& memory)
      : bias_grad(p, b, len_q, len_k, memory.bias_grad),
        p_(p),
        g_(p.g),
        b_(b),
        q_start_(p.g.cu_seqlens_q[b]),
        D_(static_cast<int>(p.g.D)),
        ws_(memory),
        bias_(p.g, b, len_q, len_k, Unit::kPerNatural, memory.bias) {}

  // Queries [row, row + n) of `head`, at most kQueryBlock.
  void pack(int64_t head, int64_t row, int n) {
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

  // P and dS of queries [lane, lane + n) of the block, which are rows `row` and on of the sequence,
  // for keys [key, key + n_keys) with packed rows `keys` and `values`.
  template <int kVecs>
  void differentiate(const ScoreRule& rule, int64_t head, int64_t row, int lane, int n, int64_t key,
                     int n_keys, const float* keys, const float* values) {
    const int padded = static_cast<int>(round_up(n_keys, Tiles::kKeyStep));
    if (rule.biased) bias_.prefetch(head, row, n, key, n_keys);
    bias_grad.prefetch(head, row, n, key, n_keys);
    Tiles::template scores<kVecs>(keys, padded, q_lanes(lane), D_, ws_.scores);
    Tiles::template scores<kVecs>(values, padded, do_lanes(lane), D_, ws_.dp);
    const KeyRange common = rule.common(row, row + n);
    const bool masked = key < common.begin || key + n_keys > common.end;
    const LaneRows bias =
        rule.biased ? bias_.template fill<kVecs>(head, row, n, key, n_keys) : kNoBias;
    const LaneRows keep = dropout_factors<kVecs>(head, row, key, n_keys);
    with_mode(rule, rule.biased || dropped(), masked, [&](auto tag) {
      for (int v = 0; v < kVecs; ++v) {
        const LaneScore<decltype(tag)::value> score(rule, row + v * kW, key, Unit::kPerNatural,
                                                    bias.vec(v));
        differentiate_vec(score, keep.vec(v), lane, v, n_keys, padded);
      }
    });
    if (bias_grad.wanted()) {
      bias_grad.template add<kVecs>(head, row, n, key, n_keys, ws_.dp);
    }
    if constexpr (kVecs == 1 && Tiles::kQueryStep > kW) clear_lanes(lane + kW, padded);
  }

  // P and dS of the block as left factors of outer_sum, with the right ones.
  const float* p_rows() const { return ws_.p_rows; }
  const float* ds_rows() const { return ws_.ds_rows; }
  const float* q_pairs() const { return q_pairs_; }
  const float* do_pairs() const { return do_pairs_; }

  // dS^T of the tile at `lane`, the last one differentiated, by rows of kWeightWords.
  const float* ds_weights(int lane) const {
    return Tiles::kRowsServeAll ? ws_.ds_rows + lane : ws_.ds_weights;
  }
  static constexpr int kWeightWords = Tiles::kRowsServeAll ? Tiles::kWeightRowWords : kLanes;

  BiasGradient<kKeyBlock> bias_grad;

 private:
  using Unit = ScoreUnit<Tiles::kExact>;

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

  bool dropped() const { return g_.dropout.threshold > 0; }

  template <int kVecs>
  LaneRows dropout_factors(int64_t head, int64_t row, int64_t key, int n) {
    if (!dropped()) return kNoDropout;
    fill_dropout<kVecs>(g_.dropout, b_, head, row, key, n, ws_.keep);
    return {ws_.keep, kLanes};
  }

  // P^T and dS^T of query vector v of the tile at `lane`, from S^T and dP^T; rows [n, padded)
  // become 0. Biased modes leave d score, which is dS less the softcap's derivative, in dP^T.
  template <class Score>
  void differentiate_vec(const Score& score, LaneRows keep, int lane, int v, int n, int padded) {
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

  const VarlenAttnBwdParams& p_;
  const VarlenAttnGeometry& g_;
  const int64_t b_, q_start_;
  const int D_;
  const Memory ws_;
  BiasBlock<kKeyBlock> bias_;
  const float *q_pairs_ = nullptr, *do_pairs_ = nullptr;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
