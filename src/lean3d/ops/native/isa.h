// Which instruction set a kernel's source is compiled for, and which one the machine has.
//
// Every ops/<op>/cpu*.cpp is compiled once for each set, into a namespace named after it: the build defines LEAN3D_ISA.
// ops/<op>/cpu.h declares the kernels between LEAN3D_KERNELS_BEGIN and LEAN3D_KERNELS_END, see ops/gemm/cpu.h, and
// ops/<op>/bind.cpp calls the set that was picked at run time with LEAN3D_CALL(name).
#pragma once

namespace lean3d {

enum class Isa { generic, avx2, avx512, neon };

// The best set that this machine has and this build contains.
Isa best_isa();
// The one in use: the best, or what use_isa set (tests run them all).
Isa isa();
void use_isa(Isa value);
const char* name(Isa value);

}  // namespace lean3d

#if defined(__x86_64__)
#define LEAN3D_CALL(function)                                                             \
  (::lean3d::isa() == ::lean3d::Isa::avx512 ? &::lean3d::avx512::function                 \
   : ::lean3d::isa() == ::lean3d::Isa::avx2 ? &::lean3d::avx2::function                   \
                                            : &::lean3d::generic::function)
#elif defined(__aarch64__)
#define LEAN3D_CALL(function) \
  (::lean3d::isa() == ::lean3d::Isa::neon ? &::lean3d::neon::function : &::lean3d::generic::function)
#else
#define LEAN3D_CALL(function) (&::lean3d::generic::function)
#endif
