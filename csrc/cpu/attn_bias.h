// rel_bias and bias of one block of scores: kLanes queries, n keys, in lanes like the scores.
//
//   one table for all queries   a band: the entries of offsets  key + n - 1 - position .. down.
//                               Key j's lanes are kLanes neighbours in it, those of key j + 1 start
//                               one entry before: no block is written.
//   matrices, tables by query   kLanes rows of n numbers, transposed
//
// Per score of a block: one load, and for rows one more, a store and a part of a transposition.
#pragma once
#include "attn_pack.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Something for each key and lane: key j's kLanes floats from data + j * stride on.
struct LaneRows {
  const float* data;
  int64_t stride;

  LaneRows vec(int v) const { return {data + v * kW, stride}; }
  ENCFAST_INLINE Vec at(int j) const { return load(data + j * stride); }
};

alignas(64) constexpr float kZeroLanes[kLanes] = {};
constexpr LaneRows kNoBias = {kZeroLanes, 0};

// Calls f(i, n) for the vectors of `count` elements; n < kW elements for the last.
template <class F>
ENCFAST_INLINE void for_each_vec(int count, F f) {
  int i = 0;
  for (; i + kW <= count; i += kW) f(i, kW);
  if (i < count) f(i, count - i);
}

// -inf where a byte is 0, else 0.
ENCFAST_INLINE Vec hidden_where_zero(const uint8_t* bytes, int n) {
  uint8_t some[kW] = {};
  const uint8_t* all = bytes;
  if (n < kW) {
    std::memcpy(some, bytes, static_cast<size_t>(n));
    all = some;
  }
#if defined(__AVX512F__)
  const IntVec wide =
      (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(all)));
#elif defined(__AVX2__)
  const IntVec wide =
      (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(all)));
#else
  IntVec wide;
  for (int i = 0; i < kW; ++i) wide[i] = all[i];
#endif
  return (Vec)((IntVec)(wide == 0) & (IntVec)splat(-__builtin_inff()));
}

// out[i] (+)= unit * table[clip(first + i, 0, size - 1)] for i < count, in whole vectors.
template <DType kT>
inline void take_clipped(const char* table, int64_t size, int64_t first, int count, float unit,
                         bool add, float* out) {
  constexpr int64_t kBytes = element_bytes(kT);
  const Vec first_entry = splat(load_element<kT>(table));
  const Vec last_entry = splat(load_element<kT>(table + (size - 1) * kBytes));
  for (int i = 0; i < count; i += kW) {
    const int64_t x = first + i;
    Vec v = first_entry;
    if (x >= 0 && x + kW <= size) {
      v = load_as<kT>(table + x * kBytes);
    } else if (x >= size - 1) {
      v = last_entry;
    } else if (x + kW > 1) {
      for (int l = x < 0 ? static_cast<int>(-x) : 0; l < kW; ++l) {
        v[l] = x + l < size ? load_element<kT>(table + (x + l) * kBytes) : last_entry[0];
      }
    }
    v *= splat(unit);
    store(out + i, add ? load(out + i) + v : v);
  }
}

// Fetches `bytes` at p into L1, for writing or reading.
template <bool kWrite>
inline void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + at, kWrite, 3);
  }
}

template <int kKeyBlock>
class BiasBlock {
 public:
  // Of workspace; none where there is nothing to add.
  static int64_t words(const VarlenAttnGeometry& g) {
    return (has_table(g) ? kBandWords : 0) + (has_rows(g) ? 2 * kBlockWords : 0);
  }

  // Numbers come out multiplied by `unit`, those of sequence b.
  BiasBlock(const VarlenAttnGeometry& g, int64_t b, int64_t len_q, int64_t len_k, float unit,
            float* workspace)
      : g_(g),
        first_row_(g.cu_seqlens_q[b]),
        first_pair_(g.bias.data ? g.bias.offsets[b] : 0),
        len_k_(len_k),
        shift_(len_k - len_q),
        span_(RelSpan::of(len_q, len_k, g.rel_bias.radius)),
        unit_(unit),
        band_(workspace),
        rows_(workspace + (has_table(g) ? kBandWords : 0)),
        block_(rows_ + kBlockWords) {}

  // Asks for what fill will read, early enough to be there.
  void prefetch(int64_t head, int64_t row, int lanes, int64_t key, int n) const {
    if (!g_.bias.data) return;
    const int64_t size = g_.bias.visibility ? 1 : element_bytes(g_.bias.dtype);
    const char* first = static_cast<const char*>(g_.bias.data) + pair(head, row, key) * size;
    for (int i = 0; i < lanes; ++i) prefetch_bytes<false>(first + i * len_k_ * size, n * size);
  }

