// A router: the experts of each token, and the gradient of its logits. Sorting is in moe_sort.h.
//
// One warp a token, its lanes over the experts, any number of them:
//
//   lane 0 1 2 .. 31 | 0 1 2 ..      E logits, read from L1 again for each pass
//   largest --> sum of exponentials --> p                                     3 passes
//   choice j: the largest (key, id) below that of choice j - 1                a pass each
//
// Bytes moved per token: read E logits, write 4 E of p and 4 K of ids; backward reads p (and
// dprobabilities) and writes dlogits. No shared memory, no list of what is taken: choices fall in
// the order of their 64-bit keys. Noise is drawn anew in each pass.
#include <cassert>
#include <cmath>

#include "floats.h"
#include "moe_draws.h"
#include "moe_route.h"
#include "moe_sort.h"
#include "warp.h"

namespace encfast {
namespace {

// Rising with the number, NaN below all; equals are told apart by the lower id.
__device__ uint64_t rank_key(float x, int64_t e) {
  const uint32_t bits = x == 0 ? 0 : __float_as_uint(x);
  const uint32_t key = x != x ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(e));
}

struct LogitRow {
  const void* logits;
  DType type;
  int64_t first;  // element

  __device__ float operator[](int64_t e) const {
    return load_floats<1>(logits, type, first + e).values[0];
  }
};

__device__ void write_softmax(const LogitRow& x, int64_t experts, float* p) {
  const int lane = lane_of_thread();
  float top = -INFINITY, total = 0;
  for (int64_t e = lane; e < experts; e += kWarpSize) top = fmaxf(top, x[e]);
  top = warp_reduce(top, [](float a, float b) { return fmaxf(a, b); });
  for (int64_t e = lane; e < experts; e += kWarpSize) total += expf(x[e] - top);
  total = warp_sum(total);
  for (int64_t e = lane; e < experts; e += kWarpSize) p[e] = expf(x[e] - top) / total;
}

__device__ void write_sigmoid(const LogitRow& x, int64_t experts, float* p) {
  for (int64_t e = lane_of_thread(); e < experts; e += kWarpSize) {
    const float small = expf(-fabsf(x[e])), upper = 1.0f / (1.0f + small);
    p[e] = x[e] >= 0 ? upper : small * upper;
  }
}

__device__ void choose_experts(const CudaMoeChooseParams& p, const LogitRow& x, int64_t t) {
  const bool noise = p.noise != MoeNoise::kNone;
  const PhiloxKey key = noise ? key_from(p.rng) : PhiloxKey{};
  uint64_t last = ~uint64_t{0};
  int64_t first = -1;  // taken by another ranking
  for (int64_t j = 0; j < p.k; ++j) {
    const bool noised = noise && (p.noise == MoeNoise::kGumbel || j > 0);
    uint64_t best = 0;
    for (int64_t e = lane_of_thread(); e < p.experts; e += kWarpSize) {
      float value = x[e];
      if (noised) {
        const int upper = upper_bits(draw_word(key, t, e, kGumbelDraws));
        value = __fadd_rn(value, gumbel_of<DeviceArithmetic>(upper));
      }
      const uint64_t rank = rank_key(value, e);
      if (rank < last && e != first && rank > best) best = rank;
    }
    best = warp_reduce(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    const uint32_t e = 0xffffffffu - static_cast<uint32_t>(best);
    if (lane_of_thread() == 0) p.expert_ids[t * p.k + j] = static_cast<int32_t>(e);
    const bool other_ranking = p.noise == MoeNoise::kGumbelRest && j == 0;
    last = other_ranking ? ~uint64_t{0} : best;
    if (other_ranking) first = e;
  }
}

__global__ void __launch_bounds__(kThreads) choose_kernel(CudaMoeChooseParams p) {
  for (int64_t t = warp_of_grid(); t < p.n; t += warps_in_grid()) {
    float* probabilities = p.probabilities + t * p.experts;
    if (p.mask && !p.mask[t]) {
      for (int64_t e = lane_of_thread(); e < p.experts; e += kWarpSize) probabilities[e] = 0;
      for (int64_t j = lane_of_thread(); j < p.k; j += kWarpSize) p.expert_ids[t * p.k + j] = -1;
      continue;
    }
    const LogitRow x{p.logits, p.type, t * p.row_stride};
    if (p.scoring == MoeScoring::kSoftmax) {
      write_softmax(x, p.experts, probabilities);
    } else {
      write_sigmoid(x, p.experts, probabilities);
    }
    choose_experts(p, x, t);
  }
}

// One token's choices.
struct Choices {
  const float* p;
  const int32_t *ids, *slots;
  int64_t k;
};

// The sum that a token's gates are divided by; 1 where they are not.
struct Divisor {
  float value;
  bool bounded;  // the sum itself was smaller
};

__device__ Divisor divisor_of(const Choices& c, MoeRenormalise renormalise) {
  if (renormalise == MoeRenormalise::kNone) return {1.0f, true};
  float total = 0;
  for (int64_t j = 0; j < c.k; ++j) {
    if (renormalise == MoeRenormalise::kChosen || c.slots[j] >= 0) total += c.p[c.ids[j]];
  }
  if (total < kLeastGateSum) return {kLeastGateSum, true};
  return {total, false};
}

// One thread a token.
__global__ void __launch_bounds__(kThreads) gates_kernel(CudaMoeGatesParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < p.n; t += step) {
    const Choices c{p.probabilities + t * p.experts, p.expert_ids + t * p.k, p.slots + t * p.k,
                    p.k};
    const bool token = c.ids[0] >= 0;
    const Divisor divisor = token ? divisor_of(c, p.renormalise) : Divisor{1.0f, true};
    // Unrolled, its divisions spill registers on sm_80.
#pragma unroll 1
    for (int64_t j = 0; j < p.k; ++j) {
      p.gates[t * p.k + j] = c.slots[j] < 0 ? 0.0f : c.p[c.ids[j]] / divisor.value;
    }
  }
}

// What each gate adds to the gradient of the probability of its expert.
struct GateGradients {
  Choices c;
  const float* dgates;
  MoeRenormalise renormalise;
  Divisor divisor;
  float shared;

