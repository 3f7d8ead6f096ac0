// The Python module `lean3d._native`: all operators' kernels, see bind.h.
#include <stdexcept>
#include <string>

#include "bind.h"
#include "isa.h"
#include "parallel.h"

NB_MODULE(_native, m) {
  m.attr("INTERFACE") = 2;  // as in __init__.py beside: grows when a function's arguments or a packed layout change
  m.def("isa", [] { return lean3d::name(lean3d::isa()); });
  m.def("use_isa", [](const std::string& wanted) {
    const lean3d::Isa best = lean3d::best_isa();
    for (lean3d::Isa isa : {lean3d::Isa::generic, lean3d::Isa::avx2, lean3d::Isa::avx512, lean3d::Isa::neon}) {
      const bool there = isa == best || isa == lean3d::Isa::generic ||
                         (isa == lean3d::Isa::avx2 && best == lean3d::Isa::avx512);
      if (there && wanted == lean3d::name(isa)) return lean3d::use_isa(isa);
    }
    throw std::invalid_argument("this machine has no " + wanted);
  });
  m.def("thread_pool", &lean3d::thread_pool);
  for (auto bind : lean3d::binders()) bind(m);
}
