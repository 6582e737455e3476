// Moves between tensors (any of three dtypes, any row stride) and the kernels' packed blocks.
//
// Packed rows are contiguous words, zero-filled from the head size up to a fixed width: row strides
// of a packed QKV tensor (H * D * bytes) map whole key blocks onto a few L1 sets. A block "in
// lanes" is transposed: word d of kLanes consecutive query rows stands side by side.
#pragma once
#include "dtype.h"
#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Queries of one register tile. Buffers in lanes have this row stride, also when the last tile of a
// sequence computes one vector only.
constexpr int kLanes = 2 * kW;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One head of consecutive rows of a tensor.
struct RowsView {
  char* data;
  int64_t stride;  // bytes
  DType dtype;
  bool streamed = false;  // Rows::streamed

  RowsView from(int64_t row) const { return {data + row * stride, stride, dtype, streamed}; }
};

inline RowsView view_of(const void* data, int64_t row_stride, int64_t head_stride, DType dtype,
                        int64_t row, int64_t head) {
  const int64_t bytes = element_bytes(dtype);
  // Read-only tensors share the type; the kernels write through views of outputs alone.
  char* first = static_cast<char*>(const_cast<void*>(data));
  return {first + (row * row_stride + head * head_stride) * bytes, row_stride * bytes, dtype};
}
inline RowsView view_of(const ConstRows& t, DType dtype, int64_t row, int64_t head) {
  return view_of(t.data, t.row_stride, t.head_stride, dtype, row, head);
}
inline RowsView view_of(const Rows& t, DType dtype, int64_t row, int64_t head) {
  RowsView view = view_of(t.data, t.row_stride, t.head_stride, dtype, row, head);
  view.streamed = t.streamed;
  return view;
}

// Calls f(tag of the dtype, store) where store(p, v) puts a whole vector of a row at p.
template <class F>
ENCFAST_INLINE void with_store(const RowsView& dst, F f) {
  with_dtype(dst.dtype, [&](auto tag) {
    constexpr DType kT = decltype(tag)::value;
    if constexpr (kCanStream<kT>) {
      if (dst.streamed) return f(tag, [](void* p, Vec v) { stream_as<kT>(p, v); });
    }
    f(tag, [](void* p, Vec v) { store_as<kT>(p, v); });
  });
}

// src rows [0, n) of D elements as floats, dst[n_padded][kWidth], zeros elsewhere.
template <int kWidth>
void pack_rows_f32(const RowsView& src, int n, int n_padded, int D, float* dst) {
  with_dtype(src.dtype, [&](auto tag) {
    constexpr DType kT = decltype(tag)::value;
    constexpr int64_t kBytes = element_bytes(kT);
    for (int i = 0; i < n; ++i) {
      const char* row = src.data + i * src.stride;
      float* out = dst + static_cast<int64_t>(i) * kWidth;
      int d = 0;
      for (; d + kW <= D; d += kW) store(out + d, load_as<kT>(row + d * kBytes));
      if (d < D) {
        store(out + d, load_partial_as<kT>(row + d * kBytes, D - d));
        d += kW;
      }
      for (; d < kWidth; d += kW) store(out + d, zeros());
    }
  });
  std::memset(dst + static_cast<int64_t>(n) * kWidth, 0, sizeof(float) * kWidth * (n_padded - n));
}

// dst[words][kLanes] = transposed rows[vecs * kW][row_words]; `words` is a multiple of kW.
inline void transpose_to_lanes(const float* rows, int row_words, int vecs, int words, float* dst) {
  for (int v = 0; v < vecs; ++v) {
    for (int w = 0; w < words; w += kW) {
      Vec r[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) r[i] = load(rows + (v * kW + i) * row_words + w);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(dst + (w + i) * kLanes + v * kW, r[i]);
    }
  }
}

