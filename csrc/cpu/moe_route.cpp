// A router on the CPU: the experts of each token, and the gradient of its logits. Sorting is in
// moe_sort.h, rows are moved by moe_rows.h.
//
//   choose   one row of logits, in L1 from here on
//              --> p = softmax or sigmoid, to memory
//              --> integer keys of logits (+ noise), least first in the order of falling logits
//              --> K times the least key, which then counts as taken
//   gates    p of each chosen expert, 0 where dropped, divided by a sum of them
//   backward dp = dprobabilities + gradients of the gates, scattered into one row in L1
//              --> dlogits = p (dp - <p, dp>), or p (1 - p) dp
//
// Memory traffic per token: E logits read, 4 E bytes of p written, 4 K bytes of ids; backward reads
// p (and dprobabilities) and writes dlogits once. No sum leaves a row, so nothing depends on the
// threads.
#include "moe_route.h"

#include "columns.h"
#include "isa.h"
#include "moe_rows.h"
#include "moe_sort.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kTokensPerTask = 128;

ENCFAST_INLINE Vec exponential(Vec x) { return exp2<6>(x * splat(kLog2e)); }

// 1 / (1 + exp(-x)), whose exponential never exceeds 1.
ENCFAST_INLINE Vec sigmoid(Vec x) {
  const Vec e = exponential(zeros() - abs(x)), below = splat(1.0f) / (splat(1.0f) + e);
  return select_within(zeros(), x, splat(__builtin_inff()), below, e * below);
}

ENCFAST_INLINE int32_t least_of(IntVec v) {
  int32_t lanes[kW];
  store(lanes, (Vec)v);
  int32_t least = lanes[0];
  for (int i = 1; i < kW; ++i) least = lanes[i] < least ? lanes[i] : least;
  return least;
}

constexpr int32_t kTaken = kLastKey;
int32_t least_key(const int32_t* keys, int64_t E) {
  IntVec least = IntVec{} + kTaken;
  for (int64_t e = 0; e < E; e += kW) {
    const IntVec k = (IntVec)load(keys + e);
    least = k < least ? k : least;
  }
  return least_of(least);
}

// Ascending keys in the order of falling numbers; NaN comes last, but before what is taken. Returns
// the least.
int32_t make_falling_keys(const float* logits, const float* noise, int64_t E, int32_t* keys) {
  for (int64_t e = 0; e < E; e += kW) {
    Vec x = load(logits + e);
    if (noise) x += load(noise + e);
    const IntVec rising = keys_of(zeros() - x);
    store(keys + e, (Vec)(rising + (IntVec)(rising == kLastKey)));
  }
  for (int64_t e = E; e % kW; ++e) keys[e] = kTaken;
  return least_key(keys, E);
}

// The number that has this key; NaN has none.
ENCFAST_INLINE float number_of(int32_t key) {
  return -float_of(static_cast<uint32_t>(key ^ ((key >> 31) & INT32_MAX)));
}

// The first expert with this key, which counts as taken from now on.
int32_t take(int32_t* keys, int64_t E, int32_t key) {
  IntVec ids{}, first = IntVec{} + kTaken;
  for (int i = 0; i < kW; ++i) ids[i] = i;
  for (int64_t e = 0; e < E; e += kW, ids += kW) {
    const IntVec found = (IntVec)load(keys + e) == key ? ids : IntVec{} + kTaken;
    first = found < first ? found : first;
  }
  const int32_t expert = least_of(first);
  keys[expert] = kTaken;
  return expert;
}

// logits: -inf behind the last column, up to a whole vector; scratch: as long; top: the largest.
void write_softmax(const float* logits, float top, int64_t E, float* scratch, float* p) {
  Vec total = zeros();
  for (int64_t e = 0; e < E; e += kW) {
    const Vec x = exponential(load(logits + e) - splat(top));
    total += x;
    store(scratch + e, x);
  }
  const Vec divisor = splat(sum(total));
  for_columns(E, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kF32>(p, at, load_at<kF32>(scratch, at) / divisor);
  });
}

void write_sigmoid(const float* logits, int64_t E, float* p) {
  for_columns(E, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kF32>(p, at, sigmoid(load_at<kF32>(logits, at)));
  });
}

// keys: of the logits, whose least is `key`.
void choose_experts(const MoeChooseParams& p, int64_t t, const float* logits, int32_t* keys,
                    int32_t key, float* noise, int32_t* chosen) {
  int64_t j = 0;
  if (p.noise != MoeNoise::kNone) {
    if (p.noise == MoeNoise::kGumbelRest) chosen[j++] = take(keys, p.E, key);
    draw_gumbel(p.key, t, p.E, noise);
    key = make_falling_keys(logits, noise, p.E, keys);
    if (j == 1) {
      keys[chosen[0]] = kTaken;
      key = least_key(keys, p.E);
    }
  }
  for (; j < p.K; ++j) {
    chosen[j] = take(keys, p.E, key);
    if (j + 1 < p.K) key = least_key(keys, p.E);
  }
}

