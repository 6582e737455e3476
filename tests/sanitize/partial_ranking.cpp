// Runs the partial_ranking cores of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const PartialRankingKernels& kKernels = ENCFAST_ISA::kPartialRanking;
constexpr DType kF = DType::kFloat32;

struct Case {
  DType dtype;
  int64_t B, M, D, K;
};

// More than one task of rows, stripe of columns, block of channels and of a ranking; buffers of
// mined rows that overflow (the third); sums of gradients in place (the second) and not.
const Case kCases[] = {{kF, 1, 2, 1, 1},
                       {kF, 8, 40, 32, 30},
                       {kF, 205, 1333, 19, 7},
                       {DType::kBFloat16, 5, 970, 7, 200},
                       {DType::kFloat16, 7, 30, 140, 3}};

void append(std::vector<char>& all, const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  all.insert(all.end(), from, from + bytes);
}

std::vector<float> unwritten(int64_t n) {
  return std::vector<float>(static_cast<size_t>(n), std::nanf(""));
}

// Mining, products, the loss and all gradients; every tensor is a heap block of its exact size.
std::vector<char> run(const Case& c, bool dense, int threads, bool& written) {
  Values values;
  const auto a = values.make(c.dtype, c.B * c.D), b = values.make(c.dtype, c.M * c.D);
  const ConstMatrix of_a{a.data(), c.D, c.dtype}, of_b{b.data(), c.D, c.dtype};
  std::vector<int64_t> positives, valid, mined(static_cast<size_t>(c.B * c.K), -1);
  for (int64_t i = 0; i < c.B; ++i) {
    positives.push_back(i % 3 ? (7 * i) % c.M : -1);
    valid.push_back(i % (c.K + 1));
  }
  ThreadPool pool{threads};
  HardNegativesParams top{c.B, c.M, c.D, c.K, of_a, of_b, positives.data(), mined.data(), nullptr};
  const Block top_space(static_cast<size_t>(kKernels.hard_negatives_bytes(top, threads)));
  std::memset(top_space.data, 0xff, top_space.bytes);
  top.workspace = top_space.data;
  kKernels.hard_negatives(top, pool.pool());
  bool in_range = true;
  for (const int64_t row : mined) in_range &= row >= 0 && row < c.M;

  const CandidateProblem q{c.B, c.M, c.D, c.K, of_a, of_b, mined.data(), dense};
  std::vector<float> dots = unwritten(c.B * c.K), ddots = dots, loss = unwritten(c.B);
  const Block dots_space(static_cast<size_t>(kKernels.dots_bytes(q, threads)));
  std::memset(dots_space.data, 0xff, dots_space.bytes);
  kKernels.dots({q, dots.data(), dots_space.data}, pool.pool());
  const RankingProblem ranking{c.B, c.K, dots.data(), valid.data(), 0.7f};
  kKernels.fwd(ranking, loss.data(), pool.pool());
  const std::vector<float> dloss(static_cast<size_t>(c.B), 0.5f);
  std::vector<double> dscale(static_cast<size_t>(c.B));
  std::vector<float> sums(static_cast<size_t>(threads * 2 * ((c.K + 63) / 64 * 64)));
  kKernels.bwd({ranking, dloss.data(), ddots.data(), dscale.data(), sums.data()}, pool.pool());

  std::vector<int64_t> begin(static_cast<size_t>(c.M + 1)), places;
  for (int64_t row = 0; row < c.M; ++row) {
    for (size_t i = 0; i < mined.size(); ++i) {
      if (mined[i] == row) places.push_back(static_cast<int64_t>(i));
    }
    begin[static_cast<size_t>(row + 1)] = static_cast<int64_t>(places.size());
  }
  auto da = nan_filled(c.B * c.D, size_of(c.dtype)), db = nan_filled(c.M * c.D, size_of(c.dtype));
  CandidateDotsBwdParams p{q,
                           ddots.data(),
                           begin.data(),
                           places.data(),
                           {da.data(), c.D, c.dtype},
                           {db.data(), c.D, c.dtype},
                           nullptr};
  const Block space(static_cast<size_t>(kKernels.dots_bwd_bytes(p, threads)));
  std::memset(space.data, 0xff, space.bytes);
  p.workspace = space.data;
  kKernels.dots_bwd(p, pool.pool());

  std::vector<char> floats, all;
  for (const auto* x : {&dots, &loss, &ddots}) append(floats, x->data(), 4 * x->size());
  written =
      in_range && all_written(kF, floats) && all_written(c.dtype, da) && all_written(c.dtype, db);
  for (const auto* x : {&floats, &da, &db}) append(all, x->data(), x->size());
  append(all, mined.data(), 8 * mined.size());
  append(all, dscale.data(), 8 * dscale.size());
  return all;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : kCases) {
    for (const bool dense : {false, true}) {
      bool written_one, written_four;
      const bool equal = run(c, dense, 1, written_one) == run(c, dense, 4, written_four);
      const bool written = written_one && written_four;
      std::printf("dtype %d dense %d B %d M %d D %d K %d %s%s\n", static_cast<int>(c.dtype),
                  static_cast<int>(dense), static_cast<int>(c.B), static_cast<int>(c.M),
                  static_cast<int>(c.D), static_cast<int>(c.K),
                  written ? "" : "NaN in the results ", equal ? "" : "1 thread differs from 4");
      ok &= written && equal;
    }
  }
  return ok ? 0 : 1;
}
