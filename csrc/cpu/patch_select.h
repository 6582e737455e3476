// The `keep` least of a sequence's numbers, exactly, in one of two orders.
//
//   ordered   noise --> integer keys of the same order --> the keep-th smallest by bisection
//             (least_keys.h) --> one pass over the keys, eight at a time with AVX-512
//   shuffled  (key, place) pairs --> stable radix sort, a byte of the key a pass
//
// Keys of a sequence stay in L1 or L2 (4 bytes a patch; 20 in the sort).
#pragma once
#include "least_keys.h"
#include "patch_gather.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Keys of n numbers, and kLastKey behind them up to a multiple of kCountStep.
void make_keys(const float* noise, int64_t n, int32_t* keys) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(keys + i, (Vec)keys_of(load(noise + i)));
  if (i < n) {
    constexpr DType kF32 = DType::kFloat32;
    const int rest = static_cast<int>(n - i);
    store_partial_as<kF32>(keys + i, (Vec)keys_of(load_partial_as<kF32>(noise + i, rest)), rest);
  }
  for (i = n; i % kCountStep; ++i) keys[i] = kLastKey;
}

// A sequence's share of the results.
struct Selected {
  int64_t first;  // id of its first patch
  int64_t row;    // of its first visible patch
  int64_t *visible, *hidden, *restore;
};

#if defined(__AVX512F__)
// Patches eight at a time: ids are packed by kind in a register and stored as far as they go.
// Returns how many are done.
ENCFAST_INLINE int64_t write_eights(const int32_t* keys, int64_t n, int32_t limit, int64_t& ties,
                                    Selected& to) {
  const __m512i last = _mm512_set1_epi64(limit), none = _mm512_set1_epi64(-1);
  const __m512i steps = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m512i wide =
        _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i)));
    unsigned equal = _mm512_cmpeq_epi64_mask(wide, last);
    const int count = __builtin_popcount(equal);
    for (int64_t over = count - ties; over > 0 && equal; --over) {
      equal &= ~(0x80000000u >> __builtin_clz(equal));  // the last of them
    }
    ties -= count;
    const auto kept = static_cast<__mmask8>(_mm512_cmplt_epi64_mask(wide, last) | equal);
    const int visible = __builtin_popcount(kept);
    const __m512i ids = _mm512_add_epi64(_mm512_set1_epi64(to.first + i), steps);
    const __m512i rows = _mm512_add_epi64(_mm512_set1_epi64(to.row), steps);
    _mm512_mask_storeu_epi64(to.visible, static_cast<__mmask8>((1u << visible) - 1),
                             _mm512_maskz_compress_epi64(kept, ids));
    _mm512_mask_storeu_epi64(to.hidden, static_cast<__mmask8>(0xffu >> visible),
                             _mm512_maskz_compress_epi64(static_cast<__mmask8>(~kept), ids));
    _mm512_storeu_si512(to.restore + i, _mm512_mask_expand_epi64(none, kept, rows));
    to.row += visible;
    to.visible += visible;
    to.hidden += 8 - visible;
  }
  return i;
}
#endif

void write_ordered(const int32_t* keys, int64_t n, Threshold t, Selected to) {
  int64_t ties = t.ties, i = 0;
#if defined(__AVX512F__)
  i = write_eights(keys, n, t.key, ties, to);
#endif
  for (; i < n; ++i) {
    const bool equal = keys[i] == t.key;
    const bool kept = (keys[i] < t.key) | (equal & (ties > 0));
    ties -= equal;
    int64_t* at = kept ? to.visible : to.hidden;
    *at = to.first + i;
    to.restore[i] = kept ? to.row : -1;
    to.row += kept;
    to.visible += kept;
    to.hidden += !kept;
  }
}

constexpr int kDigitBits = 8, kDigits = 4;
constexpr int kBuckets = 1 << kDigitBits;

ENCFAST_INLINE int digit_of(uint64_t pair, int digit) {
  return static_cast<int>(pair >> (32 + digit * kDigitBits)) & (kBuckets - 1);
}

// Sorts pairs by their upper 32 bits, equals in their order. Returns where the result is: in
// `pairs` or in `other`.
uint64_t* sort_pairs(uint64_t* pairs, uint64_t* other, int64_t n) {
  uint32_t counts[kDigits][kBuckets] = {};
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) ++counts[d][digit_of(pairs[i], d)];
  }
  for (int d = 0; d < kDigits; ++d) {
    if (counts[d][digit_of(pairs[0], d)] == n) continue;  // one digit for all
    uint32_t place = 0;
    for (uint32_t& count : counts[d]) {
      const uint32_t here = count;
      count = place;
      place += here;
    }
    for (int64_t i = 0; i < n; ++i) other[counts[d][digit_of(pairs[i], d)]++] = pairs[i];
    uint64_t* sorted = other;
    other = pairs;
    pairs = sorted;
  }
  return pairs;
}

void write_shuffled(const uint64_t* sorted, int64_t n, int64_t keep, Selected to) {
  for (int64_t r = 0; r < n; ++r) {
    const int64_t place = static_cast<uint32_t>(sorted[r]);
    const bool kept = r < keep;
    (kept ? to.visible[r] : to.hidden[r - keep]) = to.first + place;
    to.restore[place] = kept ? to.row + r : -1;
  }
}

void select_task(int64_t b, int slot, void* ctx) {
  const SelectPatchesParams& p = *static_cast<const SelectPatchesParams*>(ctx);
  const int64_t first = p.cu_seqlens[b], n = p.cu_seqlens[b + 1] - first;
  const int64_t row = p.cu_keep[b], keep = p.cu_keep[b + 1] - row;
  if (n == 0) return;
  const Selected to{first, row, p.visible + row, p.hidden + (first - row), p.restore + first};
  char* workspace = p.workspace + slot * p.workspace_stride;
  if (p.ordered) {
    int32_t* keys = reinterpret_cast<int32_t*>(workspace);
    make_keys(p.noise + first, n, keys);
    write_ordered(keys, n, find_threshold(keys, n, keep), to);
    return;
  }
  uint64_t* pairs = reinterpret_cast<uint64_t*>(workspace);
  uint64_t* other = pairs + n;
  int32_t* keys = reinterpret_cast<int32_t*>(other + n);
  make_keys(p.noise + first, n, keys);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;  // unsigned, the same order
    pairs[i] = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(i);
  }
  write_shuffled(sort_pairs(pairs, other, n), n, keep, to);
}

void select_patches(const SelectPatchesParams& p, const Pool& pool) {
  pool.run(pool.self, p.batch, select_task, const_cast<SelectPatchesParams*>(&p));
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
