// The kernels of csrc/cuda/pad.cu on the CPU: every width of a vector, strides, rows that share a
// place, masks of every kind, against plain loops.
#include "cuda/pad.cu"

#include "check.h"

template <>
encfast::Byte check::element_of(double value) {
  return {static_cast<char>(value)};
}

namespace {

using namespace encfast;
using check::Array;
using check::Draw;
using check::element_of;

bool check_gather(Draw& draw, int64_t row_bytes, size_t offset, int64_t gap) {
  const int64_t rows = 7, n = 11, stride = row_bytes + gap;
  Array<char> src((rows - 1) * stride + row_bytes, offset), out(n * row_bytes, offset);
  for (int64_t i = 0; i < src.size(); ++i) src[i] = static_cast<char>(draw(1, 100));
  Array<int64_t> index(n);
  std::vector<char> want(static_cast<size_t>(n * row_bytes), 0);
  for (int64_t i = 0; i < n; ++i) {
    index[i] = draw(-1, rows - 1);
    for (int64_t c = 0; c < row_bytes && index[i] >= 0; ++c) {
      want[static_cast<size_t>(i * row_bytes + c)] = src[index[i] * stride + c];
    }
  }
  gather_rows_cuda({src.data(), index.data(), out.data(), n, rows, row_bytes, stride, row_bytes},
                   nullptr);
  return check::equal("gather_rows", out, want);
}

bool check_gathers(Draw& draw) {
  bool ok = true;
  for (int64_t row_bytes : {1, 2, 3, 4, 8, 12, 16, 30, 48, 272, 4112}) {
    ok &= check_gather(draw, row_bytes, 0, 0);
  }
  for (size_t offset : {1, 2, 4, 8}) ok &= check_gather(draw, 64, offset, 0);
  for (int64_t gap : {1, 2, 4, 8, 16}) ok &= check_gather(draw, 64, 0, gap);
  return ok && check_gather(draw, 0, 0, 0);
}

// Small integers add without rounding in every type, so that plain loops know the exact sum.
template <class T>
bool check_sum(Draw& draw, CudaSumType type, int64_t row_elements, int64_t gap) {
  const int64_t m = 13, n = 6, stride = row_elements + gap;
  Array<T> src((m - 1) * stride + row_elements), out(n * row_elements);
  std::vector<int64_t> values(static_cast<size_t>(src.size()));
  for (int64_t i = 0; i < src.size(); ++i) {
    values[static_cast<size_t>(i)] = draw(-8, 8);
    src[i] = element_of<T>(static_cast<double>(values[static_cast<size_t>(i)]));
  }
  Array<int64_t> sorted(m), order(m), begin(n + 1);
  for (int64_t j = 0; j < m; ++j) {
    sorted[j] = draw(-1, n - 1);
    order[j] = (5 * j + 3) % m;
  }
  std::sort(sorted.data(), sorted.data() + m);
  std::vector<int64_t> sums(static_cast<size_t>(n * row_elements), 0);
  std::vector<bool> seen(static_cast<size_t>(n), false);
  for (int64_t j = 0; j < m; ++j) {
    if (sorted[j] < 0) continue;
    const auto row = static_cast<size_t>(sorted[j]);
    const bool only_first = type == CudaSumType::kBytes && seen[row];
    seen[row] = true;
    for (int64_t c = 0; c < row_elements && !only_first; ++c) {
      sums[row * static_cast<size_t>(row_elements) + static_cast<size_t>(c)] +=
          values[static_cast<size_t>(order[j] * stride + c)];
    }
  }
  std::vector<T> want;
  for (int64_t sum : sums) want.push_back(element_of<T>(static_cast<double>(sum)));
  sum_rows_cuda({type, src.data(), sorted.data(), order.data(), begin.data(), out.data(), m, n,
                 row_elements, stride},
                nullptr);
  return check::equal("sum_rows", out, want);
}

bool check_sums(Draw& draw) {
  bool ok = true;
  for (int64_t row_elements : {1, 16, 37, 96}) {
    for (int64_t gap : {0, 16}) {
      ok &= check_sum<Byte>(draw, CudaSumType::kBytes, row_elements, gap);
      ok &= check_sum<float>(draw, CudaSumType::kFloat32, row_elements, gap);
      ok &= check_sum<__nv_bfloat16>(draw, CudaSumType::kBFloat16, row_elements, gap);
      ok &= check_sum<__half>(draw, CudaSumType::kFloat16, row_elements, gap);
      ok &= check_sum<double>(draw, CudaSumType::kFloat64, row_elements, gap);
      ok &= check_sum<int32_t>(draw, CudaSumType::kInt32, row_elements, gap);
      ok &= check_sum<int64_t>(draw, CudaSumType::kInt64, row_elements, gap);
    }
  }
  return ok;
}

// Halves of a bfloat16's last place: only a sum in float32, rounded once, to even, gives 258.
bool check_one_rounding() {
  Array<__nv_bfloat16> src(3), out(1);
  src[0] = element_of<__nv_bfloat16>(256);
  src[1] = src[2] = element_of<__nv_bfloat16>(1);
  Array<int64_t> sorted(3), order(3), begin(2);
  for (int64_t j = 0; j < 3; ++j) {
    sorted[j] = 0;
    order[j] = j;
  }
  sum_rows_cuda({CudaSumType::kBFloat16, src.data(), sorted.data(), order.data(), begin.data(),
                 out.data(), 3, 1, 1, 1},
                nullptr);
  return check::equal("one rounding", out, {element_of<__nv_bfloat16>(258)});
}

enum class Mask { kNone, kAll, kPrefixes, kGaps };

bool check_find(Draw& draw, int64_t batch, int64_t seqlen, Mask kind) {
  const int64_t n = batch * seqlen;
  Array<uint8_t> mask(n);
  Array<int64_t> indices(n);
  Array<int32_t> cu_seqlens(batch + 1), tiles(find_rows_scratch(n));
  std::vector<int64_t> want;
  std::vector<int32_t> starts{0};
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = draw(0, seqlen);
    for (int64_t s = 0; s < seqlen; ++s) {
      const bool keep = kind == Mask::kAll || (kind == Mask::kPrefixes && s < length) ||
                        (kind == Mask::kGaps && draw(0, 2) == 0);
      mask[b * seqlen + s] = keep ? static_cast<uint8_t>(draw(1, 255)) : 0;
      if (keep) want.push_back(b * seqlen + s);
    }
    starts.push_back(static_cast<int32_t>(want.size()));
  }
  want.resize(static_cast<size_t>(n), -1);
  find_rows_cuda({mask.data(), indices.data(), cu_seqlens.data(), tiles.data(), n, seqlen},
                 nullptr);
  return check::equal("find_rows: indices", indices, want) &&
         check::equal("find_rows: cu_seqlens", cu_seqlens, starts);
}

