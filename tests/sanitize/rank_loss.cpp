// Runs the rank_loss core of one instruction set without PyTorch (sanitize.h).
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const RankLossKernels& kKernels = ENCFAST_ISA::kRankLoss;
constexpr DType kF = DType::kFloat32;

struct Case {
  DType dtype;
  int64_t B, M, D;
};

// More than one chunk of rows, piece and stripe of columns, block of channels; sums of gradients in
// place (the second) and not.
const Case kCases[] = {{kF, 1, 1, 1},
                       {kF, 8, 40, 32},
                       {kF, 205, 333, 19},
                       {DType::kBFloat16, 5, 970, 7},
                       {DType::kFloat16, 7, 3, 140}};

std::vector<float> unwritten(int64_t n) {
  return std::vector<float>(static_cast<size_t>(n), std::nanf(""));
}

void append(std::vector<char>& all, const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  all.insert(all.end(), from, from + bytes);
}

// Forward and backward; every tensor is a heap block of its exact size. Returns all results.
std::vector<char> run(const Case& c, RankLoss loss, int threads, bool& written) {
  Values values;
  const auto a = values.make(c.dtype, c.B * c.D), b = values.make(c.dtype, c.M * c.D);
  std::vector<int64_t> positives, excluded;
  for (int64_t i = 0; i < c.B; ++i) {
    positives.push_back(i % 3 ? (7 * i) % c.M : -1);
    // Beside the positive, in every second row that has one; c.M may be 1.
    excluded.push_back(i % 6 == 1 && c.M > 1 ? (7 * i + 1) % c.M : -1);
  }
  const bool both = loss == RankLoss::kBoth, softmax = loss != RankLoss::kSigmoid;
  const RankProblem q{loss,
                      c.B,
                      c.M,
                      c.D,
                      {a.data(), c.D, c.dtype},
                      {b.data(), c.D, c.dtype},
                      positives.data(),
                      softmax ? excluded.data() : nullptr,
                      0.7f,
                      -0.1f};
  std::vector<float> row_loss = unwritten(c.B), col_loss = unwritten(both ? c.B : 0);
  std::vector<float> positive = unwritten(c.B);
  std::vector<float> rows = unwritten(softmax ? 2 * c.B : 0),
                     columns = unwritten(both ? 2 * c.M : 0);
  const LogSums of_rows{rows.data(), softmax ? rows.data() + c.B : nullptr};
  const LogSums of_columns{columns.data(), both ? columns.data() + c.M : nullptr};
  ThreadPool pool{threads};
  {
    const Block workspace(static_cast<size_t>(kKernels.fwd_bytes(q, threads)));
    std::memset(workspace.data, 0xff, workspace.bytes);
    kKernels.fwd(
        {q, row_loss.data(), col_loss.data(), positive.data(), of_rows, of_columns, workspace.data},
        pool.pool());
  }
  const std::vector<float> drow(static_cast<size_t>(c.B), 0.5f);
  const std::vector<float> dcolumn(static_cast<size_t>(both ? c.M : 0), 0.25f);
  auto da = nan_filled(c.B * c.D, size_of(c.dtype)), db = nan_filled(c.M * c.D, size_of(c.dtype));
  double sums[2];
  const Block workspace(static_cast<size_t>(kKernels.bwd_bytes(q, threads)));
  std::memset(workspace.data, 0xff, workspace.bytes);
  kKernels.bwd({q,
                drow.data(),
                drow.data(),
                dcolumn.data(),
                of_rows,
                of_columns,
                {da.data(), c.D, c.dtype},
                {db.data(), c.D, c.dtype},
                &sums[0],
                &sums[1],
                workspace.data},
               pool.pool());
  std::vector<char> floats, all;
  for (const auto* x : {&row_loss, &col_loss, &positive, &rows, &columns}) {
    append(floats, x->data(), 4 * x->size());
  }
  written = all_written(kF, floats) && all_written(c.dtype, da) && all_written(c.dtype, db) &&
            sums[0] == sums[0] && sums[1] == sums[1];
  for (const auto* x : {&floats, &da, &db}) append(all, x->data(), x->size());
  append(all, sums, sizeof(sums));
  return all;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : kCases) {
    for (RankLoss loss : {RankLoss::kRows, RankLoss::kBoth, RankLoss::kSigmoid}) {
      bool written_one, written_four;
      const bool equal = run(c, loss, 1, written_one) == run(c, loss, 4, written_four);
      const bool written = written_one && written_four;
      std::printf("dtype %d loss %d B %d M %d D %d %s%s\n", static_cast<int>(c.dtype),
                  static_cast<int>(loss), static_cast<int>(c.B), static_cast<int>(c.M),
                  static_cast<int>(c.D), written ? "" : "NaN in the results ",
                  equal ? "" : "1 thread differs from 4");
      ok &= written && equal;
    }
  }
  return ok ? 0 : 1;
}
