// A convolution's sizes as Python gives them.
#pragma once

#include <array>
#include <cstdint>

#include "cpu.h"

namespace lean3d {

// (N, T, H, W, C, T', H', W', O, kernel, stride, padding)
using Sizes = std::array<int64_t, 18>;
inline ConvShape shape(const Sizes& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16], s[17]};
}

}  // namespace lean3d
