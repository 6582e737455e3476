// Row moves between a packed batch and a grid: plain memory traffic, the same for every dtype.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace encfast {

// out[i] = src[index[i]], or zeros where index[i] < 0. Rows are `row_bytes` long, `src_stride` and
// `out_stride` bytes apart.
struct GatherRowsParams {
  const void* src;
  const int64_t* index;  // [n]
  void* out;
  int64_t n;
  int64_t row_bytes;
  int64_t src_stride;
  int64_t out_stride;
};

enum class SumType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32, kInt64 };

// out[r] = sum of src[order[j]] for j in [begin[r], begin[r + 1]), in that order; zeros where there
// is none. Half types are summed in float32 and rounded once. Result rows are contiguous.
struct SumRowsParams {
  SumType type;
  const void* src;
  const int64_t* begin;  // [n + 1]
  const int64_t* order;  // [begin[n]]
  void* out;
  int64_t n;
  int64_t row_elements;
  int64_t src_stride;  // in elements
};

// Which entries of a mask [batch, seqlen] are kept (not 0), in their order: their places in the
// flattened mask, then -1 up to batch * seqlen; cu_seqlens[b] of them stand before row b.
struct FindRowsParams {
  const uint8_t* mask;
  int64_t* indices;     // [batch * seqlen]
  int32_t* cu_seqlens;  // [batch + 1]
  int64_t batch;
  int64_t seqlen;
};

struct PadKernels {
  void (*gather_rows)(const GatherRowsParams&, const Pool&);
  void (*sum_rows)(const SumRowsParams&, const Pool&);
  void (*find_rows)(const FindRowsParams&, const Pool&);
};

}  // namespace encfast
