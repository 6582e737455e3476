// What happens to a panel of logits, [rows][kLanes] in L1, between the products.
#pragma once
#include "attn_pack.h"
#include "columns.h"
#include "rank_loss.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr float kInf = __builtin_inff();
// The logit of a pair that is no candidate: finite, since differences of infinities are NaN where a
// row or column has nothing else.
constexpr float kHidden = -1e38f;

// Lanes of vector v whose column is below n keep x, the others get `otherwise`.
ENCFAST_INLINE Vec below(int64_t n, int v, Vec x, float otherwise) {
  const Vec last = splat(static_cast<float>(n - 1 - v * kW));
  return select_within(zeros(), iota(), last, x, splat(otherwise));
}

// log2(e) in two floats: rounded to one, all exponentials at x = -10 would be 1.3e-7 too large,
// which shows in sums of many.
ENCFAST_INLINE Vec exp(Vec x) { return exp2<6>(fma(x, splat(kLog2e), x * splat(1.92596299e-8f))); }
ENCFAST_INLINE float exp_one(float x) { return exp(splat(x))[0]; }

ENCFAST_INLINE float largest_lane(Vec v) {
  float m = v[0];
  for (int i = 1; i < kW; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// log(1 + exp(-|x|)), accurate also where 1 + exp(-|x|) rounds.
ENCFAST_INLINE Vec log1p_exp(Vec x) {
  const Vec e = exp(zeros() - abs(x)), u = splat(1.0f) + e;
  return log(u) + (e - (u - splat(1.0f))) / u;
}
ENCFAST_INLINE Vec softplus(Vec x) { return max(zeros(), x) + log1p_exp(x); }

ENCFAST_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp(zeros() - abs(x));
  return select_within(zeros(), x, splat(kInf), splat(1.0f), e) / (splat(1.0f) + e);
}

// Products become logits in place; columns from n on are hidden.
inline void to_logits(float* x, int64_t rows, int64_t n, float scale, float bias) {
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* at = x + i * kLanes + v * kW;
      const Vec logit = fma(load(at), splat(scale), splat(bias));
      store(at, n < kLanes ? below(n, v, logit, -kInf) : logit);
    }
  }
}

// Hides the excluded pairs of a panel of rows [row, +rows) and columns [column, +n) of all.
inline void hide_excluded(const RankProblem& q, int64_t row, int64_t rows, int64_t column,
                          int64_t n, float* x) {
  if (!q.excluded) return;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t lane = q.excluded[row + i] - column;
    if (lane >= 0 && lane < n) x[i * kLanes + lane] = kHidden;
  }
}

// Largest logit and sum of exponentials of each column of a panel.
inline void column_sums(const float* x, int64_t rows, float* largest, float* sums) {
  Vec m[2] = {load(x), load(x + kW)}, l[2] = {zeros(), zeros()};
  for (int64_t i = 1; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) m[v] = max(m[v], load(x + i * kLanes + v * kW));
  }
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) l[v] += exp(load(x + i * kLanes + v * kW) - m[v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    store(largest + v * kW, m[v]);
    store(sums + v * kW, l[v]);
  }
}

// One row that lies in `panels` panels a fixed distance apart.
struct RowOfPanels {
  const float* x;
  int64_t distance;
  int64_t panels;

  template <class F>
  ENCFAST_INLINE void each(F f) const {
    for (int64_t p = 0; p < panels; ++p) {
      f(load(x + p * distance), p, 0);
      f(load(x + p * distance + kW), p, 1);
    }
  }
};

// Adds a row to its running largest logit and sum of exponentials relative to it.
inline void add_to_row(const RowOfPanels& row, float& largest, float& total) {
  Vec m[2] = {splat(largest), splat(largest)};
  row.each([&](Vec x, int64_t, int v) ENCFAST_INLINE_LAMBDA { m[v] = max(m[v], x); });
  const float now = largest_lane(max(m[0], m[1]));
  Vec l[2] = {zeros(), zeros()};
  row.each([&](Vec x, int64_t, int v) ENCFAST_INLINE_LAMBDA { l[v] += exp(x - splat(now)); });
  total = total * exp_one(largest - now) + sum(l[0] + l[1]);
  largest = now;
}

