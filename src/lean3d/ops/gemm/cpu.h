// The product that all convolutions end in:  C[i, n] = epilogue(sum over taps p and channels k of A_p[i, k] B[p, k, n])
//
//     A   rows in channels-last activations: row i of tap p starts at taps[p] + i * lda, its K channels are adjacent
//     B   packed weights: panels of NR columns, each (taps * K) x NR, zeros behind the last column
//     C   rows of ldc floats
//
// A pointwise convolution has one tap; a direct one a tap for each place of its kernel, with rows adjacent along the
// width; the fast algorithm's multiplications are products with one tap at each place of the tile.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean3d {

// What happens to a sum before it is stored, in this order. Pointers may be null.
struct Epilogue {
  const float* bias = nullptr;      // (N): row i at bias + i * bias_stride
  const float* residual = nullptr;  // like C: row i at residual + i * residual_stride
  int64_t residual_stride = 0;      // 0: one row for all
  bool relu = false;
  int64_t bias_stride = 0;          // 0: one row for all
};

}  // namespace lean3d

#define LEAN3D_DECLARE_GEMM                                                                                          \
  /* Columns of a panel, and the most rows of one call of `gemm_tile`. */                                            \
  int gemm_nr();                                                                                                     \
  int gemm_mr();                                                                                                     \
  /* How many floats `gemm_pack` writes. */                                                                          \
  size_t gemm_packed_size(int64_t k, int64_t n);                                                                     \
  /* B (k, n), its element (k, n) at b[k * stride_k + n * stride_n], into panels; k counts all taps' channels. */    \
  void gemm_pack(const float* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, float* packed);           \
  /* One tile: rows <= gemm_mr() rows, columns <= gemm_nr() columns of one panel. What will be read after it, 16      \
     floats for each of the taps' channels from `soon` on, is asked for meanwhile. */                                \
  void gemm_tile(int rows, int columns, const float* const* taps, int num_taps, int64_t lda, int64_t k,              \
                 const float* panel, float* c, int64_t ldc, const Epilogue& epilogue, const float* soon = nullptr);  \
  /* One tile of two times `rows` <= gemm_mr() / 2 rows: the second half's inputs are `jump` floats behind the       \
     first's, its outputs follow the first's. For rows of output too short to fill a tile. */                        \
  void gemm_tile_pair(int rows, int columns, const float* const* taps, int num_taps, int64_t lda, int64_t jump,      \
                      int64_t k, const float* panel, float* c, int64_t ldc, const Epilogue& epilogue);               \
  /* All of C (m, n): one tap, on `threads` threads. */                                                              \
  void gemm(const float* a, int64_t lda, const float* packed, float* c, int64_t ldc, int64_t m, int64_t n,           \
            int64_t k, const Epilogue& epilogue, int threads);

#define LEAN3D_NAMESPACE(isa) \
  namespace lean3d::isa {     \
  LEAN3D_DECLARE_GEMM         \
  }
LEAN3D_NAMESPACE(generic)
LEAN3D_NAMESPACE(avx2)
LEAN3D_NAMESPACE(avx512)
LEAN3D_NAMESPACE(neon)
#undef LEAN3D_NAMESPACE
