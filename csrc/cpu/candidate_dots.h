// Products of each row of a with K chosen rows of b, and the gradients of both.
//
//   dense     b packed once; a task multiplies 96 rows of a with all of it and takes
//             K products of each row. Backward: 192 rows at a time, the gradients of K products are
//             spread over zeros, G (rank_grad.h), and da = G b, db += G^T a.
//   gathered  a product, or a multiple of a row of b, at a time. db by rows of b, over the places
//             where each is a candidate.
//
// Dense products are of bf16 where one instruction multiplies it (gemm_pack.h), those with G always
// of floats: G rounded to bf16 would not cancel where candidates differ by little of their length.
//
// Workspace: dense, b and (backward) 192 M + M D floats; it is used where M is a small multiple of
// K. A row of a gradient is one task's or grows block by block in order: no result depends on the
// threads.
#pragma once
#include "partial_ranking.h"
#include "rank_grad.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kDenseRows = 96;
constexpr int64_t kGatherRows = 16;  // rows of a task that gathers or scatters
// A panel, and a slice of G, have rows to spare: a row's pieces then lie in different sets of L1.
constexpr int64_t kPanelFloats = (kDenseRows + 1) * kPanel;
constexpr int64_t kGradSide = kChunk + 4;

template <class Word>
int64_t dots_slot_floats(const CandidateProblem& q) {
  return q.dense ? left_floats<Word>(q.D) + parts(q.M, kPanel) * kPanelFloats
                 : round_up(q.D, kMaxLanes);
}

template <class Word>
int64_t dots_bytes(const CandidateProblem& q, int threads) {
  const int64_t packed = q.dense ? Panels::floats<Word>(q.D, q.M) : 0;
  return 4 * (packed + threads * round_up(dots_slot_floats<Word>(q), kMaxLanes) + 2 * kMaxLanes);
}

template <class Word>
class CandidateDots {
  static constexpr DType kT = Word::kT;

 public:
  CandidateDots(const CandidateDotsParams& p, const Pool& pool)
      : p_(p), q_(p.q), pool_(pool), all_(nullptr, p.q.M) {
    Carver c{static_cast<float*>(p.workspace)};
    if (q_.dense) all_.data = c.take(Panels::floats<Word>(q_.D, q_.M));
    slots_ = c.take(0);
  }

  void run() {
    const int64_t rows = q_.dense ? kDenseRows : kGatherRows;
    if (q_.dense) {
      const RowSpan<Word> b{q_.b, 0, q_.M, q_.D};
      run_tasks(pool_, parts(q_.M, kPanel),
                [&](int64_t panel, int) { b.pack_transposed_panel(panel, all_); });
    }
    run_tasks(pool_, parts(q_.B, rows), [&](int64_t task, int index) {
      float* slot = slots_ + index * round_up(dots_slot_floats<Word>(q_), kMaxLanes);
      const int64_t row = task * rows, n = smaller(rows, q_.B - row);
      if (q_.dense) return multiply_all(row, n, slot);
      for (int64_t i = row; i < row + n; ++i) multiply_chosen(i, slot);
    });
  }

 private:
  void multiply_all(int64_t row, int64_t n, float* left) {
    float* products = left + left_floats<Word>(q_.D);
    RowSpan<Word>{q_.a, row, n, q_.D}.pack_left(left);
    for (int64_t panel = 0; panel < parts(q_.M, kPanel); ++panel) {
      multiply_panel<Word>(left, n, all_, panel, q_.D, products + panel * kPanelFloats);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t* candidates = q_.candidates + (row + i) * q_.K;
      float* dots = p_.dots + (row + i) * q_.K;
      const float* of_row = products + i * kPanel;
      if (i + 1 < n) fetch(of_row + kPanel);
      for (int64_t j = 0; j < q_.K; ++j) {
        const auto c = static_cast<uint64_t>(candidates[j]);
        dots[j] = of_row[c / kPanel * kPanelFloats + c % kPanel];
      }
    }
  }

