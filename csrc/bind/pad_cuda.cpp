// encfast::gather_rows, encfast::scatter_rows and encfast::find_rows on a GPU. No value of an index
// is read on the host: the kernels assert their range. A scatter sorts the index (stable), so that
// rows which share a place are added in their order without atomics: the same bits in every run.
// Rows of a dtype that cannot be added move as bytes, and of those which share a place the first
// one stays.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "bind/cuda_util.h"
#include "cuda/pad.h"

namespace encfast {
namespace {

// x with contiguous rows and index [m] contiguous, both on x's GPU.
std::pair<Tensor, Tensor> checked(const char* op, const Tensor& x, const Tensor& index) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x has no dimension, expected rows");
  check_dim(op, "index", index, 1);
  check_dtype(op, "index", index, ScalarType::Long, "int64");
  STD_TORCH_CHECK(index.is_cuda() && index.get_device_index() == x.get_device_index(), op,
                  ": index is not on the device of x, CUDA device ", x.get_device_index());
  return {with_inner_contiguous(x, 1), torch::stable::contiguous(index)};
}

CudaSumType sum_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return CudaSumType::kFloat32;
    case ScalarType::BFloat16:
      return CudaSumType::kBFloat16;
    case ScalarType::Half:
      return CudaSumType::kFloat16;
    case ScalarType::Double:
      return CudaSumType::kFloat64;
    case ScalarType::Int:
      return CudaSumType::kInt32;
    case ScalarType::Long:
      return CudaSumType::kInt64;
    default:
      return CudaSumType::kBytes;
  }
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  constexpr const char* kOp = "encfast::gather_rows";
  const DeviceGuard guard(x.get_device_index());
  const auto [rows, idx] = checked(kOp, x, index);
  Tensor out = new_rows(rows, idx.size(0));
  const int64_t size = static_cast<int64_t>(rows.element_size());
  const int64_t row_bytes = row_elements(rows) * size;
  check_launch(kOp, gather_rows_cuda({rows.const_data_ptr(), idx.const_data_ptr<int64_t>(),
                                      out.mutable_data_ptr(), idx.size(0), rows.size(0), row_bytes,
                                      rows.stride(0) * size, row_bytes},
                                     current_stream(x)));
  return out;
}

Tensor scatter_rows(const Tensor& x, const Tensor& index, int64_t n) {
  constexpr const char* kOp = "encfast::scatter_rows";
  STD_TORCH_CHECK(n >= 0, kOp, ": n is ", n, ", expected >= 0");
  const DeviceGuard guard(x.get_device_index());
  const auto [rows, idx] = checked(kOp, x, index);
  STD_TORCH_CHECK(idx.size(0) == rows.size(0), kOp, ": index has ", idx.size(0), " entries, x has ",
                  rows.size(0), " rows");
  const auto [sorted, order] = stable_sort(idx);
  Tensor out = new_rows(rows, n);
  Tensor begin = new_contiguous(rows, {n + 1}, ScalarType::Long);
  const CudaSumType type = sum_type(rows.scalar_type());
  const int64_t units = type == CudaSumType::kBytes ? static_cast<int64_t>(rows.element_size()) : 1;
  check_launch(kOp,
               sum_rows_cuda({type, rows.const_data_ptr(), sorted.const_data_ptr<int64_t>(),
                              order.const_data_ptr<int64_t>(), begin.mutable_data_ptr<int64_t>(),
                              out.mutable_data_ptr(), idx.size(0), n, row_elements(rows) * units,
                              rows.stride(0) * units},
                             current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor> find_rows(const Tensor& mask) {
  constexpr const char* kOp = "encfast::find_rows";
  const DeviceGuard guard(mask.get_device_index());
  auto [indices, cu_seqlens] = new_found_rows(kOp, mask);
  const int64_t n = indices.size(0);
  if (n == 0) {
    torch::stable::zero_(cu_seqlens);
    return {indices, cu_seqlens};
  }
  const Tensor kept = torch::stable::contiguous(to_dtype(mask, ScalarType::Bool));
  const Tensor tiles = new_contiguous(mask, {find_rows_scratch(n)}, ScalarType::Int);
  check_launch(kOp, find_rows_cuda({static_cast<const uint8_t*>(kept.const_data_ptr()),
                                    indices.mutable_data_ptr<int64_t>(),
                                    cu_seqlens.mutable_data_ptr<int32_t>(),
                                    tiles.mutable_data_ptr<int32_t>(), n, mask.size(1)},
                                   current_stream(mask)));
  return {indices, cu_seqlens};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&encfast::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&encfast::scatter_rows));
  m.impl("find_rows", TORCH_BOX(&encfast::find_rows));
}
