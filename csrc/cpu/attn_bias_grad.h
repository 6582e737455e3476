// Gradients of rel_bias and bias from blocks of d score, [keys][kLanes].
//
//   bias             each pair belongs to one block: rows, transposed out of the block. A bias that
//                    heads share is summed over them in the order in which one thread takes them.
//   table by query   the same rows, added to the entries of their offsets
//   one table        sums along the diagonals of the block, added to the table of this sequence and
//                    head; those are summed over sequences after all tasks (reduce_rel_partials).
//
// Sums are fp32. Every entry is written, by one task, also those that no query sees.
#pragma once
#include "attn_bias.h"
#include "attn_score.h"

namespace encfast::ENCFAST_ISA {
namespace {

inline float sum_of(const float* x, int n) {
  Vec acc = zeros();
  int i = 0;
  for (; i + kW <= n; i += kW) acc += load(x + i);
  if (i < n) acc += load_partial_as<DType::kFloat32>(x + i, n - i);
  return sum(acc);
}

inline void add_to(const float* x, int n, float* out) {
  int i = 0;
  for (; i + kW <= n; i += kW) store(out + i, load(out + i) + load(x + i));
  for (; i < n; ++i) out[i] += x[i];
}

// out[clip(first + i, 0, size - 1)] += x[i] for i < n.
inline void add_clipped(const float* x, int n, int64_t first, int64_t size, float* out) {
  const auto clipped = [&](int64_t i, int low) {
    return static_cast<int>(i < low ? low : i < n ? i : n);
  };
  const int inner = clipped(1 - first, 0), after = clipped(size - 1 - first, inner);
  if (inner > 0) out[0] += sum_of(x, inner);
  if (after > inner) add_to(x + inner, after - inner, out + first + inner);
  if (n > after) out[size - 1] += sum_of(x + after, n - after);
}

// band[i] = sum of block[j][l] over l - j + n - 1 = i, for j < n and kVecs vectors of lanes.
//
// Diagonals move up one lane per key. What falls out of the last lane is complete: it is stored in
// the last lane of a vector whose others later stores overwrite, so nothing is read back.
template <int kVecs>
inline void sum_diagonals(const float* block, int n, float* band) {
  Vec run[kVecs];
  for (int v = 0; v < kVecs; ++v) run[v] = load(block + v * kW);
  for (int j = 1; j < n; ++j) {
    store(band + n - j + (kVecs - 1) * kW, run[kVecs - 1]);
    for (int v = kVecs - 1; v >= 0; --v) {
      const Vec below = v > 0 ? run[v > 0 ? v - 1 : 0] : zeros();
      run[v] = shift_in(run[v], below) + load(block + j * kLanes + v * kW);
    }
  }
  for (int v = 0; v < kVecs; ++v) store(band + v * kW, run[v]);
}

template <int kKeyBlock>
class BiasGradient {
 public:
  // Of workspace; none where there is nothing to have a gradient.
  static int64_t words(const VarlenAttnGeometry& g) {
    return g.rel_bias.data || g.bias.data ? kBandWords + kRowsWords : 0;
  }

  BiasGradient(const VarlenAttnBwdParams& p, int64_t b, int64_t len_q, int64_t len_k,
               float* workspace)
      : g_(p.g),
        grads_(p.bias_grads),
        b_(b),
        len_k_(len_k),
        shift_(len_k - len_q),
        span_(RelSpan::of(len_q, len_k, p.g.rel_bias.radius)),
        band_(workspace),
        rows_(workspace + kBandWords) {}

  bool wanted() const { return grads_.bias || grads_.rel_bias; }

  // Before the blocks of queries [row, row + n) with keys `visited` of `panel`: zeros for the rest.
  // Called for every panel, in order.
  void begin(int64_t head, int64_t row, int n, KeyRange panel, KeyRange visited) {
    if (panel.begin == 0) begin_head(head, row, n);
    if (!grads_.bias || !is_first(head)) return;
    if (visited.empty()) visited = {panel.begin, panel.begin};
    const int64_t size = element_bytes(grads_.bias_dtype);
    for (int64_t i = row; i < row + n; ++i) {
      std::memset(pairs_of(head, i, panel.begin), 0, (visited.begin - panel.begin) * size);
      std::memset(pairs_of(head, i, visited.end), 0, (panel.end - visited.end) * size);
    }
  }

  // Asks for the rows that add will write, early enough to be there.
  void prefetch(int64_t head, int64_t row, int lanes, int64_t key, int n) const {
    if (!grads_.bias) return;
    const int64_t bytes = n * element_bytes(grads_.bias_dtype);
    for (int i = 0; i < lanes; ++i) prefetch_bytes<true>(pairs_of(head, row + i, key), bytes);
  }

