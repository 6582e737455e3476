// Routing of tokens to experts on the CPU: choices, their order by expert, rows moved there and
// back.
#pragma once
#include <cstdint>

#include "common/moe_rule.h"
#include "common/philox.h"
#include "matrix.h"
#include "parallel.h"

namespace encfast {

struct MoeChooseParams {
  ConstMatrix logits;   // [N, E]
  const uint8_t* mask;  // [N], 0 where a row is no token; nullptr: all are
  int64_t N, E, K;
  MoeScoring scoring;
  MoeNoise noise;
  PhiloxKey key;
  int32_t* expert_ids;   // [N, K]
  float* probabilities;  // [N, E]
  float* workspace;      // of each thread, kChooseRows rows of row_floats
  int64_t row_floats;    // E, rounded up to kMoeStep
};
constexpr int64_t kChooseRows = 3;
// Columns whose random numbers are drawn at a time, on the widest vectors.
constexpr int64_t kMoeStep = 4 * kMaxLanes;

// Places of the choices: kept ones expert by expert, in the order (rank j, token).
struct MoeSortParams {
  const int32_t* expert_ids;  // [N, K] in -1..E - 1
  int64_t N, E, K;
  bool limited;  // by capacity_of(tokens, E, capacity_factor, min_capacity)
  double capacity_factor;
  int64_t min_capacity;
  bool random;  // who of equal rank is kept; by position otherwise
  PhiloxKey key;
  int32_t* rows;        // [N * K]
  int32_t* slots;       // [N, K]
  int32_t* cu_seqlens;  // [E + 1]
  // Scratch. A tile is choices_per_tile choices in the order (rank, token).
  int64_t tiles, choices_per_tile;
  int32_t* histograms;   // [tiles][E]
  int32_t* all_seqlens;  // [E + 1], dropped choices included
  int32_t* sorted;       // [N * K], random only
  int32_t* keys;         // of each thread, keys_stride of them, at least N and whole count steps
  int64_t keys_stride;
};

struct MoeGatesParams {
  const float* probabilities;  // [N, E]
  const int32_t* expert_ids;   // [N, K]
  const int32_t* slots;        // [N, K]
  int64_t N, E, K;
  MoeRenormalise renormalise;
  float* gates;  // [N, K]
};

struct MoeRouteBwdParams {
  const float* dgates;          // [N, K] or nullptr
  const float* dprobabilities;  // [N, E] or nullptr
  const float* probabilities;   // [N, E]
  const int32_t* expert_ids;    // [N, K]
  const int32_t* slots;         // [N, K]
  int64_t N, E, K;
  MoeScoring scoring;
  MoeRenormalise renormalise;
  Matrix dlogits;      // [N, E]
  float* workspace;    // of each thread, row_floats
  int64_t row_floats;  // at least E
};

struct MoePermuteParams {
  ConstMatrix x;        // [N, C]
  const int32_t* rows;  // [M]
  Matrix out;           // [M, C], of x's dtype
  int64_t M, K, C;
  int64_t rows_per_task;
};

struct MoeUnpermuteParams {
  ConstMatrix y;         // [N * K, C]
  const float* gates;    // [N, K] or nullptr: 1
  const int32_t* slots;  // [N, K]
  Matrix out;            // [N, C], of y's dtype
  int64_t N, K, C;
  int64_t rows_per_task;
  float* workspace;    // of each thread, row_floats
  int64_t row_floats;  // at least C
};

struct MoeUnpermuteBwdParams {
  ConstMatrix dout;     // [N, C]
  ConstMatrix y;        // [M, C], of dout's dtype
  const float* gates;   // [N, K]
  const int32_t* rows;  // [M]
  Matrix dy;            // [M, C], of dout's dtype
  float* dgates;        // [N, K], 0 on entry
  int64_t M, K, C;
  int64_t rows_per_task;
};

struct MoeJitterParams {
  ConstMatrix x;  // [N, C]
  Matrix out;     // [N, C], of x's dtype
  PhiloxKey key;
  float amount;
  int64_t N, C;
  int64_t rows_per_task;
};

struct MoeRouteKernels {
  void (*choose)(const MoeChooseParams&, const Pool&);
  void (*sort)(const MoeSortParams&, const Pool&);
  void (*gates)(const MoeGatesParams&, const Pool&);
  void (*route_bwd)(const MoeRouteBwdParams&, const Pool&);
  void (*permute)(const MoePermuteParams&, const Pool&);
  void (*unpermute)(const MoeUnpermuteParams&, const Pool&);
  void (*unpermute_bwd)(const MoeUnpermuteBwdParams&, const Pool&);
  void (*jitter)(const MoeJitterParams&, const Pool&);
};

}  // namespace encfast
