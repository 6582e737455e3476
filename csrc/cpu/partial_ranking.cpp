// Loss of a ranking: x_1 .. x_K in the teacher's order, of which the first v are valid,
//
//   R_j = log sum_{k >= j} exp(x_k)            loss = sum_{j <= v} (R_j - x_j)
//   dloss/dx_k = sum_{j <= min(k, v)} exp(x_k - R_j) - [k <= v]
//
// A task is one row, in blocks of 64 that lie in L1. From the last block to the first, sums of
// exponentials grow in float64 relative to a reference that jumps when a logit exceeds it by 20:
// sums of any length lose nothing, and logits of any size neither overflow nor vanish. The gradient
// first does the same, and then, from the first block to the last, with the exponentials of -R_j.
//
// Memory traffic: K floats read in the forward; 2 K read and K written in the backward.
#include "partial_ranking.h"

#include "candidate_dots.h"
#include "isa.h"
#include "rank_tile.h"
#include "top_rows.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr float kJump = 20;

struct RunningSum {
  float reference = -kInf;
  double total = 0;  // times e^reference

  void add(float x) {
    if (x > reference + kJump) {
      total = total * exp_one(reference - x) + 1;
      reference = x;
    } else {
      total += exp_one(x - reference);
    }
  }
};

// A block of logits, and for each what a running sum was once it had been added.
struct Block {
  alignas(64) float x[kBlock];
  alignas(64) float totals[kBlock];
  alignas(64) float references[kBlock];
  int64_t n;

  // -inf up to the whole block.
  void read(const float* from, int64_t count, float scale) {
    n = smaller(count, kBlock);
    for (int64_t i = 0; i < kBlock; i += kW) {
      const int64_t left = n - i;
      const Vec v = load_up_to<DType::kFloat32>(reinterpret_cast<const char*>(from + i), left);
      store(x + i, left >= kW ? v * splat(scale) : below(left, 0, v * splat(scale), -kInf));
    }
  }

  // Adds y[0..m), in falling order if kDown.
  template <bool kDown>
  void add(const float* y, int64_t m, RunningSum& s) {
    Vec largest = splat(-kInf);
    for (int64_t i = 0; i < m; i += kW) largest = max(largest, load(y + i));
    const bool jumps = largest_lane(largest) > s.reference + kJump;
    if (!jumps) {
      for (int64_t i = 0; i < m; i += kW) {
        store(totals + i, exp(load(y + i) - splat(s.reference)));
        store(references + i, splat(s.reference));
      }
    }
    for (int64_t step = 0; step < m; ++step) {
      const int64_t i = kDown ? m - 1 - step : step;
      if (jumps) {
        s.add(y[i]);
      } else {
        s.total += totals[i];
      }
      totals[i] = static_cast<float>(s.total);
      references[i] = s.reference;
    }
  }

  // What sums are after the last of them, for entries from m on.
  void fill(int64_t m, const RunningSum& s) {
    for (int64_t i = m; i < kBlock; ++i) {
      totals[i] = static_cast<float>(s.total);
      references[i] = s.reference;
    }
  }
};

float row_loss(const float* dots, int64_t K, int64_t valid, float scale) {
  if (valid == 0) return 0;
  double loss = 0;
  RunningSum s;
  Block b;
  for (int64_t from = (K - 1) / kBlock * kBlock; from >= 0; from -= kBlock) {
    b.read(dots + from, K - from, scale);
    b.add<true>(b.x, b.n, s);
    b.fill(b.n, s);
    Vec sums = zeros();
    for (int64_t i = 0; i < smaller(b.n, valid - from); i += kW) {
      const Vec x = load(b.x + i) - load(b.references + i);
      sums += below(valid - from - i, 0, log(load(b.totals + i)) - x, 0);
    }
    loss += sum(sums);
  }
  return static_cast<float>(loss);
}

// y_j = -R_j of the valid entries, -inf up to a whole block.
void negative_suffix_sums(const float* dots, int64_t K, int64_t valid, float scale, float* y) {
  RunningSum s;
  Block b;
  for (int64_t from = (K - 1) / kBlock * kBlock; from >= 0; from -= kBlock) {
    b.read(dots + from, K - from, scale);
    b.add<true>(b.x, b.n, s);
    b.fill(b.n, s);
    if (from >= valid) continue;
    for (int64_t i = 0; i < kBlock; i += kW) {
      const Vec r = load(b.references + i) + log(load(b.totals + i));
      store(y + from + i, below(valid - from - i, 0, zeros() - r, -kInf));
    }
  }
}

