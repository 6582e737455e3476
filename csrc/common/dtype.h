// The floating types of tensors, as the cores on every device call them.
#pragma once
#include <cstdint>

namespace encfast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace encfast
