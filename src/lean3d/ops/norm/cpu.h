// Batch normalisation in training with what follows it, on channels-last activations: y = relu(norm(x) + a + b).
//
//     forward     statistics in one pass over x, the rest in a second one
//     backward    two sums in one pass over x and dy, dx in a second one; the ReLU's mask comes from x, or from y where
//                 something was added
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean3d {

struct NormShape {
  int64_t n, t, plane, c;  // clips, frames, places in a frame, channels
  int64_t rows() const { return n * t * plane; }
};

// What is added: like y, or one frame for all frames of a clip. May be null.
struct Added {
  const float* data;
  bool one_frame;
};

// All of C floats.
struct NormParameters {
  const float *weight, *bias;
};

}  // namespace lean3d

#define LEAN3D_DECLARE_NORM                                                                                          \
  /* Means and reciprocal deviations of the batch go to mean and rstd; the running ones move by `momentum`. */       \
  void norm_forward(const NormShape& shape, const float* x, const NormParameters& parameters, const Added& a,        \
                    const Added& b, bool relu, double eps, double momentum, float* running_mean, float* running_var, \
                    float* mean, float* rstd, float* y, int threads);                                                \
  /* masked: where dy goes after the ReLU's mask, the gradient of what was added; null where nothing was or where    \
     there is no ReLU. y only with masked. */                                                                        \
  void norm_backward(const NormShape& shape, const float* x, const float* y, const float* dy,                        \
                     const NormParameters& parameters, bool relu, const float* mean, const float* rstd,              \
                     float* masked, float* dx, float* dweight, float* dbias, int threads);

#define LEAN3D_NAMESPACE(isa) \
  namespace lean3d::isa {     \
  LEAN3D_DECLARE_NORM         \
  }
LEAN3D_NAMESPACE(generic)
LEAN3D_NAMESPACE(avx2)
LEAN3D_NAMESPACE(avx512)
LEAN3D_NAMESPACE(neon)
#undef LEAN3D_NAMESPACE
