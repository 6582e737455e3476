// Philox4x32-10, a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1,
// 2, 3", SC 2011): a bijection of 128-bit counters chosen by a 64-bit key. Any element of the
// stream can be drawn by itself, so a backward redraws what its forward drew, on any device.
//
// The rounds are written once for any word: uint32_t, or a class that holds several (csrc/cpu). A
// word is made of a uint32_t and brings ^ and, in its namespace, philox_multiply(a, m, &high,
// &low).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ENCFAST_PHILOX static __host__ __device__ __forceinline__
#else
#define ENCFAST_PHILOX static inline __attribute__((always_inline))
#endif

namespace encfast {

struct PhiloxKey {
  uint32_t word[2];
};

// The two halves of a * m.
ENCFAST_PHILOX void philox_multiply(uint32_t a, uint32_t m, uint32_t* high, uint32_t* low) {
  const uint64_t product = static_cast<uint64_t>(a) * m;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}

// Replaces counter c[4] by its four random words.
template <class Word>
ENCFAST_PHILOX void philox4x32(PhiloxKey key, Word c[4]) {
  uint32_t k0 = key.word[0], k1 = key.word[1];
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    philox_multiply(c[0], 0xD2511F53u, &high0, &low0);
    philox_multiply(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ Word(k0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ Word(k1);
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Dropout of attention probabilities. Of the 8 keys 8 g .. 8 g + 7 of query row i of head h in
// sequence b, the counter is (g, i, h, b); key j has half j % 2 (0: the low one) of word
// j % 8 / 2, and is kept where that half is at least the threshold.
template <class Word>
ENCFAST_PHILOX void philox_dropout_words(PhiloxKey key, uint32_t key_group, Word row, uint32_t head,
                                         uint32_t sequence, Word words[4]) {
  words[0] = Word(key_group);
  words[1] = row;
  words[2] = Word(head);
  words[3] = Word(sequence);
  philox4x32(key, words);
}

}  // namespace encfast
