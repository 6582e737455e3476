// A router on a GPU: POD parameters and torch-free launchers. `stream` is a cudaStream_t; a
// launcher returns a cudaError_t as int.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/moe_rule.h"

namespace encfast {

struct CudaMoeChooseParams {
  DType type;           // of logits
  const void* logits;   // [n, experts]
  int64_t row_stride;   // in elements
  const uint8_t* mask;  // [n], 0 where a row is no token, or null: all are
  int64_t n, experts, k;
  MoeScoring scoring;
  MoeNoise noise;
  const int64_t* rng;    // [2], or null where there is no noise
  int32_t* expert_ids;   // [n, k]
  float* probabilities;  // [n, experts]
};

// An id outside of -1..experts - 1 stops the kernel with an assertion.
struct CudaMoeSortParams {
  const int32_t* expert_ids;  // [n, k]
  int64_t n, experts, k;      // n * k below 2^31
  bool limited;               // by capacity_of(tokens, experts, capacity_factor, min_capacity)
  double capacity_factor;
  int64_t min_capacity;
  bool random;          // who of equal rank is kept; by position otherwise
  const int64_t* rng;   // [2], or null
  int32_t* rows;        // [n * k]
  int32_t* slots;       // [n, k]
  int32_t* cu_seqlens;  // [experts + 1]
  int32_t* scratch;     // moe_sort_scratch of these sizes
};

struct CudaMoeGatesParams {
  const float* probabilities;  // [n, experts]
  const int32_t* expert_ids;   // [n, k]
  const int32_t* slots;        // [n, k]
  int64_t n, experts, k;
  MoeRenormalise renormalise;
  float* gates;  // [n, k]
};

// An id that is no expert's stops the kernel with an assertion.
struct CudaMoeRouteBwdParams {
  const float* dgates;          // [n, k] or null
  const float* dprobabilities;  // [n, experts] or null
  const float* probabilities;   // [n, experts]
  const int32_t* expert_ids;    // [n, k]
  const int32_t* slots;         // [n, k]
  int64_t n, experts, k;
  MoeScoring scoring;
  MoeRenormalise renormalise;
  DType type;     // of dlogits
  void* dlogits;  // [n, experts]
};

int64_t moe_sort_scratch(int64_t n, int64_t experts, int64_t k, bool random);

int moe_choose_cuda(const CudaMoeChooseParams& p, void* stream);
int moe_sort_cuda(const CudaMoeSortParams& p, void* stream);
int moe_gates_cuda(const CudaMoeGatesParams& p, void* stream);
int moe_route_bwd_cuda(const CudaMoeRouteBwdParams& p, void* stream);

}  // namespace encfast
