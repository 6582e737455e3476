// The ops of encfast.ops.moe_route on the CPU: checks everything a core relies on, values included,
// allocates and dispatches.
#include "bind/moe_route.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "bind/pool.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);

ConstMatrix rows_in(const Tensor& x, DType dtype) {
  return {x.const_data_ptr(), x.stride(0), dtype};
}

PhiloxKey key_of(const char* op, const OptTensor& rng, const Tensor& like) {
  if (!rng) return {};
  const Tensor words = checked_rng(op, *rng, like);
  const int64_t* values = words.const_data_ptr<int64_t>();
  return {{static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1])}};
}

void check_int32_range(const char* op, const char* name, const Tensor& x, int64_t end) {
  const int32_t* values = x.const_data_ptr<int32_t>();
  const int64_t n = x.numel();
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(values[i] >= -1 && values[i] < end, op, ": ", name, " holds ", values[i],
                    ", expected -1..", end - 1);
  }
}

// What the core sorts by beside the choices themselves.
struct Room {
  bool limited = false;
  double capacity_factor = 1;
  int64_t min_capacity = 0;
  bool random = false;
  PhiloxKey key{};
};

// Choices of one tile at least, and tiles at most: a function of the shape alone.
constexpr int64_t kTileChoices = 1024, kTiles = 64;

