// Loops of multiply-adds and nothing else: what one core could do if data cost nothing.
//
// Assembly, so that neither flags nor the optimiser decide what is measured. Every loop keeps more
// independent accumulators than latency times units of any core so far (8 for FMA; 4 for a tile
// product), and every operand is zero: no denormals, no NaN.
//
// Each function runs `rounds` rounds; *_ops is the number of operations of one round, a multiply
// and an add counting as two. Callers check that the CPU has the instruction.
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OPS(name, per_instruction) const long name##_ops = 12L * (per_instruction)

// `op` on registers `r`0-11, with factors in 12 and 13; `zero` clears a register.
#define VECTOR_LOOP(name, op, zero, r, per_instruction)                                            \
  OPS(name, per_instruction);                                                                      \
  void name(long rounds) {                                                                         \
    __asm__ volatile(".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n\t" zero                             \
                     "\n\t.endr\n"                                                                 \
                     "1:\n\t.irp i,0,1,2,3,4,5,6,7,8,9,10,11\n\t" op " %%" r "12, %%" r "13, %%" r \
                     "\\i\n\t.endr\n\t"                                                            \
                     "dec %0\n\tjnz 1b\n\tvzeroupper"                                              \
                     : "+r"(rounds)                                                                \
                     :                                                                             \
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",       \
                       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");                        \
  }

#define ZERO_YMM "vxorps %%ymm\\i, %%ymm\\i, %%ymm\\i"
#define ZERO_ZMM "vpxord %%zmm\\i, %%zmm\\i, %%zmm\\i"

VECTOR_LOOP(fma_avx2, "vfmadd231ps", ZERO_YMM, "ymm", 2 * 8)
VECTOR_LOOP(fma_avx512, "vfmadd231ps", ZERO_ZMM, "zmm", 2 * 16)
VECTOR_LOOP(dot_bf16, "vdpbf16ps", ZERO_ZMM, "zmm", 2 * 32)
VECTOR_LOOP(dot_int8, "vpdpbusd", ZERO_ZMM, "zmm", 2 * 64)

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Eight tiles of 16 rows of 64 bytes; Linux gives a process the tile registers when it asks.
static void open_tiles(void) {
  const long kArchReqXcompPerm = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData);
  struct TileConfig config = {.palette = 1};
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile(
      "ldtilecfg %0\n\t.irp i,0,1,2,3,4,5,6,7\n\ttilezero %%tmm\\i\n\t.endr" ::"m"(config));
}

#define TILE_LOOP(name, op, per_instruction)                                                 \
  OPS(name, per_instruction);                                                                \
  void name(long rounds) {                                                                   \
    open_tiles();                                                                            \
    __asm__ volatile("1:\n\t.irp i,0,1,2,3,4,5,0,1,2,3,4,5\n\t" op                           \
                     " %%tmm6, %%tmm7, %%tmm\\i\n\t.endr\n\tdec %0\n\tjnz 1b\n\ttilerelease" \
                     : "+r"(rounds)                                                          \
                     :                                                                       \
                     : "cc");                                                                \
  }

TILE_LOOP(tile_bf16, "tdpbf16ps", 2 * 16 * 16 * 32)
TILE_LOOP(tile_int8, "tdpbssd", 2 * 16 * 16 * 64)
