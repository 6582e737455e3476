// Loss of a ranking: x_1 .. x_K in the teacher's order, of which the first v are valid,
//
//   R_j = log sum_{k >= j} exp(x_k)            loss = sum_{j <= v} (R_j - x_j)
//   dloss/dx_k = sum_{j <= min(k, v)} exp(x_k - R_j) - [k <= v]
//
// A task is one row, in blocks of 64 that lie in L1. From the last block to the first, sums of
// exponentials grow in float64 relative to a reference that jumps when a logit exceeds it by 20:
// sums of any length lose nothing, and logits of any size neither overflow nor vanish. The gradient
// first does the same, and then, from the first block to the last, with the exponentials of -R_j,
// held as two floats. Behind the valid entries a block adds one sum.
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

// Logarithms of a block in two floats each: a logit, and what a sum adds to it. In one float a log
// of 1e4 would be off by 5e-4, and its exponential with it.
struct Logs {
  float high[kBlock], low[kBlock];
};

struct RunningSum {
  float high = -kInf, low = 0;  // the reference
  double total = 0;             // times e^reference

  void add(float of_high, float of_low) {
    const float above = (of_high - high) + (of_low - low);
    if (above > kJump) {
      total = total * exp_one(-above) + 1;
      high = of_high;
      low = of_low;
    } else {
      total += exp_one(above);
    }
  }
};

// Logits of n, of which `left` are left at `dots`; -inf behind them.
ENCFAST_INLINE Vec logits_at(const float* dots, int64_t left, float scale) {
  const Vec x = load_up_to<DType::kFloat32>(reinterpret_cast<const char*>(dots), left);
  return left >= kW ? x * splat(scale) : below(left, 0, x * splat(scale), -kInf);
}

// Logarithms of what is added, and what a running sum was once each had been added.
struct Block {
  alignas(64) Logs terms;
  alignas(64) Logs references;
  alignas(64) float totals[kBlock];

  void read(const float* dots, int64_t left, float scale) {
    for (int64_t i = 0; i < kBlock; i += kW) {
      store(terms.high + i, logits_at(dots + i, left - i, scale));
      store(terms.low + i, zeros());
    }
  }

  // Adds the first m terms, from the last to the first if kDown; terms up to a whole vector are
  // -inf.
  template <bool kDown>
  void add(int64_t m, RunningSum& s) {
    if (jumps(m, s)) {
      for (int64_t step = 0; step < m; ++step) {
        const int64_t i = kDown ? m - 1 - step : step;
        s.add(terms.high[i], terms.low[i]);
        set(i, s);
      }
    } else {
      fill(0, s);
      exponentials(m, s);
      for (int64_t step = 0; step < m; ++step) {
        const int64_t i = kDown ? m - 1 - step : step;
        s.total += totals[i];
        totals[i] = static_cast<float>(s.total);
      }
    }
    fill(m, s);
  }

  // Adds all terms where no sum between is wanted.
  void add_all(RunningSum& s) {
    if (jumps(kBlock, s)) {
      for (int64_t i = 0; i < kBlock; ++i) s.add(terms.high[i], terms.low[i]);
    } else {
      exponentials(kBlock, s);
      Vec sums = zeros();
      for (int64_t i = 0; i < kBlock; i += kW) sums += load(totals + i);
      s.total += sum(sums);
    }
  }

  // Sets entries from m on to what the sum is now.
  void fill(int64_t m, const RunningSum& s) {
    for (; m % kW != 0; ++m) set(m, s);
    for (; m < kBlock; m += kW) {
      store(totals + m, splat(static_cast<float>(s.total)));
      store(references.high + m, splat(s.high));
      store(references.low + m, splat(s.low));
    }
  }

 private:
  // Whether one of the first m terms is too large for the reference.
  bool jumps(int64_t m, const RunningSum& s) const {
    Vec largest = splat(-kInf);
    for (int64_t i = 0; i < m; i += kW) {
      largest = max(largest, load(terms.high + i) + load(terms.low + i));
    }
    return any_greater(largest, splat(s.high + s.low + kJump));
  }

  void exponentials(int64_t m, const RunningSum& s) {
    for (int64_t i = 0; i < m; i += kW) {
      const Vec high = load(terms.high + i) - splat(s.high);
      store(totals + i, exp(high + (load(terms.low + i) - splat(s.low))));
    }
  }

