// Losses over all pairs of rows of a and b. The [B, M] logits exist one block at a time.
//
//                    stripe: 960 rows of b, packed once, shared by all threads
//                  +--------+--------+---+
//       192 rows   | panel  | panel  |   |   products (gemm_tile.h), then, in L1, what the loss
//       of a       +--------+--------+---+   makes of them (rank_tile.h)
//
//   forward   a task takes 192 rows along a stripe. A row's running maximum and sum are the task's
//             own; a column's are those of each task, put together after the stripe.
//   backward  products again, block by block of 960 x 960, whose gradients G (3.7 MB, half of it in
//             bf16, in slices of 96 words) then serve two products: da += G b (192 rows a task) and
//             db += G^T a (192 columns a task). Along a stripe db is complete, so its fp32 sums are
//             a stripe's; those of da are da itself in float32, and a copy of it in float32
//             otherwise.
//
// Words are fp32, or pairs of bf16 where one instruction multiplies them: G is then rounded to bf16
// once, after the gradients of scale and bias have been taken from it. Sums are fp32.
//
// 8 B M D operations in both passes, against 6 where the logits are kept. Every sum is owned by one
// task and goes over blocks in order: results do not depend on the number of threads.
#include "rank_loss.h"

#include "isa.h"
#include "rank_grad.h"
#include "rank_tile.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr int64_t kSide = 960;   // of a stripe and of a block of G: five chunks
constexpr int64_t kPiece = 320;  // columns of a task where a stripe is shared
constexpr int64_t kPieces = kSide / kPiece, kChunks = kSide / kChunk;

// ---- Forward ----

template <class Word>
int64_t fwd_slot_floats(const RankProblem& q) {
  return left_floats<Word>(q.D) + kChunk * kPiece;
}

template <class Word>
int64_t fwd_bytes(const RankProblem& q, int threads) {
  const int64_t columns = q.loss == RankLoss::kBoth ? 2 * parts(q.B, kChunk) * kSide : 0;
  const int64_t floats = Panels::floats<Word>(q.D, kSide) + columns + q.B +
                         threads * fwd_slot_floats<Word>(q) + (threads + 3) * kMaxLanes;
  return floats * static_cast<int64_t>(sizeof(float));
}

template <class Word>
class Forward {
 public:
  Forward(const RankFwdParams& p, const Pool& pool)
      : p_(p), q_(p.q), pool_(pool), stripe_(nullptr, kSide) {
    Carver c{static_cast<float*>(p.workspace)};
    stripe_.data = c.take(Panels::floats<Word>(q_.D, kSide));
    totals_ = c.take(q_.B);
    if (q_.loss == RankLoss::kBoth) {
      col_largest_ = c.take(parts(q_.B, kChunk) * kSide);
      col_sums_ = c.take(parts(q_.B, kChunk) * kSide);
    }
    slots_ = c.take(0);
  }

  void run() {
    for (int64_t i = 0; i < q_.B; ++i) {
      p_.positive[i] = p_.row_loss[i] = totals_[i] = 0;
      if (q_.loss != RankLoss::kSigmoid) p_.rows.largest[i] = -kInf;
    }
    for (int64_t column = 0; column < q_.M; column += kSide) run_stripe(column);
    if (q_.loss != RankLoss::kSigmoid) finish();
  }

 private:
  void run_stripe(int64_t column) {
    const int64_t n = smaller(kSide, q_.M - column);
    const RowSpan<Word> b{q_.b, column, n, q_.D};
    run_tasks(pool_, parts(n, kPanel),
              [&](int64_t panel, int) { b.pack_transposed_panel(panel, stripe_); });
    run_tasks(pool_, parts(q_.B, kChunk), [&](int64_t chunk, int slot) {
      run_chunk(chunk, column, n, slots_ + slot * round_up(fwd_slot_floats<Word>(q_), kMaxLanes));
    });
    if (q_.loss == RankLoss::kBoth) {
      run_tasks(pool_, parts(n, kPanel),
                [&](int64_t panel, int) { join_columns(column, panel * kPanel, n); });
    }
  }

