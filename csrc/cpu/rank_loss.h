// Parameters of the rank_loss cores: losses over the logits x = scale a b^T + bias, which never
// exist as a whole.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace encfast {

enum class RankLoss {
  kRows,     // log-softmax along each row
  kBoth,     // along each row and along each column
  kSigmoid,  // each logit is a binary choice
};

struct RankProblem {
  RankLoss loss;
  int64_t B, M, D;
  ConstMatrix a;             // [B, D]
  ConstMatrix b;             // [M, D], a's dtype
  const int64_t* positives;  // [B]: a column, or negative for none
  const int64_t* excluded;   // [B]: a column that is no candidate, or negative; may be nullptr
  float scale;
  float bias;
};

// The largest logit, and the logarithm of the sum of exponentials relative to it.
struct LogSums {
  float* largest;
  float* log;
};

struct RankFwdParams {
  RankProblem q;
  float* row_loss;  // [B]
  float* col_loss;  // [B], of each row's positive column; kBoth
  float* positive;  // [B], logits of the positives; 0 where there is none
  LogSums rows;     // [B]; not kSigmoid
  LogSums columns;  // [M]; kBoth
  void* workspace;
};

struct RankBwdParams {
  RankProblem q;
  const float* drow;       // [B], 0 in rows that have no loss
  const float* dpositive;  // [B], what the gradient of a positive's logit has besides that of drow
  const float* dcolumn;    // [M], kBoth
  LogSums rows;
  LogSums columns;
  Matrix da;  // data is nullptr where it is not wanted
  Matrix db;
  double* dscale;
  double* dbias;
  void* workspace;
};

struct RankLossKernels {
  int64_t (*fwd_bytes)(const RankProblem& q, int threads);
  int64_t (*bwd_bytes)(const RankProblem& q, int threads);
  void (*fwd)(const RankFwdParams& p, const Pool& pool);
  void (*bwd)(const RankBwdParams& p, const Pool& pool);
};

}  // namespace encfast
