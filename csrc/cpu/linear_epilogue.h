// What follows the product of packed_linear, on the rows of one task while they lie in L2:
//
//   y   = C + bias             int8: y = (C - zero * weight sum) * (row * column scale) + bias
//   out = act(y), or act(a) * b of two column ranges, + residual
//   out = norm(out)            where the task holds whole rows
//
// One pass in registers from C to the output; a norm sums on the way, stores to C and makes two
// more passes over the row in L1.
#pragma once
#include "linear_words.h"
#include "vec_activation.h"

namespace encfast::ENCFAST_ISA {
namespace {

ENCFAST_INLINE Vec load_lanes(const float* p, int lanes) {
  return lanes == kW ? load(p) : load_partial_as<DType::kFloat32>(p, lanes);
}

// Columns [begin, begin + width) of the weight's rows, at `at` in a row of C.
struct Columns {
  int64_t begin;
  int64_t at;
};

// Rows of C of one task: columns [begin, begin + width) of the result.
struct EpilogueTask {
  const PackedLinearParams* p;
  const RowScale* x_scales;  // [rows], int8 only, like the two of the weight
  const float* w_scale;      // [F]
  const int32_t* w_sum;      // [F]
  float* c;
  int64_t ldc;
  int64_t row;  // of c[0] in the result
  int64_t rows;
  int64_t begin, width;
  int64_t out_stride;  // columns of the result
  Columns a, b;        // b only if gated
};

// kRows rows of a task at a time: they share what is read of the weight's rows and norm, and their
// sums are independent chains. A row's own sums have one order whatever kRows.
//
// Members are copies, which live in registers: a store may alias anything behind a pointer.
template <DType kT, Activation kAct, bool kInt8, int kRows>
class EpilogueRows {
 public:
  ENCFAST_INLINE EpilogueRows(const EpilogueTask& t, int64_t r)
      : width_(t.width),
        a_(columns(t, t.a)),
        b_(columns(t, t.b)),
        gated_(t.p->gated),
        residual_dtype_(t.p->residual.dtype) {
    const MatrixView& residual = t.p->residual;
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = t.row + r + i;
      c_[i] = t.c + (r + i) * t.ldc;
      x_[i] = kInt8 ? t.x_scales[r + i] : RowScale{};
      out_[i] = static_cast<char*>(t.p->out) + (row * t.out_stride + t.begin) * element_bytes(kT);
      residual_[i] = residual.data
                         ? static_cast<const char*>(residual.data) +
                               (row * residual.stride + t.begin) * element_bytes(residual_dtype_)
                         : nullptr;
    }
  }

  ENCFAST_INLINE void without_norm() {
    each_vector([&](int64_t i, int lanes) {
      Vec y[kRows];
      before_norm(i, lanes, y);
      for (int r = 0; r < kRows; ++r) put(r, i, y[r], lanes);
    });
  }

  ENCFAST_INLINE void with_norm(const PackedLinearParams& p) {
    const float n = static_cast<float>(width_);
    Vec total[kRows], center[kRows], squares[kRows], scale[kRows];
    for (int r = 0; r < kRows; ++r) total[r] = squares[r] = zeros();
    each_vector([&](int64_t i, int lanes) {
      Vec y[kRows];
      before_norm(i, lanes, y);
      for (int r = 0; r < kRows; ++r) {
        store(c_[r] + i, y[r]);
        total[r] += first(lanes, y[r]);
      }
    });
    for (int r = 0; r < kRows; ++r) {
      center[r] = splat(p.norm == Norm::kLayerNorm ? sum(total[r]) / n : 0.0f);
    }
    each_vector([&](int64_t i, int lanes) {
      for (int r = 0; r < kRows; ++r) {
        const Vec d = first(lanes, load(c_[r] + i) - center[r]);
        squares[r] = fma(d, d, squares[r]);
      }
    });
    for (int r = 0; r < kRows; ++r) {
      scale[r] = splat(1.0f / __builtin_sqrtf(sum(squares[r]) / n + p.norm_eps));
    }
    const float *weight = p.norm_weight, *bias = p.norm_bias;
    each_vector([&](int64_t i, int lanes) {
      const Vec w = weight ? load_lanes(weight + i, lanes) : splat(1.0f);
      const Vec b = bias ? load_lanes(bias + i, lanes) : zeros();
      for (int r = 0; r < kRows; ++r) {
        put(r, i, fma((load(c_[r] + i) - center[r]) * scale[r], w, b), lanes);
      }
    });
  }

 private:
  // A range of columns: where it stands in C, and what belongs to it.
  struct Range {
    int64_t at;
    const float *bias, *scale, *sum;
  };
  static ENCFAST_INLINE Range columns(const EpilogueTask& t, const Columns& c) {
    return {c.at, t.p->bias ? t.p->bias + c.begin : nullptr, kInt8 ? t.w_scale + c.begin : nullptr,
            kInt8 ? reinterpret_cast<const float*>(t.w_sum) + c.begin : nullptr};
  }

