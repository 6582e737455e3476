// Rows of tokens to their experts and back.
//
//   permute          out[s] = x[rows[s] / K]                  copies, written in order
//   unpermute        out[t] = sum of gates[t, j] * y[slots[t, j]]    K rows read per row written
//   its gradient     dy[s] = gate * dout[token]  and  dgate = <dout[token], y[s]>   both in one
//   pass jitter           out = x * (1 +- amount), numbers drawn in L1 as they are needed
//
// Memory traffic: every row is read and written once, dout K times (one token's rows are far
// apart). Rows that lie anywhere are prefetched while the row before is worked on. A row of a
// result belongs to one task, which adds the choices of a token in their order.
#pragma once
#include "columns.h"
#include "copy_row.h"
#include "moe_draws.h"
#include "moe_route.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr DType kF32 = DType::kFloat32;

struct RowRange {
  int64_t begin, end;
};

RowRange rows_of_task(int64_t rows, int64_t per_task, int64_t task) {
  const int64_t end = (task + 1) * per_task;
  return {task * per_task, end < rows ? end : rows};
}

int64_t tasks_of(int64_t rows, int64_t per_task) { return (rows + per_task - 1) / per_task; }

template <DType kT>
void permute_task(int64_t task, int, void* ctx) {
  const MoePermuteParams& p = *static_cast<const MoePermuteParams*>(ctx);
  const RowRange slots = rows_of_task(p.M, p.rows_per_task, task);
  const auto source = [&](int64_t s) { return row_of<kT>(p.x, p.rows[s] / p.K); };
  const int64_t row_bytes = p.C * element_bytes(kT);
  const bool fresh = p.M * row_bytes > kFreshBytes;
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    char* out = row_of<kT>(p.out, s);
    if (p.rows[s] < 0) {
      std::memset(out, 0, row_bytes);
      continue;
    }
    const int64_t next = s + 1 < slots.end && p.rows[s + 1] >= 0 ? s + 1 : s;
    copy_row(out, source(s), source(next), row_bytes, fresh);
  }
}

void permute(const MoePermuteParams& p, const Pool& pool) {
  with_dtype(p.x.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.M, p.rows_per_task), permute_task<decltype(type)::value>,
             const_cast<MoePermuteParams*>(&p));
  });
}

// The kept choices of a token, a few at a time.
constexpr int kParts = 4;
struct Parts {
  const char* row[kParts];
  float gate[kParts];
  int count = 0;
};

template <DType kT>
ENCFAST_INLINE void add_part(const MoeUnpermuteParams& p, int64_t choice, Parts& parts) {
  parts.row[parts.count] = row_of<kT>(p.y, p.slots[choice]);
  parts.gate[parts.count++] = p.gates ? p.gates[choice] : 1.0f;
}

// Sums that no register holds are kept in float32 between rounds of kParts choices.
template <DType kT>
void sum_parts(const MoeUnpermuteParams& p, const Parts& parts, const Parts& next, bool first,
               bool last, float* sums, char* out) {
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    Vec sum = first ? zeros() : load_at<kF32>(sums, at);
    for (int i = 0; i < parts.count; ++i) {
      sum = fma(load_at<kT>(parts.row[i], at), splat(parts.gate[i]), sum);
    }
    for (int i = 0; i < next.count; ++i) {
      __builtin_prefetch(next.row[i] + at.c * element_bytes(kT));
    }
    if (last) {
      store_at<kT>(out, at, sum);
    } else {
      store_at<kF32>(sums, at, sum);
    }
  });
}

template <DType kT>
Parts take_parts(const MoeUnpermuteParams& p, int64_t t, int64_t& j) {
  Parts parts;
  for (; j < p.K && parts.count < kParts; ++j) {
    if (p.slots[t * p.K + j] >= 0) add_part<kT>(p, t * p.K + j, parts);
  }
  while (j < p.K && p.slots[t * p.K + j] < 0) ++j;
  return parts;
}