// Gradients of the K products; returns that of the scale.
double row_grad(const float* dots, int64_t K, int64_t valid, float scale, float dloss, float* y,
                float* ddots) {
  if (valid == 0) {
    std::memset(ddots, 0, 4 * K);
    return 0;
  }
  negative_suffix_sums(dots, K, valid, scale, y);
  double dscale = 0;
  RunningSum s;
  Block b;
  for (int64_t from = 0; from < K; from += kBlock) {
    b.read(dots + from, K - from, scale);
    const int64_t m = smaller(b.n, valid - from);
    if (m > 0) b.add<false>(y + from, m, s);
    b.fill(m > 0 ? m : 0, s);
    Vec sums = zeros();
    for (int64_t i = 0; i < b.n; i += kW) {
      const Vec p = exp(load(b.x + i) + load(b.references + i)) * load(b.totals + i);
      const Vec d = splat(dloss) * (p - below(m - i, 0, splat(1), 0));
      const char* of_block = reinterpret_cast<const char*>(dots + from + i);
      sums = fma(d, load_up_to<DType::kFloat32>(of_block, b.n - i), sums);
      const Vec out = d * splat(scale);
      if (b.n - i >= kW) {
        store(ddots + from + i, out);
      } else {
        store_partial_as<DType::kFloat32>(ddots + from + i, out, static_cast<int>(b.n - i));
      }
    }
    dscale += sum(sums);
  }
  return dscale;
}

void fwd(const RankingProblem& q, float* loss, const Pool& pool) {
  run_tasks(pool, q.B, [&](int64_t i, int) {
    loss[i] = row_loss(q.dots + i * q.K, q.K, q.valid[i], q.scale);
  });
}

void bwd(const RankingBwdParams& p, const Pool& pool) {
  const RankingProblem& q = p.q;
  run_tasks(pool, q.B, [&](int64_t i, int slot) {
    p.dscale[i] = row_grad(q.dots + i * q.K, q.K, q.valid[i], q.scale, p.dloss[i],
                           p.workspace + slot * round_up(q.K, kBlock), p.ddots + i * q.K);
  });
}

int64_t hard_negatives_bytes_of(const HardNegativesParams& p, int threads) {
  return bytes_of(p.a.dtype, [&](auto tag) {
    return hard_negatives_bytes<ProductWord<decltype(tag)::value>>(p, threads);
  });
}

int64_t dots_bytes_of(const CandidateProblem& q, int threads) {
  return bytes_of(q.a.dtype, [&](auto tag) {
    return dots_bytes<ProductWord<decltype(tag)::value>>(q, threads);
  });
}

int64_t dots_bwd_bytes_of(const CandidateDotsBwdParams& p, int threads) {
  return bytes_of(p.q.a.dtype, [&](auto tag) {
    return dots_bwd_bytes<FloatWord<decltype(tag)::value>>(p, threads);
  });
}

void hard_negatives(const HardNegativesParams& p, const Pool& pool) {
  with_dtype(p.a.dtype,
             [&](auto tag) { HardNegatives<ProductWord<decltype(tag)::value>>(p, pool).run(); });
}

void dots(const CandidateDotsParams& p, const Pool& pool) {
  with_dtype(p.q.a.dtype,
             [&](auto tag) { CandidateDots<ProductWord<decltype(tag)::value>>(p, pool).run(); });
}

void dots_bwd(const CandidateDotsBwdParams& p, const Pool& pool) {
  with_dtype(p.q.a.dtype,
             [&](auto tag) { CandidateDotsBwd<FloatWord<decltype(tag)::value>>(p, pool).run(); });
}

}  // namespace

extern const PartialRankingKernels kPartialRanking = {
    hard_negatives_bytes_of, hard_negatives, dots_bytes_of, dots,
    dots_bwd_bytes_of,       dots_bwd,       fwd,           bwd};

}  // namespace encfast::ENCFAST_ISA
