// The K rows of b with the largest products with each row of a, without the products.
//
//                     stripe: 960 rows of b, packed once for a group of rows of a
//                   +--------+--------+---+
//        96 rows    | panel  | panel  |   |   products in L1; those that beat their row's K-th so
//        of a       +--------+--------+---+   far are appended to its buffer of 2 K + 256
//
// A full buffer is cut down to its K best, which takes a count or two per bit (least_keys.h); that
// happens after K more entries at the earliest. Entries stay in the order of their columns, so ties
// fall to the lower one, and at the end a stable sort by bytes of the key puts the best first.
// Workspace: a group's buffers, 8 (2 K + 256) bytes for each of its 192 rows per thread.
#pragma once
#include "least_keys.h"
#include "partial_ranking.h"
#include "rank_pack.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kStripe = 960;
constexpr int64_t kTopRows = 96;  // of a task
constexpr int64_t kTasksOfThread = 2;

struct Entry {
  int32_t key;  // the least is the best
  int32_t column;
};

// One row's best entries so far.
class TopBuffer {
 public:
  static int64_t capacity(int64_t K) { return round_up(2 * K + 256, kCountStep); }
  static int64_t floats(int64_t K) { return 2 * capacity(K); }

  TopBuffer(float* at, int64_t K)
      : keys_(reinterpret_cast<int32_t*>(at)), columns_(keys_ + capacity(K)), K_(K) {}

  // Products of columns [column, +n), n <= kPanel.
  void add(const float* products, int64_t column, int64_t n, int64_t positive) {
    if (count_ > capacity(K_) - kPanel) cut();
    alignas(64) int32_t keys[kPanel];
    bool any = !full_;
    for (int v = 0; v < 2; ++v) {
      const IntVec k = keys_of(zeros() - load(products + v * kW));
      store(keys + v * kW, (Vec)k);
      const IntVec beats = (IntVec)(k < IntVec{} + limit_);
      for (int i = 0; i < kW; ++i) any |= beats[i] != 0;
    }
    if (!any) return;
    for (int64_t i = 0; i < n; ++i) {
      if ((full_ && keys[i] >= limit_) || column + i == positive) continue;
      keys_[count_] = keys[i];
      columns_[count_++] = static_cast<int32_t>(column + i);
    }
  }

  // The K best, the best first; scratch holds 2 K entries.
  void write(int64_t* out, Entry* scratch) {
    if (count_ > K_) cut();
    Entry *from = scratch, *to = scratch + K_;
    for (int64_t i = 0; i < K_; ++i) from[i] = {keys_[i], columns_[i]};
    for (int shift = 0; shift < 32; shift += 8) {
      sort_by_byte(from, to, shift);
      Entry* swap = from;
      from = to;
      to = swap;
    }
    for (int64_t i = 0; i < K_; ++i) out[i] = from[i].column;
  }

 private:
  void cut() {
    for (int64_t i = count_; i < round_up(count_, kCountStep); ++i) keys_[i] = kLastKey;
    const Threshold t = find_threshold(keys_, count_, K_);
    int64_t kept = 0, ties = t.ties;
    for (int64_t i = 0; i < count_; ++i) {
      if (keys_[i] > t.key || (keys_[i] == t.key && --ties < 0)) continue;
      keys_[kept] = keys_[i];
      columns_[kept++] = columns_[i];
    }
    count_ = kept;
    limit_ = t.key;
    full_ = true;
  }

  void sort_by_byte(const Entry* from, Entry* to, int shift) const {
    const auto byte = [shift](const Entry& e) {
      return ((static_cast<uint32_t>(e.key) ^ 0x80000000u) >> shift) & 255u;
    };
    int64_t starts[257] = {};
    for (int64_t i = 0; i < K_; ++i) ++starts[byte(from[i]) + 1];
    for (int i = 0; i < 256; ++i) starts[i + 1] += starts[i];
    for (int64_t i = 0; i < K_; ++i) to[starts[byte(from[i])]++] = from[i];
  }

