// One kernel table per instruction set. Every csrc/cpu/*.cpp is compiled once per ISA with
// ENCFAST_ISA naming its namespace; bind/isa.cpp chooses a table at load.
//
// Nothing of the standard library may be instantiated in csrc/cpu: a weak symbol compiled with
// AVX-512 can replace the baseline's at link time. Workspaces come from the caller.
#pragma once
#include "add_norm.h"
#include "glu.h"
#include "grouped_mm.h"
#include "linear_cross_entropy.h"
#include "moe_route.h"
#include "packed_linear.h"
#include "pad.h"
#include "partial_ranking.h"
#include "patch_gather.h"
#include "rank_loss.h"
#include "rotary.h"
#include "seg_pool.h"
#include "varlen_attn.h"

#if defined(__x86_64__)
#define ENCFAST_EACH_ISA(X) X(base) X(avx2) X(avx512) X(avx512bf16) X(avx512amx)
#else
#define ENCFAST_EACH_ISA(X) X(base)
#endif

// Each op: its kernels' type is <Op>Kernels, their name in an ISA's namespace k<Op>.
#define ENCFAST_EACH_OP(X)                    \
  X(AddNorm, add_norm)                        \
  X(Glu, glu)                                 \
  X(GroupedMm, grouped_mm)                    \
  X(LinearCrossEntropy, linear_cross_entropy) \
  X(MoeRoute, moe_route)                      \
  X(PackedLinear, packed_linear)              \
  X(Pad, pad)                                 \
  X(PartialRanking, partial_ranking)          \
  X(PatchGather, patch_gather)                \
  X(RankLoss, rank_loss)                      \
  X(Rotary, rotary)                           \
  X(SegPool, seg_pool)                        \
  X(VarlenAttn, varlen_attn)

namespace encfast {

struct CpuKernels {
  const char* name;
#define ENCFAST_MEMBER(Op, op) Op##Kernels op;
  ENCFAST_EACH_OP(ENCFAST_MEMBER)
#undef ENCFAST_MEMBER
};

#define ENCFAST_DECLARE_OP(Op, op) extern const Op##Kernels k##Op;
#define ENCFAST_DECLARE(isa)          \
  namespace isa {                     \
  ENCFAST_EACH_OP(ENCFAST_DECLARE_OP) \
  }
ENCFAST_EACH_ISA(ENCFAST_DECLARE)
#undef ENCFAST_DECLARE
#undef ENCFAST_DECLARE_OP

// The table in use: the widest the machine runs, or the one ENCFAST_CPU_ISA forces. Chosen once.
const CpuKernels& cpu_kernels();

}  // namespace encfast
