// Convolution by the fast algorithm F(m, 3) of Winograd, nested over time, height and width, for inference; at stride 1,
// or 2 in the plane.
// transforms.py has the matrices and where they come from.
//
//     x    (N, T, H, W, C)      V = B^T x  of every tile of (m + 2) places on each axis: `positions` numbers a channel
//     U    packed weights       M = V U    at each position, a product over channels
//     y    (N, T', H', W', O)   y = A^T M, + bias, + residual, relu
//
// An axis has m = 2 or 4 and 3 taps, or m = 1: then it has one tap, or up to 16 in time, over which the product sums; V
// of a frame serves all output frames that see it. Where time is transformed around the plane, its points are gone
// through one after another, so that only the plane's are in the cache at a time; what each adds is summed over.
//
// At stride 2 a 3x3 kernel with m = 4 is four kernels, of the even and odd taps on each axis, on the even and odd places,
// by F(4, 2): 5 x 5 positions, at which the product sums over the channels of those of the four that are not 0 there.
#pragma once

#include <cstdint>

#include "../fused_conv/cpu.h"

namespace lean3d {

struct FastConv {
  int64_t clips;
  int64_t in[3], out[3];     // sizes in time, height, width
  int64_t m[3], taps[3], padding[3];
  int64_t channels[2];       // of x and of what is concatenated to it
  int64_t outputs;
  bool strided;              // 2 in height and width; then m there is 4, taps are 3, and m[0] is 1
  // What is worked on at a time: tiles in time x tiles of the plane, which are the rows of the product.
  int64_t block_frames, block_tiles;
  // Threads share a block, each with panels of its own, instead of having a block each.
  bool shared;
};

struct FastConvData {
  const float* x[2];         // both (N, T, H, W, channels); the second null where channels[1] is 0
  const float* weights;      // (positions, panels, taps in time if m[0] is 1, channels, panel's columns); channels four,
                             // two or one times where strided: of even-even, even-odd, odd-even, odd-odd, if there
  const float* time_in;      // B^T (n, n) and A^T (m, n) of time, where m[0] is not 1
  const float* time_out;
  const float* bias;         // (O) or null
  const float* residual;     // like y, or null
  bool residual_still;       // the residual has one frame, for all
  bool relu;
  float* y;
};

// Maxima over windows of h x w places side by side in the plane, the last ones cut off where the rows of `columns`
// places end; 1 x 1: none.
struct PlaneShrink {
  int64_t h, w;
  int64_t ho, wo;   // what is left
  int64_t columns;
};

}  // namespace lean3d

#define LEAN3D_DECLARE_FAST_CONV                                                                                    \
  void fast_conv(const FastConv& layer, const FastConvData& data, int threads);                                      \
  /* In time alone, around any dense kernel and stride in the plane; 4, 6 or 8 points. `packed` has for each point    \
     panels of (KH, KW, C) x O, bt and at are B^T (points, points) and A^T (m, points). The bias has a whole row of   \
     outputs, (W', O). Where there are maxima there is no residual. */                                               \
  void conv_in_time(const float* x, const float* packed, const float* bt, const float* at, float* y,                 \
                    const ConvShape& s, int64_t points, const PlaneShrink& shrink, const ConvEpilogue& epilogue,    \
                    int threads);

#define LEAN3D_NAMESPACE(isa) \
  namespace lean3d::isa {     \
  LEAN3D_DECLARE_FAST_CONV    \
  }
LEAN3D_NAMESPACE(generic)
LEAN3D_NAMESPACE(avx2)
LEAN3D_NAMESPACE(avx512)
LEAN3D_NAMESPACE(neon)
#undef LEAN3D_NAMESPACE
