// Runs the pad core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const PadKernels& kPadKernels = ENCFAST_ISA::kPad;

bool check_gather() {
  constexpr int64_t kRows = 3000, kBytes = 200;
  std::vector<char> src(kRows * kBytes);
  for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<char>(i * 31 % 127 + 1);
  std::vector<int64_t> index;
  for (int64_t i = 0; i < 2 * kRows; ++i) index.push_back(i % 3 == 0 ? -1 : i * 7 % kRows);
  const auto n = static_cast<int64_t>(index.size());
  std::vector<char> out(static_cast<size_t>(n * kBytes), 0x7f);
  ThreadPool pool{4};
  kPadKernels.gather_rows({src.data(), index.data(), out.data(), n, kBytes, kBytes, kBytes},
                          pool.pool());
  const std::vector<char> zero(kBytes, 0);
  bool ok = true;
  for (size_t i = 0; i < index.size(); ++i) {
    const char* want = index[i] < 0 ? zero.data() : src.data() + index[i] * kBytes;
    ok &= std::memcmp(out.data() + i * kBytes, want, kBytes) == 0;
  }
  std::printf("%-28s %s\n", "gather_rows", ok ? "" : "wrong rows");
  return ok;
}

bool check_find() {
  // Three tasks of 128 KiB, the last one short.
  constexpr int64_t kBatch = 301, kSeqlen = 1000;
  std::vector<uint8_t> mask(kBatch * kSeqlen);
  std::vector<int64_t> want, indices(mask.size(), 0x7f);
  std::vector<int32_t> cu_seqlens(kBatch + 1, 0x7f), starts{0};
  for (size_t i = 0; i < mask.size(); ++i) {
    mask[i] = i * 2654435761u % 7 < 3 ? static_cast<uint8_t>(i % 3 + 1) : 0;
    if (mask[i]) want.push_back(static_cast<int64_t>(i));
    if ((i + 1) % kSeqlen == 0) starts.push_back(static_cast<int32_t>(want.size()));
  }
  want.resize(mask.size(), -1);
  ThreadPool pool{4};
  kPadKernels.find_rows({mask.data(), indices.data(), cu_seqlens.data(), kBatch, kSeqlen},
                        pool.pool());
  const bool ok = indices == want && cu_seqlens == starts;
  std::printf("%-28s %s\n", "find_rows", ok ? "" : "wrong rows");
  return ok;
}

}  // namespace

int main() { return check_gather() && check_find() ? 0 : 1; }
