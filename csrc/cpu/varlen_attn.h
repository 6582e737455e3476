// Parameters of the varlen_attn cores: what the binding hands over once everything has been
// checked.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace encfast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

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
};

// Query rows [q_begin, q_end) of sequence b, for all H / Hk query heads that share key head hk.
// Forward tasks begin at multiples of kTaskRowBlock and hold at most kTaskRows rows, counted over
// those heads, or one row block of each: workspaces are sized by that.
constexpr int64_t kTaskRowBlock = 64;
constexpr int64_t kTaskRows = 512;
struct VarlenAttnTask {
  int32_t b;
  int32_t hk;
  int32_t q_begin;
  int32_t q_end;
};

// Geometry and score rule, shared by forward and backward.
// Row i of a sequence's queries stands at position i + Lk - Lq among its keys (bottom-right
// alignment). Key j is visible iff -left <= j - (i + Lk - Lq) <= right, where a negative bound is
// no bound; `causal` has been folded into right by the caller. score = softcap(q k scale) - alibi
// |i + Lk - Lq - j|.
struct VarlenAttnGeometry {
  DType dtype;
  int64_t B, H, Hk, D;
  int64_t Nq;                   // total query rows: the row stride of lse
  const int32_t* cu_seqlens_q;  // [B + 1]
  const int32_t* cu_seqlens_k;  // [B + 1]
  float scale;
  float softcap;                // 0: none; else score = softcap * tanh(q k scale / softcap)
  int64_t left, right;          // -1: unlimited
  const float* alibi_slopes;    // null, or [H] or [B, H]
  int64_t alibi_batch_stride;   // 0 for [H], H for [B, H]
  const VarlenAttnTask* tasks;  // in the order they should start: most expensive first
  int64_t n_tasks;
  void* workspace;          // threads x workspace_bytes, 64-byte aligned, contents undefined
  int64_t workspace_bytes;  // per thread slot, as the kernel's own *_workspace_bytes asked for
  int64_t max_seqlen_q, max_seqlen_k;  // exact maxima over the batch
};

struct VarlenAttnFwdParams {
  VarlenAttnGeometry g;
  ConstRows q, k, v;
  Rows out;
  float* lse;  // [H, Nq], natural log; -inf where no key is visible
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
};

struct VarlenAttnKernels {
  int64_t (*fwd_workspace_bytes)(const VarlenAttnGeometry&);
  void (*fwd)(const VarlenAttnFwdParams&, const Pool&);
  int64_t (*bwd_workspace_bytes)(const VarlenAttnGeometry&);
  void (*bwd)(const VarlenAttnBwdParams&, const Pool&);
};

}  // namespace encfast
