// Rows of patches: chosen (patch_select.h), gathered from images, put back among their sequences.
//
//   gather    image --> the pixels of a row, moved run by run --> converted, scaled --> the row
//             A run is what lies evenly in image and row: 16 pixels of a 16 x 16 patch, more where
//             axes join. Without a conversion it goes to the row at once, else over a buffer of one
//             row in L1, whose vectors do not care for the patch's size.
//   restore   (x[index[i]], or fill) + add[add_index[i]] --> out[i], one row at a time in vectors;
//             where nothing is added rows are copied
//   backward  rows of dout added to their row of dadd (fp32, in L1), hidden ones also to the task's
//             partial sum of dfill
//
// Memory traffic: gather reads the pixels asked for and writes the rows; restore reads the rows it
// uses and writes out; backward reads dout once, whichever of its results are wanted. `add` is read
// again for each sequence; positions of an image stay in L2 or L3.
//
// A result row belongs to one task, which adds its sources in the order of their rows. Partial sums
// of dfill belong to tasks, whose number does not depend on the threads, and are added in their
// order.
#include "patch_gather.h"

#include "columns.h"
#include "copy_row.h"
#include "isa.h"
#include "patch_select.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr DType kF32 = DType::kFloat32;
// Bytes moved by one task of gather_patches: enough that taking a task costs nothing beside it.
constexpr int64_t kTaskBytes = 128 * 1024;

// ---- gather_patches ----

struct Loop {
  int64_t size;
  int64_t src, dst;  // strides in elements
};

// Loops over the pixels of a patch, the run last; those a patch does not need have size 1.
constexpr int kLoops = kPatchAxes + 1;
struct Moves {
  Loop loops[kLoops];
};

// Appends an inner loop, or lengthens the last one where both lie evenly in image and row.
void append(Moves& moves, int& count, Loop inner) {
  if (inner.size == 1) return;
  if (count > 0) {
    Loop& outer = moves.loops[count - 1];
    if (outer.src == inner.size * inner.src && outer.dst == inner.size * inner.dst) {
      outer = {outer.size * inner.size, inner.src, inner.dst};
      return;
    }
  }
  moves.loops[count++] = inner;
}

Moves plan_moves(const PatchGrid& g) {
  Moves moves;
  int count = 0;
  int64_t dst = g.pixels;
  const Loop channels{g.channels, g.channel_stride, g.channels_last ? 1 : g.pixels / g.channels};
  if (!g.channels_last) {
    append(moves, count, channels);
    dst = channels.dst;
  }
  for (int i = 0; i < kPatchAxes; ++i) {
    dst /= g.patch[i];
    append(moves, count, {g.patch[i], g.stride[i], dst});
  }
  if (g.channels_last) append(moves, count, channels);
  while (count < kLoops) moves.loops[count++] = {1, 0, 0};
  // The run is one that is dense on both sides, else the longest.
  int run = 0;
  for (int i = 1; i < kLoops; ++i) {
    const Loop &loop = moves.loops[i], &best = moves.loops[run];
    const bool dense = loop.src == 1 && loop.dst == 1, best_dense = best.src == 1 && best.dst == 1;
    if (dense != best_dense ? dense : loop.size > best.size) run = i;
  }
  const Loop last = moves.loops[kLoops - 1];
  moves.loops[kLoops - 1] = moves.loops[run];
  moves.loops[run] = last;
  return moves;
}

// A few vectors, the last of which may overlap the one before: no call, no loop over bytes.
ENCFAST_INLINE void copy_run(char* dst, const char* src, int64_t bytes) {
  if (bytes >= 16) {
    for (int64_t i = 0; i + 16 <= bytes; i += 16) std::memcpy(dst + i, src + i, 16);
    std::memcpy(dst + bytes - 16, src + bytes - 16, 16);
  } else if (bytes >= 4) {
    const int64_t middle = bytes >= 8 ? 4 : 0, end = bytes - 4;
    std::memcpy(dst, src, 4);
    std::memcpy(dst + middle, src + middle, 4);
    std::memcpy(dst + end - middle, src + end - middle, 4);
    std::memcpy(dst + end, src + end, 4);
  } else {
    for (int64_t i = 0; i < bytes; ++i) dst[i] = src[i];
  }
}