// Sum over a row of softplus(x), and of softplus(-x) at its positive, column `positive` of the row.
inline float softplus_row(const RowOfPanels& row, int64_t positive) {
  Vec total[2] = {zeros(), zeros()};
  row.each([&](Vec x, int64_t p, int v) ENCFAST_INLINE_LAMBDA {
    const int64_t lane = positive - (p * kLanes + v * kW);
    if (lane >= 0 && lane < kW) {
      const Vec at = splat(static_cast<float>(lane));
      x = select_within(at, iota(), at, zeros() - x, x);
    }
    total[v] += softplus(x);
  });
  return sum(total[0] + total[1]);
}

// Gradients of the logits of one panel.
//
//   softmax: g = drow p + dcolumn q, at the positive drow (p - 1) + dcolumn q + dpositive
//            p = exp(x - largest - log) of the row, q that of the column; 0 at the excluded column
//   sigmoid: g = drow sigmoid(x),    at the positive -drow sigmoid(-x)
template <RankLoss kLoss, DType kOut>
class PanelGrad {
 public:
  // Columns [column, column + n) of all.
  PanelGrad(const RankBwdParams& p, int64_t column, int64_t n) : p_(p), column_(column), n_(n) {
    if constexpr (kLoss != RankLoss::kBoth) return;
    for (int v = 0; v < 2; ++v) {
      const int64_t left = n - v * kW;
      const int64_t at = column + v * kW;
      largest_[v] = part(p.columns.largest + at, left);
      log_[v] = part(p.columns.log + at, left);
      weight_[v] = part(p.dcolumn + at, left);
    }
  }

  // Products s of row `row` of all, to scale g as kOut.
  void run(int64_t row, const float* s, void* out) {
    const float positive = lane_of(p_.q.positives[row]);
    const float excluded = p_.q.excluded ? lane_of(p_.q.excluded[row]) : kNowhere;
    if (positive >= 0 || excluded >= 0) {
      row_grad<true>(row, positive, excluded, s, out);
    } else {
      row_grad<false>(row, kNowhere, kNowhere, s, out);
    }
  }

  // Sums of g s and of g since they were last taken.
  void take(double& dscale, double& dbias) {
    dscale += sum(gs_[0] + gs_[1]);
    dbias += sum(g_[0] + g_[1]);
    gs_[0] = gs_[1] = g_[0] = g_[1] = zeros();
  }

 private:
  static constexpr float kNowhere = -1;

  // A column of all as a lane of the panel.
  float lane_of(int64_t column) const {
    const int64_t lane = column - column_;
    return lane >= 0 && lane < n_ ? static_cast<float>(lane) : kNowhere;
  }

  static Vec part(const float* p, int64_t left) {
    if (left >= kW) return load(p);
    return left > 0 ? load_partial_as<DType::kFloat32>(p, static_cast<int>(left)) : zeros();
  }

  // kSpecial: the positive or the excluded column is among these.
  template <bool kSpecial>
  ENCFAST_INLINE void row_grad(int64_t row, float positive, float excluded, const float* s,
                               void* out) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec product = load(s + v * kW);
      const Vec x = fma(product, splat(p_.q.scale), splat(p_.q.bias));
      const Vec at = splat(positive - static_cast<float>(v * kW));
      Vec g;
      if constexpr (kLoss == RankLoss::kSigmoid) {
        g = sigmoid(x);
        if (kSpecial) g = select_within(at, iota(), at, zeros() - sigmoid(zeros() - x), g);
        g *= splat(p_.drow[row]);
      } else {
        Vec p = exp((x - splat(p_.rows.largest[row])) - splat(p_.rows.log[row]));
        Vec rest = zeros();
        if constexpr (kLoss == RankLoss::kBoth) {
          rest = weight_[v] * exp((x - largest_[v]) - log_[v]);
        }
        if (kSpecial) {
          p = select_within(at, iota(), at, p - splat(1.0f), p);
          rest = select_within(at, iota(), at, rest + splat(p_.dpositive[row]), rest);
        }
        g = fma(p, splat(p_.drow[row]), rest);
        if (kSpecial) {
          const Vec hidden = splat(excluded - static_cast<float>(v * kW));
          g = select_within(hidden, iota(), hidden, zeros(), g);
        }
      }
      if (n_ < kLanes) g = below(n_, v, g, 0.0f);
      gs_[v] = fma(g, product, gs_[v]);
      g_[v] += g;
      store_at<kOut>(out, Whole{v * kW}, g * splat(p_.q.scale));
    }
  }

  const RankBwdParams& p_;
  const int64_t column_, n_;
  Vec largest_[2], log_[2], weight_[2];
  Vec gs_[2] = {zeros(), zeros()}, g_[2] = {zeros(), zeros()};
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
