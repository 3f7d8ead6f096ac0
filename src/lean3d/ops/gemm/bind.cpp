#include "../native/bind.h"
#include "../native/isa.h"
#include "cpu.h"

using namespace lean3d;

LEAN3D_BIND(gemm) {
  m.def("gemm_nr", [] { return LEAN3D_CALL(gemm_nr)(); });
  m.def("gemm_packed_size", [](int64_t k, int64_t n) { return LEAN3D_CALL(gemm_packed_size)(k, n); });
  m.def(
      "gemm_pack",
      [](uintptr_t b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, uintptr_t packed) {
        LEAN3D_CALL(gemm_pack)(floats(b), stride_k, stride_n, k, n, floats(packed));
      },
      without_gil());
  m.def(
      "gemm",
      [](uintptr_t a, int64_t lda, uintptr_t packed, uintptr_t c, int64_t ldc, int64_t rows, int64_t n, int64_t k,
         uintptr_t bias, uintptr_t residual, int64_t residual_stride, bool relu, int threads) {
        const Epilogue epilogue{floats(bias), floats(residual), residual_stride, relu};
        LEAN3D_CALL(gemm)(floats(a), lda, floats(packed), floats(c), ldc, rows, n, k, epilogue, threads);
      },
      without_gil());
}
