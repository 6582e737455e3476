// What elements a pointer of a kernel's parameters points to.
#pragma once
#include <cstdint>

namespace encfast {

enum class CudaType : int32_t { kFloat32, kBFloat16, kFloat16, kUInt8 };

}  // namespace encfast
