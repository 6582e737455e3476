// Which patches a model sees, and their pixels.
//
// Selection: a patch's rank is the number of keys of its sequence below its own, counted; equals go
// by position.
//
//   block = 256 patches in a row, one a thread, of one sequence or several
//   +----------------+
//   | keys, tile 0   |  1024 keys of a sequence at a time stand in shared memory (4 KiB); all lanes
//   | keys, tile 1 ..|  read the same 4 of them
//   +----------------+
//
// In the order of noise the rank is the place. In that of ids a second kernel, one block per
// sequence, finds the place by a scan over who is kept; ranks wait in `restore`. Bytes moved per
// patch: read 4, write 16, and 16 more for ranks that wait. Comparisons grow with the square of a
// sequence's length, 32 at a time: 1.2 thousand for the 196 patches of an image, 77 thousand for
// the 1568 of a clip. That is the range this is for; many sequences of several thousand patches
// each are better served by a sort.
//
// Pixels: block = lanes x rows, as in pad.cu; a lane has 4 vectors of a row under way.
//
//   row i = patch ids[i]   ->  where the patch begins: image, place in the grid     once a row
//   element e of the row   ->  channel and pixel of the patch: 4 axes at most       once a vector
//
// A vector is 8 or 4 elements, of which the wider of image and rows has 16 bytes at most, where
// these are neighbours in the image too and all of its strides keep them aligned; otherwise one.
// Read and written once, 8 bytes of ids a row beside it. No shared memory. Offsets are 64 bits
// wide, numbers within an image or a row 31.
#include <cassert>

#include "divider.h"
#include "floats.h"
#include "patch_gather.h"
#include "rows.h"

namespace encfast {
namespace {

constexpr int kTileKeys = 4 * kThreads;
constexpr uint32_t kNaN = 0xff800001;  // behind +infinity; keys above it are no noise's

// Numbers in the order of noise.
__device__ uint32_t key_of(float noise) {
  if (noise != noise) return kNaN;
  const uint32_t bits = noise == 0 ? 0 : __float_as_uint(noise);  // -0 equals 0
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ int count_below(const uint4* keys, int first, int last, uint32_t bound) {
  int count = 0;
#pragma unroll 4
  for (int q = first; q < last; ++q) {
    const uint4 k = keys[q];
    count += (k.x < bound) + (k.y < bound) + (k.z < bound) + (k.w < bound);
  }
  return count;
}

// Of `quads` groups of 4 keys, how many keys are below that of patch i, which stands at `at`:
// before it, within or behind. Equals count where they come first.
__device__ int rank_in_tile(const uint4* keys, int quads, uint32_t key, int64_t at) {
  if (at < 0) return count_below(keys, 0, quads, key);
  if (at >= 4 * quads) return count_below(keys, 0, quads, key + 1);
  const int own = static_cast<int>(at) / 4, place = static_cast<int>(at) % 4;
  const uint4 k = keys[own];
  return count_below(keys, 0, own, key + 1) + count_below(keys, own + 1, quads, key) +
         (k.x < key + (place > 0)) + (k.y < key + (place > 1)) + (k.z < key + (place > 2)) +
         (k.w < key);
}

// The rank of patch i of a sequence; no matter what where the sequence has none. All threads of the
// block take part.
__device__ int rank_of(const float* noise, int64_t length, int64_t i) {
  ENCFAST_SHARED(uint4, tile, kTileKeys / 4);
  auto* keys = reinterpret_cast<uint32_t*>(tile);
  const bool inside = i >= 0 && i < length;
  const uint32_t key = inside ? key_of(noise[i]) : 0;
  int rank = 0;
  for (int64_t begin = 0; begin < length; begin += kTileKeys) {
    const auto n = static_cast<int>(length - begin < kTileKeys ? length - begin : kTileKeys);
    const int quads = (n + 3) / 4;
    __syncthreads();  // the tile before has been read
    for (int j = static_cast<int>(threadIdx.x); j < 4 * quads; j += kThreads) {
      keys[j] = j < n ? key_of(noise[begin + j]) : ~0u;
    }
    __syncthreads();
    if (inside) rank += rank_in_tile(tile, quads, key, i - begin);
  }
  return rank;
}

// What one sequence reads and writes.
struct Sequence {
  int64_t start, length;  // of its patches
  int64_t seen, keep;     // visible ones of those before it, and its own
};

__device__ Sequence sequence_of(const CudaSelectPatchesParams& p, int64_t b) {
  const int64_t start = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  const int64_t seen = p.cu_keep[b], seen_end = p.cu_keep[b + 1];
  assert(seen >= 0 && seen <= seen_end && seen_end <= p.keep && seen_end - seen <= end - start &&
         "encfast::select_patches: cu_keep does not fit");
  assert(start >= seen && end <= p.n && end - seen_end <= p.n - p.keep &&
         "encfast::select_patches: cu_seqlens does not fit");
  assert((b > 0 || start == 0) && (b + 1 < p.batch || end == p.n) &&
         "encfast::select_patches: cu_seqlens does not fit");
  return {start, end - start, seen, seen_end - seen};
}

// The sequence of patch `id`: of those that begin at it or before, the last.
__device__ int64_t sequence_with(const CudaSelectPatchesParams& p, int64_t id) {
  int64_t low = 0, high = p.batch;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (p.cu_seqlens[middle] <= id) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Writes down that patch i of a sequence stands at `place` among its visible and then hidden ones.
__device__ void put(const CudaSelectPatchesParams& p, const Sequence& s, int64_t i, int64_t place) {
  const int64_t id = s.start + i;
  const bool kept = place < s.keep;
  if (kept) {
    p.visible[s.seen + place] = id;
  } else {
    p.hidden[s.start - s.seen + place - s.keep] = id;
  }
  p.restore[id] = kept ? s.seen + place : -1;
}

// Places, or in the order of ids restore[id] = rank.
__global__ void __launch_bounds__(kThreads) rank_patches_kernel(CudaSelectPatchesParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < p.n; first += step) {
    const int64_t id = first + threadIdx.x;
    const int64_t last = first + kThreads < p.n ? first + kThreads : p.n;
    int64_t end = first;
    for (int64_t b = sequence_with(p, first); end < last; ++b) {
      const Sequence s = sequence_of(p, b);
      end = s.start + s.length;
      const int64_t i = id - s.start;
      const int rank = rank_of(p.noise + s.start, s.length, i);
      if (i < 0 || i >= s.length) continue;
      if (p.ordered) {
        p.restore[id] = rank;
      } else {
        put(p, s, i, rank);
      }
    }
  }
}

// From restore[id] = rank: places in the order of ids.
__global__ void __launch_bounds__(kThreads) place_patches_kernel(CudaSelectPatchesParams p) {
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const Sequence s = sequence_of(p, b);
    int64_t kept_before = 0;
    for (int64_t begin = 0; begin < s.length; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      const bool kept = i < s.length && p.restore[s.start + i] < s.keep;
      int total;
      const int64_t before = kept_before + inclusive_scan(kept, total) - kept;
      if (i < s.length) put(p, s, i, kept ? before : s.keep + i - before);
      kept_before += total;
    }
  }
}

// Axes of which the last is the fastest: a number counts their places, strides lead to memory.
template <int kAxes>
struct Axes {
  Divider size[kAxes];
  int64_t stride[kAxes];