  void set(int64_t i, const RunningSum& s) {
    totals[i] = static_cast<float>(s.total);
    references.high[i] = s.high;
    references.low[i] = s.low;
  }
};

// Calls f(block, place of its first entry) with the sums from each entry to the end, for the blocks
// that hold valid entries, from the last to the first.
template <class F>
void for_suffixes(const float* dots, int64_t K, int64_t valid, float scale, F f) {
  RunningSum s;
  Block b;
  for (int64_t from = (K - 1) / kBlock * kBlock; from >= 0; from -= kBlock) {
    b.read(dots + from, K - from, scale);
    if (from >= valid) {
      b.add_all(s);
      continue;
    }
    b.add<true>(smaller(kBlock, K - from), s);
    f(b, from);
  }
}

float row_loss(const float* dots, int64_t K, int64_t valid, float scale) {
  double loss = 0;
  for_suffixes(dots, K, valid, scale, [&](const Block& b, int64_t from) {
    Vec sums = zeros();
    for (int64_t i = 0; i < smaller(kBlock, valid - from); i += kW) {
      const Vec x = load(b.terms.high + i) - load(b.references.high + i);
      sums += below(valid - from - i, 0, log(load(b.totals + i)) - x, 0);
    }
    loss += sum(sums);
  });
  return static_cast<float>(loss);
}

// Gradients of the K products; returns that of the scale. `y` holds the logarithms -R_j.
double row_grad(const float* dots, int64_t K, int64_t valid, float scale, float dloss, Logs* y,
                float* ddots) {
  for_suffixes(dots, K, valid, scale, [&](const Block& b, int64_t from) {
    Logs& r = y[from / kBlock];
    for (int64_t i = 0; i < kBlock; i += kW) {
      const Vec high = zeros() - load(b.references.high + i);
      store(r.high + i, below(valid - from - i, 0, high, -kInf));
      store(r.low + i, zeros() - log(load(b.totals + i)));
    }
  });
  double dscale = 0;
  RunningSum s;
  Block b;
  for (int64_t from = 0; from < K; from += kBlock) {
    const int64_t n = smaller(kBlock, K - from), m = smaller(n, valid - from);
    if (m > 0) {
      b.terms = y[from / kBlock];
      b.add<false>(m, s);
    } else {
      b.fill(0, s);
    }
    Vec sums = zeros();
    for (int64_t i = 0; i < n; i += kW) {
      const float* at = dots + from + i;
      const Vec x = logits_at(at, n - i, scale) + load(b.references.high + i);
      const Vec p = exp(x + load(b.references.low + i)) * load(b.totals + i);
      const Vec d = splat(dloss) * (p - below(m - i, 0, splat(1), 0));
      const char* of_block = reinterpret_cast<const char*>(at);
      sums = fma(d, load_up_to<DType::kFloat32>(of_block, n - i), sums);
      const Vec out = d * splat(scale);
      if (n - i >= kW) {
        store(ddots + from + i, out);
      } else {
        store_partial_as<DType::kFloat32>(ddots + from + i, out, static_cast<int>(n - i));
      }
    }
    dscale += sum(sums);
  }
  return dscale;
}

void fwd(const RankingProblem& q, float* loss, const Pool& pool) {
  run_tasks(pool, q.B, [&](int64_t i, int) {
    loss[i] = q.valid[i] == 0 ? 0 : row_loss(q.dots + i * q.K, q.K, q.valid[i], q.scale);
  });
}

void bwd(const RankingBwdParams& p, const Pool& pool) {
  const RankingProblem& q = p.q;
  run_tasks(pool, q.B, [&](int64_t i, int slot) {
    float* ddots = p.ddots + i * q.K;
    p.dscale[i] = 0;
    if (q.valid[i] == 0) {
      std::memset(ddots, 0, 4 * q.K);
    } else {
      Logs* y = reinterpret_cast<Logs*>(p.workspace) + slot * parts(q.K, kBlock);
      p.dscale[i] = row_grad(q.dots + i * q.K, q.K, q.valid[i], q.scale, p.dloss[i], y, ddots);
    }
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
