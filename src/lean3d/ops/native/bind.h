// How an operator's kernels come into the Python module: bind.cpp beside them says
//
//     LEAN3D_BIND(pool) { m.def("max_pool", ...); }
//
// Arguments are addresses and sizes: the operator in Python has checked the tensors. The GIL is let go of in the call.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <vector>

namespace lean3d {

using Binder = void (*)(nanobind::module_&);
inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}
struct AddBinder {
  explicit AddBinder(Binder binder) { binders().push_back(binder); }
};

// A tensor's address, as Python's `tensor.data_ptr()` gives it; 0 stands for none.
inline float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

using without_gil = nanobind::call_guard<nanobind::gil_scoped_release>;

}  // namespace lean3d

#define LEAN3D_BIND(op)                                              \
  static void bind_##op(nanobind::module_& m);                       \
  static const ::lean3d::AddBinder add_##op(&bind_##op);             \
  static void bind_##op(nanobind::module_& m)
