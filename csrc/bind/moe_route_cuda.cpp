// The ops of encfast.ops.moe_route on a GPU. No value is read on the host: the kernels assert the
// ranges of ids and places.
#include <torch/csrc/stable/library.h>

#include "bind/cuda_util.h"
#include "bind/moe_route.h"
#include "cuda/moe_route.h"
#include "cuda/moe_rows.h"

namespace encfast {
namespace {

const int32_t* ints_of(const Tensor& x) { return x.const_data_ptr<int32_t>(); }
const float* floats_of(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* floats_or_null(const OptTensor& x) { return x ? floats_of(*x) : nullptr; }

struct Room {
  bool limited = false;
  double capacity_factor = 1;
  int64_t min_capacity = 0;
  bool random = false;
  const int64_t* rng = nullptr;
};

void sort_choices(const char* op, const Tensor& expert_ids, int64_t experts, const Room& room,
                  const Places& places) {
  const int64_t n = expert_ids.size(0), k = expert_ids.size(1);
  const Tensor scratch =
      new_contiguous(expert_ids, {moe_sort_scratch(n, experts, k, room.random)}, ScalarType::Int);
  check_launch(
      op, moe_sort_cuda(
              {ints_of(expert_ids), n, experts, k, room.limited, room.capacity_factor,
               room.min_capacity, room.random, room.rng, places.rows.mutable_data_ptr<int32_t>(),
               places.slots.mutable_data_ptr<int32_t>(),
               places.cu_seqlens.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr<int32_t>()},
              current_stream(expert_ids)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(
    const Tensor& logits, const OptTensor& mask, int64_t top_k, std::string scoring,
    std::string renormalise, std::optional<double> capacity_factor, int64_t min_capacity,
    std::string priority, std::optional<std::string> noise, const OptTensor& rng) {
  constexpr const char* kOp = "encfast::moe_route";
  const DeviceGuard guard(logits.get_device_index());
  const Routed r(kOp, logits, mask, top_k, scoring, renormalise, capacity_factor, min_capacity,
                 priority, noise, rng);
  OptTensor words;
  if (rng) words = checked_rng(kOp, *rng, logits);
  const int64_t* key = words ? words->const_data_ptr<int64_t>() : nullptr;
  void* stream = current_stream(logits);
  check_launch(
      kOp, moe_choose_cuda(
               {core_dtype(kOp, "logits", logits), r.logits.const_data_ptr(), r.logits.stride(0),
                r.mask ? static_cast<const uint8_t*>(r.mask->const_data_ptr()) : nullptr, r.n,
                r.experts, top_k, r.scoring, r.noise, key, r.expert_ids.mutable_data_ptr<int32_t>(),
                r.probabilities.mutable_data_ptr<float>()},
               stream));
  sort_choices(kOp, r.expert_ids, r.experts,
               {r.limited, r.capacity_factor, min_capacity, r.random, key}, *r.places);
  check_launch(kOp, moe_gates_cuda({floats_of(r.probabilities), ints_of(r.expert_ids),
                                    ints_of(r.places->slots), r.n, r.experts, top_k, r.renormalise,
                                    r.gates.mutable_data_ptr<float>()},
                                   stream));
  return {r.gates,         r.expert_ids,         r.places->rows,
          r.places->slots, r.places->cu_seqlens, r.probabilities};
}

Tensor moe_route_bwd(const OptTensor& dgates, const OptTensor& dprobabilities,
                     const Tensor& probabilities, const Tensor& expert_ids, const Tensor& slots,
                     std::string scoring, std::string renormalise, ScalarType dtype) {
  constexpr const char* kOp = "encfast::moe_route_bwd";
  const DeviceGuard guard(probabilities.get_device_index());
  const RoutedGrad r(kOp, dgates, dprobabilities, probabilities, expert_ids, slots, dtype);
  check_launch(kOp, moe_route_bwd_cuda(
                        {floats_or_null(r.dgates), floats_or_null(r.dprobabilities),
                         floats_of(r.probabilities), ints_of(r.expert_ids), ints_of(r.slots), r.n,
                         r.experts, r.k, scoring_of(kOp, scoring), renormalise_of(kOp, renormalise),
                         core_dtype(kOp, "dlogits", r.dlogits), r.dlogits.mutable_data_ptr()},
                        current_stream(probabilities)));
  return r.dlogits;
}

std::tuple<Tensor, Tensor, Tensor> moe_sort(const Tensor& expert_ids, int64_t num_experts) {
  constexpr const char* kOp = "encfast::moe_sort";
  const DeviceGuard guard(expert_ids.get_device_index());
  check_dim(kOp, "expert_ids", expert_ids, 2);
  check_dtype(kOp, "expert_ids", expert_ids, ScalarType::Int, "int32");
  STD_TORCH_CHECK(num_experts >= 1, kOp, ": num_experts is ", num_experts, ", expected 1 or more");
  const Tensor ids = torch::stable::contiguous(expert_ids);
  const Places places(kOp, ids, ids.size(0), ids.size(1), num_experts);
  sort_choices(kOp, ids, num_experts, {}, places);
  return {places.rows, places.slots, places.cu_seqlens};
}

Tensor moe_permute(const Tensor& x, const Tensor& rows, const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_permute";
  const DeviceGuard guard(x.get_device_index());
  const MovedRows r(kOp, "x", x, false, rows, slots);
  Tensor out = new_rows(x, r.n * r.k);
  check_launch(kOp, moe_permute_cuda({r.dtype, r.x.const_data_ptr(), ints_of(r.rows),
                                      out.mutable_data_ptr(), r.n, r.k, r.channels, r.x.stride(0)},
                                     current_stream(x)));
  return out;
}

Tensor moe_unpermute(const Tensor& y, const OptTensor& gates_in, const Tensor& rows,
                     const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_unpermute";
  const DeviceGuard guard(y.get_device_index());
  const MovedRows r(kOp, "y", y, true, rows, slots);
  OptTensor gates;
  if (gates_in) gates = checked_gates(kOp, *gates_in, r);
  Tensor out = new_rows(y, r.n);
  check_launch(kOp, moe_unpermute_cuda(
                        {r.dtype, r.x.const_data_ptr(), floats_or_null(gates), ints_of(r.slots),
                         out.mutable_data_ptr(), r.n, r.k, r.channels, r.x.stride(0)},
                        current_stream(y)));
  return out;
}

std::tuple<Tensor, Tensor> moe_unpermute_bwd(const Tensor& dout, const Tensor& y,
                                             const Tensor& gates_in, const Tensor& rows,
                                             const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_unpermute_bwd";
  const DeviceGuard guard(y.get_device_index());
  const MovedRows r(kOp, "y", y, true, rows, slots), d(kOp, "dout", dout, false, rows, slots);
  STD_TORCH_CHECK(d.dtype == r.dtype && d.channels == r.channels, kOp,
                  ": dout and y differ in dtype or channels");
  check_same_device(kOp, "dout", dout, "y", y);
  const Tensor gates = checked_gates(kOp, gates_in, r);
  Tensor dy = new_rows(y, r.n * r.k), dgates = new_contiguous(y, {r.n, r.k}, ScalarType::Float);
  check_launch(kOp, moe_unpermute_bwd_cuda({r.dtype, d.x.const_data_ptr(), r.x.const_data_ptr(),
                                            floats_of(gates), ints_of(r.rows), ints_of(r.slots),
                                            dy.mutable_data_ptr(), dgates.mutable_data_ptr<float>(),
                                            r.n, r.k, r.channels, d.x.stride(0), r.x.stride(0)},
                                           current_stream(y)));
  return {dy, dgates};
}

Tensor moe_jitter(const Tensor& x_in, const Tensor& rng_in, double amount) {
  constexpr const char* kOp = "encfast::moe_jitter";
  const DeviceGuard guard(x_in.get_device_index());
  check_dim(kOp, "x", x_in, 2);
  const DType dtype = core_dtype(kOp, "x", x_in);
  const Tensor x = with_inner_contiguous(x_in, 1), rng = checked_rng(kOp, rng_in, x_in);
  Tensor out = new_rows(x, x.size(0));
  check_launch(kOp, moe_jitter_cuda({dtype, x.const_data_ptr(), rng.const_data_ptr<int64_t>(),
                                     static_cast<float>(amount), out.mutable_data_ptr(), x.size(0),
                                     x.size(1), x.stride(0)},
                                    current_stream(x)));
  return out;
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&encfast::moe_route));
  m.impl("moe_route_bwd", TORCH_BOX(&encfast::moe_route_bwd));
  m.impl("moe_sort", TORCH_BOX(&encfast::moe_sort));
  m.impl("moe_permute", TORCH_BOX(&encfast::moe_permute));
  m.impl("moe_unpermute", TORCH_BOX(&encfast::moe_unpermute));
  m.impl("moe_unpermute_bwd", TORCH_BOX(&encfast::moe_unpermute_bwd));
  m.impl("moe_jitter", TORCH_BOX(&encfast::moe_jitter));
}
