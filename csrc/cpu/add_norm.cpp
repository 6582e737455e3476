// Residual add and norm, one row at a time.
//
//   forward   x, residual --> total in fp32 (workspace, L1) and rounded (memory, if wanted)
//             workspace   --> variance --> y
//   backward  dy, total   --> the two row means, dweight and dbias into the task's partial sums
//             the same from L1 --> dtotal (and dx, dbranch_scale)
//
// Memory moved per element: forward reads x and residual and writes y and total, backward reads dy,
// total (and the gradient past the norm) and writes dtotal, each once. A row and the partial sums
// stay in L1 or L2 up to a few thousand channels. The variance takes a second pass over the row:
// sums of squares would cancel where the mean is large.
//
// A row belongs to one task. Parameter gradients are summed by each task over its rows, whose
// number does not depend on the threads, and then over the tasks in their order.
#include "add_norm.h"

#include "columns.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr DType kF32 = DType::kFloat32;

struct RowRange {
  int64_t begin, end;
};

template <class Params>
RowRange rows_of_task(const Params& p, int64_t task) {
  const int64_t end = (task + 1) * p.rows_per_task;
  return {task * p.rows_per_task, end < p.N ? end : p.N};
}

template <class Params>
int64_t tasks_of(const Params& p) {
  return (p.N + p.rows_per_task - 1) / p.rows_per_task;
}

// The sum of one row, rounded as its tensor holds it, into `s`. Returns the total of its elements
// or, for RMSNorm, of their squares.
template <DType kX, DType kR>
float add_row(const AddNormParams& p, int64_t row, float* s) {
  constexpr DType kSum = promoted(kX, kR);
  const char* x = row_of<kX>(p.x, row);
  const char* residual = p.residual.data ? row_of<kR>(p.residual, row) : nullptr;
  char* total = p.total.data ? row_of<kSum>(p.total, row) : nullptr;
  // Locals, here and below: for all the compiler knows a store may change what a reference shows.
  const float* branch_scale = p.branch_scale;
  const bool squares = p.kind == NormKind::kRmsNorm;
  Accumulator acc;
  for_columns(p.C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
    Vec v = load_at<kX>(x, at);
    if (branch_scale) v *= load_at<kF32>(branch_scale, at);
    if (residual) v += load_at<kR>(residual, at);
    if (total) store_at<kSum>(total, at, v);
    v = rounded_to<kSum>(v);
    store(s + at.c, v);  // the workspace row holds whole vectors
    acc.parts[i] += squares ? v * v : v;
  });
  return acc.total();
}

struct Moments {
  float mean, variance;
};

// Of a row whose mean is about `guess`. What the guess is off by, a rounding error of the first
// sum, is found here and taken out.
Moments moments_around(const float* s, int64_t C, float guess) {
  Accumulator sums, squares;
  for_columns(C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
    const Vec d = keep(load(s + at.c) - splat(guess), at);
    sums.parts[i] += d;
    squares.parts[i] = fma(d, d, squares.parts[i]);
  });
  const float channels = static_cast<float>(C), off = sums.total() / channels;
  return {guess + off, squares.total() / channels - off * off};
}

template <DType kY>
void normalise_row(const AddNormParams& p, const float* s, float mean, float rstd, void* y) {
  const float *weight = p.weight, *bias = p.bias;
  const Vec centre = splat(mean), scale = splat(rstd);
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    Vec v = (load(s + at.c) - centre) * scale;
    if (weight) v *= load_at<kF32>(weight, at);
    if (bias) v += load_at<kF32>(bias, at);
    store_at<kY>(y, at, v);
  });
}

template <DType kX, DType kR>
void fwd_task(int64_t task, int slot, void* ctx) {
  constexpr DType kSum = promoted(kX, kR);
  const AddNormParams& p = *static_cast<const AddNormParams*>(ctx);
  float* s = p.workspace + slot * p.workspace_stride;
  const float channels = static_cast<float>(p.C);
  const RowRange rows = rows_of_task(p, task);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float average = add_row<kX, kR>(p, row, s) / channels;
    Moments m{0, average};
    if (p.kind == NormKind::kLayerNorm) {
      m = moments_around(s, p.C, average);
      p.mean[row] = m.mean;
    }
    p.rstd[row] = 1.0f / __builtin_sqrtf(m.variance + p.eps);
    normalise_row<kSum>(p, s, m.mean, p.rstd[row], row_of<kSum>(p.y, row));
  }
}

void fwd(const AddNormParams& p, const Pool& pool) {
  const DType residual = p.residual.data ? p.residual.dtype : p.x.dtype;
  with_dtype(p.x.dtype, [&](auto x) {
    with_dtype(residual, [&](auto r) {
      pool.run(pool.self, tasks_of(p), fwd_task<decltype(x)::value, decltype(r)::value>,
               const_cast<AddNormParams*>(&p));
    });
  });
}

