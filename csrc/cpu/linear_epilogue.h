// What follows the product of packed_linear, on the rows of one task while they lie in L2:
//
//   y   = C + bias             int8: y = (C - zero * weight sum) * (row * column scale) + bias
//   out = act(y), or act(a) * b of two column ranges, + residual
//   out = norm(out)            where the task holds whole rows
//
// One pass in registers from C to the output; a norm stores to C first and makes two more passes
// over the row in L1.
#pragma once
#include "linear_words.h"
#include "vec_activation.h"

namespace encfast::ENCFAST_ISA {
namespace {

ENCFAST_INLINE Vec load_lanes(const float* p, int lanes) {
  return lanes == kW ? load(p) : load_partial_as<DType::kFloat32>(p, lanes);
}

// Elements of a row of any dtype. The switch is the same for every call of a task.
ENCFAST_INLINE Vec load_lanes(DType t, const char* p, int lanes) {
  Vec v = zeros();
  with_dtype(t, [&](auto tag) {
    constexpr DType kT = decltype(tag)::value;
    v = lanes == kW ? load_as<kT>(p) : load_partial_as<kT>(p, lanes);
  });
  return v;
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

template <DType kT, Activation kAct, bool kInt8>
struct Epilogue {
  static constexpr bool kExact = kT != DType::kBFloat16;

  static void run(const EpilogueTask& t) {
    for (int64_t r = 0; r < t.rows; ++r) {
      char* out =
          static_cast<char*>(t.p->out) + ((t.row + r) * t.out_stride + t.begin) * element_bytes(kT);
      float* c = t.c + r * t.ldc;
      const RowScale x = kInt8 ? t.x_scales[r] : RowScale{};
      if (t.p->norm == Norm::kNone) {
        each_vector(t.width, [&](int64_t i, int lanes) {
          put(out, i, before_norm(t, c, x, r, i, lanes), lanes);
        });
      } else {
        each_vector(t.width,
                    [&](int64_t i, int lanes) { store(c + i, before_norm(t, c, x, r, i, lanes)); });
        normalize(*t.p, c, t.width, out);
      }
    }
  }

 private:
  template <class F>
  static ENCFAST_INLINE void each_vector(int64_t width, F f) {
    int64_t i = 0;
    for (; i + kW <= width; i += kW) f(i, kW);
    if (i < width) f(i, static_cast<int>(width - i));
  }

  static ENCFAST_INLINE void put(char* out, int64_t i, Vec v, int lanes) {
    if (lanes == kW) {
      store_as<kT>(out + i * element_bytes(kT), v);
    } else {
      store_partial_as<kT>(out + i * element_bytes(kT), v, lanes);
    }
  }

  // Column i of a range behind product and bias.
  static ENCFAST_INLINE Vec linear(const EpilogueTask& t, const float* c, const Columns& columns,
                                   const RowScale& x, int64_t i, int lanes) {
    Vec y = load(c + columns.at + i);
    const int64_t f = columns.begin + i;
    if constexpr (kInt8) {
      const auto* sums = reinterpret_cast<const float*>(t.w_sum);
      const IntVec sum = (IntVec)load_lanes(sums + f, lanes);
      y = __builtin_convertvector((IntVec)y - sum * x.zero, Vec);
      y *= splat(x.scale) * load_lanes(t.w_scale + f, lanes);
    }
    return t.p->bias ? y + load_lanes(t.p->bias + f, lanes) : y;
  }

  static ENCFAST_INLINE Vec before_norm(const EpilogueTask& t, const float* c, const RowScale& x,
                                        int64_t r, int64_t i, int lanes) {
    Vec y = Act<kAct, kExact>::value(linear(t, c, t.a, x, i, lanes));
    if (t.p->gated) y *= linear(t, c, t.b, x, i, lanes);
    const MatrixView& residual = t.p->residual;
    if (residual.data) {
      const int64_t element = (t.row + r) * residual.stride + t.begin + i;
      y += load_lanes(
          residual.dtype,
          static_cast<const char*>(residual.data) + element * element_bytes(residual.dtype), lanes);
    }
    return y;
  }

  // Sum of f over the row, in two chains: one would wait for its own additions.
  template <class F>
  static ENCFAST_INLINE float row_sum(const float* row, int64_t width, F f) {
    Vec even = zeros(), odd = zeros();
    int64_t i = 0;
    for (; i + 2 * kW <= width; i += 2 * kW) {
      even += f(load(row + i));
      odd += f(load(row + i + kW));
    }
    for (; i < width; i += kW) {
      const int lanes = width - i < kW ? static_cast<int>(width - i) : kW;
      const Vec v = f(load_lanes(row + i, lanes));
      even += select_within(zeros(), iota(), splat(static_cast<float>(lanes - 1)), v, zeros());
    }
    return sum(even + odd);
  }

  static void normalize(const PackedLinearParams& p, const float* row, int64_t width, char* out) {
    const float n = static_cast<float>(width);
    float mean = 0;
    if (p.norm == Norm::kLayerNorm) mean = row_sum(row, width, [](Vec v) { return v; }) / n;
    const Vec center = splat(mean);
    const float squares = row_sum(row, width, [&](Vec v) { return (v - center) * (v - center); });
    const Vec scale = splat(1.0f / __builtin_sqrtf(squares / n + p.norm_eps));
    each_vector(width, [&](int64_t i, int lanes) {
      Vec v = (load(row + i) - center) * scale;
      if (p.norm_weight) v *= load_lanes(p.norm_weight + i, lanes);
      if (p.norm_bias) v += load_lanes(p.norm_bias + i, lanes);
      put(out, i, v, lanes);
    });
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
