// An index of rows on the CPU: checked in one pass, and grouped by the row it names.
#pragma once
#include <vector>

#include "bind/tensor_util.h"

namespace encfast {

// index [m] contiguous, each entry in low..rows - 1.
inline Tensor checked_index(const char* op, const char* name, const Tensor& index, int64_t low,
                            int64_t rows) {
  check_cpu(op, name, index);
  check_dim(op, name, index, 1);
  check_dtype(op, name, index, ScalarType::Long, "int64");
  Tensor contiguous = torch::stable::contiguous(index);
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  const int64_t n = contiguous.size(0);
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(values[i] >= low && values[i] < rows, op, ": ", name, " holds ", values[i],
                    " at ", i, ", expected ", low, "..", rows - 1);
  }
  return contiguous;
}

// Counting sort: places of row r in the index are order[begin[r]] .. order[begin[r + 1] - 1],
// ascending. Negative entries belong to no row.
struct RowGroups {
  std::vector<int64_t> begin, order;

  RowGroups(const int64_t* index, int64_t m, int64_t rows) : begin(static_cast<size_t>(rows) + 1) {
    for (int64_t i = 0; i < m; ++i) {
      if (index[i] >= 0) ++begin[static_cast<size_t>(index[i]) + 1];
    }
    for (size_t r = 1; r < begin.size(); ++r) begin[r] += begin[r - 1];
    order.resize(static_cast<size_t>(begin.back()));
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < m; ++i) {
      if (index[i] >= 0) order[static_cast<size_t>(next[static_cast<size_t>(index[i])]++)] = i;
    }
  }
};

}  // namespace encfast