  void run_chunk(int64_t chunk, int64_t column, int64_t n, float* left) {
    const int64_t row = chunk * kChunk, rows = smaller(kChunk, q_.B - row);
    float* x = left + left_floats<Word>(q_.D);
    RowSpan<Word>{q_.a, row, rows, q_.D}.pack_left(left);
    for (int64_t from = 0; from < n; from += kPiece) {
      const int64_t width = smaller(kPiece, n - from);
      for (int64_t j = 0; j < width; j += kPanel) {
        float* panel = x + j * kChunk;
        multiply_panel<Word>(left, rows, stripe_, (from + j) / kPanel, q_.D, panel);
        to_logits(panel, rows, width - j, q_.scale, q_.bias);
        hide_excluded(q_, row, rows, column + from + j, smaller(kPanel, width - j), panel);
        if (q_.loss == RankLoss::kBoth) {
          const int64_t at = chunk * kSide + from + j;
          column_sums(panel, rows, col_largest_ + at, col_sums_ + at);
        }
      }
      add_rows(row, rows, column + from, width, x);
    }
  }

  // Columns [column, column + n) of rows that lie in panels of kChunk rows.
  void add_rows(int64_t row, int64_t rows, int64_t column, int64_t n, const float* x) {
    for (int64_t i = 0; i < rows; ++i, ++row) {
      const RowOfPanels logits{x + i * kPanel, kChunk * kPanel, parts(n, kPanel)};
      const int64_t positive = q_.positives[row] - column;
      const bool here = positive >= 0 && positive < n;
      if (here) {
        p_.positive[row] = logits.x[positive / kPanel * logits.distance + positive % kPanel];
      }
      if (q_.loss == RankLoss::kSigmoid) {
        p_.row_loss[row] += softplus_row(logits, here ? positive : -1);
      } else {
        add_to_row(logits, p_.rows.largest[row], totals_[row]);
      }
    }
  }

  // The sums of all chunks for one panel of a stripe.
  void join_columns(int64_t column, int64_t from, int64_t n) {
    for (int64_t j = from; j < smaller(from + kPanel, n); j += kW) {
      const int64_t chunks = parts(q_.B, kChunk);
      Vec m = load(col_largest_ + j), l = zeros();
      for (int64_t c = 1; c < chunks; ++c) m = max(m, load(col_largest_ + c * kSide + j));
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = c * kSide + j;
        l = fma(load(col_sums_ + at), exp(load(col_largest_ + at) - m), l);
      }
      const int count = static_cast<int>(smaller(kW, n - j));
      store_partial_as<DType::kFloat32>(p_.columns.largest + column + j, m, count);
      store_partial_as<DType::kFloat32>(p_.columns.log + column + j, log(l), count);
    }
  }

  void finish() {
    const bool both = q_.loss == RankLoss::kBoth;
    for (int64_t i = 0; i < q_.B; ++i) {
      p_.rows.log[i] = log(splat(totals_[i]))[0];
      const int64_t t = q_.positives[i];
      const float x = p_.positive[i];
      if (t >= 0) p_.row_loss[i] = (p_.rows.largest[i] - x) + p_.rows.log[i];
      if (both) p_.col_loss[i] = t < 0 ? 0 : (p_.columns.largest[t] - x) + p_.columns.log[t];
    }
  }

  const RankFwdParams& p_;
  const RankProblem& q_;
  const Pool& pool_;
  Panels stripe_;
  float *totals_, *slots_, *col_largest_ = nullptr, *col_sums_ = nullptr;
};

// ---- Backward ----

template <class Word>
int64_t bwd_slot_floats(const RankProblem& q) {
  const int64_t logits = left_floats<Word>(q.D) + kChunk * kPanel;
  return logits > kTurnedFloats ? logits : kTurnedFloats;
}