template <DType kT>
void unpermute_task(int64_t task, int slot, void* ctx) {
  const MoeUnpermuteParams& p = *static_cast<const MoeUnpermuteParams*>(ctx);
  const RowRange tokens = rows_of_task(p.N, p.rows_per_task, task);
  float* sums = p.workspace + slot * p.row_floats;
  int64_t j = 0;
  Parts parts;
  if (tokens.begin < tokens.end) parts = take_parts<kT>(p, tokens.begin, j);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    for (bool first = true, last = false; !last; first = false) {
      last = j == p.K;
      Parts next;
      if (!last) {
        next = take_parts<kT>(p, t, j);
      } else if (t + 1 < tokens.end) {
        j = 0;
        next = take_parts<kT>(p, t + 1, j);
      }
      sum_parts<kT>(p, parts, next, first, last, sums, row_of<kT>(p.out, t));
      parts = next;
    }
  }
}

void unpermute(const MoeUnpermuteParams& p, const Pool& pool) {
  with_dtype(p.y.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.N, p.rows_per_task), unpermute_task<decltype(type)::value>,
             const_cast<MoeUnpermuteParams*>(&p));
  });
}

template <DType kT>
void unpermute_bwd_task(int64_t task, int, void* ctx) {
  const MoeUnpermuteBwdParams& p = *static_cast<const MoeUnpermuteBwdParams*>(ctx);
  const RowRange slots = rows_of_task(p.M, p.rows_per_task, task);
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    const int64_t choice = p.rows[s];
    char* dy = row_of<kT>(p.dy, s);
    if (choice < 0) {
      std::memset(dy, 0, p.C * element_bytes(kT));
      continue;
    }
    const char *dout = row_of<kT>(p.dout, choice / p.K), *y = row_of<kT>(p.y, s);
    const int64_t next = s + 1 < slots.end && p.rows[s + 1] >= 0 ? p.rows[s + 1] : choice;
    const char* ahead = row_of<kT>(p.dout, next / p.K);
    const Vec gate = splat(p.gates[choice]);
    Accumulator total;
    for_columns(p.C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
      const Vec d = load_at<kT>(dout, at);
      total.parts[i] = fma(d, load_at<kT>(y, at), total.parts[i]);
      store_at<kT>(dy, at, d * gate);
      __builtin_prefetch(ahead + at.c * element_bytes(kT));
    });
    p.dgates[choice] = total.total();
  }
}

void unpermute_bwd(const MoeUnpermuteBwdParams& p, const Pool& pool) {
  with_dtype(p.y.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.M, p.rows_per_task), unpermute_bwd_task<decltype(type)::value>,
             const_cast<MoeUnpermuteBwdParams*>(&p));
  });
}

template <DType kT>
void jitter_task(int64_t task, int, void* ctx) {
  const MoeJitterParams& p = *static_cast<const MoeJitterParams*>(ctx);
  const RowRange rows = rows_of_task(p.N, p.rows_per_task, task);
  const Vec amount = splat(p.amount);
  alignas(64) float factors[kDrawStep];
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    const char* x = row_of<kT>(p.x, t);
    char* out = row_of<kT>(p.out, t);
    for (int64_t c = 0; c < p.C; c += kDrawStep) {
      draw_columns(p.key, t, c, kJitterDraws, factors, [&](IntVec upper) ENCFAST_INLINE_LAMBDA {
        return jitter_of<VecArithmetic>(upper, amount);
      });
      const int64_t at_bytes = c * element_bytes(kT);
      for_columns(p.C - c < kDrawStep ? p.C - c : kDrawStep,
                  [&](auto at, int) ENCFAST_INLINE_LAMBDA {
                    const Vec v = load_at<kT>(x + at_bytes, at) * load_at<kF32>(factors, at);
                    store_at<kT>(out + at_bytes, at, v);
                  });
    }
  }
}

void jitter(const MoeJitterParams& p, const Pool& pool) {
  with_dtype(p.x.dtype, [&](auto type) {
    pool.run(pool.self, tasks_of(p.N, p.rows_per_task), jitter_task<decltype(type)::value>,
             const_cast<MoeJitterParams*>(&p));
  });
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
