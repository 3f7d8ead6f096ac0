#include "cpu.h"

#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef int32_t ints __attribute__((vector_size(LANES * 4)));

// ---- one axis: the maximum of several rows of `length` floats, place by place

// Row i starts at first + i * step.
template <int COUNT>
void row_max(const float* first, int64_t step, int64_t count, int64_t length, float* to) {
  const int64_t rows = COUNT ? COUNT : count;
  int64_t j = 0;
  for (; j + LANES <= length; j += LANES) {
    vec best = load(first + j);
    for (int64_t i = 1; i < rows; ++i) best = max(best, load(first + i * step + j));
    store(to + j, best);
  }
  if (j < length) {
    const mask m = tail(static_cast<int>(length - j));
    vec best = load(first + j, m);
    for (int64_t i = 1; i < rows; ++i) best = max(best, load(first + i * step + j, m));
    store(to + j, best, m);
  }
}

inline void max_of_rows(const float* first, int64_t step, int64_t count, int64_t length, float* to) {
  if (count == 2) return row_max<2>(first, step, count, length, to);
  if (count == 3) return row_max<3>(first, step, count, length, to);
  row_max<0>(first, step, count, length, to);
}

// The same with places: floats in scratch (exact up to 2^24), where one kind of vector serves all. Row i's are at
// places + i * step (null: all 0), and i * unit + base more.
struct Candidate {
  vec value, place;

  // As torch in scan order: the first of equal values, the last NaN.
  void meet(vec value_b, vec place_b) {
#if defined(__AVX512F__)  // the same, with a branch around NaN: the compiler's mask arithmetic takes twice as long
    const __m512 a = (__m512)value, b = (__m512)value_b;
    __mmask16 take = _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) |
                     _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(b, a, _CMP_EQ_OQ), (__m512)place_b, (__m512)place,
                                             _CMP_LT_OQ);
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0)) {
      const __mmask16 a_is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
      const __mmask16 later = _mm512_cmp_ps_mask((__m512)place_b, (__m512)place, _CMP_GT_OQ);
      take |= _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q) & (~a_is_nan | later);
    }
    value = (vec)_mm512_mask_mov_ps(a, take, b);
    place = (vec)_mm512_mask_mov_ps((__m512)place, take, (__m512)place_b);
#else
    const ints later = place_b > place;
    const ints take = (value_b > value) | ((value_b == value) & ~later) |
                      ((value_b != value_b) & ((value == value) | later));
    value = take ? value_b : value;
    place = take ? place_b : place;
#endif
  }
};

template <int COUNT, bool PLACES>
void row_max(const float* first, const float* places, int64_t step, int64_t count, int64_t length, float base,
             float unit, float* to, float* to_places) {
  const int64_t rows = COUNT ? COUNT : count;
  for (int64_t j = 0; j < length; j += LANES) {
    const mask m = tail(static_cast<int>(smaller(LANES, length - j)));
    Candidate best{load(first + j, m), splat(base)};
    if (PLACES) best.place += load(places + j, m);
    vec place = splat(base);
    for (int64_t i = 1; i < rows; ++i) {
      place += unit;
      best.meet(load(first + i * step + j, m), PLACES ? place + load(places + i * step + j, m) : place);
    }
    store(to + j, best.value, m);
    store(to_places + j, best.place, m);
  }
}

inline void max_of_rows(const float* first, const float* places, int64_t step, int64_t count, int64_t length,
                        float base, float unit, float* to, float* to_places) {
  const auto with = [&](auto f) { f(first, places, step, count, length, base, unit, to, to_places); };
  if (places) return with(count == 3 ? row_max<3, true> : row_max<0, true>);
  with(count == 3 ? row_max<3, false> : row_max<0, false>);
}

template <class Place>
void narrow(const float* from, int64_t length, Place* to) {
  for (int64_t j = 0; j < length; ++j) to[j] = static_cast<Place>(static_cast<int32_t>(from[j]));
}

