// Activations with an optional bias in front and an optional factor behind, one row at a time.
//
//   forward   a = x[activated + c] + bias, b = x[factor + c] + bias  -->  out[c] = act(a) * b
//   backward  dx[activated + c] = dout * b * act'(a)
//             dx[factor + c]    = dout * act(a),   dbias: the task's partial sums of both
//
// Pure memory traffic: forward reads x and writes out, backward reads x and dout and writes dx,
// each once. Nothing is kept from the forward; the backward evaluates the activation again, which
// costs less than reading it would.
//
// A row belongs to one task. dbias is summed by each task over its rows, whose number does not
// depend on the threads, and then over the tasks in their order.
#include "glu.h"

#include "columns.h"
#include "isa.h"
#include "vec_activation.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <class At>
ENCFAST_INLINE At shifted(At at, int64_t columns) {
  at.c += columns;
  return at;
}

// Columns of x with the bias added.
template <DType kT, class At>
ENCFAST_INLINE Vec biased(const char* x, const float* bias, At at) {
  const Vec v = load_at<kT>(x, at);
  return bias ? v + load_at<DType::kFloat32>(bias, at) : v;
}

template <class Params>
void row_range(const Params& p, int64_t task, int64_t& begin, int64_t& end) {
  begin = task * p.g.rows_per_task;
  end = begin + p.g.rows_per_task < p.g.N ? begin + p.g.rows_per_task : p.g.N;
}

template <class Tag>
struct Kernels {
  static constexpr DType kT = Tag::kT;
  using A = Act<Tag::kA, kT == DType::kFloat32>;

  static void fwd_task(int64_t task, int, void* ctx) {
    const GluParams& p = *static_cast<const GluParams*>(ctx);
    int64_t row, end;
    for (row_range(p, task, row, end); row < end; ++row) {
      const char* x = row_of<kT>(p.x, row);
      char* out = row_of<kT>(p.out, row);
      for_columns(p.g.F, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
        Vec v = A::value(biased<kT>(x, p.bias, shifted(at, p.g.activated)));
        if (p.g.gated) v *= biased<kT>(x, p.bias, shifted(at, p.g.factor));
        store_at<kT>(out, at, v);
      });
    }
  }

  template <class At>
  static ENCFAST_INLINE void put(const GluBwdParams& p, char* dx, float* dbias, At at, Vec v) {
    store_at<kT>(dx, at, v);
    if (p.width) store_at<DType::kFloat32>(dbias, at, load_at<DType::kFloat32>(dbias, at) + v);
  }

  static void bwd_row(const GluBwdParams& p, int64_t row, float* dbias) {
    const char *x = row_of<kT>(p.x, row), *dout = row_of<kT>(p.dout, row);
    char* dx = row_of<kT>(p.dx, row);
    for_columns(p.g.F, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      const auto first = shifted(at, p.g.activated);
      const Activated act = A::both(biased<kT>(x, p.bias, first));
      Vec g = load_at<kT>(dout, at);
      if (p.g.gated) {
        const auto second = shifted(at, p.g.factor);
        const Vec factor = biased<kT>(x, p.bias, second);
        put(p, dx, dbias, second, g * act.value);
        g *= factor;
      }
      put(p, dx, dbias, first, g * act.slope);
    });
  }

  static void bwd_task(int64_t task, int, void* ctx) {
    const GluBwdParams& p = *static_cast<const GluBwdParams*>(ctx);
    float* dbias = p.partials + task * p.width;
    if (p.width) std::memset(dbias, 0, sizeof(float) * p.width);
    int64_t row, end;
    for (row_range(p, task, row, end); row < end; ++row) bwd_row(p, row, dbias);
  }
};

template <DType kType, Activation kAct>
struct KernelTag {
  static constexpr DType kT = kType;
  static constexpr Activation kA = kAct;
};

template <DType kT, class F>
void with_activation(Activation a, F f) {
  switch (a) {
    case Activation::kGelu:
      return f(Kernels<KernelTag<kT, Activation::kGelu>>{});
    case Activation::kGeluTanh:
      return f(Kernels<KernelTag<kT, Activation::kGeluTanh>>{});
    case Activation::kSilu:
      return f(Kernels<KernelTag<kT, Activation::kSilu>>{});
    case Activation::kRelu:
      return f(Kernels<KernelTag<kT, Activation::kRelu>>{});
    case Activation::kNone:
      return;  // the op offers no such activation
  }
}

// Calls f with the kernels of this dtype and activation.
template <class F>
void with_kernels(DType t, Activation a, F f) {
  with_dtype(t, [&](auto dtype) { with_activation<decltype(dtype)::value>(a, f); });
}

int64_t tasks_of(const GluGeometry& g) { return (g.N + g.rows_per_task - 1) / g.rows_per_task; }

void fwd(const GluParams& p, const Pool& pool) {
  with_kernels(p.x.dtype, p.g.activation, [&](auto k) {
    pool.run(pool.self, tasks_of(p.g), decltype(k)::fwd_task, const_cast<GluParams*>(&p));
  });
}

void bwd(const GluBwdParams& p, const Pool& pool) {
  with_kernels(p.x.dtype, p.g.activation, [&](auto k) {
    pool.run(pool.self, tasks_of(p.g), decltype(k)::bwd_task, const_cast<GluBwdParams*>(&p));
  });
  PartialSums{p.partials, p.sums, tasks_of(p.g), p.width}.run(pool);
}

}  // namespace

extern const GluKernels kGlu = {fwd, bwd};

}  // namespace encfast::ENCFAST_ISA
