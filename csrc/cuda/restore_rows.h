// Rows put back at their places, on a GPU: POD parameters and torch-free launchers. `stream` is a
// cudaStream_t; a launcher returns a cudaError_t as int.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace encfast {

// out[i] = (x[index[i]], or fill where index[i] is -1) + add[add_index[i]], summed in float32 and
// rounded once. Strides are in elements; rows of `out` are contiguous. An index out of range stops
// the kernel with an assertion.
struct CudaRestoreRowsParams {
  DType type;  // of x and out
  DType add_type;
  const void* x;             // [n, channels]
  const int64_t* index;      // [m], each in -1..n - 1
  const float* fill;         // [channels], or null: zeros
  const void* add;           // [n_add, channels], or null: nothing
  const int64_t* add_index;  // [m], each in 0..n_add - 1, or null: i % n_add
  void* out;                 // [m, channels]
  int64_t m;
  int64_t n;
  int64_t n_add;
  int64_t channels;
  int64_t x_stride;
  int64_t add_stride;
};

// dfill = the sum of dout[i] over the i whose index is -1; dadd[r] = that over the i whose
// add_index is r. In float32, in an order that depends on m, n_add and channels alone.
struct CudaRestoreRowsBwdParams {
  DType type;             // of dout
  const void* dout;       // [m, channels]
  const int64_t* index;   // [m]
  const int64_t* sorted;  // [m] add_index in ascending order, each in 0..n_add - 1; null: i % n_add
  const int64_t* order;   // [m] where each stood
  int64_t* begin;         // [n_add + 1] scratch beside `sorted`
  float* partials;        // [restore_rows_bwd_scratch(..)]
  float* dfill;           // [channels], or null
  float* dadd;            // [n_add, channels], or null
  int64_t m;
  int64_t n_add;  // without `sorted` a divisor of m
  int64_t channels;
  int64_t dout_stride;  // in elements
};

int restore_rows_cuda(const CudaRestoreRowsParams& p, void* stream);
int64_t restore_rows_bwd_scratch(int64_t m, int64_t n_add, int64_t channels);
int restore_rows_bwd_cuda(const CudaRestoreRowsBwdParams& p, void* stream);

}  // namespace encfast
