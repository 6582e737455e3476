// encfast::gather_rows, encfast::scatter_rows and encfast::find_rows on the CPU.
//
// A scatter to distinct rows is a gather by the inverse index, which also writes the zero rows: one
// pass over the result and no second one over x. Where rows share a place, a counting sort groups
// them in their order and each result row is summed by one task.
#include "cpu/pad.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bind/pool.h"
#include "bind/row_index.h"
#include "bind/tensor_util.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

// x with contiguous rows, as many bytes apart as its first stride says.
Tensor checked_rows(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x has no dimension, expected rows");
  return with_inner_contiguous(x, 1);
}

void gather(const Tensor& x, const int64_t* index, const Tensor& out) {
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t row_bytes = row_elements(x) * size;
  if (row_bytes == 0) return;
  TorchPool pool;
  cpu_kernels().pad.gather_rows({x.const_data_ptr(), index, out.mutable_data_ptr(), out.size(0),
                                 row_bytes, x.stride(0) * size, row_bytes},
                                pool.pool());
}

Tensor gather_rows_cpu(const Tensor& x, const Tensor& index) {
  constexpr const char* kOp = "encfast::gather_rows";
  const Tensor rows = checked_rows(kOp, x);
  const Tensor idx = checked_index(kOp, "index", index, -1, rows.size(0));
  Tensor out = new_rows(rows, idx.size(0));
  gather(rows, idx.const_data_ptr<int64_t>(), out);
  return out;
}

// Place of each result row in the source, -1 where nothing lands; false if two rows share a place.
bool invert(const int64_t* index, int64_t m, std::vector<int64_t>& inverse) {
  for (int64_t i = 0; i < m; ++i) {
    if (index[i] < 0) continue;
    int64_t& place = inverse[static_cast<size_t>(index[i])];
    if (place >= 0) return false;
    place = i;
  }
  return true;
}

SumType sum_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return SumType::kFloat32;
    case ScalarType::BFloat16:
      return SumType::kBFloat16;
    case ScalarType::Half:
      return SumType::kFloat16;
    case ScalarType::Double:
      return SumType::kFloat64;
    case ScalarType::Int:
      return SumType::kInt32;
    case ScalarType::Long:
      return SumType::kInt64;
    default:
      STD_TORCH_CHECK(false, op,
                      ": index holds a row twice, and rows of this dtype cannot be added; expected "
                      "float32, bfloat16, float16, float64, int32 or int64");
  }
}

Tensor scatter_rows_cpu(const Tensor& x, const Tensor& index, int64_t n) {
  constexpr const char* kOp = "encfast::scatter_rows";
  STD_TORCH_CHECK(n >= 0, kOp, ": n is ", n, ", expected >= 0");
  const Tensor rows = checked_rows(kOp, x);
  const Tensor idx = checked_index(kOp, "index", index, -1, n);
  const int64_t m = idx.size(0);
  STD_TORCH_CHECK(m == rows.size(0), kOp, ": index has ", m, " entries, x has ", rows.size(0),
                  " rows");
  const int64_t* values = idx.const_data_ptr<int64_t>();
  Tensor out = new_rows(rows, n);
  std::vector<int64_t> inverse(static_cast<size_t>(n), -1);
  if (invert(values, m, inverse)) {
    gather(rows, inverse.data(), out);
    return out;
  }
  const RowGroups groups(values, m, n);
  TorchPool pool;
  cpu_kernels().pad.sum_rows(
      {sum_type(kOp, rows), rows.const_data_ptr(), groups.begin.data(), groups.order.data(),
       out.mutable_data_ptr(), n, row_elements(rows), rows.stride(0)},
      pool.pool());
  return out;
}

std::tuple<Tensor, Tensor> find_rows_cpu(const Tensor& mask) {
  constexpr const char* kOp = "encfast::find_rows";
  check_cpu(kOp, "mask", mask);
  auto [indices, cu_seqlens] = new_found_rows(kOp, mask);
  const Tensor kept = torch::stable::contiguous(to_dtype(mask, ScalarType::Bool));
  TorchPool pool;
  cpu_kernels().pad.find_rows(
      {static_cast<const uint8_t*>(kept.const_data_ptr()), indices.mutable_data_ptr<int64_t>(),
       cu_seqlens.mutable_data_ptr<int32_t>(), mask.size(0), mask.size(1)},
      pool.pool());
  return {indices, cu_seqlens};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&encfast::gather_rows_cpu));
  m.impl("scatter_rows", TORCH_BOX(&encfast::scatter_rows_cpu));
  m.impl("find_rows", TORCH_BOX(&encfast::find_rows_cpu));
}
