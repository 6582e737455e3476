// What the bindings of patch_gather share, whatever the device: argument checks and results. Values
// of ids, indices and cu_seqlens are for each device to check in its own way.
#pragma once
#include "bind/matrix.h"
#include "common/patch_grid.h"

namespace encfast {

// ids or an index: int64 [M], returned contiguous.
inline Tensor checked_int64(const char* op, const char* name, const Tensor& x,
                            const char* like_name, const Tensor& like) {
  check_dim(op, name, x, 1);
  check_dtype(op, name, x, ScalarType::Long, "int64");
  check_same_device(op, name, x, like_name, like);
  return torch::stable::contiguous(x);
}

// A [C] parameter as contiguous float32; nothing where it is absent.
inline OptTensor checked_channels(const char* op, const char* name, const OptTensor& x,
                                  const char* like_name, const Tensor& like, int64_t C) {
  if (!x) return std::nullopt;
  check_same_device(op, name, *x, like_name, like);
  core_dtype(op, name, *x);
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == C, op, ": ", name, " has shape ", shape_text(*x),
                  ", expected (", C, ",)");
  return torch::stable::contiguous(to_dtype(*x, ScalarType::Float));
}

inline const float* floats_of(const OptTensor& x) {
  return x ? x->const_data_ptr<float>() : nullptr;
}

// ---- select_patches ----

struct Selection {
  Tensor noise, cu_seqlens, cu_keep;  // contiguous
  Tensor visible, hidden, restore;    // unwritten

  Selection(const char* op, const Tensor& noise_in, const Tensor& cu_seqlens_in,
            const Tensor& cu_keep_in, int64_t keep)
      : noise(checked(op, "noise", noise_in, noise_in, ScalarType::Float, "float32")),
        cu_seqlens(checked(op, "cu_seqlens", cu_seqlens_in, noise_in, ScalarType::Int, "int32")),
        cu_keep(checked(op, "cu_keep", cu_keep_in, noise_in, ScalarType::Int, "int32")) {
    STD_TORCH_CHECK(cu_seqlens.size(0) == cu_keep.size(0) && cu_keep.size(0) >= 1, op,
                    ": cu_seqlens has ", cu_seqlens.size(0), " entries, cu_keep ", cu_keep.size(0),
                    ", expected B + 1 each");
    const int64_t n = noise.size(0);
    STD_TORCH_CHECK(n <= INT32_MAX, op, ": noise has ", n, " entries, expected at most 2^31 - 1");
    STD_TORCH_CHECK(keep >= 0 && keep <= n, op, ": keep is ", keep, ", expected 0..", n);
    visible = new_contiguous(noise, {keep}, ScalarType::Long);
    hidden = new_contiguous(noise, {n - keep}, ScalarType::Long);
    restore = new_contiguous(noise, {n}, ScalarType::Long);
  }

 private:
  static Tensor checked(const char* op, const char* name, const Tensor& x, const Tensor& noise,
                        ScalarType dtype, const char* dtype_name) {
    check_dim(op, name, x, 1);
    check_dtype(op, name, x, dtype, dtype_name);
    check_same_device(op, name, x, "noise", noise);
    return torch::stable::contiguous(x);
  }
};

// ---- gather_patches ----

inline PixelType pixel_type(const char* op, const Tensor& image) {
  switch (image.scalar_type()) {
    case ScalarType::Byte:
      return PixelType::kUint8;
    case ScalarType::Float:
      return PixelType::kFloat32;
    case ScalarType::BFloat16:
      return PixelType::kBFloat16;
    case ScalarType::Half:
      return PixelType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": image is not float32, bfloat16, float16 or uint8");
  }
}

inline PatchGrid patch_grid(const char* op, const Tensor& image, const std::vector<int64_t>& patch,
                            bool channels_last) {
  const auto axes = static_cast<int64_t>(patch.size());
  STD_TORCH_CHECK(axes >= 1 && axes <= kPatchAxes, op, ": patch has ", axes,
                  " sizes, expected 1 to 3");
  check_dim(op, "image", image, 2 + axes);
  PatchGrid g{};
  g.batch = image.size(0);
  g.channels = image.size(1);
  g.image_stride = image.stride(0);
  g.channel_stride = image.stride(1);
  g.patches = 1;
  g.pixels = g.channels;
  g.channels_last = channels_last;
  for (int i = 0; i < kPatchAxes; ++i) {
    const int64_t axis = i - (kPatchAxes - axes);
    const int64_t p = axis < 0 ? 1 : patch[static_cast<size_t>(axis)];
    const int64_t size = axis < 0 ? 1 : image.size(2 + axis);
    STD_TORCH_CHECK(p >= 1 && size % p == 0, op, ": image has shape ", shape_text(image),
                    ", expected multiples of the patch, which is ", p, " along axis ", axis);
    g.patch[i] = p;
    g.grid[i] = size / p;
    g.stride[i] = axis < 0 ? 0 : image.stride(2 + axis);
    g.patches *= g.grid[i];
    g.pixels *= p;
  }
  return g;
}

