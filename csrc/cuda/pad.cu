// Row moves, and which rows a mask keeps: memory traffic and nothing else.
//
// Moves (gather, sum):
//
//   block = lanes x rows          lanes of one row take its vectors in turn; as many rows
//   +--------+--------+           share a block as fill it; rows beyond the grid are reached
//   | row 0  | lane 0 1 2 .. |    by striding over it
//   | row 1  | lane 0 1 2 .. |
//
// Bytes moved per row: read row_bytes + 8 (index), write row_bytes. No shared memory. A vector is
// the widest of 16, 8, 4, 2, 1 bytes to which both sides are aligned in every row; what row_bytes
// leaves over moves byte by byte. All offsets are 64 bits wide.
//
// Kept rows: the flattened mask is cut into tiles of 4096 entries, one to a block, whatever the
// length of a sequence.
//
//   block = 8 warps, each with 16 rounds of 32 entries: a ballot per round, kept in registers
//   +-------------------+-------------------+
//   | warp 0: r0 r1 ..  | warp 1: r0 r1 ..  |    count: entries kept in each tile
//   +-------------------+-------------------+    scan:  one block, over the tiles
//                                                place: ballots again, rank = tile + warp + lane
//
// The mask is read twice, 1 byte an entry; 8 bytes an entry are written. Shared memory holds one
// count per warp. Indices are at most 2^31 - 1, since cu_seqlens is int32.
#include <cassert>

#include "pad.h"
#include "row_starts.h"
#include "rows.h"

namespace encfast {
namespace {

template <typename Vec>
__global__ void gather_rows_kernel(CudaGatherRowsParams p) {
  const int64_t vectors = p.row_bytes / static_cast<int64_t>(sizeof(Vec));
  const int64_t tail = vectors * static_cast<int64_t>(sizeof(Vec));
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < p.n;
       i += step) {
    const int64_t row = p.index[i];
    assert(row >= -1 && row < p.src_rows && "encfast::gather_rows: index out of range");
    const char* src = static_cast<const char*>(p.src) + row * p.src_stride;
    char* out = static_cast<char*>(p.out) + i * p.out_stride;
    for (int64_t c = threadIdx.x; c < vectors; c += blockDim.x) {
      reinterpret_cast<Vec*>(out)[c] = row < 0 ? Vec{} : reinterpret_cast<const Vec*>(src)[c];
    }
    for (int64_t c = tail + threadIdx.x; c < p.row_bytes; c += blockDim.x) {
      out[c] = row < 0 ? char{} : src[c];
    }
  }
}

template <typename Vec>
void launch_gather(const CudaGatherRowsParams& p, cudaStream_t stream) {
  const dim3 block = block_for(ceil_div(p.row_bytes, sizeof(Vec)));
  ENCFAST_LAUNCH((gather_rows_kernel<Vec>), blocks_for(p.n, block.y), block, stream, p);
}

// How one element type is added: in Sum, rounded to T at the end.
template <typename T>
struct Adding {
  using Sum = T;
  static __device__ T round(T s) { return s; }
};
template <>
struct Adding<__nv_bfloat16> {
  using Sum = float;
  static __device__ __nv_bfloat16 round(float s) { return __float2bfloat16_rn(s); }
};
template <>
struct Adding<__half> {
  using Sum = float;
  static __device__ __half round(float s) { return __float2half_rn(s); }
};

// Rows in bytes are not added: the first one stays.
struct Byte {
  char value;
};
template <>
struct Adding<Byte> {
  using Sum = Byte;
  static __device__ Byte round(Byte s) { return s; }
};
__device__ Byte operator+(Byte first, Byte) { return first; }

template <typename T, int kWidth>
__device__ Pack<T, kWidth> sum_of_rows(const CudaSumRowsParams& p, int64_t first, int64_t last,
                                       int64_t column) {
  using Sum = typename Adding<T>::Sum;
  const T* src = static_cast<const T*>(p.src) + column;
  auto load = [&](int64_t j) {
    return *reinterpret_cast<const Pack<T, kWidth>*>(src + p.order[j] * p.src_stride);
  };
  Pack<T, kWidth> row = load(first);
  if (last - first == 1) return row;  // bit for bit, as on the CPU
  Sum sum[kWidth];
  for (int k = 0; k < kWidth; ++k) sum[k] = static_cast<Sum>(row.values[k]);
  for (int64_t j = first + 1; j < last; ++j) {
    row = load(j);
    for (int k = 0; k < kWidth; ++k) sum[k] = sum[k] + static_cast<Sum>(row.values[k]);
  }
  for (int k = 0; k < kWidth; ++k) row.values[k] = Adding<T>::round(sum[k]);
  return row;
}

template <typename T, int kWidth>
__global__ void sum_rows_kernel(CudaSumRowsParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; r < p.n;
       r += step) {
    const int64_t first = p.begin[r], last = p.begin[r + 1];
    T* out = static_cast<T*>(p.out) + r * p.row_elements;
    for (int64_t c = threadIdx.x * kWidth; c < p.row_elements; c += blockDim.x * kWidth) {
      Pack<T, kWidth> sum{};
      if (first < last) sum = sum_of_rows<T, kWidth>(p, first, last, c);
      *reinterpret_cast<Pack<T, kWidth>*>(out + c) = sum;
    }
  }
}

template <typename T, int kWidth>
void launch_sum(const CudaSumRowsParams& p, cudaStream_t stream) {
  const dim3 block = block_for(ceil_div(p.row_elements, kWidth));
  ENCFAST_LAUNCH((sum_rows_kernel<T, kWidth>), blocks_for(p.n, block.y), block, stream, p);
}

