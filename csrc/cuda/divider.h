// Division by a number that is known at the launch.
#pragma once
#include <cstdint>

#include "common/gpu.h"

namespace encfast {
namespace {

// Divides by a multiplication and a shift, exactly below 2^31 (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, 1994): with 2^(l - 1) < d <= 2^l and
// f = floor(2^(31 + l) / d) + 1, f d exceeds 2^(31 + l) by at most d <= 2^l.
struct Divider {
  uint32_t divisor = 1;
  uint32_t factor = 0x80000001;
  uint32_t shift = 31;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while (int64_t{1} << (shift - 31) < d) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * factor >> shift);
  }
};

}  // namespace
}  // namespace encfast
