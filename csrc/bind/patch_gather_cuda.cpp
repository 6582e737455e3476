// encfast::select_patches, gather_patches, restore_rows and restore_rows_bwd on a GPU. No value is
// read on the host: the kernels assert the ranges of ids, indices and running sums.
#include <torch/csrc/stable/library.h>

#include "bind/cuda_util.h"
#include "bind/patch_gather.h"
#include "cuda/patch_gather.h"
#include "cuda/restore_rows.h"

namespace encfast {
namespace {

const int64_t* int64_of(const OptTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> select_patches(const Tensor& noise, const Tensor& cu_seqlens,
                                                  const Tensor& cu_keep, int64_t keep,
                                                  bool ordered) {
  constexpr const char* kOp = "encfast::select_patches";
  const DeviceGuard guard(noise.get_device_index());
  const Selection s(kOp, noise, cu_seqlens, cu_keep, keep);
  const int64_t n = s.noise.size(0), batch = s.cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(batch > 0 || n == 0, kOp, ": cu_seqlens has 1 entry, noise ", n,
                  ", expected none");
  check_launch(kOp, select_patches_cuda(
                        {s.noise.const_data_ptr<float>(), s.cu_seqlens.const_data_ptr<int32_t>(),
                         s.cu_keep.const_data_ptr<int32_t>(), s.visible.mutable_data_ptr<int64_t>(),
                         s.hidden.mutable_data_ptr<int64_t>(),
                         s.restore.mutable_data_ptr<int64_t>(), n, keep, batch, ordered},
                        current_stream(noise)));
  return {s.visible, s.hidden, s.restore};
}

Tensor gather_patches(const Tensor& image, const Tensor& ids, const std::vector<int64_t>& patch,
                      bool channels_last, const OptTensor& scale, const OptTensor& shift,
                      ScalarType dtype) {
  constexpr const char* kOp = "encfast::gather_patches";
  const DeviceGuard guard(image.get_device_index());
  const PatchRows r(kOp, image, ids, patch, channels_last, scale, shift, dtype);
  STD_TORCH_CHECK(r.grid.patches <= INT32_MAX && r.grid.pixels <= INT32_MAX, kOp, ": image has ",
                  r.grid.patches, " patches of ", r.grid.pixels,
                  " elements, expected at most 2^31 - 1 of each");
  const int64_t m = r.rows.size(0);
  STD_TORCH_CHECK(m == 0 || r.grid.batch * r.grid.patches > 0, kOp, ": ids has ", m,
                  " entries, image has shape ", shape_text(image), ", which holds no patch");
  check_launch(kOp, gather_patches_cuda(
                        {r.grid, r.pixels, r.dtype, image.const_data_ptr(), int64_of(r.ids),
                         floats_of(r.scale), floats_of(r.shift), r.rows.mutable_data_ptr(), m},
                        current_stream(image)));
  return r.rows;
}

Tensor restore_rows(const Tensor& x, const Tensor& index, const OptTensor& fill,
                    const OptTensor& add, const OptTensor& add_index) {
  constexpr const char* kOp = "encfast::restore_rows";
  const DeviceGuard guard(x.get_device_index());
  const RestoredRows r(kOp, x, index, fill, add, add_index);
  check_launch(
      kOp, restore_rows_cuda(
               {r.dtype, r.add_dtype, r.x.const_data_ptr(), int64_of(r.index), floats_of(r.fill),
                r.add ? r.add->const_data_ptr() : nullptr, int64_of(r.add_index),
                r.out.mutable_data_ptr(), r.out.size(0), r.x.size(0), r.n_add, r.x.size(1),
                r.x.stride(0), r.add ? r.add->stride(0) : 0},
               current_stream(x)));
  return r.out;
}

std::tuple<Tensor, Tensor> restore_rows_bwd(const Tensor& dout, const Tensor& index,
                                            const OptTensor& add_index, int64_t n_add,
                                            bool want_dfill, bool want_dadd) {
  constexpr const char* kOp = "encfast::restore_rows_bwd";
  const DeviceGuard guard(dout.get_device_index());
  const RestoredRowsGrad r(kOp, dout, index, add_index, n_add, want_dfill, want_dadd);
  const int64_t m = r.dout.size(0), channels = r.dout.size(1), n_dadd = want_dadd ? n_add : 0;
  OptTensor sorted, order, begin;
  if (r.add_index) {
    std::tie(sorted, order) = stable_sort(*r.add_index);
    begin = new_contiguous(dout, {n_dadd + 1}, ScalarType::Long);
  }
  const Tensor partials =
      new_contiguous(dout, {restore_rows_bwd_scratch(m, n_dadd, channels)}, ScalarType::Float);
  check_launch(kOp, restore_rows_bwd_cuda(
                        {r.dtype, r.dout.const_data_ptr(), int64_of(r.index), int64_of(sorted),
                         int64_of(order), begin ? begin->mutable_data_ptr<int64_t>() : nullptr,
                         partials.mutable_data_ptr<float>(),
                         want_dfill ? r.dfill.mutable_data_ptr<float>() : nullptr,
                         want_dadd ? r.dadd.mutable_data_ptr<float>() : nullptr, m, n_dadd,
                         channels, r.dout.stride(0)},
                        current_stream(dout)));
  return {r.dfill, r.dadd};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CUDA, m) {
  m.impl("select_patches", TORCH_BOX(&encfast::select_patches));
  m.impl("gather_patches", TORCH_BOX(&encfast::gather_patches));
  m.impl("restore_rows", TORCH_BOX(&encfast::restore_rows));
  m.impl("restore_rows_bwd", TORCH_BOX(&encfast::restore_rows_bwd));
}
