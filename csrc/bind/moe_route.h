// What the bindings of moe_route share, whatever the device: argument checks and results. Values of
// ids and places are for each device to check in its own way.
#pragma once
#include <string>

#include "bind/matrix.h"
#include "common/moe_rule.h"
#include "common/philox.h"

namespace encfast {

// An argument of this dtype and these sizes, contiguous.
inline Tensor checked_array(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                            const char* dtype_name, const std::vector<int64_t>& sizes,
                            const char* like_name, const Tensor& like) {
  check_same_device(op, name, x, like_name, like);
  check_dtype(op, name, x, dtype, dtype_name);
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == sizes[static_cast<size_t>(i)];
  std::string expected;
  for (const int64_t n : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(n);
  STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_text(x), ", expected (", expected,
                  ")");
  return torch::stable::contiguous(x);
}

inline MoeScoring scoring_of(const char* op, const std::string& name) {
  if (name == "softmax") return MoeScoring::kSoftmax;
  STD_TORCH_CHECK(name == "sigmoid", op, ": scoring is '", name,
                  "', expected 'softmax' or 'sigmoid'");
  return MoeScoring::kSigmoid;
}

inline MoeRenormalise renormalise_of(const char* op, const std::string& name) {
  if (name == "none") return MoeRenormalise::kNone;
  if (name == "chosen") return MoeRenormalise::kChosen;
  STD_TORCH_CHECK(name == "kept", op, ": renormalise is '", name,
                  "', expected 'none', 'chosen' or 'kept'");
  return MoeRenormalise::kKept;
}

inline MoeNoise noise_of(const char* op, const std::optional<std::string>& name) {
  if (!name) return MoeNoise::kNone;
  if (*name == "gumbel") return MoeNoise::kGumbel;
  STD_TORCH_CHECK(*name == "gumbel_rest", op, ": noise is '", *name,
                  "', expected 'gumbel' or 'gumbel_rest'");
  return MoeNoise::kGumbelRest;
}

inline bool is_random(const char* op, const std::string& priority) {
  STD_TORCH_CHECK(priority == "position" || priority == "random", op, ": priority is '", priority,
                  "', expected 'position' or 'random'");
  return priority == "random";
}

inline void check_choices(const char* op, int64_t n, int64_t k) {
  STD_TORCH_CHECK(n * k <= INT32_MAX, op, ": ", n, " tokens of ", k,
                  " choices are more than 2^31 - 1");
}

// Results of sorting the choices of n tokens.
struct Places {
  Tensor rows, slots, cu_seqlens;

  Places(const char* op, const Tensor& like, int64_t n, int64_t k, int64_t experts) {
    check_choices(op, n, k);
    rows = new_contiguous(like, {n * k}, ScalarType::Int);
    slots = new_contiguous(like, {n, k}, ScalarType::Int);
    cu_seqlens = new_contiguous(like, {experts + 1}, ScalarType::Int);
  }
};

struct Routed {
  Tensor logits;       // rows contiguous
  OptTensor mask;      // contiguous
  int64_t n, experts;  // of logits
  MoeScoring scoring;
  MoeRenormalise renormalise;
  MoeNoise noise;
  bool limited, random;
  double capacity_factor;
  Tensor gates, expert_ids, probabilities;  // unwritten
  std::optional<Places> places;             // unwritten