// `next` is the patch moved after this one: its runs, too short for the hardware's prefetcher, are
// asked for run by run.
template <int kBytes>
void move_pixels(const Moves& moves, const char* src, const char* next, char* dst) {
  const Loop a = moves.loops[0], b = moves.loops[1], c = moves.loops[2], run = moves.loops[3];
  const bool dense = run.src == 1 && run.dst == 1;
  const int64_t run_bytes = run.src == 1 ? run.size * kBytes : 1;
  for (int64_t i = 0; i < a.size; ++i) {
    for (int64_t j = 0; j < b.size; ++j) {
      for (int64_t k = 0; k < c.size; ++k) {
        const int64_t at = (i * a.src + j * b.src + k * c.src) * kBytes;
        const char* from = src + at;
        char* to = dst + (i * a.dst + j * b.dst + k * c.dst) * kBytes;
        for (int64_t l = 0; l < run_bytes; l += 64) __builtin_prefetch(next + at + l);
        if (dense) {
          copy_run(to, from, run.size * kBytes);
          continue;
        }
        for (int64_t l = 0; l < run.size; ++l) {
          std::memcpy(to + l * run.dst * kBytes, from + l * run.src * kBytes, kBytes);
        }
      }
    }
  }
}

template <DType kT>
struct Pixels {
  static constexpr int kBytes = element_bytes(kT);
  static ENCFAST_INLINE Vec load(const char* p) { return load_as<kT>(p); }
};

struct Uint8Pixels {
  static constexpr int kBytes = 1;
  static ENCFAST_INLINE Vec load(const char* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#else
    Vec v;
    for (int i = 0; i < kW; ++i) v[i] = static_cast<unsigned char>(p[i]);
    return v;
#endif
  }
};

// Calls f with the reader of these pixels.
template <class F>
ENCFAST_INLINE void with_pixels(PixelType t, F f) {
  switch (t) {
    case PixelType::kFloat32:
      return f(Pixels<DType::kFloat32>{});
    case PixelType::kBFloat16:
      return f(Pixels<DType::kBFloat16>{});
    case PixelType::kFloat16:
      return f(Pixels<DType::kFloat16>{});
    case PixelType::kUint8:
      return f(Uint8Pixels{});
  }
}

// Whole vectors are read beyond the row's end, from the slack of the buffers.
template <class In, DType kOut>
void convert_row(const GatherPatchesParams& p, const char* pixels, char* row) {
  const float *scale = p.factors, *shift = p.factors + p.row_floats;
  const bool scaled = p.scale || p.shift;
  for_columns(p.grid.pixels, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    Vec v = In::load(pixels + at.c * In::kBytes);
    if (scaled) v = fma(v, load(scale + at.c), load(shift + at.c));
    store_at<kOut>(row, at, v);
  });
}

// Scale and shift of each pixel of a row. Adding -0 changes nothing, not even a -0.
void spread_factors(const GatherPatchesParams& p) {
  const PatchGrid& g = p.grid;
  const int64_t inner = g.channels_last ? 1 : g.pixels / g.channels;  // pixels of a channel in line
  for (int64_t i = 0; i < p.row_floats; ++i) {
    const int64_t c = i / inner % g.channels;
    p.factors[i] = p.scale ? p.scale[c] : 1.0f;
    p.factors[p.row_floats + i] = p.shift ? p.shift[c] : -0.0f;
  }
}

struct GatherJob {
  const GatherPatchesParams& params;
  Moves moves;
  int pixel_bytes;
  void (*move)(const Moves&, const char*, const char*, char*);
  void (*convert)(const GatherPatchesParams&, const char*,
                  char*);  // nullptr: the bytes as they are
  int64_t rows;            // per task
};

