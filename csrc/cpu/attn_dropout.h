// Dropout of attention probabilities: the factors of one block, drawn anew wherever they are needed
// (common/philox.h says from what), so that forward and backward agree and nothing is kept.
//
// Lanes are queries: one vector Philox gives the halves of 8 keys for kW queries.
#pragma once
#include "attn_bias.h"
#include "philox_lanes.h"

namespace encfast::ENCFAST_ISA {
namespace {

struct OneLanes {
  alignas(64) float lane[kLanes];

  constexpr OneLanes() : lane() {
    for (float& x : lane) x = 1.0f;
  }
};
constexpr OneLanes kOneLanes;
constexpr LaneRows kNoDropout = {kOneLanes.lane, 0};

// factors[n][kLanes] of queries from `row` on and keys [key, key + n): 0 or dropout.scale. `key` is
// a multiple of 8; factors of keys up to the next multiple are written too.
template <int kVecs>
inline void fill_dropout(const Dropout& dropout, int64_t b, int64_t head, int64_t row, int64_t key,
                         int n, float* factors) {
  const IntVec threshold = IntVec{} + dropout.threshold;
  const IntVec scale = (IntVec)splat(dropout.scale);
  UIntVec lane;
  for (int i = 0; i < kW; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int j = 0; j < n; j += 8) {
    for (int v = 0; v < kVecs; ++v) {
      PhiloxLanes words[4];
      philox_dropout_words(dropout.key, static_cast<uint32_t>((key + j) / 8),
                           PhiloxLanes(lane + static_cast<uint32_t>(row + v * kW)),
                           static_cast<uint32_t>(head), static_cast<uint32_t>(b), words);
      float* p = factors + j * kLanes + v * kW;
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w, p += 2 * kLanes) {
        const IntVec low = (IntVec)(words[w].v & 0xffffu), high = (IntVec)(words[w].v >> 16);
        store(p, (Vec)((IntVec)(low >= threshold) & scale));
        store(p + kLanes, (Vec)((IntVec)(high >= threshold) & scale));
      }
    }
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
