// From raw products q.k to scores: scale, softcap, biases, visibility, and their maximum.
//
// Lanes are queries and rows are keys, so every reduction over keys is vertical: one max and one
// add per vector, no shuffles. Key blocks that every query of the block sees skip the visibility
// test.
#pragma once
#include "attn_bias.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

struct KeyRange {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

inline KeyRange intersect(KeyRange a, KeyRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// The score rule of one query head in one sequence.
struct ScoreRule {
  float scale, softcap;
  float slope;  // ALiBi
  bool alibi;
  bool biased;  // rel_bias or bias
  int64_t left, right;
  int64_t len_k, shift;  // query row i stands at key position i + shift

  ScoreRule(const VarlenAttnGeometry& g, int64_t b, int64_t h, int64_t len_q, int64_t len_k_)
      : scale(g.scale),
        softcap(g.softcap),
        slope(g.alibi_slopes ? g.alibi_slopes[b * g.alibi_batch_stride + h] : 0.0f),
        alibi(g.alibi_slopes != nullptr),
        biased(g.rel_bias.data != nullptr || g.bias.data != nullptr),
        left(g.left),
        right(g.right),
        len_k(len_k_),
        shift(len_k_ - len_q) {}

  // A positive multiple of the raw product: maxima can be taken before scaling.
  bool is_linear() const { return softcap == 0.0f && !alibi && !biased && scale > 0.0f; }

  // Keys some query of rows [begin, end) sees, and keys all of them see.
  KeyRange visible(int64_t begin, int64_t end) const {
    return bounded(begin + shift, end - 1 + shift);
  }
  KeyRange common(int64_t begin, int64_t end) const {
    return bounded(end - 1 + shift, begin + shift);
  }

 private:
  KeyRange bounded(int64_t left_from, int64_t right_from) const {
    const KeyRange all = {0, len_k};
    return intersect(all,
                     {left < 0 ? 0 : left_from - left, right < 0 ? len_k : right_from + right + 1});
  }
};

// The unit of scores, maxima and lse between a product and its exponential. In units of log 2 the
// exponential is exp2 itself. That costs fp32 its last digits: log2(e) * scale and lse * log2(e)
// are rounded, large scores multiply the rounding, and forward and backward no longer agree on P.
// It keeps natural units and pays one more multiplication; to weights in bf16 it makes no
// difference.
template <bool kExact>
struct ScoreUnit {
  static constexpr float kPerNatural = kExact ? 1.0f : kLog2e;
  static constexpr float kNatural = kExact ? 1.0f : kLn2;

  template <int kDegree>
  static ENCFAST_INLINE Vec exp(Vec x) {
    return exp2<kDegree>(kExact ? x * splat(kLog2e) : x);
  }
};

// What a score needs beyond scale: each mode is one instantiation of the loops below. kBiased adds
// a LaneRows (attn_bias.h) and, in the backward, applies dropout. It and softcap are slower anyhow,
// so they carry ALiBi and the mask with them.
enum class ScoreMode {
  kLinear,
  kLinearMasked,
  kAlibi,
  kAlibiMasked,
  kBiased,
  kSoftcap,
  kSoftcapBiased
};

template <ScoreMode kM>
struct ModeTag {
  static constexpr ScoreMode value = kM;
};

// `biased`: there is something to add, or dropout.
template <class F>
ENCFAST_INLINE void with_mode(const ScoreRule& rule, bool biased, bool masked, F f) {
  if (rule.softcap != 0.0f && biased) return f(ModeTag<ScoreMode::kSoftcapBiased>{});
  if (rule.softcap != 0.0f) return f(ModeTag<ScoreMode::kSoftcap>{});
  if (biased) return f(ModeTag<ScoreMode::kBiased>{});
  if (rule.alibi && masked) return f(ModeTag<ScoreMode::kAlibiMasked>{});
  if (rule.alibi) return f(ModeTag<ScoreMode::kAlibi>{});
  if (masked) return f(ModeTag<ScoreMode::kLinearMasked>{});
  return f(ModeTag<ScoreMode::kLinear>{});
}

// The score of one vector of queries against keys counted from a block's first.
template <ScoreMode kM>
struct LaneScore {
  static constexpr bool kSoftcap = kM == ScoreMode::kSoftcap || kM == ScoreMode::kSoftcapBiased;
  static constexpr bool kBiased = kM == ScoreMode::kBiased || kM == ScoreMode::kSoftcapBiased;
  static constexpr bool kAll = kSoftcap || kBiased;
  static constexpr bool kAlibi = kAll || kM == ScoreMode::kAlibi || kM == ScoreMode::kAlibiMasked;
  static constexpr bool kMasked =
      kAll || kM == ScoreMode::kLinearMasked || kM == ScoreMode::kAlibiMasked;

  Vec scale, cap, slope, position, first_key, last_key;
  LaneRows bias;

  // Lanes are query rows from `row` on; `key` is the block's first key. Positions are relative to
  // the block so that floats hold them exactly wherever they decide visibility. Scores come
  // multiplied by `unit`, as `bias_` already is.
  LaneScore(const ScoreRule& r, int64_t row, int64_t key, float unit, LaneRows bias_)
      : bias(bias_) {
    const Vec inf = splat(__builtin_inff());
    scale = splat(kSoftcap ? r.scale / r.softcap : r.scale * unit);
    cap = splat(r.softcap * unit);
    slope = splat(-r.slope * unit);
    position = iota() + splat(static_cast<float>(row + r.shift - key));
    first_key = r.left < 0 ? -inf : position - splat(static_cast<float>(r.left));
    last_key = r.right < 0 ? inf : position + splat(static_cast<float>(r.right));
  }

  // Score + shift of raw product s with the block's key j. With a softcap, *tanh_out
  // receives its tanh, whose derivative the backward needs.
  ENCFAST_INLINE Vec operator()(Vec s, int j, Vec shift, Vec* tanh_out) const {
    return at(s, j, splat(static_cast<float>(j)), shift, tanh_out);
  }
  // `key`: j in all lanes, for loops that count in vectors.
  ENCFAST_INLINE Vec at(Vec s, int j, Vec key, Vec shift, Vec* tanh_out) const {
    if constexpr (kBiased) shift += bias.at(j);
    Vec x;
    if constexpr (kSoftcap) {
      const Vec t = tanh(s * scale);
      *tanh_out = t;
      x = fma(t, cap, shift);
    } else {
      x = fma(s, scale, shift);
    }
    if constexpr (kAlibi) x = fma(abs(position - key), slope, x);
    if constexpr (kMasked) x = select_within(first_key, key, last_key, x, splat(-__builtin_inff()));
    return x;
  }
};

// m = maximum over keys [0, n) of s[n][kLanes], per lane.
template <int kVecs>
inline void max_over_keys(const float* s, int n, Vec m[kVecs]) {
  Vec even[kVecs], odd[kVecs];
  for (int v = 0; v < kVecs; ++v) even[v] = odd[v] = splat(-__builtin_inff());
  int j = 0;
  for (; j + 2 <= n; j += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      even[v] = max(even[v], load(s + j * kLanes + v * kW));
      odd[v] = max(odd[v], load(s + (j + 1) * kLanes + v * kW));
    }
  }
  if (j < n) {
    for (int v = 0; v < kVecs; ++v) even[v] = max(even[v], load(s + j * kLanes + v * kW));
  }
  for (int v = 0; v < kVecs; ++v) m[v] = max(even[v], odd[v]);
}

// Replaces raw products by scores in place, times `unit`; m = their maximum over keys, per lane.
template <int kVecs>
inline void apply_rule(const ScoreRule& rule, bool masked, float unit, int64_t row, int64_t key,
                       int n, LaneRows bias, float* s, Vec m[kVecs]) {
  with_mode(rule, rule.biased, masked, [&](auto tag) {
    using Score = LaneScore<decltype(tag)::value>;
    const Score score[2] = {{rule, row, key, unit, bias.vec(0)},
                            {rule, row + kW, key, unit, bias.vec(1)}};
    Vec top[kVecs];
    for (int v = 0; v < kVecs; ++v) top[v] = splat(-__builtin_inff());
    Vec key_of_block = zeros();
    for (int j = 0; j < n; ++j, key_of_block += splat(1.0f)) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        float* p = s + j * kLanes + v * kW;
        Vec unused;
        const Vec x = score[v].at(load(p), j, key_of_block, zeros(), &unused);
        store(p, x);
        top[v] = max(top[v], x);
      }
    }
    for (int v = 0; v < kVecs; ++v) m[v] = top[v];
  });
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
