// Rows put back at their places with what stands in the gaps and what is added, and the gradients
// of both parameters: memory traffic and nothing else.
//
// Forward: block = lanes x rows, as in pad.cu. Bytes moved per row of C channels: read C (x, or
// fill from the cache), C of `add` and 8 or 16 of indices, write C. No shared memory. Vectors of 16
// bytes where all rows are whole ones, else element by element.
//
// Backward: dfill and each row of dadd are a sum of rows of dout.
//
//   block = 32 vectors of channels of one row of the result, and one split of its sources
//   +--------+------------+
//   | warp 0 | lane 0 1 ..|  a warp takes sources in turn, 4 of them under way at a time; a lane's
//   | warp 1 | lane 0 1 ..|  sums stay in registers
//   +--------+------------+  the warps' sums meet in shared memory (8 KiB at most) and are added in
//                            the order of the warps
//
// Splits fill the GPU where the result has few rows: their partial sums go to memory and are added
// by the same kernel. Orders and splits follow from the sizes, never from the GPU or from
// alignment, so that a sum has the same bits everywhere. Rows of dout are read once for each
// gradient, those which dfill skips not at all. Fewer channels than 32 vectors leave lanes idle,
// and a row of `add` in far wider use than the others makes its blocks run longest.
#include <cassert>

#include "floats.h"
#include "restore_rows.h"
#include "row_starts.h"
#include "rows.h"

namespace encfast {
namespace {

template <typename T, int kWidth>
__global__ void restore_rows_kernel(CudaRestoreRowsParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < p.m;
       i += step) {
    const int64_t row = p.index[i];
    assert(row >= -1 && row < p.n && "encfast::restore_rows: index out of range");
    int64_t added = 0;
    if (p.add) {
      added = p.add_index ? p.add_index[i] : i % p.n_add;
      assert(added >= 0 && added < p.n_add && "encfast::restore_rows: add_index out of range");
    }
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + i * p.channels;
    for (int64_t c = threadIdx.x * kWidth; c < p.channels; c += blockDim.x * kWidth) {
      Floats<kWidth> sum{};
      if (row >= 0) {
        sum = load_floats<kWidth>(x + c);
      } else if (p.fill) {
        sum = load_floats<kWidth>(p.fill + c);
      }
      if (p.add) {
        const auto other = load_floats<kWidth>(p.add, p.add_type, added * p.add_stride + c);
        for (int k = 0; k < kWidth; ++k) sum.values[k] += other.values[k];
      }
      store_rounded(out + c, sum);
    }
  }
}

template <typename T, int kWidth>
void launch_restore(const CudaRestoreRowsParams& p, cudaStream_t stream) {
  const dim3 block = block_for(ceil_div(p.channels, kWidth));
  ENCFAST_LAUNCH((restore_rows_kernel<T, kWidth>), blocks_for(p.m, block.y), block, stream, p);
}

constexpr int kInFlight = 4;                             // rows a warp has under way
constexpr int64_t kMinSources = 2 * kWarps * kInFlight;  // of a split: two rounds of a block
constexpr int64_t kWantedItems = 1024;                   // 8 blocks for each SM of a large GPU

// out[s * rows + r] = the sum of split s of the sources of row r, in float32.
struct SumParams {
  const void* src;
  int64_t src_stride;    // in elements
  const int64_t* order;  // row r has the sources order[j], begin[r] <= j < begin[r + 1] ..
  const int64_t* begin;
  int64_t sources;       // .. or without `order` these many: r, r + rows, r + 2 rows, ..
  const int64_t* index;  // not null: sources whose index is >= 0 count as zeros
  float* out;            // [splits * rows, channels]
  int64_t rows;
  int64_t splits;
  int64_t channels;
};

// The sum of every `step`-th source of row r of `sources`, the first at `first`, from `column` on.
template <typename T, int kWidth>
__device__ Floats<kWidth> sum_of_sources(const SumParams& p, int64_t r, int64_t first, int64_t step,
                                         int64_t sources, int64_t column) {
  const T* src = static_cast<const T*>(p.src) + column;
  const int64_t* order = p.order ? p.order + p.begin[r] : nullptr;
  Floats<kWidth> sum{};
  for (int64_t j = first; j < sources; j += kInFlight * step) {
    Pack<T, kWidth> rows[kInFlight]{};
#pragma unroll
    for (int f = 0; f < kInFlight; ++f) {
      const int64_t at = j + f * step;
      if (at >= sources) continue;
      const int64_t row = order ? order[at] : r + at * p.rows;
      if (p.index && p.index[row] >= 0) continue;
      rows[f] = *reinterpret_cast<const Pack<T, kWidth>*>(src + row * p.src_stride);
    }
#pragma unroll
    for (int f = 0; f < kInFlight; ++f) {
      for (int k = 0; k < kWidth; ++k) sum.values[k] += static_cast<float>(rows[f].values[k]);
    }
  }
  return sum;
}

// Grid: chunks of channels of all rows, splits.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) sum_sources_kernel(SumParams p, unsigned chunks) {
  constexpr int kChunk = kWarpSize * kWidth;
  ENCFAST_SHARED(float, sums, kWarps* kChunk);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t r = blockIdx.x / chunks, split = blockIdx.y;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % chunks) * kChunk;
  const int64_t column = begin + lane * kWidth;
  Floats<kWidth> sum{};
  if (column < p.channels) {
    const int64_t sources = p.order ? p.begin[r + 1] - p.begin[r] : p.sources;
    sum =
        sum_of_sources<T, kWidth>(p, r, split * kWarps + warp, p.splits * kWarps, sources, column);
  }
  for (int k = 0; k < kWidth; ++k) sums[warp * kChunk + lane * kWidth + k] = sum.values[k];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kChunk; c += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kChunk + c];
    if (begin + c < p.channels) p.out[(split * p.rows + r) * p.channels + begin + c] = total;
  }
}

