// What every binding needs of tensors: checks whose messages name the argument, layouts,
// workspaces.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace encfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

inline void check_cpu(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " is not on the CPU like the other tensors");
}

inline void check_same_device(const char* op, const char* name, const Tensor& x,
                              const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cpu() == like.is_cpu() && x.is_cuda() == like.is_cuda() &&
                      x.get_device_index() == like.get_device_index(),
                  op, ": ", name, " is not on the device of ", like_name);
}

inline void check_dim(const char* op, const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, op, ": ", name, " has shape ", shape_text(x), ", expected ", dim,
                  " dimensions");
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                        const char* dtype_name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " is not ", dtype_name);
}

// What the cores call the dtype of x; an error where they have none.
inline DType core_dtype(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " is not float32, bfloat16 or float16");
  }
}

inline void check_same_shape(const char* op, const char* name, const Tensor& x,
                             const char* like_name, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_text(x), ", ", like_name, " has ",
                  shape_text(like));
}

// True where dimensions `from`.. lie in memory like those of a contiguous tensor.
inline bool inner_contiguous(const Tensor& x, int64_t from) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= from; --i) {
    if (x.size(i) == 0) return true;
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

// `x` itself where its dimensions `from`.. are contiguous (outer strides stay), else a copy.
inline Tensor with_inner_contiguous(const Tensor& x, int64_t from) {
  return inner_contiguous(x, from) ? x : torch::stable::contiguous(x);
}

// x of `dim` dimensions and a dtype that cores know, the last dimension contiguous; outer strides
// stay.
inline Tensor checked_operand(const char* op, const char* name, const Tensor& x, int64_t dim) {
  check_cpu(op, name, x);
  check_dim(op, name, x, dim);
  core_dtype(op, name, x);
  return with_inner_contiguous(x, dim - 1);
}

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// From here on the C library maps fresh memory for every allocation (its largest M_MMAP_THRESHOLD);
// below, memory is reused and its pages are there already.
constexpr int64_t kFreshAllocation = int64_t{32} << 20;

// Asks for pages of 2 MiB under a large result on the CPU, where the system leaves that to
// programs: a fault for each 4 KiB costs several times as much as writing them. x will be written
// whole. What cannot be had is not missed.
inline void advise_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes < kFreshAllocation || !x.is_cpu()) return;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

inline Tensor new_contiguous(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                             ScalarType dtype) {
  Tensor x = torch::stable::new_empty(like, sizes, dtype);
  advise_huge_pages(x);
  return x;
}

// An uninitialised tensor of n rows like those of x.
inline Tensor new_rows(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = n;
  return new_contiguous(x, sizes, x.scalar_type());
}

// Elements of one row: all dimensions but the first.
inline int64_t row_elements(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 1; i < x.dim(); ++i) count *= x.size(i);
  return count;
}

// What find_rows returns for a mask, unwritten: (indices [B * S] int64, cu_seqlens [B + 1] int32).
inline std::tuple<Tensor, Tensor> new_found_rows(const char* op, const Tensor& mask) {
  check_dim(op, "mask", mask, 2);
  const int64_t n = mask.size(0) * mask.size(1);
  STD_TORCH_CHECK(n <= INT32_MAX, op, ": mask has ", n, " entries, expected at most 2^31 - 1");
  return {new_contiguous(mask, {n}, ScalarType::Long),
          new_contiguous(mask, {mask.size(0) + 1}, ScalarType::Int)};
}

// Scratch memory from PyTorch's allocator, so that its accounting and its NaN fill of uninitialised
// memory (torch.use_deterministic_algorithms) reach it.
class Workspace {
 public:
  static constexpr int64_t kAlign = 64;  // cache line, and the width of one AVX-512 register

  Workspace(const Tensor& like, int64_t bytes)
      : tensor_(new_contiguous(like, {(bytes + kAlign) / 4 + 1}, ScalarType::Float)) {}

  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  Tensor tensor_;
};

}  // namespace encfast
