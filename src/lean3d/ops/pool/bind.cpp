#include <nanobind/stl/array.h>

#include <array>

#include "../native/bind.h"
#include "../native/isa.h"
#include "cpu.h"

using namespace lean3d;

namespace {
using Sizes = std::array<int64_t, 5>;  // in, out, window, stride, padding
PoolAxis axis(const Sizes& s) { return {s[0], s[1], s[2], s[3], s[4]}; }
}  // namespace

LEAN3D_BIND(pool) {
  m.def(
      "max_pool",
      [](int64_t n, int64_t c, Sizes t, Sizes h, Sizes w, uintptr_t x, uintptr_t y, uintptr_t places, int place_bytes,
         int threads) {
        LEAN3D_CALL(max_pool)
        ({n, c, axis(t), axis(h), axis(w)}, floats(x), floats(y), reinterpret_cast<void*>(places), place_bytes, threads);
      },
      without_gil());
  m.def(
      "max_pool_backward",
      [](int64_t n, int64_t c, Sizes t, Sizes h, Sizes w, uintptr_t dy, uintptr_t places, int place_bytes, uintptr_t dx,
         int threads) {
        LEAN3D_CALL(max_pool_backward)
        ({n, c, axis(t), axis(h), axis(w)}, floats(dy), reinterpret_cast<void*>(places), place_bytes, floats(dx),
         threads);
      },
      without_gil());
}