// ---- all axes of a block of output rows in one frame

struct Block {
  int64_t row_begin, row_end;  // output rows
};

// Rows of an input frame that a block of output rows looks at.
inline int64_t rows_first(const PoolAxis& h, const Block& b) { return h.first(b.row_begin); }
inline int64_t rows_last(const PoolAxis& h, const Block& b) { return h.last(b.row_end - 1); }

// Along the width, where all taps of a run of outputs are inside: [begin, end).
struct Run {
  int64_t begin, end;
};
inline Run inner_outputs(const PoolAxis& w) {
  if (w.stride != 1) return {0, 0};
  const int64_t begin = smaller(w.padding, w.out);
  return {begin, larger(begin, smaller(w.out, w.in + w.padding - w.window + 1))};
}

template <class Body>  // body(first output, outputs, first input, taps): one call for the inner run, one for each other
inline void along_width(const PoolAxis& w, const Body& body) {
  const Run inner = inner_outputs(w);
  for (int64_t o = 0; o < w.out; ++o) {
    if (o == inner.begin && inner.begin < inner.end) {
      body(o, inner.end - inner.begin, w.first(o), w.window);
      o = inner.end - 1;
    } else {
      body(o, int64_t(1), w.first(o), w.last(o) - w.first(o));
    }
  }
}

void forward_block(const PoolShape& s, const float* x, float* y, int64_t frame, const Block& block) {
  const int64_t row = s.w.in * s.c, out_row = s.w.out * s.c;
  const int64_t top = rows_first(s.h, block), rows = rows_last(s.h, block) - top;
  const float* frames = x + (s.t.first(frame) * s.h.in + top) * row;
  const int64_t num_frames = s.t.last(frame) - s.t.first(frame);
  if (num_frames > 1) {
    float* to = scratch(0, rows * row);
    max_of_rows(frames, s.h.in * row, num_frames, rows * row, to);
    frames = to;
  }
  for (int64_t o = block.row_begin; o < block.row_end; ++o) {
    const float* line = frames + (s.h.first(o) - top) * row;
    const int64_t taps = s.h.last(o) - s.h.first(o);
    float* out = y + (frame * s.h.out + o) * out_row;
    if (taps > 1) {
      float* to = scratch(1, row);
      max_of_rows(line, row, taps, row, to);
      line = to;
    }
    along_width(s.w, [&](int64_t first, int64_t outputs, int64_t in, int64_t count) {
      max_of_rows(line + in * s.c, s.c, count, outputs * s.c, out + first * s.c);
    });
  }
}

template <class Place>
void forward_block(const PoolShape& s, const float* x, float* y, Place* places, int64_t frame, const Block& block) {
  const int64_t row = s.w.in * s.c, out_row = s.w.out * s.c;
  const int64_t top = rows_first(s.h, block), rows = rows_last(s.h, block) - top;
  const int64_t num_frames = s.t.last(frame) - s.t.first(frame);
  // What the padding leaves out is counted in the places: they number the whole window.
  const auto skipped = [](const PoolAxis& a, int64_t o) { return static_cast<float>(a.first(o) - (o * a.stride - a.padding)); };
  const float frame_unit = static_cast<float>(s.h.window * s.w.window), row_unit = static_cast<float>(s.w.window);
  float* best = scratch(0, rows * row);
  float* best_places = scratch(1, rows * row);
  max_of_rows(x + (s.t.first(frame) * s.h.in + top) * row, nullptr, s.h.in * row, num_frames, rows * row,
              skipped(s.t, frame) * frame_unit, frame_unit, best, best_places);
  float* line = scratch(2, row);
  float* line_places = scratch(3, row);
  float* last_places = scratch(4, out_row);
  for (int64_t o = block.row_begin; o < block.row_end; ++o) {
    const int64_t from = (s.h.first(o) - top) * row;
    max_of_rows(best + from, best_places + from, row, s.h.last(o) - s.h.first(o), row, skipped(s.h, o) * row_unit,
                row_unit, line, line_places);
    const int64_t to = (frame * s.h.out + o) * out_row;
    along_width(s.w, [&](int64_t first, int64_t outputs, int64_t in, int64_t count) {
      max_of_rows(line + in * s.c, line_places + in * s.c, s.c, count, outputs * s.c, skipped(s.w, first), 1.0f,
                  y + to + first * s.c, last_places + first * s.c);
    });
    narrow(last_places, out_row, places + to);
  }
}

