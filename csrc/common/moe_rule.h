// How gates come from logits, on every device.
#pragma once
#include <cstdint>

namespace encfast {

enum class MoeScoring : int32_t { kSoftmax, kSigmoid };
enum class MoeRenormalise : int32_t { kNone, kChosen, kKept };
enum class MoeNoise : int32_t { kNone, kGumbel, kGumbelRest };  // kGumbelRest: not on first choices

constexpr float kLeastGateSum = 1e-20f;  // gates are divided by at least this

}  // namespace encfast
