// Chooses the kernel table for this machine, once, and tells which tables it could run.
//
// setup.py defines ENCFAST_BUILT_ISAS(X): ENCFAST_EACH_ISA less those the compiler had no flags
// for.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace encfast {
namespace {

[[maybe_unused]] bool runs_base() { return true; }

#if defined(__x86_64__)

[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

[[maybe_unused]] bool runs_avx512bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

// By cpuid: not every compiler that knows -mamx-bf16 knows the name in __builtin_cpu_supports.
bool cpu_has_amx() {
  // leaf 7, edx
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr unsigned kAmx = kAmxBf16 | kAmxTile | kAmxInt8;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx;
}

// Linux hands out tile registers on request only, to the whole process, and may refuse:
// before 5.16, under seccomp, or when a thread's signal stack is too small for them.
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

[[maybe_unused]] bool runs_avx512amx() {
  static const bool runs = runs_avx512bf16() && cpu_has_amx() && request_amx_permission();
  return runs;
}

#endif

// The built ISAs this machine runs, narrowest first, separated by commas.
std::string runnable() {
  std::string names;
#define ENCFAST_APPEND(isa) \
  if (runs_##isa()) names += names.empty() ? #isa : "," #isa;
  ENCFAST_BUILT_ISAS(ENCFAST_APPEND)
#undef ENCFAST_APPEND
  return names;
}

CpuKernels choose() {
  const char* env = std::getenv("ENCFAST_CPU_ISA");
  const std::string forced = env ? env : "";
  CpuKernels chosen{};
#define ENCFAST_TAKE_OP(Op, op) k##Op,
#define ENCFAST_TAKE(isa)                                   \
  if (runs_##isa() && (forced.empty() || forced == #isa)) { \
    using namespace isa;                                    \
    chosen = {#isa, ENCFAST_EACH_OP(ENCFAST_TAKE_OP)};      \
  }
  ENCFAST_BUILT_ISAS(ENCFAST_TAKE)
#undef ENCFAST_TAKE
#undef ENCFAST_TAKE_OP
  STD_TORCH_CHECK(chosen.name, "ENCFAST_CPU_ISA='", forced,
                  "': not an ISA that this build has and this machine runs; expected one of ",
                  runnable(), ", or nothing for the widest");
  return chosen;
}

std::string cpu_isa() { return cpu_kernels().name; }

// What cpuid calls the maker of an x86 CPU, like "AuthenticAMD"; nothing for others.
std::string cpu_vendor() {
#if defined(__x86_64__)
  unsigned eax, name[3];
  if (__get_cpuid(0, &eax, &name[0], &name[2], &name[1])) {
    return {reinterpret_cast<const char*>(name), sizeof(name)};
  }
#endif
  return {};
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = choose();
  return kernels;
}

}  // namespace encfast

STABLE_TORCH_LIBRARY_FRAGMENT(encfast, m) {
  m.def("cpu_isa() -> str");   // the ISA in use
  m.def("cpu_isas() -> str");  // those that could be, separated by commas
  m.def("cpu_vendor() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(encfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&encfast::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&encfast::runnable));
  m.impl("cpu_vendor", TORCH_BOX(&encfast::cpu_vendor));
}
