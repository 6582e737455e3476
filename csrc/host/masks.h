// Masks over grids of patches, drawn from a seed: the same on every machine and in NumPy.
#pragma once
#include <cstdint>

namespace encfast {

// SplitMix64 (Steele et al., OOPSLA 2014): the n-th number is a hash of seed + n * gamma.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t next();
  // In [0, n), n <= 2^32, by the upper half of a product; off by less than n / 2^32 from uniform.
  int64_t below(int64_t n);
  // In [0, 1), a multiple of 2^-53.
  double unit();

 private:
  uint64_t state_;
};

struct BlockRule {
  int64_t height, width;
  int64_t hidden;                    // patches to hide, exactly
  int64_t min_patches, max_patches;  // area of a rectangle
  double min_aspect;                 // height / width is in [min_aspect, 1 / min_aspect]
};

// Hides patches - keep of so many patches, each choice alike. mask [patches] is all 0 before.
void random_mask(uint64_t seed, int64_t patches, int64_t keep, uint8_t* mask);

// Hides rectangles until exactly rule.hidden patches are hidden. mask [height * width] is all 0
// before.
void block_mask(uint64_t seed, const BlockRule& rule, uint8_t* mask);

}  // namespace encfast