// Where the first pixel of a patch lies, in elements.
int64_t patch_offset(const PatchGrid& g, int64_t id) {
  int64_t offset = id / g.patches * g.image_stride, p = id % g.patches;
  for (int i = kPatchAxes - 1; i >= 0; --i) {
    offset += p % g.grid[i] * g.patch[i] * g.stride[i];
    p /= g.grid[i];
  }
  return offset;
}

void gather_task(int64_t task, int slot, void* ctx) {
  const GatherJob& job = *static_cast<const GatherJob*>(ctx);
  const GatherPatchesParams& p = job.params;
  const int64_t end = (task + 1) * job.rows < p.n ? (task + 1) * job.rows : p.n;
  const int64_t row_bytes = p.grid.pixels * element_bytes(p.dtype);
  const char* image = static_cast<const char*>(p.image);
  char* buffer = reinterpret_cast<char*>(p.staging + slot * p.row_floats);
  const auto patch = [&](int64_t i) {
    return image + patch_offset(p.grid, p.ids[i]) * job.pixel_bytes;
  };
  const char* src = patch(task * job.rows);
  for (int64_t i = task * job.rows; i < end; ++i) {
    const char* next = i + 1 < end ? patch(i + 1) : src;
    char* row = static_cast<char*>(p.rows) + i * row_bytes;
    job.move(job.moves, src, next, job.convert ? buffer : row);
    if (job.convert) job.convert(p, buffer, row);
    src = next;
  }
}

bool same_type(PixelType pixels, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return pixels == PixelType::kFloat32;
    case DType::kBFloat16:
      return pixels == PixelType::kBFloat16;
    case DType::kFloat16:
      return pixels == PixelType::kFloat16;
  }
  return false;
}

void gather_patches(const GatherPatchesParams& p, const Pool& pool) {
  if (p.n == 0 || p.grid.pixels == 0) return;
  const int64_t row_bytes = 4 * p.grid.pixels;
  GatherJob job{p,       plan_moves(p.grid),
                0,       nullptr,
                nullptr, row_bytes >= kTaskBytes ? 1 : kTaskBytes / row_bytes};
  const bool scaled = p.scale || p.shift;
  if (scaled) spread_factors(p);
  with_pixels(p.pixels, [&](auto in) {
    using In = decltype(in);
    job.pixel_bytes = In::kBytes;
    job.move = move_pixels<In::kBytes>;
    if (!scaled && same_type(p.pixels, p.dtype)) return;
    with_dtype(p.dtype, [&](auto out) { job.convert = convert_row<In, decltype(out)::value>; });
  });
  pool.run(pool.self, (p.n + job.rows - 1) / job.rows, gather_task, &job);
}

// ---- restore_rows ----

struct RowRange {
  int64_t begin, end;
};

RowRange rows_of_task(int64_t rows, int64_t per_task, int64_t task) {
  const int64_t end = (task + 1) * per_task;
  return {task * per_task, end < rows ? end : rows};
}

// Nothing is added: rows of x and the rounded fill, as they are.
template <DType kX>
void copy_task(int64_t task, int, void* ctx) {
  const RestoreRowsParams& p = *static_cast<const RestoreRowsParams*>(ctx);
  const RowRange rows = rows_of_task(p.M, p.rows_per_task, task);
  const auto source = [&](int64_t i) {
    const int64_t from = p.index[i];
    return from < 0 ? static_cast<const char*>(p.fill_row) : row_of<kX>(p.x, from);
  };
  const int64_t row_bytes = p.C * element_bytes(kX);
  const bool fresh = p.M * row_bytes > kFreshBytes;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t next = i + 1 < rows.end ? i + 1 : i;
    copy_row(row_of<kX>(p.out, i), source(i), source(next), row_bytes, fresh);
  }
}

template <DType kX>
void round_fill(const RestoreRowsParams& p) {
  const float* fill = p.fill;
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kX>(p.fill_row, at, fill ? load_at<kF32>(fill, at) : zeros());
  });
}

