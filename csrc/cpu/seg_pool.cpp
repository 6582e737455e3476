// Rows of a segment reduced to one.
//
//   shares    weights --> share of each row            [N] floats, a segment a task
//   reduce    x --> sums or largest values of 8 (4) vectors of columns in registers, down the
//             rows of a segment --> out, or fp32 for the norm    kTaskColumns of a segment a task
//   norm      a row of fp32 --> its length, out
//   gradient  dout, out --> fp32 of a segment; share * fp32 --> a row of dx, <fp32, x> --> dweights
//
// Memory traffic: x is read once and out written once; the backward reads x only for dweights, and
// writes dx once. Columns of one task are 512, long enough for the hardware to fetch ahead and
// short enough that one long segment feeds all threads.
//
// Each result belongs to one task, which adds rows in their order.
#include "seg_pool.h"

#include <cstring>

#include "columns.h"
#include "isa.h"
#include "vec_math.h"

namespace encfast::ENCFAST_ISA {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr int64_t kTaskColumns = 512;
constexpr float kEps = 1e-12f;

bool chooses(SegPoolHow how) {
  return how == SegPoolHow::kMax || how == SegPoolHow::kFirst || how == SegPoolHow::kLast;
}

// ---- shares ----

float total_of(const float* values, int64_t n) {
  Accumulator acc;
  for_columns(
      n, [&](auto at, int i) ENCFAST_INLINE_LAMBDA { acc.parts[i] += load_at<kF32>(values, at); });
  return acc.total();
}

void softmax(const float* scores, int64_t n, float* share) {
  float most = scores[0];
  for (int64_t i = 1; i < n; ++i) most = scores[i] > most ? scores[i] : most;
  const Vec shift = splat(-most), log2e = splat(kLog2e);
  for_columns(n, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kF32>(share, at, exp2<6>((load_at<kF32>(scores, at) + shift) * log2e));
  });
}

// What each row of segment b counts, if there are weights.
template <class Params>
void share_task(int64_t b, int, void* ctx) {
  const Params& p = *static_cast<const Params*>(ctx);
  const int64_t begin = p.ends[b], n = p.ends[b + 1] - begin;
  const float* weights = p.weights + begin;
  float* share = p.share + begin;
  if (n == 0) return;
  if (p.how == SegPoolHow::kAttention) {
    softmax(weights, n, share);
    weights = share;
  }
  const float total = p.how == SegPoolHow::kSum ? 1.0f : total_of(weights, n);
  const Vec scale = splat(total == 0.0f ? 0.0f : 1.0f / total);
  for_columns(n, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kF32>(share, at, load_at<kF32>(weights, at) * scale);
  });
}

template <class Params>
void find_shares(const Params& p, const Pool& pool) {
  if (p.weights) pool.run(pool.self, p.B, share_task<Params>, const_cast<Params*>(&p));
}

// What every row of n counts where there are no weights.
ENCFAST_INLINE float plain_share(SegPoolHow how, int64_t n) {
  return how == SegPoolHow::kMean && n > 0 ? 1.0f / static_cast<float>(n) : 1.0f;
}

// ---- forward ----

struct Segment {
  int64_t b, begin, end;
};

ENCFAST_INLINE Whole shifted(Whole at, int i) { return {at.c + i * kW}; }
ENCFAST_INLINE Tail shifted(Tail at, int) { return at; }

// v is column c of segment b's result, or of what is normalised later.
template <DType kT, class At>
ENCFAST_INLINE void put(const SegPoolParams& p, int64_t b, At at, Vec v) {
  if (p.norm) {
    store(p.pooled + b * p.pooled_stride + at.c, keep(v, at));
  } else {
    store_at<kT>(row_of<kT>(p.out, b), at, v);
  }
}

template <DType kT, int kVecs, class At>
void sum_columns(const SegPoolParams& p, const Segment& s, At at) {
  Vec sums[kVecs];
  for (Vec& v : sums) v = zeros();
  const float* share = p.weights ? p.share : nullptr;
  const float plain = plain_share(p.how, s.end - s.begin);
  for (int64_t r = s.begin; r < s.end; ++r) {
    const char* row = row_of<kT>(p.x, r);
    const Vec scale = splat(share ? share[r] : 1.0f);
    for (int i = 0; i < kVecs; ++i) {
      sums[i] = fma(load_at<kT>(row, shifted(at, i)), scale, sums[i]);
    }
  }
  // One rounding of the sum and one of the quotient, as a mean of the plain maths has.
  const Vec scale = splat(share ? 1.0f : plain);
  for (int i = 0; i < kVecs; ++i) put<kT>(p, s.b, shifted(at, i), sums[i] * scale);
}

