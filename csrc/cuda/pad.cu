// Row moves: memory traffic and nothing else.
//
//   block = lanes x rows          lanes of one row take its vectors in turn; as many rows
//   +--------+--------+           share a block as fill it; rows beyond the grid are reached
//   | row 0  | lane 0 1 2 .. |    by striding over it
//   | row 1  | lane 0 1 2 .. |
//
// Bytes moved per row: read row_bytes + 8 (index), write row_bytes. No shared memory. A vector is
// the widest of 16, 8, 4, 2, 1 bytes to which both sides are aligned in every row; what row_bytes
// leaves over moves byte by byte. All offsets are 64 bits wide.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

#include "pad.h"

namespace encfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // many waves on any GPU; the kernels stride over the rest

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes for a row of `vectors`: the next power of two, within a block.
dim3 block_for(int64_t vectors) {
  unsigned lanes = 1;
  while (lanes < vectors && lanes < kThreads) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

unsigned blocks_for(int64_t rows, unsigned rows_per_block) {
  const int64_t blocks = ceil_div(rows, rows_per_block);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Whether `width` divides both addresses and both strides.
bool aligned(int64_t width, const void* a, int64_t a_stride, const void* b, int64_t b_stride) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                        static_cast<uint64_t>(a_stride) | static_cast<uint64_t>(b_stride);
  return bits % static_cast<uint64_t>(width) == 0;
}

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
  gather_rows_kernel<Vec><<<blocks_for(p.n, block.y), block, 0, stream>>>(p);
}

// begin[r] = how many of `sorted` are below r, for r in 0..n.
__global__ void row_starts_kernel(CudaSumRowsParams p) {
  assert((p.m == 0 || (p.sorted[0] >= -1 && p.sorted[p.m - 1] < p.n)) &&
         "encfast::scatter_rows: index out of range");
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r <= p.n;
       r += step) {
    int64_t low = 0, high = p.m;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (p.sorted[middle] < r) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    p.begin[r] = low;
  }
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
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

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
  sum_rows_kernel<T, kWidth><<<blocks_for(p.n, block.y), block, 0, stream>>>(p);
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
  row_starts_kernel<<<blocks_for(p.n + 1, kThreads), kThreads, 0, stream>>>(p);
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

}  // namespace encfast