void sort_choices(const Tensor& expert_ids, int64_t experts, const Room& room,
                  const Places& places) {
  const int64_t n = expert_ids.size(0), k = expert_ids.size(1), choices = n * k;
  const int64_t per_tile = std::max(kTileChoices, (choices + kTiles - 1) / kTiles);
  const int64_t tiles = (choices + per_tile - 1) / per_tile;
  TorchPool pool;
  const int64_t sorted = room.random ? choices : 0;
  const int64_t stride = room.random ? round_up_lanes(n + kMoeStep) : 0;
  const Workspace scratch(expert_ids, (tiles * experts + experts + 1 + sorted) * kFloatBytes);
  const Workspace keys(expert_ids, stride * pool.threads() * kFloatBytes);
  auto* histograms = static_cast<int32_t*>(scratch.data());
  int32_t* all_seqlens = histograms + tiles * experts;
  cpu_kernels().moe_route.sort(
      {expert_ids.const_data_ptr<int32_t>(), n, experts, k, room.limited, room.capacity_factor,
       room.min_capacity, room.random, room.key, places.rows.mutable_data_ptr<int32_t>(),
       places.slots.mutable_data_ptr<int32_t>(), places.cu_seqlens.mutable_data_ptr<int32_t>(),
       tiles, per_tile, histograms, all_seqlens, all_seqlens + experts + 1,
       static_cast<int32_t*>(keys.data()), stride},
      pool.pool());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_cpu(
    const Tensor& logits, const OptTensor& mask, int64_t top_k, std::string scoring,
    std::string renormalise, std::optional<double> capacity_factor, int64_t min_capacity,
    std::string priority, std::optional<std::string> noise, const OptTensor& rng) {
  constexpr const char* kOp = "encfast::moe_route";
  check_cpu(kOp, "logits", logits);
  const Routed r(kOp, logits, mask, top_k, scoring, renormalise, capacity_factor, min_capacity,
                 priority, noise, rng);
  const PhiloxKey key = key_of(kOp, rng, logits);
  const int64_t row_floats = (r.experts + kMoeStep - 1) / kMoeStep * kMoeStep;
  TorchPool pool;
  const Workspace workspace(logits, kChooseRows * row_floats * pool.threads() * kFloatBytes);
  const MoeRouteKernels& kernels = cpu_kernels().moe_route;
  kernels.choose(
      {rows_in(r.logits, core_dtype(kOp, "logits", logits)),
       r.mask ? static_cast<const uint8_t*>(r.mask->const_data_ptr()) : nullptr, r.n, r.experts,
       top_k, r.scoring, r.noise, key, r.expert_ids.mutable_data_ptr<int32_t>(),
       r.probabilities.mutable_data_ptr<float>(), static_cast<float*>(workspace.data()),
       row_floats},
      pool.pool());
  sort_choices(r.expert_ids, r.experts, {r.limited, r.capacity_factor, min_capacity, r.random, key},
               *r.places);
  kernels.gates({r.probabilities.const_data_ptr<float>(), r.expert_ids.const_data_ptr<int32_t>(),
                 r.places->slots.const_data_ptr<int32_t>(), r.n, r.experts, top_k, r.renormalise,
                 r.gates.mutable_data_ptr<float>()},
                pool.pool());
  return {r.gates,         r.expert_ids,         r.places->rows,
          r.places->slots, r.places->cu_seqlens, r.probabilities};
}

const float* floats_or_null(const OptTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

Tensor moe_route_bwd_cpu(const OptTensor& dgates, const OptTensor& dprobabilities,
                         const Tensor& probabilities, const Tensor& expert_ids, const Tensor& slots,
                         std::string scoring, std::string renormalise, ScalarType dtype) {
  constexpr const char* kOp = "encfast::moe_route_bwd";
  check_cpu(kOp, "probabilities", probabilities);
  const RoutedGrad r(kOp, dgates, dprobabilities, probabilities, expert_ids, slots, dtype);
  check_int32_range(kOp, "expert_ids", r.expert_ids, r.experts);
  TorchPool pool;
  const int64_t row_floats = round_up_lanes(r.experts);
  const Workspace workspace(probabilities, row_floats * pool.threads() * kFloatBytes);
  cpu_kernels().moe_route.route_bwd(
      {floats_or_null(r.dgates), floats_or_null(r.dprobabilities),
       r.probabilities.const_data_ptr<float>(), r.expert_ids.const_data_ptr<int32_t>(),
       r.slots.const_data_ptr<int32_t>(), r.n, r.experts, r.k, scoring_of(kOp, scoring),
       renormalise_of(kOp, renormalise), matrix_of(kOp, r.dlogits),
       static_cast<float*>(workspace.data()), row_floats},
      pool.pool());
  return r.dlogits;
}

std::tuple<Tensor, Tensor, Tensor> moe_sort_cpu(const Tensor& expert_ids, int64_t num_experts) {
  constexpr const char* kOp = "encfast::moe_sort";
  check_cpu(kOp, "expert_ids", expert_ids);
  check_dim(kOp, "expert_ids", expert_ids, 2);
  check_dtype(kOp, "expert_ids", expert_ids, ScalarType::Int, "int32");
  STD_TORCH_CHECK(num_experts >= 1, kOp, ": num_experts is ", num_experts, ", expected 1 or more");
  const Tensor ids = torch::stable::contiguous(expert_ids);
  check_int32_range(kOp, "expert_ids", ids, num_experts);
  const Places places(kOp, ids, ids.size(0), ids.size(1), num_experts);
  sort_choices(ids, num_experts, {}, places);
  return {places.rows, places.slots, places.cu_seqlens};
}

Tensor moe_permute_cpu(const Tensor& x, const Tensor& rows, const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_permute";
  check_cpu(kOp, "x", x);
  const MovedRows r(kOp, "x", x, false, rows, slots);
  check_int32_range(kOp, "rows", r.rows, r.n * r.k);
  const Tensor out = new_rows(x, r.n * r.k);
  if (out.numel() == 0) return out;
  TorchPool pool;
  cpu_kernels().moe_route.permute(
      {rows_in(r.x, r.dtype), r.rows.const_data_ptr<int32_t>(), matrix_of(kOp, out), r.n * r.k, r.k,
       r.channels, rows_per_task(r.channels)},
      pool.pool());
  return out;
}

Tensor moe_unpermute_cpu(const Tensor& y, const OptTensor& gates_in, const Tensor& rows,
                         const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_unpermute";
  check_cpu(kOp, "y", y);
  const MovedRows r(kOp, "y", y, true, rows, slots);
  check_int32_range(kOp, "slots", r.slots, r.n * r.k);
  OptTensor gates;
  if (gates_in) gates = checked_gates(kOp, *gates_in, r);
  const Tensor out = new_rows(y, r.n);
  if (out.numel() == 0) return out;
  TorchPool pool;
  const int64_t row_floats = round_up_lanes(r.channels);
  const Workspace workspace(y, row_floats * pool.threads() * kFloatBytes);
  cpu_kernels().moe_route.unpermute(
      {rows_in(r.x, r.dtype), floats_or_null(gates), r.slots.const_data_ptr<int32_t>(),
       matrix_of(kOp, out), r.n, r.k, r.channels, rows_per_task(r.channels * r.k),
       static_cast<float*>(workspace.data()), row_floats},
      pool.pool());
  return out;
}

std::tuple<Tensor, Tensor> moe_unpermute_bwd_cpu(const Tensor& dout, const Tensor& y,
                                                 const Tensor& gates_in, const Tensor& rows,
                                                 const Tensor& slots) {
  constexpr const char* kOp = "encfast::moe_unpermute_bwd";
  check_cpu(kOp, "y", y);
  const MovedRows r(kOp, "y", y, true, rows, slots), d(kOp, "dout", dout, false, rows, slots);
  STD_TORCH_CHECK(d.dtype == r.dtype && d.channels == r.channels, kOp,
                  ": dout and y differ in dtype or channels");
  const Tensor gates = checked_gates(kOp, gates_in, r);
  check_int32_range(kOp, "rows", r.rows, r.n * r.k);
  const Tensor dy = new_rows(y, r.n * r.k);
  Tensor dgates = new_contiguous(y, {r.n, r.k}, ScalarType::Float);
  torch::stable::fill_(dgates, 0.0);
  if (dy.numel() == 0) return {dy, dgates};
  TorchPool pool;
  cpu_kernels().moe_route.unpermute_bwd(
      {rows_in(d.x, d.dtype), rows_in(r.x, r.dtype), gates.const_data_ptr<float>(),
       r.rows.const_data_ptr<int32_t>(), matrix_of(kOp, dy), dgates.mutable_data_ptr<float>(),
       r.n * r.k, r.k, r.channels, rows_per_task(r.channels)},
      pool.pool());
  return {dy, dgates};
}

Tensor moe_jitter_cpu(const Tensor& x_in, const Tensor& rng, double amount) {
  constexpr const char* kOp = "encfast::moe_jitter";
  check_cpu(kOp, "x", x_in);
  check_dim(kOp, "x", x_in, 2);
  const DType dtype = core_dtype(kOp, "x", x_in);
  const Tensor x = with_inner_contiguous(x_in, 1);
  const Tensor out = new_rows(x, x.size(0));
  const PhiloxKey key = key_of(kOp, rng, x);
  if (out.numel() == 0) return out;
  TorchPool pool;
  cpu_kernels().moe_route.jitter(
      {rows_in(x, dtype), matrix_of(kOp, out), key, static_cast<float>(amount), x.size(0),
       x.size(1), rows_per_task(x.size(1))},
      pool.pool());
  return out;
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&encfast::moe_route_cpu));
  m.impl("moe_route_bwd", TORCH_BOX(&encfast::moe_route_bwd_cpu));
  m.impl("moe_sort", TORCH_BOX(&encfast::moe_sort_cpu));
  m.impl("moe_permute", TORCH_BOX(&encfast::moe_permute_cpu));
  m.impl("moe_unpermute", TORCH_BOX(&encfast::moe_unpermute_cpu));
  m.impl("moe_unpermute_bwd", TORCH_BOX(&encfast::moe_unpermute_bwd_cpu));
  m.impl("moe_jitter", TORCH_BOX(&encfast::moe_jitter_cpu));
}