// One row of the backward; kT is the dtype of the sum and of every gradient but dx.
template <DType kT, DType kX>
class BackwardRow {
 public:
  BackwardRow(const AddNormBwdParams& p, int64_t row, float* partials)
      : p_(p),
        row_(row),
        mean_(p.kind == NormKind::kLayerNorm ? p.mean[row] : 0.0f),
        rstd_(p.rstd[row]),
        dy_(row_of<kT>(p.dy, row)),
        total_(row_of<kT>(p.total, row)) {
    dweight_ = take(p.want_dweight, partials);
    dbias_ = take(p.want_dbias, partials);
    dbranch_scale_ = take(p.want_dbranch_scale, partials);
  }

  void run() {
    reduce();
    write();
  }

 private:
  float* take(bool wanted, float*& next) const {
    float* section = wanted ? next : nullptr;
    if (wanted) next += p_.section;
    return section;
  }

  // dy times weight, and the normalised row. A value of its own, whose members stay in registers.
  struct Source {
    const char *dy, *total;
    const float* weight;
    Vec mean, rstd;

    template <class At>
    ENCFAST_INLINE Vec normalised(At at) const {
      return keep((load_at<kT>(total, at) - mean) * rstd, at);
    }
    template <class At>
    ENCFAST_INLINE Vec weighted(Vec dy, At at) const {
      return weight ? dy * load_at<kF32>(weight, at) : dy;
    }
  };

  Source source() const { return {dy_, total_, p_.weight, splat(mean_), splat(rstd_)}; }

  static ENCFAST_INLINE void add_to(float* sums, int64_t c, Vec v) {
    store(sums + c, load(sums + c) + v);
  }

  void reduce() {
    const Source in = source();
    float *const dweight = dweight_, *const dbias = dbias_;
    Accumulator direct, along;
    for_columns(p_.C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
      const Vec dy = load_at<kT>(in.dy, at), n = in.normalised(at), g = in.weighted(dy, at);
      direct.parts[i] += g;
      along.parts[i] = fma(g, n, along.parts[i]);
      if (dweight) add_to(dweight, at.c, dy * n);
      if (dbias) add_to(dbias, at.c, dy);
    });
    const float channels = static_cast<float>(p_.C);
    direct_ = p_.kind == NormKind::kLayerNorm ? direct.total() / channels : 0.0f;
    along_ = along.total() / channels;
  }

  void write() const {
    const Source in = source();
    const Vec direct = splat(direct_), along = splat(-along_);
    const char* past = p_.dtotal_in.data ? row_of<kT>(p_.dtotal_in, row_) : nullptr;
    const float* branch_scale = p_.branch_scale;
    const char* x = branch_scale ? row_of<kX>(p_.x, row_) : nullptr;
    char* dx = branch_scale ? row_of<kX>(p_.dx, row_) : nullptr;
    char* dtotal = row_of<kT>(p_.dtotal, row_);
    float* const dbranch_scale = dbranch_scale_;
    for_columns(p_.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      Vec g = in.weighted(load_at<kT>(in.dy, at), at) - direct;
      g = fma(in.normalised(at), along, g) * in.rstd;
      if (past) g += load_at<kT>(past, at);
      store_at<kT>(dtotal, at, g);
      if (!dx) return;
      store_at<kX>(dx, at, g * load_at<kF32>(branch_scale, at));
      if (dbranch_scale) add_to(dbranch_scale, at.c, g * load_at<kX>(x, at));
    });
  }

  const AddNormBwdParams& p_;
  const int64_t row_;
  const float mean_, rstd_;
  const char *dy_, *total_;
  float *dweight_, *dbias_, *dbranch_scale_;
  float direct_ = 0, along_ = 0;  // mean over the row of g, and of g times the normalised row
};

int64_t partial_width(const AddNormBwdParams& p) {
  return (p.want_dweight + p.want_dbias + p.want_dbranch_scale) * p.section;
}

template <DType kT, DType kX>
void bwd_task(int64_t task, int, void* ctx) {
  const AddNormBwdParams& p = *static_cast<const AddNormBwdParams*>(ctx);
  const int64_t width = partial_width(p);
  float* partials = p.partials + task * width;
  if (width) std::memset(partials, 0, sizeof(float) * width);
  const RowRange rows = rows_of_task(p, task);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    BackwardRow<kT, kX>(p, row, partials).run();
  }
}

void bwd(const AddNormBwdParams& p, const Pool& pool) {
  const DType dx = p.branch_scale ? p.x.dtype : p.total.dtype;
  with_dtype(p.total.dtype, [&](auto t) {
    with_dtype(dx, [&](auto x) {
      pool.run(pool.self, tasks_of(p), bwd_task<decltype(t)::value, decltype(x)::value>,
               const_cast<AddNormBwdParams*>(&p));
    });
  });
  PartialSums{p.partials, p.sums, tasks_of(p), partial_width(p)}.run(pool);
}

}  // namespace

extern const AddNormKernels kAddNorm = {fwd, bwd};

}  // namespace encfast::ENCFAST_ISA
