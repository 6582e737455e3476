// Copies of rows that lie anywhere.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

// An output of more than this is new pages in every call (glibc's largest M_MMAP_THRESHOLD): the
// kernel has just cleared them, and their lines are written where they lie, in the cache. A smaller
// one is memory used before, whose lines a plain store reads first; the C library's copy of rows of
// a KiB and more (rep movsb) does not. On a Zen 4, rows of 3 KiB: 10 MB 0.9 -> 0.65 ms by the
// library, 77 MB 43 ms line by line against 54.
constexpr int64_t kFreshBytes = 32 << 20;

// No stream of the hardware's prefetcher goes from one row to the next, and rows of 1 to 8 KiB are
// too short for it to start anew on each: `next` is asked for line by line. On long rows it is at
// its best by itself.
constexpr int64_t kPrefetchedBytes = 16 * 1024;

// Copies a row from src to dst; `next` is the row copied after it, or any other address. `fresh`:
// all rows together take more than kFreshBytes.
ENCFAST_INLINE void copy_row(char* dst, const char* src, const char* next, int64_t bytes,
                             bool fresh) {
  constexpr int64_t kLine = 64;
  int64_t i = 0;
  if (fresh && bytes <= kPrefetchedBytes) {
    for (; i + kLine <= bytes; i += kLine) {
      __builtin_prefetch(next + i);
      std::memcpy(dst + i, src + i, kLine);
    }
  }
  if (i < bytes) std::memcpy(dst + i, src + i, bytes - i);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