bool check_finds(Draw& draw) {
  bool ok = true;
  for (Mask kind : {Mask::kNone, Mask::kAll, Mask::kPrefixes, Mask::kGaps}) {
    ok &= check_find(draw, 5, 37, kind);
  }
  // One entry; sequences of one; tiles that end with a sequence, within one, and just behind one.
  ok &= check_find(draw, 1, 1, Mask::kAll) && check_find(draw, 70, 1, Mask::kGaps);
  ok &= check_find(draw, 2, kTile, Mask::kPrefixes) && check_find(draw, 3, 3000, Mask::kGaps);
  return ok && check_find(draw, 1, kTile + 1, Mask::kAll);
}

// More tiles than the one block has threads.
bool check_scan_of_tiles(Draw& draw) {
  const int64_t n_tiles = 2 * kThreads + 9;
  Array<int32_t> tiles(n_tiles + 1);
  std::vector<int32_t> want{0};
  for (int64_t t = 0; t < n_tiles; ++t) {
    tiles[t] = static_cast<int32_t>(draw(0, kTile));
    want.push_back(want.back() + tiles[t]);
  }
  CudaFindRowsParams p{};
  p.tiles = tiles.data();
  ENCFAST_LAUNCH((scan_tiles_kernel), 1, kThreads, nullptr, p, n_tiles);
  return check::equal("scan_tiles", tiles, want);
}

// Row 7 of 7 does not exist.
void gather_out_of_range() {
  Array<char> src(7 * 16), out(16);
  Array<int64_t> index(1);
  index[0] = 7;
  gather_rows_cuda({src.data(), index.data(), out.data(), 1, 7, 16, 16, 16}, nullptr);
}

}  // namespace

int main(int, char** args) {
  if (std::strcmp(args[1], "bad_index") == 0) gather_out_of_range();
  return check::under_seeds(args, [](Draw& draw) {
    return check_gathers(draw) && check_sums(draw) && check_one_rounding() && check_finds(draw) &&
           check_scan_of_tiles(draw);
  });
}
