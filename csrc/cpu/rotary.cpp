// Rotation of the heads of packed rows. Memory traffic: each head is read once and written once,
// each row's angles are read once for all of its heads, of q and of k.
//
//            angles of row i          heads of row i
//   tables   cos[pairs] sin[pairs]    q0 q1 .. k0 k1 ..   ->   one rounding, new rows
//               \__ float, in L1 _______/ x * cos + partner * sin
//
// The angles are first laid out for the loop over the heads: in float, the sign of the rotation in
// the sines, and for interleaved pairs one value per element instead of one per pair.
#include "rotary.h"

#include "dtype.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Bytes written by one task: enough that taking a task costs nothing beside it.
constexpr int64_t kTaskBytes = 128 * 1024;

struct Angles {
  alignas(64) float cos[kRotaryMaxHeadSize];
  alignas(64) float sin[kRotaryMaxHeadSize];
};

template <DType kT>
ENCFAST_INLINE Vec load_lanes(const char* p, int lanes) {
  return lanes == kW ? load_as<kT>(p) : load_partial_as<kT>(p, lanes);
}
template <DType kT>
ENCFAST_INLINE void store_lanes(char* p, Vec v, int lanes) {
  if (lanes == kW) {
    store_as<kT>(p, v);
  } else {
    store_partial_as<kT>(p, v, lanes);
  }
}

// Calls f(offset, lanes) until n elements are covered. The last vector overlaps the one before it:
// results do not depend on what was written. Only an n below kW takes part of a vector.
template <class F>
ENCFAST_INLINE void for_each_vector(int64_t n, F f) {
  if (n < kW) return f(int64_t{0}, static_cast<int>(n));
  for (int64_t i = 0; i < n; i += kW) f(i + kW <= n ? i : n - kW, kW);
}

template <DType kT>
void read_angles(const RotaryParams& p, int64_t row, Angles& a) {
  constexpr int64_t kSize = element_bytes(kT);
  const char* cos = static_cast<const char*>(p.cos) + row * p.cos_stride * kSize;
  const char* sin = static_cast<const char*>(p.sin) + row * p.sin_stride * kSize;
  const Vec sign = splat(p.conjugate ? -1.0f : 1.0f);
  for_each_vector(p.pairs, [&](int64_t i, int lanes) {
    store(a.cos + i, load_lanes<kT>(cos + i * kSize, lanes));
    store(a.sin + i, load_lanes<kT>(sin + i * kSize, lanes) * sign);
  });
}

// c0 c0 c1 c1 .. and -s0 s0 -s1 s1 ..; from the end, as it grows in place.
void interleave_angles(Angles& a, int64_t pairs) {
  for (int64_t i = pairs - 1; i >= 0; --i) {
    const float cos = a.cos[i], sin = a.sin[i];
    a.cos[2 * i] = a.cos[2 * i + 1] = cos;
    a.sin[2 * i] = -sin;
    a.sin[2 * i + 1] = sin;
  }
}

template <DType kT>
ENCFAST_INLINE void rotate_halves(const char* x, char* y, const Angles& a, int64_t pairs) {
  constexpr int64_t kSize = element_bytes(kT);
  const char* x2 = x + pairs * kSize;
  char* y2 = y + pairs * kSize;
  for_each_vector(pairs, [&](int64_t i, int lanes) {
    const Vec first = load_lanes<kT>(x + i * kSize, lanes);
    const Vec second = load_lanes<kT>(x2 + i * kSize, lanes);
    const Vec cos = load(a.cos + i), sin = load(a.sin + i);
    store_lanes<kT>(y + i * kSize, first * cos - second * sin, lanes);
    store_lanes<kT>(y2 + i * kSize, second * cos + first * sin, lanes);
  });
}

template <DType kT>
ENCFAST_INLINE void rotate_neighbours(const char* x, char* y, const Angles& a, int64_t pairs) {
  constexpr int64_t kSize = element_bytes(kT);
  for_each_vector(2 * pairs, [&](int64_t i, int lanes) {
    const Vec v = load_lanes<kT>(x + i * kSize, lanes);
    const Vec cos = load(a.cos + i), sin = load(a.sin + i);
    store_lanes<kT>(y + i * kSize, v * cos + swap_pairs(v) * sin, lanes);
  });
}

template <DType kT, bool kInterleaved>
ENCFAST_INLINE void rotate_heads(const RotaryParams& p, const RotaryHeads& x, int64_t row,
                                 const Angles& a) {
  constexpr int64_t kSize = element_bytes(kT);
  const char* in = static_cast<const char*>(x.in.data) + row * x.in.row_stride * kSize;
  char* out = static_cast<char*>(x.out.data) + row * x.out.row_stride * kSize;
  const int64_t rotated = 2 * p.pairs;
  for (int64_t h = 0; h < x.heads; ++h) {
    if constexpr (kInterleaved) {
      rotate_neighbours<kT>(in, out, a, p.pairs);
    } else {
      rotate_halves<kT>(in, out, a, p.pairs);
    }
    if (rotated < p.D) {
      std::memcpy(out + rotated * kSize, in + rotated * kSize, (p.D - rotated) * kSize);
    }
    in += x.in.head_stride * kSize;
    out += x.out.head_stride * kSize;
  }
}

template <DType kT, bool kInterleaved>
void rotate_row(const RotaryParams& p, int64_t row, Angles& a) {
  const int64_t position = p.positions ? p.positions[row] : row;
  with_dtype(p.table_dtype, [&](auto t) { read_angles<decltype(t)::value>(p, position, a); });
  if constexpr (kInterleaved) interleave_angles(a, p.pairs);
  rotate_heads<kT, kInterleaved>(p, p.q, row, a);
  rotate_heads<kT, kInterleaved>(p, p.k, row, a);
}

struct Job {
  const RotaryParams& params;
  void (*rotate_row)(const RotaryParams&, int64_t, Angles&);
  int64_t rows;  // per task
};

void rotate_task(int64_t task, int, void* ctx) {
  const Job& job = *static_cast<const Job*>(ctx);
  const int64_t n = job.params.N;
  const int64_t end = (task + 1) * job.rows < n ? (task + 1) * job.rows : n;
  Angles angles = {};
  for (int64_t row = task * job.rows; row < end; ++row) job.rotate_row(job.params, row, angles);
}

void rotate(const RotaryParams& p, const Pool& pool) {
  const int64_t row_bytes = (p.q.heads + p.k.heads) * p.D * element_bytes(p.dtype);
  if (p.N == 0 || row_bytes == 0) return;
  Job job{p, nullptr, row_bytes >= kTaskBytes ? 1 : kTaskBytes / row_bytes};
  with_dtype(p.dtype, [&](auto t) {
    constexpr DType kT = decltype(t)::value;
    job.rotate_row = p.interleaved ? rotate_row<kT, true> : rotate_row<kT, false>;
  });
  pool.run(pool.self, (p.N + job.rows - 1) / job.rows, rotate_task, &job);
}

}  // namespace

extern const RotaryKernels kRotary = {rotate};

}  // namespace encfast::ENCFAST_ISA