struct PatchRows {
  PatchGrid grid;
  PixelType pixels;
  DType dtype;  // of the rows
  Tensor ids;
  OptTensor scale, shift;  // float32
  Tensor rows;             // [M, pixels], unwritten

  PatchRows(const char* op, const Tensor& image, const Tensor& ids_in,
            const std::vector<int64_t>& patch, bool channels_last, const OptTensor& scale_in,
            const OptTensor& shift_in, ScalarType row_dtype)
      : grid(patch_grid(op, image, patch, channels_last)),
        pixels(pixel_type(op, image)),
        ids(checked_int64(op, "ids", ids_in, "image", image)),
        scale(checked_channels(op, "scale", scale_in, "image", image, grid.channels)),
        shift(checked_channels(op, "shift", shift_in, "image", image, grid.channels)),
        rows(new_contiguous(image, {ids.size(0), grid.pixels}, row_dtype)) {
    dtype = core_dtype(op, "dtype", rows);
  }
};

// ---- restore_rows ----

// i % n_add stands for a missing add_index.
inline void check_added(const char* op, const Tensor& index, const OptTensor& add_index,
                        int64_t n_add) {
  const int64_t m = index.size(0);
  STD_TORCH_CHECK(add_index ? add_index->size(0) == m : m == 0 || (n_add > 0 && m % n_add == 0), op,
                  ": add has ", n_add, " rows, index ", m, " entries, add_index ",
                  add_index ? add_index->size(0) : 0,
                  "; expected as many in both, or no add_index and a divisor");
}

struct RestoredRows {
  Tensor x, index;           // rows contiguous; contiguous
  OptTensor fill;            // float32
  OptTensor add, add_index;  // rows contiguous; contiguous
  Tensor out;                // [M, C], unwritten
  DType dtype, add_dtype{};  // of x and out; of add
  int64_t n_add = 0;

  RestoredRows(const char* op, const Tensor& x_in, const Tensor& index_in, const OptTensor& fill_in,
               const OptTensor& add_in, const OptTensor& add_index_in)
      : x(checked_rows(op, "x", x_in)),
        index(checked_int64(op, "index", index_in, "x", x)),
        fill(checked_channels(op, "fill", fill_in, "x", x, x.size(1))),
        out(new_rows(x, index.size(0))),
        dtype(core_dtype(op, "x", x)) {
    STD_TORCH_CHECK(add_in || !add_index_in, op, ": add_index came without add");
    if (!add_in) return;
    check_same_device(op, "add", *add_in, "x", x);
    add = checked_rows(op, "add", *add_in);
    add_dtype = core_dtype(op, "add", *add);
    n_add = add->size(0);
    STD_TORCH_CHECK(add->size(1) == x.size(1), op, ": add has ", add->size(1), " channels, x has ",
                    x.size(1));
    if (add_index_in) add_index = checked_int64(op, "add_index", *add_index_in, "x", x);
    check_added(op, index, add_index, n_add);
  }

  static Tensor checked_rows(const char* op, const char* name, const Tensor& x) {
    check_dim(op, name, x, 2);
    core_dtype(op, name, x);
    return with_inner_contiguous(x, 1);
  }
};

struct RestoredRowsGrad {
  Tensor dout, index;   // rows contiguous; contiguous
  OptTensor add_index;  // contiguous; left out where dadd is not wanted
  Tensor dfill, dadd;   // float32 [C] and [n_add, C], unwritten; [0] where not wanted
  DType dtype;          // of dout

  RestoredRowsGrad(const char* op, const Tensor& dout_in, const Tensor& index_in,
                   const OptTensor& add_index_in, int64_t n_add, bool want_dfill, bool want_dadd)
      : dout(RestoredRows::checked_rows(op, "dout", dout_in)),
        index(checked_int64(op, "index", index_in, "dout", dout)),
        dfill(new_contiguous(dout, {want_dfill ? dout.size(1) : 0}, ScalarType::Float)),
        dtype(core_dtype(op, "dout", dout)) {
    STD_TORCH_CHECK(index.size(0) == dout.size(0), op, ": index has ", index.size(0),
                    " entries, dout has ", dout.size(0), " rows");
    STD_TORCH_CHECK(n_add >= 0, op, ": n_add is ", n_add, ", expected >= 0");
    if (!want_dadd) {
      dadd = new_contiguous(dout, {0}, ScalarType::Float);
      return;
    }
    if (add_index_in) add_index = checked_int64(op, "add_index", *add_index_in, "dout", dout);
    check_added(op, index, add_index, n_add);
    dadd = new_contiguous(dout, {n_add, dout.size(1)}, ScalarType::Float);
  }
};

}  // namespace encfast
