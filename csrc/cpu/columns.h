// Columns of a row, one vector at a time, and sums over rows that do not depend on the threads.
#pragma once
#include "dtype.h"
#include "matrix.h"
#include "parallel.h"

#define ENCFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace encfast::ENCFAST_ISA {
namespace {

// Columns c .. c + kW - 1, and the fewer that are left at the end of a row.
struct Whole {
  int64_t c;
};
struct Tail {
  int64_t c;
  int count;
};

constexpr int kUnroll = 4;

// f(columns, i) over [0, C); i in [0, kUnroll) names an accumulator, so that sums do not wait for
// each other.
template <class F>
ENCFAST_INLINE void for_columns(int64_t C, F f) {
  int64_t c = 0;
  for (; c + kUnroll * kW <= C; c += kUnroll * kW) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) f(Whole{c + i * kW}, i);
  }
  for (; c + kW <= C; c += kW) f(Whole{c}, 0);
  if (c < C) f(Tail{c, static_cast<int>(C - c)}, 0);
}

struct Accumulator {
  Vec parts[kUnroll] = {zeros(), zeros(), zeros(), zeros()};

  ENCFAST_INLINE float total() const { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

template <DType kT>
ENCFAST_INLINE Vec load_at(const void* row, Whole at) {
  return load_as<kT>(static_cast<const char*>(row) + at.c * element_bytes(kT));
}
template <DType kT>
ENCFAST_INLINE Vec load_at(const void* row, Tail at) {
  return load_partial_as<kT>(static_cast<const char*>(row) + at.c * element_bytes(kT), at.count);
}
template <DType kT>
ENCFAST_INLINE void store_at(void* row, Whole at, Vec v) {
  store_as<kT>(static_cast<char*>(row) + at.c * element_bytes(kT), v);
}
template <DType kT>
ENCFAST_INLINE void store_at(void* row, Tail at, Vec v) {
  store_partial_as<kT>(static_cast<char*>(row) + at.c * element_bytes(kT), v, at.count);
}

// Zero in lanes that are no columns.
ENCFAST_INLINE Vec keep(Vec v, Whole) { return v; }
ENCFAST_INLINE Vec keep(Vec v, Tail at) {
  return select_within(zeros(), iota(), splat(static_cast<float>(at.count - 1)), v, zeros());
}

// v as a tensor of this dtype would hold it.
template <DType kT>
ENCFAST_INLINE Vec rounded_to(Vec v) {
  if constexpr (kT == DType::kFloat32) return v;
  alignas(64) char row[4 * kW];
  store_as<kT>(row, v);
  return load_as<kT>(row);
}

constexpr DType promoted(DType a, DType b) { return a == b ? a : DType::kFloat32; }

template <DType kT>
ENCFAST_INLINE const char* row_of(const ConstMatrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.row_stride * element_bytes(kT);
}
template <DType kT>
ENCFAST_INLINE char* row_of(const Matrix& m, int64_t row) {
  return static_cast<char*>(m.data) + row * m.row_stride * element_bytes(kT);
}

// Partial sums of parameter gradients, one row of each task, added in the order of the tasks.
struct PartialSums {
  const float* partials;  // [tasks][width]
  float* out;             // [width]
  int64_t tasks;
  int64_t width;  // a multiple of kMaxLanes

  static constexpr int64_t kColumns = 1024;  // of one task

  static void run_task(int64_t task, int, void* ctx) {
    const PartialSums& p = *static_cast<const PartialSums*>(ctx);
    const int64_t end = (task + 1) * kColumns < p.width ? (task + 1) * kColumns : p.width;
    for (int64_t c = task * kColumns; c < end; c += kW) {
      Vec total = load(p.partials + c);
      for (int64_t i = 1; i < p.tasks; ++i) total += load(p.partials + i * p.width + c);
      store(p.out + c, total);
    }
  }

  void run(const Pool& pool) const {
    pool.run(pool.self, (width + kColumns - 1) / kColumns, run_task,
             const_cast<PartialSums*>(this));
  }
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