  Routed(const char* op, const Tensor& logits_in, const OptTensor& mask_in, int64_t k,
         const std::string& scoring_name, const std::string& renormalise_name,
         std::optional<double> factor, int64_t min_capacity, const std::string& priority,
         const std::optional<std::string>& noise_name, const OptTensor& rng)
      : n(0),
        experts(0),
        scoring(scoring_of(op, scoring_name)),
        renormalise(renormalise_of(op, renormalise_name)),
        noise(noise_of(op, noise_name)),
        limited(factor.has_value()),
        random(is_random(op, priority) && limited),
        capacity_factor(factor.value_or(1.0)) {
    check_dim(op, "logits", logits_in, 2);
    core_dtype(op, "logits", logits_in);
    logits = with_inner_contiguous(logits_in, 1);
    n = logits.size(0);
    experts = logits.size(1);
    STD_TORCH_CHECK(experts >= 1, op, ": logits has shape ", shape_text(logits),
                    ", expected one expert at least");
    STD_TORCH_CHECK(k >= 1 && k <= experts, op, ": top_k is ", k, ", expected 1..", experts);
    STD_TORCH_CHECK(capacity_factor > 0, op, ": capacity_factor is ", capacity_factor,
                    ", expected more than 0");
    STD_TORCH_CHECK(min_capacity >= 0, op, ": min_capacity is ", min_capacity,
                    ", expected 0 or more");
    if (mask_in) {
      mask = checked_array(op, "mask", *mask_in, ScalarType::Bool, "bool", {n}, "logits", logits);
    }
    STD_TORCH_CHECK(rng || (noise == MoeNoise::kNone && !random), op,
                    ": noise and random priority need rng");
    gates = new_contiguous(logits, {n, k}, ScalarType::Float);
    expert_ids = new_contiguous(logits, {n, k}, ScalarType::Int);
    probabilities = new_contiguous(logits, {n, experts}, ScalarType::Float);
    places.emplace(op, logits, n, k, experts);
  }
};

struct RoutedGrad {
  OptTensor dgates, dprobabilities;         // contiguous
  Tensor probabilities, expert_ids, slots;  // contiguous
  Tensor dlogits;                           // unwritten
  int64_t n, experts, k;

  RoutedGrad(const char* op, const OptTensor& dgates_in, const OptTensor& dprobabilities_in,
             const Tensor& probabilities_in, const Tensor& expert_ids_in, const Tensor& slots_in,
             ScalarType dtype) {
    check_dim(op, "probabilities", probabilities_in, 2);
    check_dim(op, "expert_ids", expert_ids_in, 2);
    n = probabilities_in.size(0);
    experts = probabilities_in.size(1);
    k = expert_ids_in.size(1);
    STD_TORCH_CHECK(k >= 1, op, ": expert_ids has no choices");
    const auto array = [&](const char* name, const Tensor& x, bool floats, int64_t columns) {
      return checked_array(op, name, x, floats ? ScalarType::Float : ScalarType::Int,
                           floats ? "float32" : "int32", {n, columns}, "probabilities",
                           probabilities_in);
    };
    probabilities = array("probabilities", probabilities_in, true, experts);
    expert_ids = array("expert_ids", expert_ids_in, false, k);
    slots = array("slots", slots_in, false, k);
    if (dgates_in) dgates = array("dgates", *dgates_in, true, k);
    if (dprobabilities_in) {
      dprobabilities = array("dprobabilities", *dprobabilities_in, true, experts);
    }
    dlogits = new_contiguous(probabilities, {n, experts}, dtype);
    core_dtype(op, "dlogits", dlogits);
  }
};

// Rows [n, C] of tokens or of choices, with the places of a routing.
struct MovedRows {
  Tensor x;            // rows contiguous
  Tensor rows, slots;  // contiguous
  int64_t n, k, channels;
  DType dtype;

  MovedRows(const char* op, const char* name, const Tensor& x_in, bool of_choices,
            const Tensor& rows_in, const Tensor& slots_in) {
    check_dim(op, name, x_in, 2);
    check_dim(op, "slots", slots_in, 2);
    dtype = core_dtype(op, name, x_in);
    n = slots_in.size(0);
    k = slots_in.size(1);
    channels = x_in.size(1);
    STD_TORCH_CHECK(k >= 1, op, ": slots has no choices");
    check_choices(op, n, k);
    const auto places = [&](const char* what, const Tensor& y, const std::vector<int64_t>& sizes) {
      return checked_array(op, what, y, ScalarType::Int, "int32", sizes, name, x_in);
    };
    rows = places("rows", rows_in, {n * k});
    slots = places("slots", slots_in, {n, k});
    const int64_t expected = of_choices ? n * k : n;
    STD_TORCH_CHECK(x_in.size(0) == expected, op, ": ", name, " has ", x_in.size(0),
                    " rows, expected ", expected);
    x = with_inner_contiguous(x_in, 1);
  }
};

// Gates [n, k] of the rows, contiguous.
inline Tensor checked_gates(const char* op, const Tensor& gates, const MovedRows& r) {
  return checked_array(op, "gates", gates, ScalarType::Float, "float32", {r.n, r.k}, "y", r.x);
}

inline Tensor checked_rng(const char* op, const Tensor& rng, const Tensor& like) {
  return checked_array(op, "rng", rng, ScalarType::Long, "int64", {2}, "the other tensors", like);
}

}  // namespace encfast