template <class Word>
int64_t bwd_bytes(const RankProblem& q, int threads) {
  const int64_t width = round_up(q.D, kPanel);
  const int64_t packed = Panels::floats<Word>(q.D, kSide) + 2 * Panels::floats<Word>(kSide, q.D);
  const int64_t sums = kSide * width + round_up(q.B, kShortTileRows) * width;
  const int64_t floats = packed + GradBlock<Word>::floats(kSide, kSide) + sums +
                         threads * bwd_slot_floats<Word>(q) + (threads + 8) * kMaxLanes;
  return floats * static_cast<int64_t>(sizeof(float)) +
         kChunks * kPieces * 2 * static_cast<int64_t>(sizeof(double));
}

template <class Word>
class Backward {
 public:
  Backward(const RankBwdParams& p, const Pool& pool)
      : p_(p),
        q_(p.q),
        pool_(pool),
        width_(round_up(p.q.D, kPanel)),
        stripe_(nullptr, kSide),
        b_terms_(nullptr, p.q.D),
        a_terms_(nullptr, p.q.D) {
    Carver c{static_cast<float*>(p.workspace)};
    stripe_.data = c.take(Panels::floats<Word>(q_.D, kSide));
    b_terms_.data = c.take(Panels::floats<Word>(kSide, q_.D));
    a_terms_.data = c.take(Panels::floats<Word>(kSide, q_.D));
    grads_ = {c.take(GradBlock<Word>::floats(kSide, kSide)), kSide};
    db_sums_ = c.take(kSide * width_);
    partials_ = reinterpret_cast<double*>(c.take(kChunks * kPieces * 4));
    a_in_place_ = sums_in_place(p.da, q_.B, q_.D);
    da_sums_ = a_in_place_ ? static_cast<float*>(p.da.data)
                           : c.take(round_up(q_.B, kShortTileRows) * width_);
    slots_ = c.take(0);
  }

  void run() {
    *p_.dscale = *p_.dbias = 0;
    for (int64_t column = 0; column < q_.M; column += kSide) {
      const int64_t n = smaller(kSide, q_.M - column);
      pack_stripe(column, n);
      for (int64_t row = 0; row < q_.B; row += kSide) {
        run_block(row, smaller(kSide, q_.B - row), column, n);
      }
      if (p_.db.data) write_sums<Word::kT>(pool_, db_sums_, p_.db, column, n, q_.D);
    }
    if (p_.da.data && !a_in_place_) write_sums<Word::kT>(pool_, da_sums_, p_.da, 0, q_.B, q_.D);
  }

 private:
  float* slot(int index) const {
    return slots_ + index * round_up(bwd_slot_floats<Word>(q_), kMaxLanes);
  }

  void pack_stripe(int64_t column, int64_t n) {
    const RowSpan<Word> b{q_.b, column, n, q_.D};
    const int64_t panels = parts(n, kPanel), blocks = p_.da.data ? parts(n, kStep<Word>) : 0;
    run_tasks(pool_, panels + blocks, [&](int64_t task, int) {
      if (task < panels) return b.pack_transposed_panel(task, stripe_);
      b.pack_terms(task - panels, b_terms_);
    });
  }

  void run_block(int64_t row, int64_t rows, int64_t column, int64_t n) {
    const RowSpan<Word> a{q_.a, row, rows, q_.D};
    const int64_t pieces = parts(n, kPiece), logits = parts(rows, kChunk) * pieces;
    const int64_t blocks = p_.db.data ? parts(rows, kStep<Word>) : 0;
    run_tasks(pool_, logits + blocks, [&](int64_t task, int index) {
      if (task >= logits) return a.pack_terms(task - logits, a_terms_);
      const int64_t chunk = task / pieces * kChunk, piece = task % pieces * kPiece;
      partials_[2 * task] = partials_[2 * task + 1] = 0;
      with_loss(a, row, chunk, column, piece, smaller(kPiece, n - piece), slot(index),
                partials_ + 2 * task);
    });
    for (int64_t task = 0; task < logits; ++task) {
      *p_.dscale += partials_[2 * task];
      *p_.dbias += partials_[2 * task + 1];
    }
    const int64_t spans = parts(q_.D, kSpan);
    const int64_t of_a = p_.da.data ? parts(rows, kChunk) * spans : 0;
    const int64_t of_b = p_.db.data ? parts(n, kChunk) * spans : 0;
    run_tasks(pool_, of_a + of_b, [&](int64_t task, int index) {
      const bool for_a = task < of_a;
      if (!for_a) task -= of_a;
      const int64_t chunk = task / spans * kChunk, span = task % spans * kSpan;
      if (for_a) {
        grads_.add_times_b(rows, chunk, n, b_terms_, span, q_.D, da_sums_ + row * width_,
                           column > 0);
      } else {
        grads_.add_transposed_times_a(rows, chunk, n, a_terms_, span, q_.D, db_sums_, row > 0,
                                      slot(index));
      }
    });
  }

