#include "cpu.h"

#include <algorithm>
#include <cstring>

#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

// The tile of C that stays in registers: MR rows of NV vectors, and what is left over holds B and one element of A.
#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;  // 28 of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 of 16
#else
constexpr int MR = 8, NV = 3;  // 24 of NEON's 32
#endif
constexpr int NR = NV * LANES;
// Floats of B that are asked for ahead of their use: panels larger than the caches come from memory meanwhile.
constexpr int AHEAD = 64 * NR;
constexpr int LINE = 16;  // floats of a cache line

// Rows come in groups of GROUP: the second group's inputs are `jump` floats behind the first's.
template <int ROWS, int V, int GROUP>
inline __attribute__((always_inline)) void tile(int columns, const float* const* taps, int num_taps, int64_t lda,
                                                int64_t jump, int64_t k, const float* __restrict panel, float* c,
                                                int64_t ldc, const Epilogue& epilogue, const float* soon) {
  vec sum[ROWS][V];
  const bool one_bias = epilogue.bias && epilogue.bias_stride == 0;  // sums start from it
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const vec start = one_bias ? load(epilogue.bias + v * LANES, tail(columns - v * LANES)) : vec{};
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      sum[i][v] = start;
      __builtin_prefetch(c + i * ldc + v * LANES, 1);
    }
  }
  for (int p = 0; p < num_taps; ++p) {
    const float* __restrict a = taps[p];
    const float* __restrict a2 = a + jump;
    for (int64_t q = 0; q < k; ++q, panel += NR, soon += LINE) {
      vec b[V];
      __builtin_prefetch(soon, 0, 2);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        b[v] = load(panel + v * LANES);
        __builtin_prefetch(panel + AHEAD + v * LANES);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const float x = i < GROUP ? a[i * lda + q] : a2[(i - GROUP) * lda + q];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[i][v] += x * b[v];
      }
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const int left = columns - v * LANES;
    const int64_t at = v * LANES;
    const mask m = tail(left);
    const auto add = [&](const float* from, int64_t stride) {
      if (left >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i][v] += load(from + i * stride + at);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i][v] += load(from + i * stride + at, m);
      }
    };
    if (epilogue.bias && !one_bias) add(epilogue.bias, epilogue.bias_stride);
    if (epilogue.residual) add(epilogue.residual, epilogue.residual_stride);
    if (epilogue.relu) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) sum[i][v] = relu(sum[i][v]);
    }
    if (left >= LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) store(c + i * ldc + at, sum[i][v]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) store(c + i * ldc + at, sum[i][v], m);
    }
  }
}

using TileFunction = void (*)(int, const float* const*, int, int64_t, int64_t, int64_t, const float*, float*, int64_t,
                              const Epilogue&, const float*);
template <int ROWS, int V, int GROUP>
void tile_function(int columns, const float* const* taps, int num_taps, int64_t lda, int64_t jump, int64_t k,
                   const float* panel, float* c, int64_t ldc, const Epilogue& epilogue, const float* soon) {
  tile<ROWS, V, GROUP>(columns, taps, num_taps, lda, jump, k, panel, c, ldc, epilogue, soon);
}

template <int GROUPS, int... I>
constexpr auto tile_table(std::integer_sequence<int, I...>) {
  struct Table {
    TileFunction by_rows[sizeof...(I)][NV];
  };
  if constexpr (NV == 3)
    return Table{{{tile_function<GROUPS*(I + 1), 1, I + 1>, tile_function<GROUPS*(I + 1), 2, I + 1>,
                   tile_function<GROUPS*(I + 1), NV, I + 1>}...}};
  else
    return Table{{{tile_function<GROUPS*(I + 1), 1, I + 1>, tile_function<GROUPS*(I + 1), NV, I + 1>}...}};
}
constexpr auto TILES = tile_table<1>(std::make_integer_sequence<int, MR>{});
constexpr auto PAIRS = tile_table<2>(std::make_integer_sequence<int, MR / 2>{});

}  // namespace

int gemm_nr() { return NR; }
int gemm_mr() { return MR; }

size_t gemm_packed_size(int64_t k, int64_t n) { return static_cast<size_t>((n + NR - 1) / NR * NR * k); }

void gemm_pack(const float* b, int64_t stride_k, int64_t stride_n, int64_t k, int64_t n, float* packed) {
  for (int64_t first = 0; first < n; first += NR)
    for (int64_t q = 0; q < k; ++q)
      for (int64_t j = 0; j < NR; ++j, ++packed)
        *packed = first + j < n ? b[q * stride_k + (first + j) * stride_n] : 0.0f;
}

void gemm_tile(int rows, int columns, const float* const* taps, int num_taps, int64_t lda, int64_t k,
               const float* panel, float* c, int64_t ldc, const Epilogue& epilogue, const float* soon) {
  TILES.by_rows[rows - 1][(columns - 1) / LANES](columns, taps, num_taps, lda, 0, k, panel, c, ldc, epilogue,
                                                 soon ? soon : panel);
}

void gemm_tile_pair(int rows, int columns, const float* const* taps, int num_taps, int64_t lda, int64_t jump,
                    int64_t k, const float* panel, float* c, int64_t ldc, const Epilogue& epilogue) {
  PAIRS.by_rows[rows - 1][(columns - 1) / LANES](columns, taps, num_taps, lda, jump, k, panel, c, ldc, epilogue,
                                                 panel);
}

void gemm(const float* a, int64_t lda, const float* packed, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
          const Epilogue& epilogue, int threads) {
  // A block of rows of A stays in the second-level cache while all panels of B pass by.
  const int64_t fitting = std::max<int64_t>(1, (256 << 10) / (4 * k) / MR);
  const int64_t wanted = std::max<int64_t>(1, m / (4 * threads) / MR);
  const int64_t block = std::min(fitting, wanted) * MR;
  parallel((m + block - 1) / block, threads, [&](int64_t piece, int) {
    const int64_t begin = piece * block, end = std::min(m, begin + block);
    for (int64_t j = 0; j < n; j += NR) {
      Epilogue here = epilogue;
      for (int64_t i = begin; i < end; i += MR) {
        const float* tap = a + i * lda;
        if (epilogue.bias) here.bias = epilogue.bias + i * epilogue.bias_stride + j;
        if (epilogue.residual) here.residual = epilogue.residual + i * epilogue.residual_stride + j;
        gemm_tile(static_cast<int>(std::min<int64_t>(MR, end - i)), static_cast<int>(std::min<int64_t>(NR, n - j)), &tap,
                  1, lda, k, packed + j * k, c + i * ldc + j, ldc, here);
      }
    }
  });
}

}  // namespace lean3d::LEAN3D_ISA