// NaN, once found, stays, and is found in the first row that has one.
template <DType kT, int kVecs, class At>
void max_columns(const SegPoolParams& p, const Segment& s, At at) {
  Vec most[kVecs];
  IntVec where[kVecs];
  const int32_t first = static_cast<int32_t>(s.begin);
  for (int i = 0; i < kVecs; ++i) {
    most[i] = s.begin < s.end ? load_at<kT>(row_of<kT>(p.x, s.begin), shifted(at, i)) : zeros();
    where[i] = IntVec{} + (s.begin < s.end ? first : -1);
  }
  for (int64_t r = s.begin + 1; r < s.end; ++r) {
    const char* row = row_of<kT>(p.x, r);
    const IntVec number = IntVec{} + static_cast<int32_t>(r);
    for (int i = 0; i < kVecs; ++i) {
      const Vec v = load_at<kT>(row, shifted(at, i));
      const IntVec more = (IntVec)(v > most[i]) | ((IntVec)(v != v) & (IntVec)(most[i] == most[i]));
      most[i] = (Vec)(((IntVec)v & more) | ((IntVec)most[i] & ~more));
      where[i] = (number & more) | (where[i] & ~more);
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    const auto to = shifted(at, i);
    put<kT>(p, s.b, to, most[i]);
    store_at<kF32>(p.rows + s.b * p.C, to, (Vec)where[i]);
  }
}

// The row itself, or zeros for that of an empty segment.
template <DType kT, class At>
void choose_columns(const SegPoolParams& p, const Segment& s, At at) {
  const int64_t r = p.how == SegPoolHow::kFirst ? s.begin : s.end - 1;
  put<kT>(p, s.b, at, s.begin < s.end ? load_at<kT>(row_of<kT>(p.x, r), at) : zeros());
}

template <int kCount>
struct Vectors {
  static constexpr int value = kCount;
};

// f(columns, Vectors<n>) over columns [begin, end), kCount vectors at a time where there are.
template <int kCount, class F>
ENCFAST_INLINE void for_blocks(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kCount * kW <= end; c += kCount * kW) f(Whole{c}, Vectors<kCount>{});
  for (; c + kW <= end; c += kW) f(Whole{c}, Vectors<1>{});
  if (c < end) f(Tail{c, static_cast<int>(end - c)}, Vectors<1>{});
}

int64_t chunks_of(int64_t C) { return (C + kTaskColumns - 1) / kTaskColumns; }

template <DType kT>
void reduce_task(int64_t task, int, void* ctx) {
  const SegPoolParams& p = *static_cast<const SegPoolParams*>(ctx);
  const int64_t chunks = chunks_of(p.C), b = task / chunks, c = task % chunks * kTaskColumns;
  const int64_t end = c + kTaskColumns < p.C ? c + kTaskColumns : p.C;
  const Segment s{b, p.ends[b], p.ends[b + 1]};
  if (p.how == SegPoolHow::kMax) {
    // Values and where they are: half as many fit into the registers.
    for_blocks<4>(c, end, [&](auto at, auto n) ENCFAST_INLINE_LAMBDA {
      max_columns<kT, decltype(n)::value>(p, s, at);
    });
  } else if (chooses(p.how)) {
    for_blocks<1>(c, end,
                  [&](auto at, auto) ENCFAST_INLINE_LAMBDA { choose_columns<kT>(p, s, at); });
  } else {
    for_blocks<8>(c, end, [&](auto at, auto n) ENCFAST_INLINE_LAMBDA {
      sum_columns<kT, decltype(n)::value>(p, s, at);
    });
  }
}

ENCFAST_INLINE float length_of(const float* row, int64_t C) {
  Accumulator acc;
  for_columns(C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
    const Vec v = load_at<kF32>(row, at);
    acc.parts[i] = fma(v, v, acc.parts[i]);
  });
  return __builtin_sqrtf(acc.total());
}

template <DType kT>
void norm_task(int64_t b, int, void* ctx) {
  const SegPoolParams& p = *static_cast<const SegPoolParams*>(ctx);
  const float* row = p.pooled + b * p.pooled_stride;
  const float length = length_of(row, p.C);
  p.norm[b] = length;
  const Vec divisor = splat(length < kEps ? kEps : length);
  char* out = row_of<kT>(p.out, b);
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    store_at<kT>(out, at, load_at<kF32>(row, at) / divisor);
  });
}

void fwd(const SegPoolParams& p, const Pool& pool) {
  find_shares(p, pool);
  with_dtype(p.x.dtype, [&](auto type) {
    constexpr DType kT = decltype(type)::value;
    void* ctx = const_cast<SegPoolParams*>(&p);
    pool.run(pool.self, p.B * chunks_of(p.C), reduce_task<kT>, ctx);
    if (p.norm) pool.run(pool.self, p.B, norm_task<kT>, ctx);
  });
}

// ---- backward ----

// The gradient of segment b's result, taken through the division by its length.
template <DType kT>
void grad_task(int64_t b, int, void* ctx) {
  const SegPoolBwdParams& p = *static_cast<const SegPoolBwdParams*>(ctx);
  const char* dout = row_of<kT>(p.dout, b);
  float* grad = p.grad + b * p.grad_stride;
  float along = 0.0f, scale = 1.0f;
  const char* out = p.norm ? row_of<kT>(p.out, b) : dout;
  if (p.norm) {
    Accumulator acc;
    for_columns(p.C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
      acc.parts[i] = fma(load_at<kT>(dout, at), load_at<kT>(out, at), acc.parts[i]);
    });
    // A row shorter than eps was divided by eps, whatever its direction.
    along = p.norm[b] > kEps ? acc.total() : 0.0f;
    scale = 1.0f / (p.norm[b] < kEps ? kEps : p.norm[b]);
  }
  const Vec minus = splat(-along), times = splat(scale);
  for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    const Vec g = fma(minus, load_at<kT>(out, at), load_at<kT>(dout, at));
    store(grad + at.c, keep(g * times, at));
  });
}

