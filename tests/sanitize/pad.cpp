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

}  // namespace

int main() { return check_gather() ? 0 : 1; }
