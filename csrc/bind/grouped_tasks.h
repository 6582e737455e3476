// How products of groups of rows are cut into tasks of the grouped_mm core, and run.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "bind/pool.h"
#include "bind/tensor_util.h"
#include "cpu/isa.h"

namespace encfast {

// `n` in parts of at most `most`, equal up to a multiple of `step`.
inline int64_t even_share(int64_t n, int64_t most, int64_t step) {
  const int64_t parts = (n + most - 1) / most;
  const int64_t share = (n + parts - 1) / parts;
  return std::min(most, (share + step - 1) / step * step);
}

// Tasks over `rows(e)` x `columns` results of at most most_rows x most_columns each.
template <class Rows>
std::vector<GroupedMmTask> cut_groups(int64_t E, int64_t columns, Rows rows, int64_t most_rows,
                                      int64_t most_columns) {
  std::vector<GroupedMmTask> tasks;
  if (columns == 0) return tasks;
  const int64_t width = even_share(columns, most_columns, kGroupedColumnStep);
  for (int64_t e = 0; e < E; ++e) {
    if (rows(e) == 0) continue;
    const int64_t share = even_share(rows(e), most_rows, kGroupedRowStep);
    for (int64_t n = 0; n < columns; n += width) {
      for (int64_t m = 0; m < rows(e); m += share) {
        tasks.push_back({e, m, std::min(m + share, rows(e)), n, std::min(n + width, columns)});
      }
    }
  }
  return tasks;
}

// Large tasks, but some for every thread where that can be had; `terms(e)` of each sum. Expensive
// ones come first.
template <class Rows, class Terms>
std::vector<GroupedMmTask> grouped_tasks(GroupedProduct product, int64_t E, int64_t columns,
                                         Rows rows, Terms terms) {
  constexpr int64_t kPerThread = 3, kLeastRows = 2 * kGroupedRowStep;
  constexpr int64_t kLeastColumns = 4 * kGroupedColumnStep, kPackCost = 4;
  const int64_t threads = TorchPool().threads();
  const int64_t wanted = threads > 1 ? kPerThread * threads : 1;
  int64_t most_rows = grouped_rows(product), most_columns = kGroupedColumns;
  std::vector<GroupedMmTask> tasks = cut_groups(E, columns, rows, most_rows, most_columns);
  while (static_cast<int64_t>(tasks.size()) < wanted &&
         (most_rows > kLeastRows || most_columns > kLeastColumns)) {
    if (most_rows >= most_columns) {
      most_rows = std::max(most_rows - kGroupedRowStep, kLeastRows);
    } else {
      most_columns = std::max(most_columns - kGroupedColumnStep, kLeastColumns);
    }
    tasks = cut_groups(E, columns, rows, most_rows, most_columns);
  }
  const auto cost = [&](const GroupedMmTask& t) {
    return (t.m_end - t.m + kPackCost) * (t.n_end - t.n) * (terms(t.group) + kPackCost);
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const GroupedMmTask& s, const GroupedMmTask& t) {
    return cost(s) > cost(t);
  });
  return tasks;
}

// Runs the tasks; `like` is a tensor of the device.
inline void multiply_groups(GroupedMmParams& p, const Tensor& like,
                            const std::vector<GroupedMmTask>& tasks) {
  TorchPool pool;
  const GroupedMmKernels& kernels = cpu_kernels().grouped_mm;
  p.tasks = tasks.data();
  p.n_tasks = static_cast<int64_t>(tasks.size());
  const Workspace workspace(like, kernels.workspace_bytes(p, pool.threads()));
  p.workspace = workspace.data();
  if (p.n_tasks > 0) kernels.multiply(p, pool.pool());
}

}  // namespace encfast