  __device__ GateGradients(const Choices& choices, const float* grads, MoeRenormalise rule)
      : c(choices),
        dgates(grads),
        renormalise(rule),
        divisor(divisor_of(choices, rule)),
        shared(0) {
    if (divisor.bounded) return;
    for (int64_t j = 0; j < c.k; ++j) {
      if (c.slots[j] >= 0) shared += dgates[j] * c.p[c.ids[j]];
    }
    shared /= divisor.value;
  }

  __device__ float of_expert(int64_t e) const {
    int64_t j = 0;
    while (j < c.k && c.ids[j] != e) ++j;
    if (j == c.k) return 0;
    const bool kept = c.slots[j] >= 0;
    if (!kept && renormalise != MoeRenormalise::kChosen) return 0;
    return ((kept ? dgates[j] : 0.0f) - shared) / divisor.value;
  }
};

__global__ void __launch_bounds__(kThreads) route_bwd_kernel(CudaMoeRouteBwdParams p) {
  const int lane = lane_of_thread();
  for (int64_t t = warp_of_grid(); t < p.n; t += warps_in_grid()) {
    const int64_t row = t * p.experts;
    const Choices c{p.probabilities + row, p.expert_ids + t * p.k, p.slots + t * p.k,
                    p.dgates ? p.k : 0};
    if (p.expert_ids[t * p.k] < 0) {
      for (int64_t e = lane; e < p.experts; e += kWarpSize) {
        store_rounded<1>(p.dlogits, p.type, row + e, {{0.0f}});
      }
      continue;
    }
    for (int64_t j = 0; j < c.k; ++j) {
      assert(c.ids[j] >= 0 && c.ids[j] < p.experts && "encfast::moe_route_bwd: id out of range");
    }
    const GateGradients gates(c, p.dgates + t * p.k, p.renormalise);
    const auto dp = [&](int64_t e) {
      return gates.of_expert(e) + (p.dprobabilities ? p.dprobabilities[row + e] : 0.0f);
    };
    const bool softmax = p.scoring == MoeScoring::kSoftmax;
    float mean = 0;
    if (softmax) {
      for (int64_t e = lane; e < p.experts; e += kWarpSize) mean += c.p[e] * dp(e);
      mean = warp_sum(mean);
    }
    for (int64_t e = lane; e < p.experts; e += kWarpSize) {
      const float s = c.p[e], d = dp(e);
      store_rounded<1>(p.dlogits, p.type, row + e,
                       {{softmax ? s * (d - mean) : s * (1.0f - s) * d}});
    }
  }
}

}  // namespace

int moe_choose_cuda(const CudaMoeChooseParams& p, void* stream_handle) {
  if (p.n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  ENCFAST_LAUNCH((choose_kernel), blocks_for(p.n, kWarps), kThreads, stream, p);
  return static_cast<int>(cudaGetLastError());
}

int64_t moe_sort_scratch(int64_t n, int64_t experts, int64_t k, bool random) {
  return SortScratch::size(n, experts, k, random);
}

int moe_sort_cuda(const CudaMoeSortParams& p, void* stream_handle) {
  sort_choices(p, static_cast<cudaStream_t>(stream_handle));
  return static_cast<int>(cudaGetLastError());
}

int moe_gates_cuda(const CudaMoeGatesParams& p, void* stream_handle) {
  if (p.n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  ENCFAST_LAUNCH((gates_kernel), blocks_for(p.n, kThreads), kThreads, stream, p);
  return static_cast<int>(cudaGetLastError());
}

int moe_route_bwd_cuda(const CudaMoeRouteBwdParams& p, void* stream_handle) {
  if (p.n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  ENCFAST_LAUNCH((route_bwd_kernel), blocks_for(p.n, kWarps), kThreads, stream, p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace encfast
