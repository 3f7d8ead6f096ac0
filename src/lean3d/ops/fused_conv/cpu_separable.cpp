// One kernel a channel, and a pointwise product behind it.
#include "blocks.h"

namespace lean3d::LEAN3D_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 7;  // places along the width that share what they load: 7 sums, 15 inputs at stride 2
#else
constexpr int TILE = 4;
#endif
constexpr int MAX_ROWS = 64;  // rows of a depthwise kernel; callers keep to it

struct Depthwise {
  int64_t c, padded;
  const float* bias;
  bool relu;
};

// Channels [at, at + LANES) of COUNT places, inputs at rows[i], kernel rows of kw at weights[i]; KW, SW: 0 where only
// known at run time. WHOLE: all these channels exist.
template <int COUNT, int KW, int SW, bool WHOLE>
inline __attribute__((always_inline)) void depthwise_vector(const Depthwise& d, const float* const* rows,
                                                            const float* const* weights, int num_rows, int kw_,
                                                            int64_t sw_, const float* residual, float* y,
                                                            int64_t pitch, int64_t at) {
  const int kw = KW ? KW : kw_;
  const int64_t sw = SW ? SW : sw_, c = d.c;
  const mask m = tail(static_cast<int>(c - at));
  const auto get = [&](const float* p) { return WHOLE ? load(p) : load(p, m); };
  vec sum[COUNT];
  const vec bias = d.bias ? load(d.bias + at) : vec{};
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) sum[i] = bias;
  for (int r = 0; r < num_rows; ++r) {
    const float* in = rows[r] + at;
    const float* weight = weights[r] + at;
    if constexpr (KW > 0) {
      vec x[(COUNT - 1) * SW + KW];
#pragma GCC unroll 24
      for (int i = 0; i < (COUNT - 1) * SW + KW; ++i) x[i] = get(in + i * c);
#pragma GCC unroll 8
      for (int q = 0; q < KW; ++q) {
        const vec w = load(weight + q * d.padded);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) sum[i] += x[i * SW + q] * w;
      }
    } else {
      for (int q = 0; q < kw; ++q) {
        const vec w = load(weight + q * d.padded);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) sum[i] += get(in + (i * sw + q) * c) * w;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) {
    vec v = sum[i];
    if (residual) v += get(residual + i * pitch + at);
    if (d.relu) v = relu(v);
    if constexpr (WHOLE)
      store(y + i * pitch + at, v);
    else
      store(y + i * pitch + at, v, m);
  }
}

template <int COUNT, int KW, int SW>
void depthwise_tile(const Depthwise& d, const float* const* rows, const float* const* weights, int num_rows, int kw,
                    int64_t sw, const float* residual, float* y, int64_t pitch) {
  int64_t at = 0;
  for (; at + LANES <= d.c; at += LANES)
    depthwise_vector<COUNT, KW, SW, true>(d, rows, weights, num_rows, kw, sw, residual, y, pitch, at);
  if (at < d.c) depthwise_vector<COUNT, KW, SW, false>(d, rows, weights, num_rows, kw, sw, residual, y, pitch, at);
}

using DepthwiseTile = void (*)(const Depthwise&, const float* const*, const float* const*, int, int, int64_t,
                               const float*, float*, int64_t);
struct DepthwiseTable {
  DepthwiseTile by_count[TILE];
};
template <int KW, int SW, int... I>
constexpr DepthwiseTable depthwise_table(std::integer_sequence<int, I...>) {
  return {{depthwise_tile<I + 1, KW, SW>...}};
}
constexpr auto DEPTHWISE = depthwise_table<0, 0>(std::make_integer_sequence<int, TILE>{});
constexpr auto DEPTHWISE_3 = depthwise_table<3, 1>(std::make_integer_sequence<int, TILE>{});
constexpr auto DEPTHWISE_3_2 = depthwise_table<3, 2>(std::make_integer_sequence<int, TILE>{});

