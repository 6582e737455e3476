// Parameters of the linear_cross_entropy cores, which read and turn slices of logits.
#pragma once
#include "matrix.h"
#include "parallel.h"

namespace encfast {

// Columns [first, first + columns) of the logits of some rows, before bias and softcap.
struct VocabSlice {
  int64_t rows, columns, first;
  int64_t rows_per_task;
  const float* bias;       // [columns] or nullptr
  float softcap;           // 0: none
  const int64_t* targets;  // [rows], columns of the whole vocabulary
};

// What a row has of the slices it has met.
enum VocabStat { kMaxLogit, kSumOfExp, kSumOfLogits, kTargetLogit, kVocabStats };

// Of a row, where p is its softmax: gradient of a logit = p * kFactor + kEverywhere, and kAtTarget
// besides at the target.
enum VocabCoefficient { kLogSumExp, kFactor, kEverywhere, kAtTarget, kVocabCoefficients };

struct VocabScanParams {
  VocabSlice s;
  ConstMatrix logits;
  float* stats;  // [kVocabStats][rows], brought up to date
};

struct VocabGradParams {
  VocabSlice s;
  ConstMatrix logits;
  const float* coefficients;  // [kVocabCoefficients][rows]
  Matrix grad;                // of the logits' dtype; may be the logits
};

struct LinearCrossEntropyKernels {
  void (*scan)(const VocabScanParams&, const Pool&);
  void (*grad)(const VocabGradParams&, const Pool&);
};

}  // namespace encfast