// Rows [0, n) of dst = columns of src[D][kLanes], each lane multiplied by its factor.
inline void store_from_lanes(const float* src, const Vec factor[2], int n, int D,
                             const RowsView& dst) {
  with_store(dst, [&](auto tag, auto store_vector) {
    constexpr DType kT = decltype(tag)::value;
    constexpr int64_t kBytes = element_bytes(kT);
    for (int v = 0; v * kW < n; ++v) {
      const int rows = n - v * kW < kW ? n - v * kW : kW;
      for (int d = 0; d < D; d += kW) {
        Vec r[kW];
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) r[i] = load(src + (d + i) * kLanes + v * kW) * factor[v];
        transpose(r);
        char* out = dst.data + v * kW * dst.stride + d * kBytes;
        if (d + kW <= D) {
          for (int i = 0; i < rows; ++i) store_vector(out + i * dst.stride, r[i]);
        } else {
          for (int i = 0; i < rows; ++i) store_partial_as<kT>(out + i * dst.stride, r[i], D - d);
        }
      }
    }
  });
}

// Rows [0, n) of dst = src[n][width], row i multiplied by factor[i * factor_step].
inline void store_rows(const float* src, int width, const float* factor, int factor_step, int n,
                       int D, const RowsView& dst) {
  with_store(dst, [&](auto tag, auto store_vector) {
    constexpr DType kT = decltype(tag)::value;
    constexpr int64_t kBytes = element_bytes(kT);
    for (int i = 0; i < n; ++i) {
      const float* row = src + static_cast<int64_t>(i) * width;
      char* out = dst.data + i * dst.stride;
      const Vec f = broadcast(factor + i * factor_step);
      int d = 0;
#if defined(__AVX512BF16__)
      if constexpr (kT == DType::kBFloat16) {  // two vectors are a whole line
        for (; d + 2 * kW <= D; d += 2 * kW) {
          const Vec low = load(row + d) * f, high = load(row + d + kW) * f;
          _mm512_storeu_si512(out + d * kBytes, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
      }
#endif
      for (; d + kW <= D; d += kW) store_vector(out + d * kBytes, load(row + d) * f);
      if (d < D) store_partial_as<kT>(out + d * kBytes, load(row + d) * f, D - d);
    }
  });
}

inline void store_zero_rows(int64_t n, int D, const RowsView& dst) {
  for (int64_t i = 0; i < n; ++i) {
    std::memset(dst.data + i * dst.stride, 0, D * element_bytes(dst.dtype));
  }
}

// out[i] = sum over d of a[i][d] * b[i][d], in fp32.
inline void row_dots(const RowsView& a, const RowsView& b, int n, int D, float* out) {
  with_dtype(a.dtype, [&](auto tag) {
    constexpr DType kT = decltype(tag)::value;
    constexpr int64_t kBytes = element_bytes(kT);
    for (int i = 0; i < n; ++i) {
      const char* x = a.data + i * a.stride;
      const char* y = b.data + i * b.stride;
      Vec acc = zeros();
      int d = 0;
      for (; d + kW <= D; d += kW) {
        acc = fma(load_as<kT>(x + d * kBytes), load_as<kT>(y + d * kBytes), acc);
      }
      if (d < D) {
        acc = fma(load_partial_as<kT>(x + d * kBytes, D - d),
                  load_partial_as<kT>(y + d * kBytes, D - d), acc);
      }
      out[i] = sum(acc);
    }
  });
}

// Fetches rows into L2 a few at a time, in between products. Rows of one head lie H * D elements
// apart, mostly on different pages, where hardware prefetchers do not follow, and the packing loops
// have too little work of their own to hide the misses.
class RowPrefetcher {
 public:
  RowPrefetcher() = default;
  RowPrefetcher(const RowsView& rows, int64_t n, int D)
      : next_(rows.data), stride_(rows.stride), left_(n), bytes_(D * element_bytes(rows.dtype)) {}

  void step(int64_t rows) {
    for (; rows > 0 && left_ > 0; --rows, --left_, next_ += stride_) {
      for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(next_ + at, 0, 2);
    }
  }

 private:
  const char* next_ = nullptr;
  int64_t stride_ = 0, left_ = 0, bytes_ = 0;
};

// Asks for ownership of rows that will be stored soon. Stores that miss fill the store buffer and
// stop the core; asked for before the products, the lines are there in time. Streamed rows need
// none.
inline void prefetch_for_write(const RowsView& rows, int64_t n, int D) {
  if (rows.streamed) return;
  const int64_t bytes = D * element_bytes(rows.dtype);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(rows.data + i * rows.stride + at, 1, 2);
    }
  }
}

// Hands out 64-byte aligned pieces of a workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  float* take(int64_t words) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(words * 4, 64);
    return reinterpret_cast<float*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace encfast::ENCFAST_ISA