// Output row (t, h): its W' places, `pitch` floats apart at y (and at the residual). x points at the clip.
void depthwise_row(const Depthwise& d, const ConvShape& s, const float* x, const float* weight, int64_t t, int64_t h,
                   const float* residual, float* y, int64_t pitch) {
  const float* rows[MAX_ROWS];
  const float* weights[MAX_ROWS];
  const float* here_rows[MAX_ROWS];
  const float* here_weights[MAX_ROWS];
  int count = 0;
  for (int64_t a = 0; a < s.kt; ++a)
    for (int64_t r = 0; r < s.kh; ++r) {
      const int64_t f = t * s.st - s.pt + a, g = h * s.sh - s.ph + r;
      if (f < 0 || f >= s.t || g < 0 || g >= s.h) continue;
      rows[count] = x + (f * s.h + g) * s.w * s.c;
      weights[count++] = weight + (a * s.kh + r) * s.kw * d.padded;
    }
  // Places from `begin` to `end` have all columns of the kernel inside.
  const int64_t begin = std::min(s.wo, ceil_div(s.pw, s.sw));
  const int64_t end = s.w + s.pw < s.kw ? begin : std::max(begin, std::min(s.wo, (s.w + s.pw - s.kw) / s.sw + 1));
  const auto& table = s.kw == 3 && s.sw == 1 ? DEPTHWISE_3 : s.kw == 3 && s.sw == 2 ? DEPTHWISE_3_2 : DEPTHWISE;
  const auto run = [&](int64_t w, int64_t q0, int64_t q1, const DepthwiseTile tile) {
    for (int i = 0; i < count; ++i) {
      here_rows[i] = rows[i] + (w * s.sw - s.pw + q0) * s.c;
      here_weights[i] = weights[i] + q0 * d.padded;
    }
    tile(d, here_rows, here_weights, count, static_cast<int>(q1 - q0), s.sw, residual ? residual + w * pitch : nullptr,
         y + w * pitch, pitch);
  };
  const int64_t tiles = ceil_div(end - begin, TILE);
  for (int64_t w = 0; w < s.wo;) {
    if (w == begin && tiles) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t places = (end - begin) / tiles + (tile < (end - begin) % tiles);
        run(w, 0, s.kw, table.by_count[places - 1]);
        w += places;
      }
      continue;
    }
    const int64_t q = w * s.sw - s.pw;
    const int64_t q0 = std::min(s.kw, std::max<int64_t>(0, -q)), q1 = std::max(q0, std::min(s.kw, s.w - q));
    run(w, q0, q1, DEPTHWISE.by_count[0]);
    ++w;
  }
}

}  // namespace

void conv_depthwise(const float* x, const float* weight, float* y, const ConvShape& s, const ConvEpilogue& epilogue,
                    int threads) {
  const Depthwise d{s.c, round_up(s.c, 16), epilogue.bias, epilogue.relu};
  // Some rows at a time: large enough to be worth a piece, small enough that their inputs are read once.
  const int64_t rows = std::max<int64_t>(1, std::min(s.ho, ceil_div(16 << 10, s.wo * s.c)));
  const int64_t blocks = ceil_div(s.ho, rows);
  parallel(s.n * s.to * blocks, threads, [&](int64_t piece, int) {
    const int64_t frame = piece / blocks, h0 = piece % blocks * rows;
    const float* clip = x + frame / s.to * s.t * s.h * s.w * s.c;
    for (int64_t h = h0; h < std::min(s.ho, h0 + rows); ++h) {
      const int64_t at = (frame * s.ho + h) * s.wo * s.c;
      depthwise_row(d, s, clip, weight, frame % s.to, h, epilogue.residual ? epilogue.residual + at : nullptr, y + at,
                    s.c);
    }
  });
}

// ---- stage two, and what may stand around it