  int32_t *keys_, *columns_;
  int64_t K_;
  int64_t count_ = 0;
  int32_t limit_ = kLastKey;  // of the K best so far, once there were more
  bool full_ = false;
};

template <class Word>
int64_t top_slot_floats(int64_t D, int64_t K) {
  const int64_t products = left_floats<Word>(D) + kTopRows * kPanel, sorted = 4 * K;
  return products > sorted ? products : sorted;
}

int64_t top_rows_at_once(int64_t B, int threads) {
  return smaller(threads * kTasksOfThread * kTopRows, B);
}

constexpr int64_t kTopBufferFloats = (sizeof(TopBuffer) + 3) / 4;

template <class Word>
int64_t hard_negatives_bytes(const HardNegativesParams& p, int threads) {
  const int64_t rows = top_rows_at_once(p.B, threads);
  const int64_t slots = threads * round_up(top_slot_floats<Word>(p.D, p.K), kMaxLanes);
  return 4 * (Panels::floats<Word>(p.D, kStripe) + rows * TopBuffer::floats(p.K) +
              rows * kTopBufferFloats + slots + 4 * kMaxLanes);
}

template <class Word>
class HardNegatives {
 public:
  HardNegatives(const HardNegativesParams& p, const Pool& pool)
      : p_(p),
        pool_(pool),
        group_(top_rows_at_once(p.B, pool.threads(pool.self))),
        stripe_(nullptr, kStripe) {
    Carver c{static_cast<float*>(p.workspace)};
    stripe_.data = c.take(Panels::floats<Word>(p.D, kStripe));
    entries_ = c.take(group_ * TopBuffer::floats(p.K));
    buffers_ = reinterpret_cast<TopBuffer*>(c.take(group_ * kTopBufferFloats));
    slots_ = c.take(0);
  }

  void run() {
    for (int64_t row = 0; row < p_.B; row += group_) {
      const int64_t rows = smaller(group_, p_.B - row);
      for (int64_t i = 0; i < rows; ++i) {
        buffers_[i] = TopBuffer(entries_ + i * TopBuffer::floats(p_.K), p_.K);
      }
      for (int64_t column = 0; column < p_.M; column += kStripe) run_stripe(row, rows, column);
      run_tasks(pool_, rows, [&](int64_t i, int index) {
        buffers_[i].write(p_.candidates + (row + i) * p_.K, reinterpret_cast<Entry*>(slot(index)));
      });
    }
  }

 private:
  float* slot(int index) const {
    return slots_ + index * round_up(top_slot_floats<Word>(p_.D, p_.K), kMaxLanes);
  }

  void run_stripe(int64_t row, int64_t rows, int64_t column) {
    const RowSpan<Word> b{p_.b, column, smaller(kStripe, p_.M - column), p_.D};
    run_tasks(pool_, parts(b.n, kPanel),
              [&](int64_t panel, int) { b.pack_transposed_panel(panel, stripe_); });
    run_tasks(pool_, parts(rows, kTopRows), [&](int64_t task, int index) {
      const int64_t first = task * kTopRows;
      add_rows(row, first, smaller(kTopRows, rows - first), column, b.n, slot(index));
    });
  }

  // n rows from row + first on, columns [column, +width).
  void add_rows(int64_t row, int64_t first, int64_t n, int64_t column, int64_t width, float* left) {
    float* products = left + left_floats<Word>(p_.D);
    RowSpan<Word>{p_.a, row + first, n, p_.D}.pack_left(left);
    for (int64_t j = 0; j < width; j += kPanel) {
      multiply_panel<Word>(left, n, stripe_, j / kPanel, p_.D, products);
      for (int64_t i = 0; i < n; ++i) {
        buffers_[first + i].add(products + i * kPanel, column + j, smaller(kPanel, width - j),
                                p_.positives[row + first + i]);
      }
    }
  }

  const HardNegativesParams& p_;
  const Pool& pool_;
  const int64_t group_;
  Panels stripe_;
  float *entries_, *slots_;
  TopBuffer* buffers_;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
