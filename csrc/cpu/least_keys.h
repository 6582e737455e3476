// Integer keys in the order of floats, and the `keep` least of them by bisection on their value:
// each step is a vectorised count of the keys below. It ends as soon as a count is `keep`: about
// log2 of their number of steps where keys differ, 32 at most whatever they are. No comparison of
// floats decides anything, so NaN and ties have one meaning everywhere.
#pragma once
#include "dtype.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int32_t kLastKey = INT32_MAX;

// Integers in the order of the floats: -0 is 0, and every NaN is kLastKey.
ENCFAST_INLINE IntVec keys_of(Vec noise) {
  const IntVec bits = (IntVec)noise;
  const IntVec magnitude = bits & INT32_MAX;
  const IntVec nan = (IntVec)(magnitude > 0x7f800000);
  const IntVec zero = (IntVec)(magnitude == 0);
  const IntVec keys = bits ^ ((bits >> 31) & INT32_MAX);
  return (keys & ~zero & ~nan) | (nan & kLastKey);
}

// Keys are counted so many at a time; kLastKey stands behind them up to a whole step.
constexpr int64_t kCountStep = 4 * kW;

// How many keys are at most `limit`, which is below kLastKey.
int64_t count_up_to(const int32_t* keys, int64_t n, int32_t limit) {
  const IntVec last = IntVec{} + limit;
  IntVec counts[4] = {};
  for (int64_t i = 0; i < n; i += kCountStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      counts[j] -= (IntVec)((IntVec)load(keys + i + j * kW) <= last);
    }
  }
  const IntVec total = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  int64_t count = 0;
  for (int lane = 0; lane < kW; ++lane) count += total[lane];
  return count;
}

// Kept are the keys below `key`, and the first `ties` that equal it.
struct Threshold {
  int32_t key;
  int64_t ties;
};

Threshold find_threshold(const int32_t* keys, int64_t n, int64_t keep) {
  int64_t low = INT32_MIN, high = kLastKey;  // the keep-th smallest is in low..high
  int64_t below = 0;                         // keys less than low
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t count = count_up_to(keys, n, static_cast<int32_t>(middle));
    if (count == keep) return {static_cast<int32_t>(middle), n};
    if (count > keep) {
      high = middle;
    } else {
      low = middle + 1;
      below = count;
    }
  }
  return {static_cast<int32_t>(low), keep - below};
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