  // Asks for a row of products, whose pieces lie far apart in L3.
  void fetch(const float* of_row) const {
    for (int64_t panel = 0; panel < parts(q_.M, kPanel); ++panel, of_row += kPanelFloats) {
      for (int64_t lane = 0; lane < kPanel; lane += 16) __builtin_prefetch(of_row + lane, 0, 2);
    }
  }

  void multiply_chosen(int64_t row, float* of_a) {
    const char* a = row_of<kT>(q_.a, row);
    for_columns(q_.D, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      store_at<DType::kFloat32>(of_a, at, load_at<kT>(a, at));
    });
    for (int64_t j = row * q_.K; j < (row + 1) * q_.K; ++j) {
      const char* b = row_of<kT>(q_.b, q_.candidates[j]);
      Accumulator total;
      for_columns(q_.D, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
        total.parts[i] =
            fma(load_at<DType::kFloat32>(of_a, at), load_at<kT>(b, at), total.parts[i]);
      });
      p_.dots[j] = total.total();
    }
  }

  const CandidateDotsParams& p_;
  const CandidateProblem& q_;
  const Pool& pool_;
  Panels all_;
  float* slots_;
};

int64_t dots_bwd_slot_floats(const CandidateProblem& q) {
  if (!q.dense) return round_up(q.D, kMaxLanes);
  return q.M > kTurnedFloats ? round_up(q.M, kMaxLanes) : kTurnedFloats;
}

template <class Word>
int64_t dots_bwd_bytes(const CandidateDotsBwdParams& p, int threads) {
  const CandidateProblem& q = p.q;
  const int64_t width = round_up(q.D, kPanel);
  int64_t floats = threads * round_up(dots_bwd_slot_floats(q), kMaxLanes) + 8 * kMaxLanes;
  if (q.dense) {
    floats += Panels::floats<Word>(q.M, q.D) + Panels::floats<Word>(kChunk, q.D) +
              GradBlock<Word>::floats(kGradSide, q.M) + kChunk * width +
              round_up(q.M, kShortTileRows) * width;
  }
  return 4 * floats;
}

template <class Word>
class CandidateDotsBwd {
  static constexpr DType kT = Word::kT;

 public:
  CandidateDotsBwd(const CandidateDotsBwdParams& p, const Pool& pool)
      : p_(p), q_(p.q), pool_(pool), b_terms_(nullptr, p.q.D), a_terms_(nullptr, p.q.D) {
    Carver c{static_cast<float*>(p.workspace)};
    if (q_.dense) {
      const int64_t width = round_up(q_.D, kPanel);
      b_terms_.data = c.take(Panels::floats<Word>(q_.M, q_.D));
      a_terms_.data = c.take(Panels::floats<Word>(kChunk, q_.D));
      grads_ = {c.take(GradBlock<Word>::floats(kGradSide, q_.M)), kGradSide};
      da_sums_ = c.take(kChunk * width);
      b_in_place_ = sums_in_place(p.db, q_.M, q_.D);
      db_sums_ = b_in_place_ ? static_cast<float*>(p.db.data)
                             : c.take(round_up(q_.M, kShortTileRows) * width);
    }
    slots_ = c.take(0);
  }

  void run() {
    if (!q_.dense) return run_gathered();
    if (p_.da.data) {
      const RowSpan<Word> b{q_.b, 0, q_.M, q_.D};
      run_tasks(pool_, parts(q_.M, kStep<Word>),
                [&](int64_t block, int) { b.pack_terms(block, b_terms_); });
    }
    for (int64_t row = 0; row < q_.B; row += kChunk) run_block(row, smaller(kChunk, q_.B - row));
    if (p_.db.data && !b_in_place_) {
      write_sums<kT>(pool_, db_sums_, p_.db, 0, q_.M, q_.D);
    }
  }

 private:
  float* slot(int index) const {
    return slots_ + index * round_up(dots_bwd_slot_floats(q_), kMaxLanes);
  }