  template <class F>
  ENCFAST_INLINE void each_vector(F f) {
    int64_t i = 0;
    for (; i + kW <= width_; i += kW) f(i, kW);
    if (i < width_) f(i, static_cast<int>(width_ - i));
  }

  static ENCFAST_INLINE Vec first(int lanes, Vec v) {
    if (lanes == kW) return v;
    return select_within(zeros(), iota(), splat(static_cast<float>(lanes - 1)), v, zeros());
  }

  ENCFAST_INLINE void put(int r, int64_t i, Vec v, int lanes) {
    char* at = out_[r] + i * element_bytes(kT);
    if (lanes == kW) {
      store_as<kT>(at, v);
    } else {
      store_partial_as<kT>(at, v, lanes);
    }
  }

  // Column i of a range behind product and bias.
  ENCFAST_INLINE void linear(const Range& range, int64_t i, int lanes, Vec y[kRows]) {
    IntVec w_sum{};
    Vec w_scale = zeros(), bias = zeros();
    if constexpr (kInt8) {
      w_sum = (IntVec)load_lanes(range.sum + i, lanes);
      w_scale = load_lanes(range.scale + i, lanes);
    }
    if (range.bias) bias = load_lanes(range.bias + i, lanes);
    for (int r = 0; r < kRows; ++r) {
      y[r] = load(c_[r] + range.at + i);
      if constexpr (kInt8) {
        y[r] = __builtin_convertvector((IntVec)y[r] - w_sum * x_[r].zero, Vec);
        y[r] = fma(y[r], splat(x_[r].scale) * w_scale, bias);
      } else {
        y[r] += bias;
      }
    }
  }

  ENCFAST_INLINE void before_norm(int64_t i, int lanes, Vec y[kRows]) {
    linear(a_, i, lanes, y);
    for (int r = 0; r < kRows; ++r) y[r] = Act < kAct, kT != DType::kBFloat16 > ::value(y[r]);
    if (gated_) {
      Vec b[kRows];
      linear(b_, i, lanes, b);
      for (int r = 0; r < kRows; ++r) y[r] *= b[r];
    }
    if (!residual_[0]) return;
    with_dtype(residual_dtype_, [&](auto tag) {
      constexpr DType kR = decltype(tag)::value;
      for (int r = 0; r < kRows; ++r) {
        const char* at = residual_[r] + i * element_bytes(kR);
        y[r] += lanes == kW ? load_as<kR>(at) : load_partial_as<kR>(at, lanes);
      }
    });
  }

  const int64_t width_;
  const Range a_, b_;  // b only if gated
  const bool gated_;
  const DType residual_dtype_;
  float* c_[kRows];
  RowScale x_[kRows];
  char* out_[kRows];
  const char* residual_[kRows];
};

template <DType kT, Activation kAct, bool kInt8>
struct Epilogue {
  // fp32 rows that are only moved wait for memory: four would be as many streams of misses.
  static constexpr int kRowsAtOnce = kT == DType::kFloat32 && kAct == Activation::kNone ? 1 : 4;

  static void run(const EpilogueTask& t) {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= t.rows; r += kRowsAtOnce) run_rows<kRowsAtOnce>(t, r);
    for (; r < t.rows; ++r) run_rows<1>(t, r);
  }

 private:
  template <int kRows>
  static void run_rows(const EpilogueTask& t, int64_t r) {
    EpilogueRows<kT, kAct, kInt8, kRows> rows(t, r);
    if (t.p->norm == Norm::kNone) {
      rows.without_norm();
    } else {
      rows.with_norm(*t.p);
    }
  }
};

template <DType kT, bool kInt8>
inline void run_epilogue_of(const EpilogueTask& t) {
  switch (t.p->activation) {
    case Activation::kNone:
      return Epilogue<kT, Activation::kNone, kInt8>::run(t);
    case Activation::kGelu:
      return Epilogue<kT, Activation::kGelu, kInt8>::run(t);
    case Activation::kGeluTanh:
      return Epilogue<kT, Activation::kGeluTanh, kInt8>::run(t);
    case Activation::kSilu:
      return Epilogue<kT, Activation::kSilu, kInt8>::run(t);
    case Activation::kRelu:
      return Epilogue<kT, Activation::kRelu, kInt8>::run(t);
  }
}

template <bool kInt8>
inline void run_epilogue(const EpilogueTask& t) {
  with_dtype(t.p->x.dtype, [&](auto tag) { run_epilogue_of<decltype(tag)::value, kInt8>(t); });
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
