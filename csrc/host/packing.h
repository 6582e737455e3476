// Packing plans over sequence lengths.
#pragma once
#include <cstdint>
#include <vector>

namespace encfast {

// The bin of each of n lengths, placed one by one into the first bin with room for it. O(n log n):
// a tree of maxima over the room of all bins finds that bin. Each length is in [0, capacity].
std::vector<int64_t> first_fit(const int64_t* lengths, int64_t n, int64_t capacity);

// Where each batch starts when ascending lengths are cut greedily. A batch is full when its grid
// (sequences x longest) would exceed max_tokens, when more than max_padding of that grid would be
// padding, or when it holds max_sequences.
std::vector<int64_t> batch_starts(const int64_t* lengths, int64_t n, int64_t max_tokens,
                                  double max_padding, int64_t max_sequences);

}  // namespace encfast
