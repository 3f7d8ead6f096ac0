#include <nanobind/stl/array.h>

#include "../fused_conv/sizes.h"
#include "../native/bind.h"
#include "../native/isa.h"
#include "cpu.h"

using namespace lean3d;
using Triple = std::array<int64_t, 3>;

LEAN3D_BIND(fast_conv) {
  m.def(
      "fast_conv",
      [](int64_t clips, Triple in, Triple out, Triple m, Triple taps, Triple padding, std::array<int64_t, 2> channels,
         int64_t outputs, bool strided, std::array<int64_t, 2> block, bool shared, std::array<uintptr_t, 2> x,
         uintptr_t weights, uintptr_t time_in, uintptr_t time_out, uintptr_t bias, uintptr_t residual,
         bool residual_still, bool relu, uintptr_t y, int threads) {
        FastConv layer{};
        layer.clips = clips;
        for (int axis = 0; axis < 3; ++axis) {
          layer.in[axis] = in[axis];
          layer.out[axis] = out[axis];
          layer.m[axis] = m[axis];
          layer.taps[axis] = taps[axis];
          layer.padding[axis] = padding[axis];
        }
        layer.channels[0] = channels[0];
        layer.channels[1] = channels[1];
        layer.outputs = outputs;
        layer.strided = strided;
        layer.block_frames = block[0];
        layer.block_tiles = block[1];
        layer.shared = shared;
        const FastConvData data{{floats(x[0]), floats(x[1])}, floats(weights), floats(time_in), floats(time_out),
                                floats(bias), floats(residual),
                                residual_still, relu, floats(y)};
        LEAN3D_CALL(fast_conv)(layer, data, threads);
      },
      without_gil());
  m.def(
      "conv_in_time",
      [](uintptr_t x, uintptr_t packed, uintptr_t time_in, uintptr_t time_out, uintptr_t y, const Sizes& s,
         int64_t points, const std::array<int64_t, 5>& w, uintptr_t bias, uintptr_t residual, bool relu, int threads) {
        const ConvEpilogue epilogue{floats(bias), nullptr, floats(residual), relu};
        LEAN3D_CALL(conv_in_time)
        (floats(x), floats(packed), floats(time_in), floats(time_out), floats(y), shape(s), points,
         {w[0], w[1], w[2], w[3], w[4]}, epilogue, threads);
      },
      without_gil());
}