namespace {

// Frame `t` of the product in time, rows [r0, r1), to `to`; x points at the clip.
void temporal_rows(const float* x, const TemporalProduct& first, const ConvShape& s, int64_t t, int64_t r0, int64_t r1,
                   float* to) {
  const int64_t begin = t * first.s - first.p, row = s.w * first.c;  // frames outside are left out
  const int64_t a0 = std::max<int64_t>(0, -begin), a1 = std::max(a0, std::min(first.k, first.t - begin));
  int64_t taps[MAX_ROWS];
  for (int64_t a = a0; a < a1; ++a) taps[a - a0] = ((begin + a) * s.h + r0) * row;
  const Places places{1, 1, (r1 - r0) * s.w, 0, 0, first.c, 0, 0};
  const Output out{to, s.c, first.bias, 0, nullptr, first.relu};
  Ahead ahead{};
  for (int64_t j = 0; j < s.c; j += gemm_nr())
    product(places, x, taps, static_cast<int>(a1 - a0), first.c,
            first.packed + j * first.k * first.c + a0 * first.c * gemm_nr(), j, 0, 0, out, ahead);
}

constexpr int MAX_SHRINK = 64;  // places of a window; callers keep to it

// `count` windows' maxima: window i's places are at taps[...] + i * step. COUNT: 0 where only known at run time.
template <int COUNT>
void shrink_run(const float* const* taps, int num_taps, int64_t step, int64_t channels, int64_t count, float* y) {
  const mask m = tail(static_cast<int>(channels % LANES));
  for (int64_t i = 0; i < count; ++i, y += channels) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      vec v = load(taps[0] + i * step + c);
#pragma GCC unroll 8
      for (int k = 1; k < (COUNT ? COUNT : num_taps); ++k) v = max(v, load(taps[k] + i * step + c));
      store(y + c, v);
    }
    if (c < channels) {
      vec v = load(taps[0] + i * step + c, m);
      for (int k = 1; k < num_taps; ++k) v = max(v, load(taps[k] + i * step + c, m));
      store(y + c, v, m);
    }
  }
}

// One row of windows: `frames` x `rows` rows of `columns` places from `from`, frames `pitch` floats apart.
void shrink_row(const Shrink& shrink, const float* from, int64_t frames, int64_t rows, int64_t columns, int64_t pitch,
                int64_t channels, float* y) {
  const float* taps[MAX_SHRINK];
  const auto run = [&](int64_t first, int64_t width, int64_t count) {
    int n = 0;
    for (int64_t f = 0; f < frames; ++f)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = 0; q < width; ++q)
          taps[n++] = from + f * pitch + (r * columns + first * shrink.w + q) * channels;
    const auto way = n == 4 ? shrink_run<4> : n == 8 ? shrink_run<8> : shrink_run<0>;
    way(taps, n, shrink.w * channels, channels, count, y + first * channels);
  };
  const int64_t whole = std::min(shrink.wo, columns / shrink.w);
  if (whole) run(0, shrink.w, whole);
  if (whole < shrink.wo) run(whole, columns - whole * shrink.w, 1);
}

}  // namespace

