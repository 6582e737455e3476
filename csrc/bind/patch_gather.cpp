// encfast::select_patches, gather_patches, restore_rows and restore_rows_bwd on the CPU: checks
// everything a core relies on, values included, allocates and dispatches.
#include "bind/patch_gather.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind/pool.h"
#include "bind/row_index.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

// Running sums [B + 1] from 0 to `total`, never decreasing.
void check_running_sums(const char* op, const char* name, const Tensor& sums, int64_t total) {
  const int32_t* values = sums.const_data_ptr<int32_t>();
  const int64_t B = sums.size(0) - 1;
  STD_TORCH_CHECK(values[0] == 0, op, ": ", name, " starts at ", values[0], ", expected 0");
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(values[b] <= values[b + 1], op, ": ", name, " decreases from ", values[b],
                    " to ", values[b + 1], " at sequence ", b);
  }
  STD_TORCH_CHECK(values[B] == total, op, ": ", name, " ends at ", values[B], ", expected ", total);
}

// Patches of the longest sequence; none keeps more than it has.
int64_t checked_lengths(const char* op, const Selection& s) {
  check_running_sums(op, "cu_seqlens", s.cu_seqlens, s.noise.size(0));
  check_running_sums(op, "cu_keep", s.cu_keep, s.visible.size(0));
  const int32_t* ends = s.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* kept = s.cu_keep.const_data_ptr<int32_t>();
  int64_t longest = 0;
  for (int64_t b = 0; b + 1 < s.cu_seqlens.size(0); ++b) {
    const int64_t length = ends[b + 1] - ends[b], keep = kept[b + 1] - kept[b];
    STD_TORCH_CHECK(keep <= length, op, ": keep is ", keep, " for sequence ", b, ", which has ",
                    length, " patches");
    longest = std::max(longest, length);
  }
  return longest;
}

std::tuple<Tensor, Tensor, Tensor> select_patches_cpu(const Tensor& noise, const Tensor& cu_seqlens,
                                                      const Tensor& cu_keep, int64_t keep,
                                                      bool ordered) {
  constexpr const char* kOp = "encfast::select_patches";
  check_cpu(kOp, "noise", noise);
  const Selection s(kOp, noise, cu_seqlens, cu_keep, keep);
  const int64_t stride = round_up_lanes(checked_lengths(kOp, s) * kSelectBytes + kSelectPad);
  TorchPool pool;
  const Workspace workspace(noise, stride * pool.threads());
  cpu_kernels().patch_gather.select_patches(
      {s.noise.const_data_ptr<float>(), s.cu_seqlens.const_data_ptr<int32_t>(),
       s.cu_keep.const_data_ptr<int32_t>(), s.visible.mutable_data_ptr<int64_t>(),
       s.hidden.mutable_data_ptr<int64_t>(), s.restore.mutable_data_ptr<int64_t>(),
       s.cu_seqlens.size(0) - 1, ordered, static_cast<char*>(workspace.data()), stride},
      pool.pool());
  return {s.visible, s.hidden, s.restore};
}

Tensor gather_patches_cpu(const Tensor& image, const Tensor& ids, const std::vector<int64_t>& patch,
                          bool channels_last, const OptTensor& scale, const OptTensor& shift,
                          ScalarType dtype) {
  constexpr const char* kOp = "encfast::gather_patches";
  check_cpu(kOp, "image", image);
  const PatchRows r(kOp, image, ids, patch, channels_last, scale, shift, dtype);
  const Tensor checked = checked_index(kOp, "ids", r.ids, 0, r.grid.batch * r.grid.patches);
  TorchPool pool;
  const int64_t row_floats = round_up_lanes(r.grid.pixels);
  const Workspace workspace(
      image, (2 + pool.threads()) * row_floats * static_cast<int64_t>(sizeof(float)));
  auto* factors = static_cast<float*>(workspace.data());
  cpu_kernels().patch_gather.gather_patches(
      {r.grid, r.pixels, r.dtype, image.const_data_ptr(), checked.const_data_ptr<int64_t>(),
       floats_of(r.scale), floats_of(r.shift), r.rows.mutable_data_ptr(), r.rows.size(0), factors,
       factors + 2 * row_floats, row_floats},
      pool.pool());
  return r.rows;
}