  // d score of queries [row, row + lanes) and keys [key, key + n), block[keys][kLanes]. Lanes from
  // `lanes` to the next whole vector hold zeros.
  template <int kVecs>
  void add(int64_t head, int64_t row, int lanes, int64_t key, int n, const float* block) {
    if (one_table()) {
      sum_diagonals<kVecs>(block, n, band_);
      const int64_t first_offset = key + n - 1 - (row + shift_);
      add_clipped(band_, n - 1 + kVecs * kW, span_.after - first_offset, span_.size(),
                  partial_of(head));
    }
    if (!grads_.bias && !by_query()) return;
    rows_from_lanes<kVecs>(block, n);
    for (int i = 0; i < lanes; ++i) add_row(head, row + i, key, n, rows_ + i * kKeyBlock);
  }

 private:
  static constexpr int64_t kBandWords = kKeyBlock + kLanes;
  static constexpr int64_t kRowsWords = static_cast<int64_t>(kKeyBlock) * kLanes;

  bool by_query() const { return grads_.rel_bias && g_.rel_bias.per_query; }
  bool one_table() const { return grads_.rel_bias && !g_.rel_bias.per_query; }
  // The first head that writes a matrix: all of them, or the one that starts a sum.
  bool is_first(int64_t head) const { return head == 0 || grads_.bias_head_stride > 0; }

  char* pairs_of(int64_t head, int64_t i, int64_t key) const {
    const int64_t at = head * grads_.bias_head_stride + g_.bias.offsets[b_] + i * len_k_ + key;
    return static_cast<char*>(grads_.bias) + at * element_bytes(grads_.bias_dtype);
  }
  float* table_of(int64_t head, int64_t i) const {
    return grads_.rel_bias + ((g_.cu_seqlens_q[b_] + i) * g_.H + head) * table_size();
  }
  int64_t table_size() const { return 2 * g_.rel_bias.radius + 1; }
  // Entry span.after - o for offset o: the order of sum_diagonals.
  float* partial_of(int64_t head) const {
    return grads_.rel_partials + grads_.partial_starts[b_] + head * span_.size();
  }

  void begin_head(int64_t head, int64_t row, int n) {
    if (one_table() && row == 0 && span_.size() > 0) {
      std::memset(partial_of(head), 0, sizeof(float) * span_.size());
    }
    if (!by_query()) return;
    for (int64_t i = row; i < row + n; ++i) {
      std::memset(table_of(head, i), 0, sizeof(float) * table_size());
    }
  }

  template <int kVecs>
  void rows_from_lanes(const float* block, int n) {
    for (int v = 0; v < kVecs; ++v) {
      for (int j = 0; j < n; j += kW) {
        Vec r[kW];
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) r[i] = load(block + (j + i) * kLanes + v * kW);
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) store(rows_ + (v * kW + i) * kKeyBlock + j, r[i]);
      }
    }
  }

  void add_row(int64_t head, int64_t i, int64_t key, int n, const float* row) {
    if (grads_.bias && is_first(head)) {
      store_row(row, n, pairs_of(head, i, key));
    } else if (grads_.bias) {
      add_to(row, n, reinterpret_cast<float*>(pairs_of(head, i, key)));
    }
    if (by_query()) {
      add_clipped(row, n, key - (i + shift_) + g_.rel_bias.radius, table_size(), table_of(head, i));
    }
  }

  void store_row(const float* row, int n, char* out) const {
    with_dtype(grads_.bias_dtype, [&](auto tag) {
      constexpr DType kT = decltype(tag)::value;
      for_each_vec(n, [&](int j, int m) {
        char* p = out + j * element_bytes(kT);
        if (m == kW) {
          store_as<kT>(p, load(row + j));
        } else {
          store_partial_as<kT>(p, load(row + j), m);
        }
      });
    });
  }

  const VarlenAttnGeometry& g_;
  const BiasGrads& grads_;
  const int64_t b_, len_k_, shift_;
  const RelSpan span_;
  float *band_, *rows_;
};

// One head of the gradient of a table for all queries: the partials of its sequences, in order.
inline void reduce_rel_partials(const VarlenAttnBwdParams& p, int64_t head) {
  const VarlenAttnGeometry& g = p.g;
  const int64_t radius = g.rel_bias.radius;
  float* table = p.bias_grads.rel_bias + head * (2 * radius + 1);
  std::memset(table, 0, sizeof(float) * (2 * radius + 1));
  for (int64_t b = 0; b < g.B; ++b) {
    const RelSpan span = RelSpan::of(g.cu_seqlens_q[b + 1] - g.cu_seqlens_q[b],
                                     g.cu_seqlens_k[b + 1] - g.cu_seqlens_k[b], radius);
    const float* partial =
        p.bias_grads.rel_partials + p.bias_grads.partial_starts[b] + head * span.size();
    for (int64_t i = 0; i < span.size(); ++i) table[radius + span.after - i] += partial[i];
  }
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