void conv_stage_two(const float* x, const TemporalProduct& first, const float* weight, const float* bias, bool relu,
                    const float* packed, float* y, const ConvShape& s, const Shrink& shrink,
                    const ConvEpilogue& epilogue, int threads) {
  const Depthwise d{s.c, round_up(s.c, 16), bias, relu};
  const int64_t step = step_of(s.c), mr = gemm_mr();
  const bool shrinks = shrink.t * shrink.h * shrink.w > 1;
  // What the windows leave out is not computed.
  const int64_t all_frames = std::min(s.to, shrink.to * shrink.t), all_rows = std::min(s.ho, shrink.ho * shrink.h);
  // The middle of a block lies in a strip of the second-level cache: more of it where weights are large.
  const int64_t wanted = s.c * s.o > LARGE_WEIGHTS ? 14 * mr : 8 * mr;
  int64_t rows = std::max<int64_t>(1, std::min(all_rows, wanted / s.wo)), frames = 1;
  if (rows == all_rows) frames = std::max<int64_t>(1, std::min(all_frames, wanted / (all_rows * s.wo)));
  rows = round_up(ceil_div(all_rows, ceil_div(all_rows, rows)), shrink.h);
  frames = round_up(frames, shrink.t);
  // A product in front is computed for several blocks at a time, since blocks share rows of it.
  int64_t band = rows;
  if (first.packed) {
    const int64_t fitting = std::max<int64_t>(1, STRIP / 2 / (frames * s.w * s.c * s.sh) / rows) * rows;
    const int64_t shared = round_up(ceil_div(all_rows * s.n * ceil_div(all_frames, frames), 4 * threads), rows);
    band = std::max(rows, std::min(fitting, shared));
  }
  const int64_t bands = ceil_div(all_rows, band), by_frames = ceil_div(all_frames, frames);
  const int64_t zero_tap = 0;
  const int64_t pieces = s.n * by_frames * bands;
  parallel(pieces, threads, [&](int64_t piece, int) {
    const int64_t n = piece / (by_frames * bands), t0 = piece / bands % by_frames * frames;
    const int64_t t1 = std::min(all_frames, t0 + frames), begin = piece % bands * band;
    const int64_t end = std::min(all_rows, begin + band);
    float* middle = scratch(0, (t1 - t0) * rows * s.wo * step);
    float* sums = shrinks ? scratch(1, (t1 - t0) * rows * s.wo * s.o) : nullptr;
    // What the depthwise kernel reads: the clip, or some rows of some frames of it that were just made.
    ConvShape in = s;
    const float* from = x + n * s.t * s.h * s.w * s.c;
    int64_t from_frame = 0;
    if (first.packed) {
      const int64_t r0 = std::min(s.h, std::max<int64_t>(0, begin * s.sh - s.ph));
      const int64_t r1 = std::max(r0, std::min(s.h, (end - 1) * s.sh - s.ph + s.kh));
      float* made = scratch(2, (t1 - t0) * (r1 - r0) * s.w * s.c);
      for (int64_t t = t0; t < t1; ++t)
        temporal_rows(x + n * first.t * s.h * s.w * first.c, first, s, t, r0, r1, made + (t - t0) * (r1 - r0) * s.w * s.c);
      in.t = t1 - t0;
      in.h = r1 - r0;
      in.ph += r0;
      from = made;
      from_frame = t0;
    }
    for (int64_t h0 = begin; h0 < end; h0 += rows) {
      const int64_t h1 = std::min(end, h0 + rows);
      float* to = middle;
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t h = h0; h < h1; ++h, to += s.wo * step)
          depthwise_row(d, in, from, weight, t - from_frame, h, nullptr, to, step);
      const int64_t count = (h1 - h0) * s.wo;
      const Output out{shrinks ? sums : y, s.o, epilogue.bias, 0, epilogue.residual, epilogue.relu};
      const Places places{t1 - t0, h1 - h0, s.wo, count * step, s.wo * step, step, shrinks ? count : s.ho * s.wo, s.wo};
      const int64_t at = shrinks ? 0 : ((n * s.to + t0) * s.ho + h0) * s.wo;
      Ahead ahead{};
      if (!first.packed && piece + threads < pieces) {  // what the next block reads comes from memory meanwhile
        const int64_t next = piece + threads, t = next / bands % by_frames * frames * s.st - s.pt;
        const int64_t r0 = std::max<int64_t>(0, next % bands * band * s.sh - s.ph), row = s.w * s.c;
        ahead = {x + ((next / (by_frames * bands) * s.t + std::max<int64_t>(0, t)) * s.h + r0) * row, frames * s.st,
                 std::min(s.h - r0, rows * s.sh + s.kh - 1) * row, s.h * row, 0};
      }
      for (int64_t j = 0; j < s.o; j += gemm_nr())
        product(places, middle, &zero_tap, 1, s.c, packed + j * s.c, j, at, 0, out, ahead);
      if (!shrinks) continue;
      for (int64_t t = t0; t < t1; t += shrink.t)
        for (int64_t h = h0; h < h1; h += shrink.h)
          shrink_row(shrink, sums + ((t - t0) * count + (h - h0) * s.wo) * s.o, std::min(shrink.t, t1 - t),
                     std::min(shrink.h, h1 - h), s.wo, count * s.o, s.o,
                     y + (((n * shrink.to + t / shrink.t) * shrink.ho + h / shrink.h) * shrink.wo) * s.o);
    }
  });
}

}  // namespace lean3d::LEAN3D_ISA
