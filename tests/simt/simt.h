// The CUDA names that kernels of csrc/cuda use, on the CPU. A kernel that needs another one adds it
// here; what fibers.h says of ordering holds for all of them.
#pragma once
#include <cmath>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (simt::self().index)
#define blockIdx (simt::self().block->index)
#define blockDim (simt::runtime().block)
#define gridDim (simt::runtime().grid)

#define ENCFAST_SHARED(T, name, n) T(&name)[n] = simt::shared<T[n]>([] {})
#define ENCFAST_LAUNCH(kernel, grid, block, stream, ...) \
  simt::launch((grid), (block), [=] {                    \
    (void)(stream);                                      \
    (ENCFAST_UNPACK kernel)(__VA_ARGS__);                \
  })
#define ENCFAST_UNPACK(...) __VA_ARGS__

using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }  // an illegal launch has been reported

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Storage formats; arithmetic is in float, as in the kernels.
struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
  operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
};
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -13;  // of a subnormal and of the smallest normal numbers
  if (size >= std::ldexp(1.0f, -14)) std::frexp(size, &exponent);
  // In units of the last place; 2048 of them carry into the next exponent by themselves.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + units))};
}

inline void __syncthreads(int line = __builtin_LINE()) { simt::barrier(line); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  simt::warp_barrier(mask, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, int line = __builtin_LINE()) {
  return simt::exchange(mask, "__shfl_sync", line, value,
                        [=](unsigned, unsigned) { return simt::offer_of<T>(source % 32); });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  return simt::exchange(mask, "__shfl_up_sync", line, value, [=](unsigned lane, unsigned) {
    return simt::offer_of<T>(lane < delta ? lane : lane - delta);
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, int line = __builtin_LINE()) {
  return simt::exchange(mask, "__shfl_xor_sync", line, value,
                        [=](unsigned lane, unsigned) { return simt::offer_of<T>(lane ^ bits); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return simt::exchange(mask, "__ballot_sync", line, predicate, [](unsigned, unsigned lanes) {
    unsigned votes = 0;
    for (unsigned l = 0; l < simt::kWarp; ++l) {
      if ((lanes >> l & 1) && simt::offer_of<int>(l)) votes |= 1u << l;
    }
    return votes;
  });
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// Rounded by themselves: a compiler could fuse them with what follows, but for the volatile.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) { return a + b; }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Atomic for TSan too, and like CUDA's without any order of other accesses.
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