template <typename T, int kWidth>
void launch_sum(const SumParams& p, cudaStream_t stream) {
  const auto chunks = static_cast<unsigned>(ceil_div(p.channels, kWarpSize * kWidth));
  const dim3 grid(chunks * static_cast<unsigned>(p.rows), static_cast<unsigned>(p.splits));
  ENCFAST_LAUNCH((sum_sources_kernel<T, kWidth>), grid, kThreads, stream, p, chunks);
}

template <typename T>
void launch_sum_of(const SumParams& p, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  if (aligned(16, p.src, p.src_stride * kSize, p.channels * kSize)) {
    launch_sum<T, 16 / sizeof(T)>(p, stream);
  } else {
    launch_sum<T, 1>(p, stream);
  }
}

// Splits of the sources of each row, m of them in all rows together.
int64_t splits_of(int64_t m, int64_t rows, int64_t channels) {
  const int64_t wanted = ceil_div(kWantedItems, rows * ceil_div(channels, 256));
  const int64_t useful = m / rows / kMinSources;
  return useful < 1 ? 1 : wanted < useful ? wanted : useful;
}

int64_t partials_of(int64_t m, int64_t rows, int64_t channels) {
  if (rows == 0 || channels == 0) return 0;
  const int64_t splits = splits_of(m, rows, channels);
  return splits == 1 ? 0 : splits * rows * channels;
}

// The sums in one stage, or in two by way of `partials`.
void sum_sources(DType type, SumParams p, int64_t m, float* partials, cudaStream_t stream) {
  if (p.rows == 0) return;
  float* out = p.out;
  p.splits = splits_of(m, p.rows, p.channels);
  if (p.splits > 1) p.out = partials;
  with_float_type(type, [&](auto tag) { launch_sum_of<typename decltype(tag)::Type>(p, stream); });
  if (p.splits == 1) return;
  SumParams rest{};  // every rows-th of the partial sums
  rest.src = partials;
  rest.src_stride = rest.channels = p.channels;
  rest.sources = p.splits;
  rest.out = out;
  rest.rows = p.rows;
  rest.splits = 1;
  launch_sum_of<float>(rest, stream);
}

}  // namespace

int restore_rows_cuda(const CudaRestoreRowsParams& p, void* stream_handle) {
  if (p.m == 0 || p.channels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = bytes_of(p.type);
  const bool vectors = aligned(16, p.x, p.x_stride * size, p.out, p.channels * size, p.fill, p.add,
                               p.add_stride * bytes_of(p.add_type));
  with_float_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (vectors) {
      launch_restore<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_restore<T, 1>(p, stream);
    }
  });
  return static_cast<int>(cudaGetLastError());
}

int64_t restore_rows_bwd_scratch(int64_t m, int64_t n_add, int64_t channels) {
  const int64_t dfill = partials_of(m, 1, channels), dadd = partials_of(m, n_add, channels);
  return dfill > dadd ? dfill : dadd;
}

int restore_rows_bwd_cuda(const CudaRestoreRowsBwdParams& p, void* stream_handle) {
  if (p.channels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  SumParams sum{};
  sum.src = p.dout;
  sum.src_stride = p.dout_stride;
  sum.channels = p.channels;
  if (p.dfill) {
    SumParams hidden = sum;
    hidden.sources = p.m;
    hidden.index = p.index;
    hidden.out = p.dfill;
    hidden.rows = 1;
    sum_sources(p.type, hidden, p.m, p.partials, stream);
  }
  if (p.dadd && p.n_add > 0) {
    if (p.sorted) find_row_starts(p.sorted, p.m, p.begin, p.n_add, stream);
    sum.order = p.order;
    sum.begin = p.begin;
    sum.sources = p.m / p.n_add;
    sum.out = p.dadd;
    sum.rows = p.n_add;
    sum_sources(p.type, sum, p.m, p.partials, stream);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace encfast
