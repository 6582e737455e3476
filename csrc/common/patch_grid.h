// How patches lie in a batch of images: plain data, read by the CPU's cores and by device code.
#pragma once
#include <cstdint>

namespace encfast {

enum class PixelType : int32_t { kFloat32, kBFloat16, kFloat16, kUint8 };

constexpr int kPatchAxes = 3;

// image [batch, channels, *size] of up to kPatchAxes sizes; those it lacks come first and are 1.
// Patch p of image b has the id b * patches + p, the last axis fastest; its pixels make a row in
// the order [channels, *patch], or [*patch, channels] with channels_last. Strides are in elements.
struct PatchGrid {
  int64_t batch;
  int64_t channels;
  int64_t grid[kPatchAxes];   // patches along each axis
  int64_t patch[kPatchAxes];  // pixels of a patch along each axis
  int64_t image_stride;
  int64_t channel_stride;
  int64_t stride[kPatchAxes];
  int64_t patches;  // of an image
  int64_t pixels;   // elements of a row, channels included
  bool channels_last;
};

}  // namespace encfast
