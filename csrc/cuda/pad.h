// Row moves on a GPU: POD parameters and torch-free launchers. `stream` is a cudaStream_t; a
// launcher returns a cudaError_t as int.
#pragma once
#include <cstdint>

namespace encfast {

// out[i] = src[index[i]], or zeros where index[i] is -1. Rows are `row_bytes` long and
// `src_stride`, `out_stride` bytes apart. An index outside of -1..src_rows - 1 stops the kernel
// with an assertion.
struct CudaGatherRowsParams {
  const void* src;
  const int64_t* index;  // [n]
  void* out;
  int64_t n;
  int64_t src_rows;
  int64_t row_bytes;
  int64_t src_stride;
  int64_t out_stride;
};

// kBytes moves rows of any dtype: of rows that share a place the first one stays.
enum class CudaSumType : int32_t {
  kBytes,
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat64,
  kInt32,
  kInt64
};

// out[r] = sum of src[order[j]] over the j with sorted[j] == r, in the order of j; zeros where
// there are none. Half types are summed in float32 and rounded once. Rows of `out` are contiguous.
struct CudaSumRowsParams {
  CudaSumType type;
  const void* src;
  const int64_t* sorted;  // [m] ascending, each in -1..n - 1
  const int64_t* order;   // [m] the source row of each
  int64_t* begin;         // [n + 1] scratch: where the j of each r start
  void* out;
  int64_t m;
  int64_t n;
  int64_t row_elements;  // with kBytes: bytes
  int64_t src_stride;    // in elements
};

// The entries of a mask that are kept (not 0), in their order:
//   indices[0 .. N - 1]   where they stand in the flattened mask, and -1 behind them
//   cu_seqlens[b]         how many are kept before row b, in 0..batch
struct CudaFindRowsParams {
  const uint8_t* mask;  // [n], rows of seqlen
  int64_t* indices;     // [n]
  int32_t* cu_seqlens;  // [n / seqlen + 1]
  int32_t* tiles;       // [find_rows_scratch(n)]
  int64_t n;            // below 2^31; nothing is written where it is 0
  int64_t seqlen;
};

int gather_rows_cuda(const CudaGatherRowsParams& p, void* stream);
int sum_rows_cuda(const CudaSumRowsParams& p, void* stream);
int64_t find_rows_scratch(int64_t n);
int find_rows_cuda(const CudaFindRowsParams& p, void* stream);

}  // namespace encfast
