// The one include of device code. nvcc compiles it for a GPU; any other C++17 compiler, with
// tests/simt on its include path, for the CPU, where every CUDA thread is a fiber and the address,
// thread and undefined-behaviour sanitizers watch it (tests/simt/fibers.h).
//
// What the two compilers spell differently, spelt once:
//
//   ENCFAST_SHARED(T, name, n)                          an array of the block's shared memory
//   ENCFAST_LAUNCH((kernel<..>), grid, block, stream, args...)
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ENCFAST_SHARED(T, name, n) __shared__ T name[n]
#define ENCFAST_LAUNCH(kernel, grid, block, stream, ...) \
  (ENCFAST_UNPACK kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define ENCFAST_UNPACK(...) __VA_ARGS__
#else
#include "simt.h"
#endif
