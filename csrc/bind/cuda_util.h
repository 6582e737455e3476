// What the bindings of CUDA kernels share: the device and stream of a call, and a stable sort.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <utility>

#include "bind/tensor_util.h"

// Weak: found where libtorch brings libtorch_cuda along, null on a CPU-only PyTorch, which loads
// this library all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace encfast {

using torch::stable::accelerator::DeviceGuard;

inline void* current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "encfast: this PyTorch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " at launch");
}

// aten::sort.stable: (ascending values, where each came from).
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& x) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace encfast
