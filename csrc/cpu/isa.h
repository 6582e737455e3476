// One kernel table per instruction set. Every csrc/cpu/*.cpp is compiled once per ISA with
// ENCFAST_ISA naming its namespace; bind/isa.cpp chooses a table at load.
//
// Nothing of the standard library may be instantiated in csrc/cpu: a weak symbol compiled with
// AVX-512 can replace the baseline's at link time. Workspaces come from the caller.
#pragma once
#include "add_norm.h"
#include "glu.h"
#include "pad.h"
#include "rotary.h"
#include "varlen_attn.h"

#if defined(__x86_64__)
#define ENCFAST_EACH_ISA(X) X(base) X(avx2) X(avx512) X(avx512bf16) X(avx512amx)
#else
#define ENCFAST_EACH_ISA(X) X(base)
#endif

namespace encfast {

struct CpuKernels {
  const char* name;
  VarlenAttnKernels varlen_attn;
  PadKernels pad;
  RotaryKernels rotary;
  AddNormKernels add_norm;
  GluKernels glu;
};

#define ENCFAST_DECLARE(isa)                  \
  namespace isa {                             \
  extern const VarlenAttnKernels kVarlenAttn; \
  extern const PadKernels kPad;               \
  extern const RotaryKernels kRotary;         \
  extern const AddNormKernels kAddNorm;       \
  extern const GluKernels kGlu;               \
  }
ENCFAST_EACH_ISA(ENCFAST_DECLARE)
#undef ENCFAST_DECLARE

// The table in use: the widest the machine runs, or the one ENCFAST_CPU_ISA forces. Chosen once.
const CpuKernels& cpu_kernels();

}  // namespace encfast