// ---- backward: each input collects from the windows that hold it, in scan order, those that chose it

#if defined(__AVX512F__)
inline vec chosen(const uint8_t* places, uint8_t place, const float* dy, int n) {
  const mask m = tail(n);
  const __mmask16 equal = _mm_mask_cmpeq_epi8_mask(m, _mm_maskz_loadu_epi8(m, places), _mm_set1_epi8(static_cast<char>(place)));
  return (vec)_mm512_maskz_loadu_ps(equal, dy);
}
inline vec chosen(const uint16_t* places, uint16_t place, const float* dy, int n) {
  const mask m = tail(n);
  const __mmask16 equal =
      _mm256_mask_cmpeq_epi16_mask(m, _mm256_maskz_loadu_epi16(m, places), _mm256_set1_epi16(static_cast<short>(place)));
  return (vec)_mm512_maskz_loadu_ps(equal, dy);
}
#else
template <class Place>
inline vec chosen(const Place* places, Place place, const float* dy, int n) {
  typedef Place narrow_ints __attribute__((vector_size(LANES * sizeof(Place))));
  narrow_ints p{};
  if (n == LANES)
    __builtin_memcpy(&p, places, sizeof(p));
  else
    for (int i = 0; i < n; ++i) p[i] = places[i];
  const ints equal = __builtin_convertvector(p, ints) == static_cast<int32_t>(place);
  const vec value = n == LANES ? load(dy) : load(dy, tail(n));
  return (vec)((ints)value & equal);
}
#endif

template <class Place>
struct Tap {
  const float* dy;
  const Place* places;
  Place place;
};

// Several vectors at once: each tap is looked up once for all of them.
template <int V, class Place>
inline void collect_vectors(const Tap<Place>* taps, int64_t count, int left, int64_t j, float* dx) {
  vec sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = vec{};
  for (int64_t i = 0; i < count; ++i) {
    const Place place = taps[i].place;
    const Place* places = taps[i].places + j;
    const float* dy = taps[i].dy + j;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[v] += chosen(places + v * LANES, place, dy + v * LANES, static_cast<int>(smaller(LANES, left - v * LANES)));
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(dx + j + v * LANES, sum[v], tail(left - v * LANES));
}

template <class Place>
void collect(const Tap<Place>* taps, int64_t count, int64_t length, float* dx) {
  int64_t j = 0;
  for (; j + 4 * LANES <= length; j += 4 * LANES) collect_vectors<4>(taps, count, 4 * LANES, j, dx);
  for (; j < length; j += LANES)
    collect_vectors<1>(taps, count, static_cast<int>(smaller(LANES, length - j)), j, dx);
}

// The outputs whose windows hold input `i`: [first, last).
struct Holders {
  int64_t first, last;
  Holders(const PoolAxis& a, int64_t i)
      : first(larger(0, (i + a.padding - a.window + a.stride) / a.stride)),
        last(smaller(a.out, (i + a.padding) / a.stride + 1)) {
    if (i + a.padding - a.window < 0) first = 0;
  }
};

template <class Place>
void backward_row(const PoolShape& s, const float* dy, const Place* places, float* dx, int64_t t, int64_t h) {
  const Holders frames(s.t, t), rows(s.h, h);
  const int64_t most = larger(1, (frames.last - frames.first) * (rows.last - rows.first) * s.w.window);
  auto* taps = reinterpret_cast<Tap<Place>*>(scratch(0, most * sizeof(Tap<Place>) / sizeof(float)));
  // Inputs held by windows at the same distances: all inner ones at stride 1.
  const int64_t inner_begin = s.w.stride == 1 ? larger(0, s.w.window - 1 - s.w.padding) : s.w.in;
  const int64_t inner_end = smaller(s.w.in, s.w.out - s.w.padding);
  for (int64_t w = 0, run; w < s.w.in; w += run) {
    run = w == inner_begin && inner_begin < inner_end ? inner_end - inner_begin : 1;
    const Holders columns(s.w, w);
    int64_t count = 0;
    for (int64_t i = frames.first; i < frames.last; ++i)
      for (int64_t j = rows.first; j < rows.last; ++j)
        for (int64_t k = columns.first; k < columns.last; ++k) {
          const int64_t at = ((i * s.h.out + j) * s.w.out + k) * s.c;
          const int64_t place = ((t - i * s.t.stride + s.t.padding) * s.h.window + h - j * s.h.stride + s.h.padding) * s.w.window +
                                w - k * s.w.stride + s.w.padding;
          taps[count++] = {dy + at, places + at, static_cast<Place>(place)};
        }
    collect(taps, count, run * s.c, dx + ((t * s.h.in + h) * s.w.in + w) * s.c);
  }
}

template <class Place>
void backward(const PoolShape& s, const float* dy, const Place* places, float* dx, int threads) {
  const int64_t in = s.t.in * s.h.in * s.w.in * s.c, out = s.t.out * s.h.out * s.w.out * s.c;
  parallel(s.n * s.t.in, threads, [&](int64_t piece, int) {
    const int64_t n = piece / s.t.in, t = piece % s.t.in;
    for (int64_t h = 0; h < s.h.in; ++h) backward_row(s, dy + n * out, places + n * out, dx + n * in, t, h);
  });
}

}  // namespace