  void set(int axis, int64_t n, int64_t step) {
    size[axis] = Divider(n);
    stride[axis] = n == 1 ? 0 : step;
  }
};

struct Place {
  int64_t offset;
  uint32_t first, last;  // along the first and the last axis
};

template <int kAxes>
__device__ Place place_of(const Axes<kAxes>& axes, uint32_t i) {
  Place at{};
#pragma unroll
  for (int a = kAxes - 1; a > 0; --a) {
    const uint32_t rest = axes.size[a].quotient(i);
    const uint32_t along = i - rest * axes.size[a].divisor;
    if (a == kAxes - 1) at.last = along;
    at.offset += along * axes.stride[a];
    i = rest;
  }
  at.first = i;
  at.offset += i * axes.stride[0];
  return at;
}

// How the image lies under its grid, and under the row of a patch.
struct Layout {
  Axes<3> grid;
  Axes<4> row;  // [channels, *patch], or with channels last [*patch, channels]
  Divider channels;
};

// With channels last, pixels that are neighbours in the image make one axis with their channels.
bool joins_channels(const PatchGrid& g) {
  return g.channels_last && (g.channels == 1 || g.channel_stride == 1) &&
         (g.patch[2] == 1 || g.stride[2] == g.channels);
}

Layout layout_of(const PatchGrid& g) {
  Layout at{};
  at.channels = Divider(g.channels);
  const int first = g.channels_last ? 0 : 1;  // axis of a row that is the patch's first
  const bool joined = joins_channels(g);
  for (int a = 0; a < kPatchAxes; ++a) {
    at.grid.set(a, g.grid[a], g.patch[a] * g.stride[a]);
    at.row.set(joined ? a + 1 : a + first, g.patch[a], g.stride[a]);
  }
  if (joined) {
    at.row.set(3, g.patch[2] * g.channels, 1);
  } else {
    at.row.set(g.channels_last ? 3 : 0, g.channels, g.channel_stride);
  }
  return at;
}

// Elements e .. e + kWidth - 1 of the row of the patch that begins at `src`.
template <int kWidth, typename Pixel>
__device__ Floats<kWidth> pixels_of(const CudaGatherPatchesParams& p, const Layout& layout,
                                    const Pixel* src, uint32_t e) {
  const Place at = place_of(layout.row, e);
  auto x = load_floats<kWidth>(src + at.offset);
  uint32_t channel = at.first;
  if (p.grid.channels_last) {
    channel = at.last - layout.channels.quotient(at.last) * layout.channels.divisor;
  }
  for (int k = 0; k < kWidth; ++k) {
    if (p.scale) x.values[k] *= p.scale[channel];
    if (p.shift) x.values[k] += p.shift[channel];
    if (p.grid.channels_last && ++channel == layout.channels.divisor) channel = 0;
  }
  return x;
}

constexpr int kVectors = 4;  // of a row that a lane has under way

template <typename Pixel, int kWidth>
__global__ void gather_patches_kernel(CudaGatherPatchesParams p, Layout layout) {
  const auto pixels = static_cast<uint32_t>(p.grid.pixels);
  const uint32_t across = blockDim.x * kWidth;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < p.m;
       i += step) {
    const int64_t id = p.ids[i], image = id / p.grid.patches;
    assert(id >= 0 && image < p.grid.batch && "encfast::gather_patches: id out of range");
    const auto patch = static_cast<uint32_t>(id - image * p.grid.patches);
    const Pixel* src = static_cast<const Pixel*>(p.image) + image * p.grid.image_stride +
                       place_of(layout.grid, patch).offset;
    for (uint32_t first = threadIdx.x * kWidth; first < pixels; first += kVectors * across) {
      Floats<kWidth> x[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t e = first + v * across;
        x[v] = pixels_of<kWidth>(p, layout, src, e < pixels ? e : first);
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t e = first + v * across;
        if (e < pixels) store_rounded(p.rows, p.type, i * p.grid.pixels + e, x[v]);
      }
    }
  }
}

// Whether all vectors of `width` elements are neighbours in the image, and aligned there.
bool moves_in_vectors(const CudaGatherPatchesParams& p, const Layout& at, int width, int64_t size) {
  if (at.row.stride[3] != 1 || at.row.size[3].divisor % static_cast<uint32_t>(width)) return false;
  bool fits = aligned(width * size, p.image, (p.grid.batch == 1 ? 0 : p.grid.image_stride) * size);
  for (int64_t stride : at.grid.stride) fits = fits && stride % width == 0;
  for (int a = 0; a < 3; ++a) fits = fits && at.row.stride[a] % width == 0;
  return fits;
}

template <typename Pixel, int kWidth>
void launch_gather(const CudaGatherPatchesParams& p, const Layout& layout, cudaStream_t stream) {
  const dim3 block = block_for(ceil_div(p.grid.pixels, kVectors * kWidth));
  ENCFAST_LAUNCH((gather_patches_kernel<Pixel, kWidth>), blocks_for(p.m, block.y), block, stream, p,
                 layout);
}

template <typename Pixel>
void launch_gather_of(const CudaGatherPatchesParams& p, cudaStream_t stream) {
  constexpr int kSize = sizeof(Pixel), kMost = 16 / (kSize < 2 ? 2 : kSize);
  const int64_t row_size = bytes_of(p.type);
  const Layout layout = layout_of(p.grid);
  const auto fits = [&](int width) {
    return moves_in_vectors(p, layout, width, kSize) && aligned(width * row_size, p.rows);
  };
  if (kMost == 8 && row_size == 2 && fits(8)) {
    launch_gather<Pixel, kMost>(p, layout, stream);
  } else if (fits(4)) {
    launch_gather<Pixel, 4>(p, layout, stream);
  } else {
    launch_gather<Pixel, 1>(p, layout, stream);
  }
}

}  // namespace

int select_patches_cuda(const CudaSelectPatchesParams& p, void* stream_handle) {
  if (p.n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  ENCFAST_LAUNCH((rank_patches_kernel), blocks_for(p.n, kThreads), kThreads, stream, p);
  if (p.ordered) {
    ENCFAST_LAUNCH((place_patches_kernel), blocks_for(p.batch, 1), kThreads, stream, p);
  }
  return static_cast<int>(cudaGetLastError());
}

int gather_patches_cuda(const CudaGatherPatchesParams& p, void* stream_handle) {
  if (p.m == 0 || p.grid.pixels == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.pixels) {
    case PixelType::kFloat32:
      launch_gather_of<float>(p, stream);
      break;
    case PixelType::kBFloat16:
      launch_gather_of<__nv_bfloat16>(p, stream);
      break;
    case PixelType::kFloat16:
      launch_gather_of<__half>(p, stream);
      break;
    case PixelType::kUint8:
      launch_gather_of<uint8_t>(p, stream);
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace encfast
