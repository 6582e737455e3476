#include "packing.h"

#include <algorithm>

namespace encfast {

std::vector<int64_t> first_fit(const int64_t* lengths, int64_t n, int64_t capacity) {
  int64_t leaves = 1;  // one bin for each sequence is always enough
  while (leaves < n) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, capacity);  // room[1] is the root, room[leaves + b] bin b
  std::vector<int64_t> bins(n);
  for (int64_t i = 0; i < n; ++i) {
    int64_t node = 1;
    while (node < leaves) {
      node *= 2;
      if (room[node] < lengths[i]) ++node;  // no bin of the left half has room for it
    }
    bins[i] = node - leaves;
    room[node] -= lengths[i];
    for (node /= 2; node >= 1; node /= 2) {
      room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
  return bins;
}

std::vector<int64_t> batch_starts(const int64_t* lengths, int64_t n, int64_t max_tokens,
                                  double max_padding, int64_t max_sequences) {
  std::vector<int64_t> starts;
  int64_t tokens = 0;  // of the batch being filled
  for (int64_t i = 0; i < n; ++i) {
    const int64_t count = starts.empty() ? 1 : i - starts.back() + 1;
    const int64_t grid = count * lengths[i];  // ascending: this one is the longest
    const int64_t padding = grid - (tokens + lengths[i]);
    const bool full = count > max_sequences || grid > max_tokens ||
                      static_cast<double>(padding) > max_padding * static_cast<double>(grid);
    if (starts.empty() || full) {
      starts.push_back(i);
      tokens = 0;
    }
    tokens += lengths[i];
  }
  return starts;
}

}  // namespace encfast