// In vectors of 16 bytes where rows are whole ones, else element by element.
template <typename T>
void launch_sum_of(const CudaSumRowsParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t size = sizeof(T);
  if (aligned(16, p.src, p.src_stride * size, p.out, p.row_elements * size)) {
    launch_sum<T, kWidth>(p, stream);
  } else {
    launch_sum<T, 1>(p, stream);
  }
}

constexpr int kRounds = 16;                    // a warp's: its ballots fill 16 registers
constexpr int kStretch = kRounds * kWarpSize;  // entries of a warp
constexpr int kTile = kWarps * kStretch;       // and of a block

// One bit per entry of this warp's stretch that is kept; returns their number.
__device__ int kept_of_warp(const CudaFindRowsParams& p, int64_t begin,
                            unsigned (&ballots)[kRounds]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int count = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + round * kWarpSize + lane;
    ballots[round] = __ballot_sync(kAllLanes, i < p.n && p.mask[i] != 0);
    count += __popc(ballots[round]);
  }
  return count;
}

int64_t tiles_of(int64_t n) { return ceil_div(n, kTile); }

__device__ int64_t begin_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kTile +
         static_cast<int64_t>(threadIdx.x) / kWarpSize * kStretch;
}

__global__ void __launch_bounds__(kThreads) count_kept_kernel(CudaFindRowsParams p) {
  unsigned ballots[kRounds];
  const int kept = kept_of_warp(p, begin_of_warp(), ballots);
  int total;
  inclusive_scan(threadIdx.x % kWarpSize == 0 ? kept : 0, total);
  if (threadIdx.x == 0) p.tiles[blockIdx.x] = total;
}

// One block: tiles[t] becomes the sum of those before t, and tiles[n_tiles] that of all.
__global__ void __launch_bounds__(kThreads)
    scan_tiles_kernel(CudaFindRowsParams p, int64_t n_tiles) {
  int before = 0;
  for (int64_t begin = 0; begin < n_tiles; begin += kThreads) {
    const int64_t t = begin + threadIdx.x;
    const int count = t < n_tiles ? p.tiles[t] : 0;
    int total;
    const int through = inclusive_scan(count, total);
    if (t < n_tiles) p.tiles[t] = before + through - count;
    before += total;
  }
  if (threadIdx.x == 0) p.tiles[n_tiles] = before;
}

__global__ void __launch_bounds__(kThreads) place_kept_kernel(CudaFindRowsParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t begin = begin_of_warp();
  unsigned ballots[kRounds];
  const int kept = kept_of_warp(p, begin, ballots);
  int total;
  const int through = inclusive_scan(lane == 0 ? kept : 0, total);
  // Of the lanes of a warp the first holds its entries: all ranks of the warp start behind hers.
  int rank = p.tiles[blockIdx.x] + __shfl_sync(kAllLanes, through, 0) - kept;
  const int all = p.tiles[gridDim.x];
  const unsigned lanes_before = (1u << lane) - 1;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + round * kWarpSize + lane;
    if (i < p.n) {
      const int before = rank + __popc(ballots[round] & lanes_before);
      const auto entry = static_cast<unsigned>(i), seqlen = static_cast<unsigned>(p.seqlen);
      if (entry % seqlen == 0) p.cu_seqlens[entry / seqlen] = before;
      if (ballots[round] >> lane & 1) p.indices[before] = i;
      if (i >= all) p.indices[i] = -1;
    }
    rank += __popc(ballots[round]);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.cu_seqlens[p.n / p.seqlen] = all;
}

}  // namespace

int gather_rows_cuda(const CudaGatherRowsParams& p, void* stream_handle) {
  if (p.n == 0 || p.row_bytes == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  auto fits = [&](int64_t w) { return aligned(w, p.src, p.src_stride, p.out, p.out_stride); };
  if (fits(16)) {
    launch_gather<uint4>(p, stream);
  } else if (fits(8)) {
    launch_gather<uint2>(p, stream);
  } else if (fits(4)) {
    launch_gather<uint32_t>(p, stream);
  } else if (fits(2)) {
    launch_gather<uint16_t>(p, stream);
  } else {
    launch_gather<uint8_t>(p, stream);
  }
  return static_cast<int>(cudaGetLastError());
}

int sum_rows_cuda(const CudaSumRowsParams& p, void* stream_handle) {
  if (p.n == 0 || p.row_elements == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  find_row_starts(p.sorted, p.m, p.begin, p.n, stream);
  switch (p.type) {
    case CudaSumType::kBytes:
      launch_sum_of<Byte>(p, stream);
      break;
    case CudaSumType::kFloat32:
      launch_sum_of<float>(p, stream);
      break;
    case CudaSumType::kBFloat16:
      launch_sum_of<__nv_bfloat16>(p, stream);
      break;
    case CudaSumType::kFloat16:
      launch_sum_of<__half>(p, stream);
      break;
    case CudaSumType::kFloat64:
      launch_sum_of<double>(p, stream);
      break;
    case CudaSumType::kInt32:
      launch_sum_of<int32_t>(p, stream);
      break;
    case CudaSumType::kInt64:
      launch_sum_of<int64_t>(p, stream);
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

int64_t find_rows_scratch(int64_t n) { return tiles_of(n) + 1; }

int find_rows_cuda(const CudaFindRowsParams& p, void* stream_handle) {
  if (p.n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const auto tiles = static_cast<unsigned>(tiles_of(p.n));
  ENCFAST_LAUNCH((count_kept_kernel), tiles, kThreads, stream, p);
  ENCFAST_LAUNCH((scan_tiles_kernel), 1, kThreads, stream, p, tiles);
  ENCFAST_LAUNCH((place_kept_kernel), tiles, kThreads, stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace encfast