template <DType kX, DType kAdd>
void add_task(int64_t task, int, void* ctx) {
  const RestoreRowsParams& p = *static_cast<const RestoreRowsParams*>(ctx);
  const RowRange rows = rows_of_task(p.M, p.rows_per_task, task);
  int64_t cyclic = rows.begin % p.n_add;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t from = p.index[i];
    const char* add = row_of<kAdd>(p.add, p.add_index ? p.add_index[i] : cyclic);
    if (++cyclic == p.n_add) cyclic = 0;
    char* out = row_of<kX>(p.out, i);
    if (from >= 0) {
      const char* x = row_of<kX>(p.x, from);
      for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
        store_at<kX>(out, at, load_at<kX>(x, at) + load_at<kAdd>(add, at));
      });
    } else {
      const float* fill = p.fill;
      for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
        const Vec gap = fill ? load_at<kF32>(fill, at) : zeros();
        store_at<kX>(out, at, gap + load_at<kAdd>(add, at));
      });
    }
  }
}

void restore_rows(const RestoreRowsParams& p, const Pool& pool) {
  if (p.M == 0 || p.C == 0) return;
  const int64_t tasks = (p.M + p.rows_per_task - 1) / p.rows_per_task;
  auto* ctx = const_cast<RestoreRowsParams*>(&p);
  with_dtype(p.x.dtype, [&](auto x) {
    constexpr DType kX = decltype(x)::value;
    if (p.add.data) {
      with_dtype(p.add.dtype, [&](auto add) {
        pool.run(pool.self, tasks, add_task<kX, decltype(add)::value>, ctx);
      });
    } else {
      round_fill<kX>(p);
      pool.run(pool.self, tasks, copy_task<kX>, ctx);
    }
  });
}

// ---- restore_rows_bwd ----

template <DType kT>
ENCFAST_INLINE void add_row(const RestoreRowsBwdParams& p, int64_t i, float* sum) {
  const char* row = row_of<kT>(p.dout, i);
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kF32>(sum, at, load_at<kF32>(sum, at) + load_at<kT>(row, at));
  });
}

// Adds row i of dout to what it is part of; dadd and dfill may be absent.
template <DType kT>
ENCFAST_INLINE void add_to(const RestoreRowsBwdParams& p, int64_t i, float* dadd, float* dfill) {
  if (dadd) add_row<kT>(p, i, dadd);
  if (dfill && p.index[i] < 0) add_row<kT>(p, i, dfill);
}

template <DType kT>
void bwd_task(int64_t task, int, void* ctx) {
  const RestoreRowsBwdParams& p = *static_cast<const RestoreRowsBwdParams*>(ctx);
  float* dfill = p.width ? p.partials + task * p.width : nullptr;
  if (dfill) std::memset(dfill, 0, p.width * sizeof(float));
  const RowRange rows = rows_of_task(p.dadd ? p.n_add : p.M, p.rows_per_task, task);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    if (!p.dadd) {
      add_to<kT>(p, r, nullptr, dfill);
      continue;
    }
    float* dadd = p.dadd + r * p.C;
    std::memset(dadd, 0, p.C * sizeof(float));
    if (p.begin) {
      for (int64_t j = p.begin[r]; j < p.begin[r + 1]; ++j) {
        add_to<kT>(p, p.order[j], dadd, dfill);
      }
    } else {
      for (int64_t i = r; i < p.M; i += p.n_add) add_to<kT>(p, i, dadd, dfill);
    }
  }
}

void restore_rows_bwd(const RestoreRowsBwdParams& p, const Pool& pool) {
  const int64_t rows = p.dadd ? p.n_add : p.M;
  if (rows == 0) return;
  const int64_t tasks = (rows + p.rows_per_task - 1) / p.rows_per_task;
  with_dtype(p.dout.dtype, [&](auto t) {
    pool.run(pool.self, tasks, bwd_task<decltype(t)::value>, const_cast<RestoreRowsBwdParams*>(&p));
  });
  PartialSums{p.partials, p.sums, tasks, p.width}.run(pool);
}

}  // namespace

extern const PatchGatherKernels kPatchGather = {select_patches, gather_patches, restore_rows,
                                                restore_rows_bwd};

}  // namespace encfast::ENCFAST_ISA
