// The varlen_attn kernel table of one instruction set: chooses the compute format and head width,
// and runs tasks on the injected pool.
#include "varlen_attn.h"

#include "attn_tiles_amx.h"
#include "attn_tiles_bf16.h"
#include "attn_tiles_f32.h"
#include "isa.h"
#include "varlen_attn_bwd.h"
#include "varlen_attn_fwd.h"
#include "varlen_attn_short.h"

namespace encfast::ENCFAST_ISA {
namespace {

template <class Tiles>
struct TilesTag {
  using type = Tiles;
};

template <int kWidth, class F>
auto with_format(const VarlenAttnGeometry& g, F f) {
#if defined(__AMX_BF16__)
  if (g.dtype == DType::kBFloat16) return f(TilesTag<AmxTiles<kWidth>>{});
#elif defined(__AVX512BF16__)
  if (g.dtype == DType::kBFloat16) return f(TilesTag<Bf16Tiles<kWidth>>{});
#endif
  return f(TilesTag<F32Tiles<kWidth>>{});
}

// Calls f with the tag of the tiles that serve this dtype and head size.
template <class F>
auto with_tiles(const VarlenAttnGeometry& g, F f) {
  if (g.D <= 32) return with_format<32>(g, f);
  if (g.D <= 64) return with_format<64>(g, f);
  if (g.D <= 128) return with_format<128>(g, f);
  return with_format<256>(g, f);
}

// Outputs from this size on are stored past the caches. Their lines would not be in a core's own
// cache when someone reads them, and a store that misses reads its line first: a third of the
// traffic of the backward.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// Streams an output [rows, heads, D] that is large enough and lies in whole cache lines.
void choose_streaming(const VarlenAttnGeometry& g, int64_t rows, int64_t heads, Rows* out) {
  with_dtype(g.dtype, [&](auto tag) {
    constexpr DType kT = decltype(tag)::value;
    const int64_t bytes = element_bytes(kT);
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out->data));
    const int64_t misaligned =
        (address | bytes * out->row_stride | bytes * out->head_stride | bytes * g.D) % 64;
    out->streamed =
        kCanStream<kT> && misaligned == 0 && rows * heads * g.D * bytes >= kStreamedBytes;
  });
}

// Neighbouring tasks are heads of one sequence. A thread takes up to kBundle of them at once, so
// that it knows which rows it needs next and can fetch them while it computes; fewer when threads
// would idle.
constexpr int64_t kBundle = 4;
constexpr int64_t kBundlesPerThread = 16;

template <class Params>
struct Bundles {
  const Params& params;
  int64_t size;
};

int64_t bundle_size(int64_t n, const Pool& pool) {
  const int64_t fair = n / (kBundlesPerThread * pool.threads(pool.self));
  return fair < 1 ? 1 : fair < kBundle ? fair : kBundle;
}

// Runs Pass on each task, or ShortPass on those of a whole short sequence, in the workspace of the
// slot that takes it. Bundles of `size` neighbours run in order on one slot.
template <class Pass, class ShortPass, class Params>
void run_tasks(const Params& params, int64_t size, const Pool& pool) {
  const int64_t n = params.g.n_tasks;
  Bundles<Params> bundles{params, size};
  pool.run(
      pool.self, (n + size - 1) / size,
      [](int64_t bundle, int slot, void* ctx) {
        const auto& b = *static_cast<const Bundles<Params>*>(ctx);
        const VarlenAttnGeometry& g = b.params.g;
        void* workspace = static_cast<char*>(g.workspace) + slot * g.workspace_bytes;
        const int64_t begin = bundle * b.size;
        const int64_t end = begin + b.size < g.n_tasks ? begin + b.size : g.n_tasks;
        for (int64_t i = begin; i < end; ++i) {
          const VarlenAttnTask& task = g.tasks[i];
          const VarlenAttnTask* next = i + 1 < end ? &g.tasks[i + 1] : nullptr;
          const bool whole = task.hk == kAllHeads;
          if (next && (next->hk == kAllHeads) != whole) next = nullptr;
          if (whole) {
            ShortPass::run(b.params, task, next, workspace);
          } else {
            Pass::run(b.params, task, next, workspace);
          }
        }
      },
      &bundles);
}

// The passes over short sequences. Tiles without any never get a task of theirs.
template <class Tiles, bool kAny = (Tiles::kShortRows > 0)>
struct Short {
  using Fwd = ShortForward<Tiles>;
  using Bwd = ShortBackward<Tiles>;
};
template <class Tiles>
struct Short<Tiles, false> {
  using Fwd = Forward<Tiles>;
  using Bwd = Backward<Tiles>;
};

template <class Pass, class ShortPass>
int64_t larger_workspace(const VarlenAttnGeometry& g) {
  const int64_t a = Pass::workspace_bytes(g), b = ShortPass::workspace_bytes(g);
  return a > b ? a : b;
}

int64_t short_rows(const VarlenAttnGeometry& g) {
  return with_tiles(g, [](auto t) -> int64_t { return decltype(t)::type::kShortRows; });
}
int64_t fwd_workspace_bytes(const VarlenAttnGeometry& g) {
  return with_tiles(g, [&](auto t) {
    using Tiles = typename decltype(t)::type;
    return larger_workspace<Forward<Tiles>, typename Short<Tiles>::Fwd>(g);
  });
}
int64_t bwd_workspace_bytes(const VarlenAttnGeometry& g) {
  return with_tiles(g, [&](auto t) {
    using Tiles = typename decltype(t)::type;
    return larger_workspace<Backward<Tiles>, typename Short<Tiles>::Bwd>(g);
  });
}
void fwd(const VarlenAttnFwdParams& given, const Pool& pool) {
  VarlenAttnFwdParams p = given;
  choose_streaming(p.g, p.g.Nq, p.g.H, &p.out);
  with_tiles(p.g, [&](auto t) {
    using Tiles = typename decltype(t)::type;
    run_tasks<Forward<Tiles>, typename Short<Tiles>::Fwd>(p, bundle_size(p.g.n_tasks, pool), pool);
  });
}

// Key heads that add to one gradient are the neighbours of one bundle.
int64_t bwd_bundle_size(const VarlenAttnBwdParams& p, const Pool& pool) {
  const bool sum_heads = p.bias_grads.bias && p.bias_grads.bias_head_stride == 0;
  return sum_heads ? p.g.Hk : bundle_size(p.g.n_tasks, pool);
}

void bwd(const VarlenAttnBwdParams& given, const Pool& pool) {
  VarlenAttnBwdParams p = given;
  const int64_t key_rows = p.g.cu_seqlens_k[p.g.B];
  choose_streaming(p.g, p.g.Nq, p.g.H, &p.dq);
  choose_streaming(p.g, key_rows, p.g.Hk, &p.dk);
  choose_streaming(p.g, key_rows, p.g.Hk, &p.dv);
  with_tiles(p.g, [&](auto t) {
    using Tiles = typename decltype(t)::type;
    run_tasks<Backward<Tiles>, typename Short<Tiles>::Bwd>(p, bwd_bundle_size(p, pool), pool);
  });
  if (!p.bias_grads.rel_bias || p.g.rel_bias.per_query) return;
  pool.run(
      pool.self, p.g.H,
      [](int64_t head, int, void* ctx) {
        reduce_rel_partials(*static_cast<const VarlenAttnBwdParams*>(ctx), head);
      },
      &p);
}

}  // namespace

extern const VarlenAttnKernels kVarlenAttn = {short_rows, fwd_workspace_bytes, fwd,
                                              bwd_workspace_bytes, bwd};

}  // namespace encfast::ENCFAST_ISA
