#include <nanobind/stl/array.h>

#include <array>

#include "../native/bind.h"
#include "../native/isa.h"
#include "cpu.h"

using namespace lean3d;

namespace {

// (N, T, H, W, C, T', H', W', O, kernel, stride, padding)
using Sizes = std::array<int64_t, 18>;
ConvShape shape(const Sizes& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16], s[17]};
}

}  // namespace

LEAN3D_BIND(fused_conv) {
  m.def(
      "conv_direct",
      [](uintptr_t x, uintptr_t packed, uintptr_t y, const Sizes& s, uintptr_t bias, uintptr_t offset,
         uintptr_t residual, bool relu, int threads) {
        const ConvEpilogue epilogue{floats(bias), floats(offset), floats(residual), relu};
        LEAN3D_CALL(conv_direct)(floats(x), floats(packed), floats(y), shape(s), epilogue, threads);
      },
      without_gil());
  m.def(
      "conv_depthwise",
      [](uintptr_t x, uintptr_t weight, uintptr_t y, const Sizes& s, uintptr_t bias, uintptr_t residual, bool relu,
         int threads) {
        const ConvEpilogue epilogue{floats(bias), nullptr, floats(residual), relu};
        LEAN3D_CALL(conv_depthwise)(floats(x), floats(weight), floats(y), shape(s), epilogue, threads);
      },
      without_gil());
  m.def(
      "conv_stage_two",
      [](uintptr_t x, uintptr_t first, uintptr_t first_bias, bool first_relu, const std::array<int64_t, 5>& in_time,
         uintptr_t weight, uintptr_t middle_bias, bool middle_relu, uintptr_t packed, uintptr_t y, const Sizes& s,
         const std::array<int64_t, 6>& w, uintptr_t bias, uintptr_t residual, bool relu, int threads) {
        const TemporalProduct temporal{floats(first), floats(first_bias), first_relu, in_time[0],
                                       in_time[1],    in_time[2],         in_time[3], in_time[4]};
        const ConvEpilogue epilogue{floats(bias), nullptr, floats(residual), relu};
        LEAN3D_CALL(conv_stage_two)
        (floats(x), temporal, floats(weight), floats(middle_bias), middle_relu, floats(packed), floats(y), shape(s),
         {w[0], w[1], w[2], w[3], w[4], w[5]}, epilogue, threads);
      },
      without_gil());
  m.def("small_big_channels", [] { return LEAN3D_CALL(small_big_channels)(); });
  m.def(
      "conv_small_big",
      [](uintptr_t x, uintptr_t packed, uintptr_t y, const Sizes& s, const std::array<int64_t, 3>& window,
         uintptr_t bias, uintptr_t residual, bool relu, int threads) {
        const ConvEpilogue epilogue{floats(bias), nullptr, floats(residual), relu};
        LEAN3D_CALL(conv_small_big)
        (floats(x), floats(packed), floats(y), shape(s), window[0], window[1], window[2], epilogue, threads);
      },
      without_gil());
}
