// Copies of rows that lie anywhere: the next one is fetched while this one is written.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace encfast::ENCFAST_ISA {
namespace {

// No stream of the hardware's prefetcher goes from one row to the next, and rows of 1 to 8 KiB are
// too short for it to start anew on each: `next` is asked for line by line. On long rows it is at
// its best by itself.
constexpr int64_t kPrefetchedBytes = 16 * 1024;

// Copies a row from src to dst; `next` is the row copied after it, or any other address.
ENCFAST_INLINE void copy_row(char* dst, const char* src, const char* next, int64_t bytes) {
  constexpr int64_t kLine = 64;
  int64_t i = 0;
  if (bytes <= kPrefetchedBytes) {
    for (; i + kLine <= bytes; i += kLine) {
      __builtin_prefetch(next + i);
      std::memcpy(dst + i, src + i, kLine);
    }
  }
  if (i < bytes) std::memcpy(dst + i, src + i, bytes - i);
}

}  // namespace
}  // namespace encfast::ENCFAST_ISA
