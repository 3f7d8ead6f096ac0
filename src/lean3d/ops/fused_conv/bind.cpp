#include <nanobind/stl/array.h>

#include "../native/bind.h"
#include "../native/isa.h"
#include "sizes.h"

using namespace lean3d;

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
