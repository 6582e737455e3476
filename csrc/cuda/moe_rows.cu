// Rows of tokens to their experts and back: memory traffic and nothing else.
//
//   block = lanes x rows          lanes of one row take its vectors in turn; as many rows
//   +--------+--------+           share a block as fill it; rows beyond the grid are reached
//   | row 0  | lane 0 1 2 .. |    by striding over it
//   | row 1  | lane 0 1 2 .. |
//
// The gradient of unpermute has a warp per row, which sums the product of two rows on the way.
// Bytes moved per row: permute reads and writes it once; unpermute reads K and writes one; its
// gradient reads two and writes one. A vector is 16 bytes where all rows are aligned to that, else
// one element. No shared memory, no atomics: a row of a result belongs to one thread or warp.
// Offsets are 64 bits wide.
#include <cassert>
#include <type_traits>

#include "floats.h"
#include "moe_draws.h"
#include "moe_rows.h"
#include "rows.h"
#include "warp.h"

namespace encfast {
namespace {

template <typename T, int kWidth>
__global__ void permute_kernel(CudaMoePermuteParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y, choices = p.n * p.k;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; s < choices;
       s += step) {
    const int64_t choice = p.rows[s];
    assert(choice >= -1 && choice < choices && "encfast::moe_permute: row out of range");
    const T* src = static_cast<const T*>(p.x) + (choice < 0 ? 0 : choice / p.k) * p.x_stride;
    T* out = static_cast<T*>(p.out) + s * p.channels;
    for (int64_t c = threadIdx.x * kWidth; c < p.channels; c += blockDim.x * kWidth) {
      Pack<T, kWidth> row{};
      if (choice >= 0) row = *reinterpret_cast<const Pack<T, kWidth>*>(src + c);
      *reinterpret_cast<Pack<T, kWidth>*>(out + c) = row;
    }
  }
}

template <typename T, int kWidth>
__global__ void unpermute_kernel(CudaMoeUnpermuteParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < p.n;
       t += step) {
    const int32_t* slots = p.slots + t * p.k;
    for (int64_t c = threadIdx.x * kWidth; c < p.channels; c += blockDim.x * kWidth) {
      Floats<kWidth> sum{};
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t slot = slots[j];
        assert(slot >= -1 && slot < p.n * p.k && "encfast::moe_unpermute: slot out of range");
        if (slot < 0) continue;
        const float gate = p.gates ? p.gates[t * p.k + j] : 1.0f;
        const auto y = load_floats<kWidth>(static_cast<const T*>(p.y) + slot * p.y_stride + c);
        for (int i = 0; i < kWidth; ++i) sum.values[i] += gate * y.values[i];
      }
      store_rounded(static_cast<T*>(p.out) + t * p.channels + c, sum);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) unpermute_bwd_kernel(CudaMoeUnpermuteBwdParams p) {
  const int lane = lane_of_thread();
  const int64_t choices = p.n * p.k;
  for (int64_t s = warp_of_grid(); s < choices; s += warps_in_grid()) {
    if (lane == 0 && p.slots[s] < 0) p.dgates[s] = 0;
    const int64_t choice = p.rows[s];
    assert(choice >= -1 && choice < choices && "encfast::moe_unpermute_bwd: row out of range");
    const bool used = choice >= 0;
    const float gate = used ? p.gates[choice] : 0.0f;
    const T* dout = static_cast<const T*>(p.dout) + (used ? choice / p.k : 0) * p.dout_stride;
    const T* y = static_cast<const T*>(p.y) + s * p.y_stride;
    T* dy = static_cast<T*>(p.dy) + s * p.channels;
    float product = 0;
    for (int64_t c = lane * kWidth; c < p.channels; c += kWarpSize * kWidth) {
      Floats<kWidth> d{};
      if (used) {
        d = load_floats<kWidth>(dout + c);
        const auto v = load_floats<kWidth>(y + c);
        for (int i = 0; i < kWidth; ++i) {
          product += d.values[i] * v.values[i];
          d.values[i] *= gate;
        }
      }
      store_rounded(dy + c, d);
    }
    product = warp_sum(product);
    if (used && lane == 0) p.dgates[choice] = product;
  }
}

// One thread draws the numbers of 4 columns.
template <typename T>
__global__ void jitter_kernel(CudaMoeJitterParams p) {
  const PhiloxKey key = key_from(p.rng);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < p.n;
       t += step) {
    for (int64_t first = threadIdx.x * 4; first < p.channels; first += blockDim.x * 4) {
      uint32_t words[4];
      draw_words(key, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(t), kJitterDraws,
                 words);
      for (int w = 0; w < 4 && first + w < p.channels; ++w) {
        const float factor = jitter_of<DeviceArithmetic>(upper_bits(words[w]), p.amount);
        const T x = static_cast<const T*>(p.x)[t * p.x_stride + first + w];
        static_cast<T*>(p.out)[t * p.channels + first + w] =
            rounded<T>(static_cast<float>(x) * factor);
      }
    }
  }
}

