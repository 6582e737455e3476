// Patches on the CPU: chosen by their noise, gathered from images, put back among their sequences.
#pragma once
#include <cstdint>

#include "common/patch_grid.h"
#include "matrix.h"
#include "parallel.h"

namespace encfast {

// Sequence b owns patches cu_seqlens[b] .. cu_seqlens[b + 1] - 1 and keeps as many as cu_keep says.
struct SelectPatchesParams {
  const float* noise;         // [N]
  const int32_t* cu_seqlens;  // [batch + 1]
  const int32_t* cu_keep;     // [batch + 1]
  int64_t* visible;           // [K]
  int64_t* hidden;            // [N - K]
  int64_t* restore;           // [N]
  int64_t batch;
  bool ordered;
  char* workspace;           // of each thread, workspace_stride bytes apart
  int64_t workspace_stride;  // kSelectBytes for each patch of the longest sequence, and kSelectPad
};
constexpr int64_t kSelectBytes = 20, kSelectPad = 256;

struct GatherPatchesParams {
  PatchGrid grid;
  PixelType pixels;
  DType dtype;  // of the rows
  const void* image;
  const int64_t* ids;  // [n]
  const float* scale;  // [channels] or nullptr
  const float* shift;  // [channels] or nullptr
  void* rows;          // [n, grid.pixels]
  int64_t n;
  // What a row needs that is converted: scale and shift pixel by pixel, [2][row_floats] (a multiple
  // of kMaxLanes), and for each thread the pixels of a row, row_floats floats.
  float* factors;
  float* staging;
  int64_t row_floats;
};

// out[i] = (x[index[i]], or fill where index[i] < 0) + add[add_index[i]].
struct RestoreRowsParams {
  ConstMatrix x;
  const int64_t* index;      // [M]
  const float* fill;         // [C] or nullptr: zeros
  ConstMatrix add;           // [n_add, C]; data nullptr: nothing to add
  const int64_t* add_index;  // [M] or nullptr: i % n_add
  int64_t n_add;
  Matrix out;  // of x's dtype
  int64_t M;
  int64_t C;
  int64_t rows_per_task;
  void* fill_row;  // scratch, C elements of x's dtype
};

// dfill = sum of dout[i] over index[i] < 0; dadd[a] = sum of the dout[i] that add[a] was added to.
struct RestoreRowsBwdParams {
  ConstMatrix dout;
  const int64_t* index;  // [M]
  // Rows of dout that belong to dadd[a]: order[begin[a]] .. order[begin[a + 1] - 1]. begin nullptr:
  // a, a + n_add, ...
  const int64_t* begin;  // [n_add + 1]
  const int64_t* order;  // [M]
  int64_t n_add;
  int64_t M;
  int64_t C;
  float* dadd;            // [n_add, C]; nullptr: not wanted
  int64_t rows_per_task;  // of dadd; of dout where dadd is not wanted
  float* partials;        // [tasks][width], rows of dfill
  float* sums;            // [width]
  int64_t width;          // C rounded up to kMaxLanes; 0: dfill is not wanted
};

struct PatchGatherKernels {
  void (*select_patches)(const SelectPatchesParams&, const Pool&);
  void (*gather_patches)(const GatherPatchesParams&, const Pool&);
  void (*restore_rows)(const RestoreRowsParams&, const Pool&);
  void (*restore_rows_bwd)(const RestoreRowsBwdParams&, const Pool&);
};

}  // namespace encfast