  void with_loss(const RowSpan<Word>& a, int64_t row, int64_t chunk, int64_t column, int64_t piece,
                 int64_t n, float* left, double* sums) {
    switch (q_.loss) {
      case RankLoss::kRows:
        return logit_grads<RankLoss::kRows>(a, row, chunk, column, piece, n, left, sums);
      case RankLoss::kBoth:
        return logit_grads<RankLoss::kBoth>(a, row, chunk, column, piece, n, left, sums);
      case RankLoss::kSigmoid:
        return logit_grads<RankLoss::kSigmoid>(a, row, chunk, column, piece, n, left, sums);
    }
  }

  // Rows [chunk, +kChunk) and columns [piece, piece + n) of the block at (row, column).
  template <RankLoss kLoss>
  void logit_grads(const RowSpan<Word>& a, int64_t row, int64_t chunk, int64_t column,
                   int64_t piece, int64_t n, float* left, double* sums) {
    const int64_t rows = smaller(kChunk, a.n - chunk);
    float* s = left + left_floats<Word>(q_.D);
    RowSpan<Word>{q_.a, row + chunk, rows, q_.D}.pack_left(left);
    for (int64_t j = 0; j < n; j += kPanel) {
      multiply_panel<Word>(left, rows, stripe_, (piece + j) / kPanel, q_.D, s);
      PanelGrad<kLoss, kGradType<Word>> grad(p_, column + piece + j, smaller(kPanel, n - j));
      for (int64_t i = 0; i < rows; ++i) {
        grad.run(row + chunk + i, s + i * kPanel, grads_.at(chunk + i, piece + j));
      }
      grad.take(sums[0], sums[1]);
    }
  }

  const RankBwdParams& p_;
  const RankProblem& q_;
  const Pool& pool_;
  const int64_t width_;
  Panels stripe_, b_terms_, a_terms_;
  GradBlock<Word> grads_;
  float *db_sums_, *da_sums_, *slots_;
  double* partials_;
  bool a_in_place_;
};

int64_t fwd_bytes_of(const RankProblem& q, int threads) {
  return bytes_of(q.a.dtype, [&](auto tag) {
    return fwd_bytes<ProductWord<decltype(tag)::value>>(q, threads);
  });
}

int64_t bwd_bytes_of(const RankProblem& q, int threads) {
  return bytes_of(q.a.dtype, [&](auto tag) {
    return bwd_bytes<ProductWord<decltype(tag)::value>>(q, threads);
  });
}

void fwd(const RankFwdParams& p, const Pool& pool) {
  with_dtype(p.q.a.dtype,
             [&](auto tag) { Forward<ProductWord<decltype(tag)::value>>(p, pool).run(); });
}

void bwd(const RankBwdParams& p, const Pool& pool) {
  with_dtype(p.q.a.dtype,
             [&](auto tag) { Backward<ProductWord<decltype(tag)::value>>(p, pool).run(); });
}

}  // namespace

extern const RankLossKernels kRankLoss = {fwd_bytes_of, bwd_bytes_of, fwd, bwd};

}  // namespace encfast::ENCFAST_ISA