// f(tag of the element type, vectors of 16 bytes or single elements).
template <typename F, typename... Places>
void with_vectors(DType type, F f, Places... places) {
  with_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (aligned(16, places...)) {
      f(tag, std::integral_constant<int, 16 / sizeof(T)>{});
    } else {
      f(tag, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

int moe_permute_cuda(const CudaMoePermuteParams& p, void* stream_handle) {
  if (p.n * p.k == 0 || p.channels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = bytes_of(p.type);
  with_vectors(
      p.type,
      [&](auto tag, auto width) {
        using T = typename decltype(tag)::Type;
        constexpr int kWidth = decltype(width)::value;
        const dim3 block = block_for(ceil_div(p.channels, kWidth));
        ENCFAST_LAUNCH((permute_kernel<T, kWidth>), blocks_for(p.n * p.k, block.y), block, stream,
                       p);
      },
      p.x, p.x_stride * size, p.out, p.channels * size);
  return static_cast<int>(cudaGetLastError());
}

int moe_unpermute_cuda(const CudaMoeUnpermuteParams& p, void* stream_handle) {
  if (p.n == 0 || p.channels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = bytes_of(p.type);
  with_vectors(
      p.type,
      [&](auto tag, auto width) {
        using T = typename decltype(tag)::Type;
        constexpr int kWidth = decltype(width)::value;
        const dim3 block = block_for(ceil_div(p.channels, kWidth));
        ENCFAST_LAUNCH((unpermute_kernel<T, kWidth>), blocks_for(p.n, block.y), block, stream, p);
      },
      p.y, p.y_stride * size, p.out, p.channels * size);
  return static_cast<int>(cudaGetLastError());
}

int moe_unpermute_bwd_cuda(const CudaMoeUnpermuteBwdParams& p, void* stream_handle) {
  if (p.n * p.k == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = bytes_of(p.type);
  with_vectors(
      p.type,
      [&](auto tag, auto width) {
        using T = typename decltype(tag)::Type;
        constexpr int kWidth = decltype(width)::value;
        ENCFAST_LAUNCH((unpermute_bwd_kernel<T, kWidth>), blocks_for(p.n * p.k, kWarps), kThreads,
                       stream, p);
      },
      p.dout, p.dout_stride * size, p.y, p.y_stride * size, p.dy, p.channels * size);
  return static_cast<int>(cudaGetLastError());
}

int moe_jitter_cuda(const CudaMoeJitterParams& p, void* stream_handle) {
  if (p.n == 0 || p.channels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  with_float_type(p.type, [&](auto tag) {
    const dim3 block = block_for(ceil_div(p.channels, 4));
    ENCFAST_LAUNCH((jitter_kernel<typename decltype(tag)::Type>), blocks_for(p.n, block.y), block,
                   stream, p);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace encfast