void max_pool(const PoolShape& s, const float* x, float* y, void* places, int place_bytes, int threads) {
  const int64_t in = s.t.in * s.h.in * s.w.in * s.c, out = s.t.out * s.h.out * s.w.out * s.c;
  // The frames that a block looks at stay in the second-level cache: each is read for several outputs.
  const int64_t row = s.w.in * s.c * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = (512 << 10) / (row * larger(1, smaller(s.t.window, 4))) / s.h.stride;
  int64_t height = larger(1, smaller(s.h.out, fitting));
  const int64_t blocks = (s.h.out + height - 1) / height;
  height = (s.h.out + blocks - 1) / blocks;
  // A thread walks along time where there are pieces enough, so that frames are still in its cache.
  const int64_t chunks = s.n * blocks >= 4 * threads ? 1 : smaller(s.t.out, 4 * threads);
  const int64_t length = (s.t.out + chunks - 1) / chunks;
  parallel(s.n * blocks * chunks, threads, [&](int64_t piece, int) {
    const int64_t chunk = piece % chunks, b = piece / chunks % blocks, n = piece / chunks / blocks;
    const Block block{smaller(b * height, s.h.out), smaller((b + 1) * height, s.h.out)};
    if (block.row_begin == block.row_end) return;
    for (int64_t frame = chunk * length; frame < smaller((chunk + 1) * length, s.t.out); ++frame)
      if (!places)
        forward_block(s, x + n * in, y + n * out, frame, block);
      else if (place_bytes == 1)
        forward_block(s, x + n * in, y + n * out, static_cast<uint8_t*>(places) + n * out, frame, block);
      else
        forward_block(s, x + n * in, y + n * out, static_cast<uint16_t*>(places) + n * out, frame, block);
  });
}

void max_pool_backward(const PoolShape& s, const float* dy, const void* places, int place_bytes, float* dx, int threads) {
  if (place_bytes == 1)
    backward(s, dy, static_cast<const uint8_t*>(places), dx, threads);
  else
    backward(s, dy, static_cast<const uint16_t*>(places), dx, threads);
}

}  // namespace lean3d::LEAN3D_ISA
