// Elements of any type as float32, several at a time, and back.
#pragma once
#include "common/dtype.h"
#include "common/gpu.h"
#include "rows.h"

namespace encfast {
namespace {

template <int kWidth>
struct Floats {
  float values[kWidth];
};

// To nearest even.
template <typename T>
__device__ T rounded(float x);
template <>
__device__ inline float rounded(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 rounded(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half rounded(float x) {
  return __float2half_rn(x);
}

// Reads kWidth elements in vectors of at most 16 bytes, to which `src` has to be aligned.
template <int kWidth, typename T>
__device__ Floats<kWidth> load_floats(const T* src) {
  constexpr int kMost = 16 / sizeof(T), kPart = kWidth < kMost ? kWidth : kMost;
  Floats<kWidth> x;
  for (int k = 0; k < kWidth; k += kPart) {
    const auto part = *reinterpret_cast<const Pack<T, kPart>*>(src + k);
    for (int j = 0; j < kPart; ++j) x.values[k + j] = static_cast<float>(part.values[j]);
  }
  return x;
}

// Those from element i on of an array whose floating type is known at run time only.
template <int kWidth>
__device__ Floats<kWidth> load_floats(const void* src, DType type, int64_t i) {
  switch (type) {
    case DType::kBFloat16:
      return load_floats<kWidth>(static_cast<const __nv_bfloat16*>(src) + i);
    case DType::kFloat16:
      return load_floats<kWidth>(static_cast<const __half*>(src) + i);
    default:
      return load_floats<kWidth>(static_cast<const float*>(src) + i);
  }
}

template <typename T, int kWidth>
__device__ void store_rounded(T* out, const Floats<kWidth>& x) {
  Pack<T, kWidth> pack;
  for (int k = 0; k < kWidth; ++k) pack.values[k] = rounded<T>(x.values[k]);
  *reinterpret_cast<Pack<T, kWidth>*>(out) = pack;
}

// As elements from i on of an array whose floating type is known at run time only.
template <int kWidth>
__device__ void store_rounded(void* out, DType type, int64_t i, const Floats<kWidth>& x) {
  switch (type) {
    case DType::kBFloat16:
      return store_rounded(static_cast<__nv_bfloat16*>(out) + i, x);
    case DType::kFloat16:
      return store_rounded(static_cast<__half*>(out) + i, x);
    default:
      return store_rounded(static_cast<float*>(out) + i, x);
  }
}

inline int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls f with the tag of a floating type.
template <typename F>
void with_float_type(DType type, F f) {
  switch (type) {
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return f(TypeTag<__half>{});
    default:
      return f(TypeTag<float>{});
  }
}

}  // namespace
}  // namespace encfast