  void run_block(int64_t row, int64_t rows) {
    const RowSpan<Word> a{q_.a, row, rows, q_.D};
    const int64_t spreads = parts(rows, kGatherRows), blocks = parts(rows, kStep<Word>);
    run_tasks(pool_, spreads + blocks, [&](int64_t task, int index) {
      if (task >= spreads) return a.pack_terms(task - spreads, a_terms_);
      for (int64_t i = task * kGatherRows; i < smaller((task + 1) * kGatherRows, rows); ++i) {
        spread(row, i, slot(index));
      }
    });
    const int64_t spans = parts(q_.D, kSpan);
    const int64_t of_a = p_.da.data ? spans : 0;
    const int64_t of_b = p_.db.data ? parts(q_.M, kChunk) * spans : 0;
    run_tasks(pool_, of_a + of_b, [&](int64_t task, int index) {
      if (task < of_a) {
        return grads_.add_times_b(rows, 0, q_.M, b_terms_, task * kSpan, q_.D, da_sums_, false);
      }
      task -= of_a;
      grads_.add_transposed_times_a(rows, task / spans * kChunk, q_.M, a_terms_,
                                    task % spans * kSpan, q_.D, db_sums_, row > 0, slot(index));
    });
    if (p_.da.data) write_sums<kT>(pool_, da_sums_, p_.da, row, rows, q_.D);
  }

  // Gradients of the K products of row + i to their columns of G, zeros to the others. Collected
  // close together: slices of G lie on many pages.
  void spread(int64_t row, int64_t i, float* sums) {
    std::memset(sums, 0, 4 * round_up(q_.M, kW));
    const int64_t first = (row + i) * q_.K;
    for (int64_t j = first; j < first + q_.K; ++j) sums[q_.candidates[j]] += p_.ddots[j];
    for (int64_t c = 0; c < q_.M; c += kW) {
      store(grads_.at(i, c), load(sums + c));
    }
  }

  void run_gathered() {
    const int64_t of_a = p_.da.data ? parts(q_.B, kGatherRows) : 0;
    const int64_t of_b = p_.db.data ? parts(q_.M, kGatherRows) : 0;
    run_tasks(pool_, of_a + of_b, [&](int64_t task, int index) {
      if (task < of_a) {
        for_rows(task, q_.B, [&](int64_t row) { grad_of_a(row, slot(index)); });
      } else {
        for_rows(task - of_a, q_.M, [&](int64_t row) { grad_of_b(row, slot(index)); });
      }
    });
  }

  template <class F>
  void for_rows(int64_t task, int64_t rows, F f) {
    for (int64_t i = task * kGatherRows; i < smaller((task + 1) * kGatherRows, rows); ++i) f(i);
  }

  void grad_of_a(int64_t row, float* sums) {
    std::memset(sums, 0, 4 * round_up(q_.D, kMaxLanes));
    for (int64_t j = row * q_.K; j < (row + 1) * q_.K; ++j) {
      add(row_of<kT>(q_.b, q_.candidates[j]), p_.ddots[j], sums);
    }
    write(sums, row_of<kT>(p_.da, row));
  }

  void grad_of_b(int64_t row, float* sums) {
    std::memset(sums, 0, 4 * round_up(q_.D, kMaxLanes));
    for (int64_t j = p_.begin[row]; j < p_.begin[row + 1]; ++j) {
      add(row_of<kT>(q_.a, p_.places[j] / q_.K), p_.ddots[p_.places[j]], sums);
    }
    write(sums, row_of<kT>(p_.db, row));
  }

  void add(const char* row, float times, float* sums) {
    for_columns(q_.D, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      store_at<DType::kFloat32>(
          sums, at, fma(splat(times), load_at<kT>(row, at), load_at<DType::kFloat32>(sums, at)));
    });
  }

  void write(const float* sums, char* out) {
    for_columns(q_.D, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      store_at<kT>(out, at, load_at<DType::kFloat32>(sums, at));
    });
  }

  const CandidateDotsBwdParams& p_;
  const CandidateProblem& q_;
  const Pool& pool_;
  Panels b_terms_, a_terms_;
  GradBlock<Word> grads_{nullptr, 0};
  float *da_sums_ = nullptr, *db_sums_ = nullptr, *slots_;
  bool b_in_place_ = false;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
