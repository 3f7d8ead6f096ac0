#include <nanobind/stl/array.h>

#include <array>

#include "../native/bind.h"
#include "../native/isa.h"
#include "cpu.h"

using namespace lean3d;

LEAN3D_BIND(norm) {
  m.def(
      "norm_forward",
      [](std::array<int64_t, 4> s, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t a, bool a_one_frame,
         uintptr_t b, bool b_one_frame, bool relu, double eps, double momentum, uintptr_t running_mean,
         uintptr_t running_var, uintptr_t mean, uintptr_t rstd, uintptr_t y, int threads) {
        LEAN3D_CALL(norm_forward)
        ({s[0], s[1], s[2], s[3]}, floats(x), {floats(weight), floats(bias)}, {floats(a), a_one_frame},
         {floats(b), b_one_frame}, relu, eps, momentum, floats(running_mean), floats(running_var), floats(mean),
         floats(rstd), floats(y), threads);
      },
      without_gil());
  m.def(
      "norm_backward",
      [](std::array<int64_t, 4> s, uintptr_t x, uintptr_t y, uintptr_t dy, uintptr_t weight, uintptr_t bias, bool relu,
         uintptr_t mean, uintptr_t rstd, uintptr_t masked, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
         int threads) {
        LEAN3D_CALL(norm_backward)
        ({s[0], s[1], s[2], s[3]}, floats(x), floats(y), floats(dy), {floats(weight), floats(bias)}, relu, floats(mean),
         floats(rstd), floats(masked), floats(dx), floats(dweight), floats(dbias), threads);
      },
      without_gil());
}
