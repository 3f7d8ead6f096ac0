// Max pooling, forward and backward, on channels-last activations (N, T, H, W, C).
//
// A window's maximum is taken axis by axis: over frames, over rows, over places in a row. Where a gradient is wanted
// each output keeps its place, the number of its maximum in the window in scan order: one or two bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean3d {

struct PoolAxis {
  int64_t in, out;  // lengths
  int64_t window, stride, padding;

  // The inputs of output `o` are [first(o), last(o)), those inside.
  int64_t first(int64_t o) const { return o * stride > padding ? o * stride - padding : 0; }
  int64_t last(int64_t o) const {
    const int64_t end = o * stride - padding + window;
    return end < in ? end : in;
  }
};

struct PoolShape {
  int64_t n, c;
  PoolAxis t, h, w;
};

}  // namespace lean3d

#define LEAN3D_DECLARE_POOL                                                                                           \
  /* x -> y (N, T', H', W', C); places, like y in elements of `place_bytes` (1 or 2), may be null. */                 \
  void max_pool(const PoolShape& shape, const float* x, float* y, void* places, int place_bytes, int threads);        \
  /* The gradient of x from that of y. */                                                                             \
  void max_pool_backward(const PoolShape& shape, const float* dy, const void* places, int place_bytes, float* dx,     \
                         int threads);

#define LEAN3D_NAMESPACE(isa) \
  namespace lean3d::isa {     \
  LEAN3D_DECLARE_POOL         \
  }
LEAN3D_NAMESPACE(generic)
LEAN3D_NAMESPACE(avx2)
LEAN3D_NAMESPACE(avx512)
LEAN3D_NAMESPACE(neon)
#undef LEAN3D_NAMESPACE
