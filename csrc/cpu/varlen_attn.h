// Parameters of the varlen_attn cores: what the binding hands over once everything has been
// checked.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"
#include "parallel.h"

namespace encfast {

// A [rows, heads, D] tensor whose last dimension is contiguous; strides in elements (0 and negative
// are legal).
struct ConstRows {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};
struct Rows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
  bool streamed = false;  // stored past the caches; the kernels decide (choose_streaming)
};

// Query rows [q_begin, q_end) of sequence b, for all H / Hk query heads that share key head hk.
// Forward tasks begin at multiples of kTaskRowBlock and hold at most kTaskRows rows, counted over
// those heads, or one row block of each: workspaces are sized by that.
// hk = kAllHeads: all rows of a short sequence for all heads (VarlenAttnGeometry::short_rows).
constexpr int64_t kTaskRowBlock = 64;
constexpr int64_t kTaskRows = 2048;
constexpr int32_t kAllHeads = -1;
struct VarlenAttnTask {
  int32_t b;
  int32_t hk;
  int32_t q_begin;
  int32_t q_end;
};

// A table over offsets o = key - position of the query, clipped to -radius .. radius. One for all
// queries comes as [H, 2 radius + 1] of fp32 with its rows reversed (entry radius - o), which is
// the order of lanes; one of each query as [Nq, H, 2 radius + 1] of `dtype`, entry o + radius.
struct RelBias {
  const void* data;  // null: none
  DType dtype;
  bool per_query;
  int64_t radius;
  int64_t row_stride, head_stride;  // in elements
};

// One [Lq, Lk] matrix per sequence, contiguous, sequence b's from element offsets[b] of its head
// on.
struct PairBias {
  const void* data;  // null: none
  bool visibility;   // bytes, 0 hides; else numbers of `dtype`, added
  DType dtype;
  const int64_t* offsets;  // [B + 1]
  int64_t head_stride;     // in elements; 0: one for all heads
};

// A probability is kept where its 16 random bits (common/philox.h) are >= threshold, and then
// multiplied by scale.
struct Dropout {
  int32_t threshold;  // 0: no dropout
  float scale;        // 65536 / (65536 - threshold)
  PhiloxKey key;
};

// Geometry and score rule, shared by forward and backward.
// Row i of a sequence's queries stands at position p = i + Lk - Lq among its keys (bottom-right
// alignment). Key j is visible iff -left <= j - p <= right, where a negative bound is no bound;
// `causal` has been folded into right by the caller. score = softcap(q k scale) - alibi |p - j| +
// rel_bias[j - p] + bias[i, j].
struct VarlenAttnGeometry {
  DType dtype;
  int64_t B, H, Hk, D;
  int64_t Nq;                   // total query rows: the row stride of lse
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* cu_seqlens_k;  // [B + 1]
  float scale;
  float softcap;               // 0: none; else score = softcap * tanh(q k scale / softcap)
  int64_t left, right;         // -1: unlimited
  const float* alibi_slopes;   // null, or [H] or [B, H]
  int64_t alibi_batch_stride;  // 0 for [H], H for [B, H]
  RelBias rel_bias;
  PairBias bias;
  Dropout dropout;
  const VarlenAttnTask* tasks;  // in the order they should start: most expensive first
  int64_t n_tasks;
  void* workspace;          // threads x workspace_bytes, 64-byte aligned, contents undefined
  int64_t workspace_bytes;  // per thread slot, as the kernel's own *_workspace_bytes asked for
  int64_t max_seqlen_q, max_seqlen_k;  // exact maxima over the batch
  // Sequences of at most so many queries and keys are short: planned as one task each. The kernels
  // say how many (VarlenAttnKernels::short_rows); 0 for none.
  int64_t short_rows;
};

struct VarlenAttnFwdParams {
  VarlenAttnGeometry g;
  ConstRows q, k, v;
  Rows out;
  float* lse;  // [H, Nq], natural log; -inf where no key is visible
};

// Gradients of rel_bias and bias, null where not wanted. Every entry is written.
struct BiasGrads {
  void* bias;                     // [H, T] of bias_dtype, or [T] of fp32: the sum over heads
  DType bias_dtype;               // fp32 for the sum
  int64_t bias_head_stride;       // T, or 0 for the sum
  float* rel_bias;                // [Nq, H, R], or [H, R]
  float* rel_partials;            // of [H, R] each sequence's own, of the offsets it has: RelSpan
  const int64_t* partial_starts;  // [B + 1]: sequence b's [H, RelSpan::size()] in rel_partials
};

// The clipped offsets -before .. after between the rows of a sequence.
struct RelSpan {
  int64_t before, after;

  static constexpr RelSpan of(int64_t len_q, int64_t len_k, int64_t radius) {
    if (len_q == 0 || len_k == 0) return {0, -1};
    return {len_k - 1 < radius ? len_k - 1 : radius, len_q - 1 < radius ? len_q - 1 : radius};
  }
  constexpr int64_t size() const { return before + after + 1; }
};

// In the backward a task covers whole sequences (q_begin = 0, q_end = Lq): it owns dk and dv of its
// key head and dq of the query heads that share it. Every row of dq, dk and dv is written, also
// those of sequences with no counterpart (zeros).
struct VarlenAttnBwdParams {
  VarlenAttnGeometry g;
  ConstRows q, k, v, out, dout;
  const float* lse;
  Rows dq, dk, dv;
  const float* dlse;  // [H, Nq], the gradient of lse, or null for none
  BiasGrads bias_grads;
};

struct VarlenAttnKernels {
  // What short_rows is to be when tasks are planned; reads dtype and D.
  int64_t (*short_rows)(const VarlenAttnGeometry&);
  int64_t (*fwd_workspace_bytes)(const VarlenAttnGeometry&);
  void (*fwd)(const VarlenAttnFwdParams&, const Pool&);
  int64_t (*bwd_workspace_bytes)(const VarlenAttnGeometry&);
  void (*bwd)(const VarlenAttnBwdParams&, const Pool&);
};

}  // namespace encfast