ConstMatrix rows_in(const Tensor& x, DType dtype) {
  return {x.const_data_ptr(), x.stride(0), dtype};
}

Tensor restore_rows_cpu(const Tensor& x, const Tensor& index, const OptTensor& fill,
                        const OptTensor& add, const OptTensor& add_index) {
  constexpr const char* kOp = "encfast::restore_rows";
  check_cpu(kOp, "x", x);
  const RestoredRows r(kOp, x, index, fill, add, add_index);
  checked_index(kOp, "index", r.index, -1, r.x.size(0));
  if (r.add_index) checked_index(kOp, "add_index", *r.add_index, 0, r.n_add);
  const int64_t C = r.x.size(1);
  if (r.out.numel() == 0) return r.out;
  TorchPool pool;
  const Workspace fill_row(x, C * static_cast<int64_t>(sizeof(float)));
  cpu_kernels().patch_gather.restore_rows(
      {rows_in(r.x, r.dtype), r.index.const_data_ptr<int64_t>(), floats_of(r.fill),
       r.add ? rows_in(*r.add, r.add_dtype) : ConstMatrix{},
       r.add_index ? r.add_index->const_data_ptr<int64_t>() : nullptr, r.n_add,
       matrix_of(kOp, r.out), r.out.size(0), C, rows_per_task(C), fill_row.data()},
      pool.pool());
  return r.out;
}

std::tuple<Tensor, Tensor> restore_rows_bwd_cpu(const Tensor& dout, const Tensor& index,
                                                const OptTensor& add_index, int64_t n_add,
                                                bool want_dfill, bool want_dadd) {
  constexpr const char* kOp = "encfast::restore_rows_bwd";
  check_cpu(kOp, "dout", dout);
  const RestoredRowsGrad r(kOp, dout, index, add_index, n_add, want_dfill, want_dadd);
  const int64_t M = r.dout.size(0), C = r.dout.size(1);
  const int64_t* order = nullptr;
  std::optional<RowGroups> groups;
  if (r.add_index) {
    checked_index(kOp, "add_index", *r.add_index, 0, n_add);
    groups.emplace(r.add_index->const_data_ptr<int64_t>(), M, n_add);
    order = groups->order.data();
  }
  const int64_t rows = want_dadd ? n_add : M;
  if (rows == 0 || C == 0) {
    return {torch::stable::fill_(Tensor(r.dfill), 0.0), torch::stable::fill_(Tensor(r.dadd), 0.0)};
  }
  const int64_t per_task = rows_per_partial(rows), width = want_dfill ? round_up_lanes(C) : 0;
  const Tensor sums = new_contiguous(dout, {width}, ScalarType::Float);
  TorchPool pool;
  const Workspace partials(
      dout, (rows + per_task - 1) / per_task * width * static_cast<int64_t>(sizeof(float)));
  cpu_kernels().patch_gather.restore_rows_bwd(
      {rows_in(r.dout, r.dtype), r.index.const_data_ptr<int64_t>(),
       groups ? groups->begin.data() : nullptr, order, n_add, M, C,
       want_dadd ? r.dadd.mutable_data_ptr<float>() : nullptr, per_task,
       static_cast<float*>(partials.data()), sums.mutable_data_ptr<float>(), width},
      pool.pool());
  std::copy_n(sums.const_data_ptr<float>(), r.dfill.numel(), r.dfill.mutable_data_ptr<float>());
  return {r.dfill, r.dadd};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("select_patches", TORCH_BOX(&encfast::select_patches_cpu));
  m.impl("gather_patches", TORCH_BOX(&encfast::gather_patches_cpu));
  m.impl("restore_rows", TORCH_BOX(&encfast::restore_rows_cpu));
  m.impl("restore_rows_bwd", TORCH_BOX(&encfast::restore_rows_bwd_cpu));
}
