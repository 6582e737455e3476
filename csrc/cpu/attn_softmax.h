// Softmax of score tiles in lanes: statistics that run over the blocks of keys, and the weights of
// one block.
#pragma once
#include "attn_dropout.h"
#include "attn_score.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Running softmax statistics of one query tile: maximum score and sum of exponentials.
template <int kVecs, class Unit>
struct RunningSoftmax {
  Vec max_score[kVecs], sum[kVecs];

  // Finite, so that -inf - max_score is -inf and never NaN; scores below count as -inf, which the
  // lowest finite numbers that stand for "masked" thereby do in every dtype and unit. A lane that
  // has seen no key ends with sum 0, every other with sum >= 1 or NaN.
  void reset() {
    for (int v = 0; v < kVecs; ++v) {
      max_score[v] = splat(-1e38f);
      sum[v] = zeros();
    }
  }

  // Takes in a block of scores whose maximum is factor * block_max, factor > 0; when some maximum
  // grew, rescales the sums and the output out[D][kLanes] (null: there is none yet).
  void raise(const Vec block_max[kVecs], float factor, int D, float* out) {
    Vec decay[kVecs];
    bool grew = false;
    for (int v = 0; v < kVecs; ++v) {
      const Vec m = max(max_score[v], block_max[v] * splat(factor));
      grew |= any_greater(m, max_score[v]);
      decay[v] = Unit::template exp<6>(max_score[v] - m);
      max_score[v] = m;
    }
    if (!grew || out == nullptr) return;
    for (int v = 0; v < kVecs; ++v) sum[v] *= decay[v];
    for (int d = 0; d < D; ++d) {
      for (int v = 0; v < kVecs; ++v) {
        float* p = out + d * kLanes + v * kW;
        store(p, load(p) * decay[v]);
      }
    }
  }

  void store_to(float* stats) const {
    for (int v = 0; v < kVecs; ++v) {
      store(stats + v * kW, max_score[v]);
      store(stats + kLanes + v * kW, sum[v]);
    }
  }
  void load_from(const float* stats) {
    for (int v = 0; v < kVecs; ++v) {
      max_score[v] = load(stats + v * kW);
      sum[v] = load(stats + kLanes + v * kW);
    }
  }

  // Factor that normalises the output of vector v: 0 where no key was visible.
  Vec normaliser(int v) const {
    return select_within(zeros(), sum[v], zeros(), zeros(), splat(1.0f) / sum[v]);
  }

  // Natural logarithm of the sum of exponentials; -inf where no key was visible.
  Vec log_sum_exp(int v) const {
    const Vec lse = fma(max_score[v], splat(Unit::kNatural), log(sum[v]));
    return select_within(zeros(), sum[v], zeros(), splat(-__builtin_inff()), lse);
  }
};

// weights = P^T = exp(factor S^T - m) of keys [0, n), adding to the sums; rows [n, padded) become
// 0. Dropout multiplies by keep[n][kLanes] after the sums.
template <class Tiles, bool kDropout, int kVecs, class Unit>
inline void exponentiate(const float* scores, const float* keep, int n, int padded, float factor,
                         RunningSoftmax<kVecs, Unit>& softmax, float* weights) {
  const Vec c = splat(factor);
  for (int v = 0; v < kVecs; ++v) {
    const Vec minus_max = -softmax.max_score[v];
    const auto weight = [&](int j, Vec* sum) {
      const int at = j * kLanes + v * kW;
      const Vec p = Unit::template exp<Tiles::kExp2Degree>(fma(load(scores + at), c, minus_max));
      *sum += p;
      return kDropout ? p * load(keep + at) : p;
    };
    Vec even_sum = zeros(), odd_sum = zeros();
    int j = 0;
    for (; j + 2 <= n; j += 2) {
      const Vec even = weight(j, &even_sum), odd = weight(j + 1, &odd_sum);
      Tiles::put_weights(weights, j, v, even, odd);
    }
    if (j < n) {
      const Vec even = weight(j, &even_sum);
      Tiles::put_weights(weights, j, v, even, zeros());
      j += 2;
    }
    for (; j < padded; j += 2) Tiles::put_weights(weights, j, v, zeros(), zeros());
    softmax.sum[v] += even_sum + odd_sum;
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
