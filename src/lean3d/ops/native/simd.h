// One vector of floats, whatever the instruction set: the compiler's vector extension does the arithmetic, and what it
// has no words for (masked memory access, maxima that pass on NaN) is spelled out here for each set.
//
//     vec     LANES floats        a + b, a * b, a * 2.0f, fused multiply-add where the compiler contracts
//     mask    the first n lanes   tail(n)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LEAN3D_ISA
#error "compiled for no instruction set: see isa.h"
#endif

namespace lean3d::LEAN3D_ISA {

#if defined(__AVX512F__)

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(64), aligned(64)));
typedef float vec_unaligned __attribute__((vector_size(64), aligned(4)));
typedef __mmask16 mask;
inline mask tail(int n) { return n >= LANES ? mask(0xffff) : mask((1u << n) - 1u); }
inline vec load(const float* p, mask m) { return (vec)_mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, vec v, mask m) { _mm512_mask_storeu_ps(p, m, (__m512)v); }
// As torch: NaN wins. vmaxps gives its second operand where one is NaN, so only a NaN in `a` is looked after.
inline vec max(vec a, vec b) {
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q);
  return (vec)_mm512_mask_max_ps((__m512)a, number, (__m512)a, (__m512)b);
}
inline vec relu(vec a) { return (vec)_mm512_max_ps(__m512{}, (__m512)a); }

#elif defined(__AVX2__)

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(32), aligned(32)));
typedef float vec_unaligned __attribute__((vector_size(32), aligned(4)));
typedef __m256i mask;
inline mask tail(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vec load(const float* p, mask m) { return (vec)_mm256_maskload_ps(p, m); }
inline void store(float* p, vec v, mask m) { _mm256_maskstore_ps(p, m, (__m256)v); }
inline vec max(vec a, vec b) {
  __m256 r = _mm256_max_ps((__m256)a, (__m256)b);
  return (vec)_mm256_blendv_ps(r, (__m256)a, _mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q));
}
inline vec relu(vec a) { return (vec)_mm256_max_ps(__m256{}, (__m256)a); }

#else  // NEON, and any other machine, by the compiler's own means

constexpr int LANES = 4;
typedef float vec __attribute__((vector_size(16), aligned(16)));
typedef float vec_unaligned __attribute__((vector_size(16), aligned(4)));
typedef int mask;
inline mask tail(int n) { return n < LANES ? n : LANES; }
inline vec load(const float* p, mask m) {
  vec v{};
  std::memcpy(&v, p, sizeof(float) * m);
  return v;
}
inline void store(float* p, vec v, mask m) { std::memcpy(p, &v, sizeof(float) * m); }
inline vec max(vec a, vec b) {
  typedef int32_t bits __attribute__((vector_size(16)));
  const bits take_a = (a > b) | (a != a);
  return (vec)(((bits)a & take_a) | ((bits)b & ~take_a));
}
inline vec relu(vec a) { return max(a, vec{}); }

#endif

inline vec load(const float* p) { return *(const vec_unaligned*)p; }
inline void store(float* p, vec v) { *(vec_unaligned*)p = v; }
inline vec splat(float x) { return vec{} + x; }

}  // namespace lean3d::LEAN3D_ISA
