// Convolutions at inference: bias, residual and ReLU with the product, what goes between two steps kept in the cache.
// Activations are (N, T, H, W, C), adjacent; weights of products are packed by `gemm_pack`.
#pragma once

#include <cstdint>

#include "../gemm/cpu.h"

namespace lean3d {

struct ConvShape {
  int64_t n, t, h, w, c;                    // input
  int64_t to, ho, wo, o;                    // output
  int64_t kt, kh, kw, st, sh, sw, pt, ph, pw;  // kernel, strides, zeros in front
};

// What is added to a sum before it is stored. Pointers may be null; y may be the residual.
struct ConvEpilogue {
  const float* bias;      // (O)
  const float* offset;    // (N, 1, H', W', O): the same at all times, in place of the bias
  const float* residual;  // (N, T', H', W', O)
  bool relu;
};

// A product over K frames, kernel K x 1 x 1, whose output is the input of what follows.
struct TemporalProduct {
  const float* packed;     // null: there is none, x itself is the input
  const float* bias;       // (C)
  bool relu;
  int64_t t, c, k, s, p;   // frames and channels of its input; kernel, stride, zeros in front
};

// Maxima over windows side by side, the last ones cut off where the input ends; 1 x 1 x 1: none.
struct Shrink {
  int64_t t, h, w;     // the window
  int64_t to, ho, wo;  // output
};

}  // namespace lean3d

#define LEAN3D_DECLARE_FUSED_CONV                                                                                   \
  /* Dense, any kernel; `packed` from (KT, KH, KW, C) x O. */                                                        \
  void conv_direct(const float* x, const float* packed, float* y, const ConvShape& s, const ConvEpilogue& epilogue, \
                   int threads);                                                                                    \
  /* One kernel a channel; weight (KT, KH, KW, padded), rows of `padded` >= C floats, a multiple of 16; bias also. */ \
  void conv_depthwise(const float* x, const float* weight, float* y, const ConvShape& s,                            \
                      const ConvEpilogue& epilogue, int threads);                                                   \
  /* That, with its own bias and ReLU, and a pointwise product to O channels behind it, s.o is O. A product in time   \
     may come first: then the kernel is 1 in time at stride 1, and s describes what that product makes. The maxima   \
     come last; where there are any, there is no residual. */                                                        \
  void conv_stage_two(const float* x, const TemporalProduct& first, const float* weight, const float* bias,         \
                      bool relu, const float* packed, float* y, const ConvShape& s, const Shrink& shrink,            \
                      const ConvEpilogue& epilogue, int threads);                                                   \
  /* y = small(x) + big(pool(x)), kernel 1 in time, the pool a maximum over odd windows at stride 1. `packed` holds  \
     for each `small_big_channels()` channels (the last ones may be fewer) KH x KW x (theirs of x, then the pool's). */ \
  int64_t small_big_channels();                                                                                     \
  void conv_small_big(const float* x, const float* packed, float* y, const ConvShape& s, int64_t window_t,          \
                      int64_t window_h, int64_t window_w, const ConvEpilogue& epilogue, int threads);

#define LEAN3D_NAMESPACE(isa) \
  namespace lean3d::isa {     \
  LEAN3D_DECLARE_FUSED_CONV   \
  }
LEAN3D_NAMESPACE(generic)
LEAN3D_NAMESPACE(avx2)
LEAN3D_NAMESPACE(avx512)
LEAN3D_NAMESPACE(neon)
#undef LEAN3D_NAMESPACE