  // Queries [row, row + lanes) of `head`, keys [key, key + n); 0 in the lanes after.
  template <int kVecs>
  LaneRows fill(int64_t head, int64_t row, int lanes, int64_t key, int n) {
    if (has_table(g_)) fill_band(head, row, key, n, kVecs * kW);
    if (!has_rows(g_)) return {band_ + n - 1, -1};
    for (int i = 0; i < lanes; ++i) fill_row(head, row + i, key, n, rows_ + i * kKeyBlock);
    for (int i = lanes; i < kVecs * kW; ++i) {
      std::memset(rows_ + i * kKeyBlock, 0, sizeof(float) * round_up(n, kW));
    }
    transpose_to_lanes(rows_, kKeyBlock, kVecs, static_cast<int>(round_up(n, kW)), block_);
    if (has_table(g_)) add_band<kVecs>(n);
    return {block_, kLanes};
  }

 private:
  static constexpr int64_t kBandWords = kKeyBlock + kLanes;
  static constexpr int64_t kBlockWords = static_cast<int64_t>(kKeyBlock) * kLanes;

  static bool has_table(const VarlenAttnGeometry& g) {
    return g.rel_bias.data && !g.rel_bias.per_query;
  }
  static bool has_rows(const VarlenAttnGeometry& g) {
    return g.bias.data || (g.rel_bias.data && g.rel_bias.per_query);
  }

  // The element of bias for query i and `key`.
  int64_t pair(int64_t head, int64_t i, int64_t key) const {
    return head * g_.bias.head_stride + first_pair_ + i * len_k_ + key;
  }

  // Entry n - 1 - j + l belongs to key j and lane l. Padding lanes get entries that the sequence
  // has, so that it depends on no other.
  void fill_band(int64_t head, int64_t row, int64_t key, int n, int lanes) {
    const RelBias& t = g_.rel_bias;
    const auto* table = static_cast<const float*>(t.data) + head * t.head_stride;
    const auto* own = reinterpret_cast<const char*>(table + t.radius - span_.after);
    const int64_t first_offset = key + n - 1 - (row + shift_);
    take_clipped<DType::kFloat32>(own, span_.size(), span_.after - first_offset, n - 1 + lanes,
                                  unit_, false, band_);
  }

  template <int kVecs>
  void add_band(int n) {
    for (int j = 0; j < n; ++j) {
      for (int v = 0; v < kVecs; ++v) {
        float* p = block_ + j * kLanes + v * kW;
        store(p, load(p) + load(band_ + n - 1 - j + v * kW));
      }
    }
  }

  void fill_row(int64_t head, int64_t i, int64_t key, int n, float* out) {
    if (g_.bias.data) fill_pairs(head, i, key, n, out);
    const RelBias& t = g_.rel_bias;
    if (!t.data || !t.per_query) return;
    with_dtype(t.dtype, [&](auto tag) {
      constexpr DType kT = decltype(tag)::value;
      const char* table =
          static_cast<const char*>(t.data) +
          ((first_row_ + i) * t.row_stride + head * t.head_stride) * element_bytes(kT);
      take_clipped<kT>(table, 2 * t.radius + 1, key - (i + shift_) + t.radius, n, unit_,
                       g_.bias.data != nullptr, out);
    });
  }

  void fill_pairs(int64_t head, int64_t i, int64_t key, int n, float* out) {
    const PairBias& bias = g_.bias;
    const int64_t at = pair(head, i, key);
    if (bias.visibility) {
      const uint8_t* src = static_cast<const uint8_t*>(bias.data) + at;
      for_each_vec(n, [&](int j, int m) { store(out + j, hidden_where_zero(src + j, m)); });
      return;
    }
    with_dtype(bias.dtype, [&](auto tag) {
      constexpr DType kT = decltype(tag)::value;
      const char* src = static_cast<const char*>(bias.data) + at * element_bytes(kT);
      const Vec unit = splat(unit_);
      for_each_vec(n, [&](int j, int m) {
        const char* p = src + j * element_bytes(kT);
        store(out + j, (m == kW ? load_as<kT>(p) : load_partial_as<kT>(p, m)) * unit);
      });
    });
  }

  const VarlenAttnGeometry& g_;
  const int64_t first_row_, first_pair_, len_k_, shift_;
  const RelSpan span_;
  const float unit_;
  float *band_, *rows_, *block_;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