int64_t segment_of(const int32_t* ends, int64_t B, int64_t row) {
  int64_t low = 0, high = B;  // ends[low] <= row < ends[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (ends[middle] <= row ? low : high) = middle;
  }
  return low;
}

ENCFAST_INLINE bool is_chosen(const SegPoolBwdParams& p, int64_t b, int64_t row) {
  return row == (p.how == SegPoolHow::kFirst ? p.ends[b] : p.ends[b + 1] - 1);
}

template <DType kT>
void spread_row(const SegPoolBwdParams& p, int64_t b, int64_t row) {
  const float* grad = p.grad + b * p.grad_stride;
  char* dx = row_of<kT>(p.dx, row);
  if (p.how == SegPoolHow::kMax) {
    const int32_t* rows = p.rows + b * p.C;
    const IntVec number = IntVec{} + static_cast<int32_t>(row);
    for_columns(p.C, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
      const IntVec own = (IntVec)((IntVec)load_at<kF32>(rows, at) == number);
      store_at<kT>(dx, at, (Vec)((IntVec)load(grad + at.c) & own));
    });
    return;
  }
  float share = plain_share(p.how, p.ends[b + 1] - p.ends[b]);
  if (p.weights) share = p.share[row];
  if (chooses(p.how)) {
    if (!is_chosen(p, b, row)) {
      std::memset(dx, 0, p.C * element_bytes(kT));
      return;
    }
    share = 1.0f;
  }
  const Vec scale = splat(share);
  for_columns(p.C, [&](auto at, int)
                       ENCFAST_INLINE_LAMBDA { store_at<kT>(dx, at, load(grad + at.c) * scale); });
}

template <DType kT>
float product_with_row(const SegPoolBwdParams& p, int64_t b, int64_t row) {
  const float* grad = p.grad + b * p.grad_stride;
  const char* x = row_of<kT>(p.x, row);
  Accumulator acc;
  for_columns(p.C, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
    acc.parts[i] = fma(load(grad + at.c), load_at<kT>(x, at), acc.parts[i]);
  });
  return acc.total();
}

template <DType kT>
void rows_task(int64_t task, int, void* ctx) {
  const SegPoolBwdParams& p = *static_cast<const SegPoolBwdParams*>(ctx);
  const int64_t begin = task * p.rows_per_task, end = begin + p.rows_per_task;
  int64_t b = segment_of(p.ends, p.B, begin);
  for (int64_t row = begin; row < end && row < p.N; ++row) {
    while (row >= p.ends[b + 1]) ++b;
    if (p.dx.data) spread_row<kT>(p, b, row);
    if (p.dweights) p.dweights[row] = product_with_row<kT>(p, b, row);
  }
}

// dweights of segment b from the products <gradient, x> that stand there: a share also takes from
// the others what it gains.
void weights_task(int64_t b, int, void* ctx) {
  const SegPoolBwdParams& p = *static_cast<const SegPoolBwdParams*>(ctx);
  const int64_t begin = p.ends[b], n = p.ends[b + 1] - begin;
  float* products = p.dweights + begin;
  const float* share = p.share + begin;
  Accumulator acc;
  for_columns(n, [&](auto at, int i) ENCFAST_INLINE_LAMBDA {
    acc.parts[i] = fma(load_at<kF32>(products, at), load_at<kF32>(share, at), acc.parts[i]);
  });
  const bool attention = p.how == SegPoolHow::kAttention;
  const float total = attention ? 1.0f : total_of(p.weights + begin, n);
  const Vec mean = splat(acc.total()), scale = splat(total == 0.0f ? 0.0f : 1.0f / total);
  for_columns(n, [&](auto at, int) ENCFAST_INLINE_LAMBDA {
    Vec v = (load_at<kF32>(products, at) - mean) * scale;
    if (attention) v *= load_at<kF32>(share, at);
    store_at<kF32>(products, at, v);
  });
}

void bwd(const SegPoolBwdParams& p, const Pool& pool) {
  find_shares(p, pool);
  void* ctx = const_cast<SegPoolBwdParams*>(&p);
  with_dtype(p.x.dtype, [&](auto type) {
    constexpr DType kT = decltype(type)::value;
    pool.run(pool.self, p.B, grad_task<kT>, ctx);
    pool.run(pool.self, (p.N + p.rows_per_task - 1) / p.rows_per_task, rows_task<kT>, ctx);
  });
  if (p.dweights && p.how != SegPoolHow::kSum) pool.run(pool.self, p.B, weights_task, ctx);
}

}  // namespace

const SegPoolKernels kSegPool = {fwd, bwd};

}  // namespace encfast::ENCFAST_ISA