template <DType kT>
void choose_task(int64_t task, int slot, void* ctx) {
  const MoeChooseParams& p = *static_cast<const MoeChooseParams*>(ctx);
  const RowRange tokens = rows_of_task(p.N, kTokensPerTask, task);
  float* logits = p.workspace + slot * kChooseRows * p.row_floats;
  float* scratch = logits + p.row_floats;
  int32_t* keys = reinterpret_cast<int32_t*>(scratch + p.row_floats);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    float* probabilities = p.probabilities + t * p.E;
    int32_t* chosen = p.expert_ids + t * p.K;
    if (p.mask && !p.mask[t]) {
      std::memset(probabilities, 0, p.E * sizeof(float));
      for (int64_t j = 0; j < p.K; ++j) chosen[j] = -1;
      continue;
    }
    const char* row = row_of<kT>(p.logits, t);
    for_columns(p.E, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      store_at<kF32>(logits, at, load_at<kT>(row, at));
    });
    for (int64_t e = p.E; e % kW; ++e) logits[e] = -__builtin_inff();
    const int32_t key = make_falling_keys(logits, nullptr, p.E, keys);
    if (p.scoring == MoeScoring::kSoftmax) {
      write_softmax(logits, number_of(key), p.E, scratch, probabilities);
    } else {
      write_sigmoid(logits, p.E, probabilities);
    }
    choose_experts(p, t, logits, keys, key, scratch, chosen);
  }
}

void choose(const MoeChooseParams& p, const Pool& pool) {
  with_dtype(p.logits.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.N, kTokensPerTask), choose_task<decltype(type)::value>,
             const_cast<MoeChooseParams*>(&p));
  });
}

// ---- gates ----

// The sum that a token's gates are divided by; 1 where they are not.
struct Divisor {
  float value;
  bool bounded;  // the sum itself was smaller
};

Divisor divisor_of(const float* p, const int32_t* ids, const int32_t* slots, int64_t K,
                   MoeRenormalise renormalise) {
  if (renormalise == MoeRenormalise::kNone) return {1.0f, true};
  float total = 0;
  for (int64_t j = 0; j < K; ++j) {
    if (renormalise == MoeRenormalise::kChosen || slots[j] >= 0) total += p[ids[j]];
  }
  // A NaN passes.
  return total < kLeastGateSum ? Divisor{kLeastGateSum, true} : Divisor{total, false};
}

void gates_task(int64_t task, int, void* ctx) {
  const MoeGatesParams& p = *static_cast<const MoeGatesParams*>(ctx);
  const RowRange tokens = rows_of_task(p.N, kTokensPerTask, task);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const float* scores = p.probabilities + t * p.E;
    const int32_t *ids = p.expert_ids + t * p.K, *slots = p.slots + t * p.K;
    float* gates = p.gates + t * p.K;
    if (ids[0] < 0) {
      std::memset(gates, 0, p.K * sizeof(float));
      continue;
    }
    const Divisor divisor = divisor_of(scores, ids, slots, p.K, p.renormalise);
    for (int64_t j = 0; j < p.K; ++j) {
      gates[j] = slots[j] < 0 ? 0.0f : scores[ids[j]] / divisor.value;
    }
  }
}

void gates(const MoeGatesParams& p, const Pool& pool) {
  pool.run(pool.self, tasks_of(p.N, kTokensPerTask), gates_task, const_cast<MoeGatesParams*>(&p));
}

// Adds the gradients of a token's gates to those of its probabilities.
void add_gate_gradients(const MoeRouteBwdParams& p, int64_t t, float* dp) {
  const float *scores = p.probabilities + t * p.E, *dgates = p.dgates + t * p.K;
  const int32_t *ids = p.expert_ids + t * p.K, *slots = p.slots + t * p.K;
  const Divisor divisor = divisor_of(scores, ids, slots, p.K, p.renormalise);
  float shared = 0;
  if (!divisor.bounded) {
    for (int64_t j = 0; j < p.K; ++j) {
      if (slots[j] >= 0) shared += dgates[j] * scores[ids[j]];
    }
    shared /= divisor.value;
  }
  for (int64_t j = 0; j < p.K; ++j) {
    const bool kept = slots[j] >= 0;
    if (!kept && p.renormalise != MoeRenormalise::kChosen) continue;
    dp[ids[j]] += ((kept ? dgates[j] : 0.0f) - shared) / divisor.value;
  }
}

template <DType kT>
void route_bwd_task(int64_t task, int slot, void* ctx) {
  const MoeRouteBwdParams& p = *static_cast<const MoeRouteBwdParams*>(ctx);
  const RowRange tokens = rows_of_task(p.N, kTokensPerTask, task);
  float* dp = p.workspace + slot * p.row_floats;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    char* dlogits = row_of<kT>(p.dlogits, t);
    if (p.expert_ids[t * p.K] < 0) {
      std::memset(dlogits, 0, p.E * element_bytes(kT));
      continue;
    }
    const float* scores = p.probabilities + t * p.E;
    if (p.dprobabilities) {
      std::memcpy(dp, p.dprobabilities + t * p.E, p.E * sizeof(float));
    } else {
      std::memset(dp, 0, p.E * sizeof(float));
    }
    if (p.dgates) add_gate_gradients(p, t, dp);
    const bool softmax = p.scoring == MoeScoring::kSoftmax;
    Accumulator inner;
    if (softmax) {
      for_columns(p.E, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
        inner.parts[i] += load_at<kF32>(scores, at) * load_at<kF32>(dp, at);
      });
    }
    const Vec mean = splat(inner.total()), one = splat(1.0f);
    for_columns(p.E, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      const Vec s = load_at<kF32>(scores, at), d = load_at<kF32>(dp, at);
      store_at<kT>(dlogits, at, softmax ? s * (d - mean) : s * (one - s) * d);
    });
  }
}

void route_bwd(const MoeRouteBwdParams& p, const Pool& pool) {
  with_dtype(p.dlogits.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.N, kTokensPerTask), route_bwd_task<decltype(type)::value>,
             const_cast<MoeRouteBwdParams*>(&p));
  });
}

}  // namespace

extern const MoeRouteKernels kMoeRoute = {choose,  sort,      gates,         route_bwd,
                                          permute, unpermute, unpermute_bwd, jitter};

}  // namespace encfast::ENCFAST_ISA
