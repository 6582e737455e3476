// What may stand between two linear layers.
#pragma once
#include <cstdint>

namespace encfast {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kSilu, kRelu };

}  // namespace encfast
