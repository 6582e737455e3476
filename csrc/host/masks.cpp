#include "masks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace encfast {
namespace {

constexpr int kTries = 10;  // of BEiT's published code

struct Rectangle {
  int64_t top, left, height, width;
};

// Whether a rectangle was drawn that fits into the grid. Areas are whole numbers and the aspect is
// a product: no sum that a compiler may contract, hence the same bits everywhere.
bool draw(SplitMix64& random, const BlockRule& rule, int64_t most, Rectangle& r) {
  const int64_t least = std::min(rule.min_patches, most);
  const double area = static_cast<double>(least + random.below(most - least + 1));
  const double widest = 1.0 / (rule.min_aspect * rule.min_aspect);
  const double aspect = rule.min_aspect * std::pow(widest, random.unit());
  r.height = static_cast<int64_t>(std::nearbyint(std::sqrt(area * aspect)));
  r.width = static_cast<int64_t>(std::nearbyint(std::sqrt(area / aspect)));
  if (r.height < 1 || r.width < 1 || r.height > rule.height || r.width > rule.width) return false;
  r.top = random.below(rule.height - r.height + 1);
  r.left = random.below(rule.width - r.width + 1);
  return true;
}

int64_t visible_in(const Rectangle& r, int64_t width, const uint8_t* mask) {
  int64_t count = 0;
  for (int64_t y = r.top; y < r.top + r.height; ++y) {
    const uint8_t* row = mask + y * width;
    count += r.width - std::accumulate(row + r.left, row + r.left + r.width, int64_t{0});
  }
  return count;
}

bool touches(const BlockRule& rule, const uint8_t* mask, int64_t cell) {
  const int64_t y = cell / rule.width, x = cell % rule.width;
  return (y > 0 && mask[cell - rule.width]) || (y + 1 < rule.height && mask[cell + rule.width]) ||
         (x > 0 && mask[cell - 1]) || (x + 1 < rule.width && mask[cell + 1]);
}

// Hides one patch at the border of a rectangle, the first from a random place on.
void grow(SplitMix64& random, const BlockRule& rule, uint8_t* mask) {
  const int64_t cells = rule.height * rule.width, start = random.below(cells);
  int64_t found = -1;
  for (int64_t i = 0; i < cells; ++i) {
    const int64_t cell = (start + i) % cells;
    if (mask[cell]) continue;
    if (found < 0) found = cell;  // where nothing is hidden yet
    if (touches(rule, mask, cell)) {
      found = cell;
      break;
    }
  }
  mask[found] = 1;
}

// The number of patches that a rectangle has hidden, 0 after so many unlucky tries.
int64_t hide_rectangle(SplitMix64& random, const BlockRule& rule, int64_t most, uint8_t* mask) {
  for (int attempt = 0; attempt < kTries; ++attempt) {
    Rectangle r;
    if (!draw(random, rule, most, r)) continue;
    const int64_t gained = visible_in(r, rule.width, mask);
    if (gained < 1 || gained > most) continue;
    for (int64_t y = r.top; y < r.top + r.height; ++y) {
      std::fill_n(mask + y * rule.width + r.left, r.width, uint8_t{1});
    }
    return gained;
  }
  return 0;
}

}  // namespace

uint64_t SplitMix64::next() {
  state_ += 0x9E3779B97F4A7C15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t SplitMix64::below(int64_t n) {
  return static_cast<int64_t>(((next() >> 32) * static_cast<uint64_t>(n)) >> 32);
}

double SplitMix64::unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

void random_mask(uint64_t seed, int64_t patches, int64_t keep, uint8_t* mask) {
  SplitMix64 random(seed);
  std::vector<int64_t> order(patches);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = 0; i < patches - keep; ++i) {
    std::swap(order[i], order[i + random.below(patches - i)]);
    mask[order[i]] = 1;
  }
}

void block_mask(uint64_t seed, const BlockRule& rule, uint8_t* mask) {
  SplitMix64 random(seed);
  for (int64_t left = rule.hidden; left > 0;) {
    const int64_t gained = hide_rectangle(random, rule, std::min(left, rule.max_patches), mask);
    if (gained == 0) grow(random, rule, mask);
    left -= std::max(gained, int64_t{1});
  }
}

}  // namespace encfast
