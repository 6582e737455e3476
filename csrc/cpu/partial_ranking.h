// Parameters of the partial_ranking cores: the K most similar rows, products with K chosen rows,
// and the loss of a ranking of K products.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace encfast {

struct HardNegativesParams {
  int64_t B, M, D, K;
  ConstMatrix a;             // [B, D]
  ConstMatrix b;             // [M, D], a's dtype
  const int64_t* positives;  // [B]: a row of b never chosen, or negative for none
  int64_t* candidates;       // [B, K]
  void* workspace;
};

struct CandidateProblem {
  int64_t B, M, D, K;
  ConstMatrix a;
  ConstMatrix b;
  const int64_t* candidates;  // [B, K], rows of b
  // Products with all rows of b, of which K are taken: faster than products with K rows anywhere in
  // memory once K is a good part of M.
  bool dense;
};

struct CandidateDotsParams {
  CandidateProblem q;
  float* dots;  // [B, K]
  void* workspace;
};

struct CandidateDotsBwdParams {
  CandidateProblem q;
  const float* ddots;  // [B, K]
  // Not dense: places in candidates of row r of b are places[begin[r]] .. places[begin[r + 1] - 1].
  const int64_t* begin;
  const int64_t* places;
  Matrix da;  // data is nullptr where it is not wanted
  Matrix db;
  void* workspace;
};

struct RankingProblem {
  int64_t B, K;
  const float* dots;     // [B, K]
  const int64_t* valid;  // [B], 0..K
  float scale;
};

struct RankingBwdParams {
  RankingProblem q;
  const float* dloss;  // [B]
  float* ddots;        // [B, K]
  double* dscale;      // [B], to be summed
  float* workspace;    // [threads][2][K to whole blocks of 64]
};

struct PartialRankingKernels {
  int64_t (*hard_negatives_bytes)(const HardNegativesParams& p, int threads);
  void (*hard_negatives)(const HardNegativesParams& p, const Pool& pool);
  int64_t (*dots_bytes)(const CandidateProblem& q, int threads);
  void (*dots)(const CandidateDotsParams& p, const Pool& pool);
  int64_t (*dots_bwd_bytes)(const CandidateDotsBwdParams& p, int threads);
  void (*dots_bwd)(const CandidateDotsBwdParams& p, const Pool& pool);
  void (*fwd)(const RankingProblem& q, float* loss, const Pool& pool);
  void (*bwd)(const RankingBwdParams& p, const Pool& pool);
};

}  // namespace encfast
