// Tensors [..., C] as the matrices of the row-wise cores, and what else their bindings share.
#pragma once
#include "bind/tensor_util.h"
#include "cpu/matrix.h"

namespace encfast {

using OptTensor = std::optional<Tensor>;

// The distance of rows [..., C] that lie evenly spaced with contiguous elements; else nothing.
inline std::optional<int64_t> even_row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) != 1 && x.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t rows = 1;  // of the dimensions seen so far, innermost first
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (!stride) stride = x.stride(i);
    if (x.stride(i) != *stride * rows) return std::nullopt;
    rows *= x.size(i);
  }
  return stride.value_or(x.size(last));
}

// Keeps the memory of a [..., C] tensor alive that a core reads as a matrix.
class RowsIn {
 public:
  RowsIn() = default;
  RowsIn(const char* op, const char* name, const Tensor& x) {
    check_cpu(op, name, x);
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": ", name, " has shape ",
                    shape_text(x), ", expected rows of at least one channel");
    dtype_ = core_dtype(op, name, x);
    std::optional<int64_t> stride = even_row_stride(x);
    tensor_ = stride ? x : torch::stable::contiguous(x);
    stride_ = stride.value_or(x.size(x.dim() - 1));
  }
  RowsIn(const char* op, const char* name, const OptTensor& x)
      : RowsIn(x ? RowsIn(op, name, *x) : RowsIn()) {}

  ConstMatrix matrix() const {
    return {tensor_ ? tensor_->const_data_ptr() : nullptr, stride_, dtype_};
  }

 private:
  OptTensor tensor_;
  int64_t stride_ = 0;
  DType dtype_ = DType::kFloat32;
};

// A contiguous result [..., C] as a matrix.
inline Matrix matrix_of(const char* op, const Tensor& x) {
  return {x.mutable_data_ptr(), x.size(x.dim() - 1), core_dtype(op, "result", x)};
}

// A [C] parameter of any of the dtypes as contiguous float32.
class Vector {
 public:
  Vector(const char* op, const char* name, const OptTensor& x, int64_t C) {
    if (!x) return;
    check_cpu(op, name, *x);
    core_dtype(op, name, *x);
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == C, op, ": ", name, " has shape ", shape_text(*x),
                    ", expected (", C, ",)");
    tensor_ = torch::stable::contiguous(to_dtype(*x, ScalarType::Float));
  }

  const float* data() const { return tensor_ ? tensor_->const_data_ptr<float>() : nullptr; }

 private:
  OptTensor tensor_;
};

inline Tensor new_empty_vector(const Tensor& like, ScalarType dtype) {
  return new_contiguous(like, {0}, dtype);
}

inline int64_t round_up_lanes(int64_t n) { return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// Rows of one forward task: enough bytes that taking a task costs nothing beside it.
inline int64_t rows_per_task(int64_t C) {
  constexpr int64_t kFloats = 32 * 1024;
  return std::max<int64_t>(1, kFloats / C);
}

// Rows whose parameter gradients one task sums: a function of the shape alone. Few enough tasks
// that their partial sums are small beside the rows.
inline int64_t rows_per_partial(int64_t N) {
  constexpr int64_t kTasks = 64, kMinRows = 16;
  return std::max<int64_t>(kMinRows, (N + kTasks - 1) / kTasks);
}

}  // namespace encfast
