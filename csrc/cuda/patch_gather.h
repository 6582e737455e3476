// Patches chosen and gathered on a GPU: POD parameters and torch-free launchers. `stream` is a
// cudaStream_t; a launcher returns a cudaError_t as int.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/patch_grid.h"

namespace encfast {

// Of sequence b, rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1, the cu_keep[b + 1] - cu_keep[b] with
// the least noise; NaN counts as the largest, equals go by position. Running sums that do not fit
// the sizes stop the kernel with an assertion.
struct CudaSelectPatchesParams {
  const float* noise;         // [n]
  const int32_t* cu_seqlens;  // [batch + 1], from 0 to n
  const int32_t* cu_keep;     // [batch + 1], from 0 to keep
  int64_t* visible;           // [keep] the ids of those, sequence by sequence
  int64_t* hidden;            // [n - keep] the others
  int64_t* restore;           // [n] place of each patch in `visible`, or -1
  int64_t n;                  // below 2^31
  int64_t keep;
  int64_t batch;
  bool ordered;  // ids ascend; otherwise in the order of their noise
};

// rows[i] = the pixels of patch ids[i], * scale + shift in float32, rounded once. An id out of
// range stops the kernel with an assertion.
struct CudaGatherPatchesParams {
  PatchGrid grid;  // of at most 2^31 - 1 patches an image, and elements a row
  PixelType pixels;
  DType type;  // of the rows
  const void* image;
  const int64_t* ids;  // [m]
  const float* scale;  // [channels], or null: 1
  const float* shift;  // [channels], or null: 0
  void* rows;          // [m, grid.pixels] contiguous
  int64_t m;
};

int select_patches_cuda(const CudaSelectPatchesParams& p, void* stream);
int gather_patches_cuda(const CudaGatherPatchesParams& p, void* stream);

}  // namespace encfast
