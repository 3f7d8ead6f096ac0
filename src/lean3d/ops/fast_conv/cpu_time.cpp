// The fast algorithm in time around a direct kernel in the plane, whatever its size and stride: for stems, whose few
// channels make a tile of the clip small enough to be transformed where it is copied to.
//
//     strip      m + K - 1 frames of some rows, zeros around them      V = B^T x    over time, in place
//     products   at each point in time a flat direct convolution       M = V U
//     y          m frames of those rows                                A^T M, + bias, + residual, relu; if asked, only
//                                                                      the maxima over windows side by side are kept
#include "../fused_conv/blocks.h"
#include "cpu.h"

namespace lean3d::LEAN3D_ISA {
namespace {

constexpr int64_t PRODUCTS = 192 << 10;  // floats of all points that a block makes: they stay in the second-level cache

// Places [0, count) of N frames, `count` apart, into the points they make; bt is (N, N).
template <int N>
void to_points_in_time(float* frames, int64_t count, const float* bt) {
  for (int64_t i = 0; i < count; i += LANES) {
    const mask m = tail(static_cast<int>(std::min<int64_t>(LANES, count - i)));
    vec d[N];
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) d[t] = load(frames + t * count + i, m);
    for (int p = 0; p < N; ++p) {
      vec sum = bt[p * N] * d[0];
#pragma GCC unroll 8
      for (int t = 1; t < N; ++t) sum += bt[p * N + t] * d[t];
      store(frames + p * count + i, sum, m);
    }
  }
}

// A row of outputs of one frame from its points, `step` apart; at is that frame's row of A^T.
template <int N>
void from_points(const float* points, int64_t step, const float* at, const float* bias, const float* residual, bool rectify,
                 int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += LANES) {
    const mask m = tail(static_cast<int>(std::min<int64_t>(LANES, count - i)));
    vec sum = bias ? load(bias + i, m) : vec{};
#pragma GCC unroll 8
    for (int p = 0; p < N; ++p) sum += at[p] * load(points + p * step + i, m);
    if (residual) sum += load(residual + i, m);
    store(y + i, rectify ? relu(sum) : sum, m);
  }
}

// Maxima over `high` rows of x, (W, channels) each, and windows of `wide` columns, the last ones cut off at w.
void shrink_rows(const float* x, int64_t w, int64_t channels, int64_t high, int64_t wide, int64_t columns, float* y) {
  for (int64_t q = 0; q < columns; ++q, y += channels)
    for (int64_t c = 0; c < channels; c += LANES) {
      const mask m = tail(static_cast<int>(std::min<int64_t>(LANES, channels - c)));
      const int64_t begin = q * wide, end = std::min(w, begin + wide);
      vec most = load(x + begin * channels + c, m);
      for (int64_t r = 0; r < high; ++r)
        for (int64_t i = begin; i < end; ++i) most = max(most, load(x + (r * w + i) * channels + c, m));
      store(y + c, most, m);
    }
}

template <int N>
void run(const float* x, const float* packed, const float* bt, const float* at, float* y, const ConvShape& s,
         const PlaneShrink& shrink, const ConvEpilogue& epilogue, int threads) {
  const int64_t m = N + 1 - s.kt, tiles = ceil_div(s.to, m);
  const int64_t columns = (s.wo - 1) * s.sw + s.kw, pitch = columns * s.c, line = s.wo * s.o;
  const int64_t fitting = std::min((STRIP / (N * pitch) - s.kh) / s.sh + 1, PRODUCTS / (N * line));
  int64_t rows = std::min(s.ho, std::max<int64_t>(1, fitting));
  while (rows > 1 && threads > 1 && s.n * tiles * ceil_div(s.ho, rows) < 4 * threads) rows = halves(rows);
  rows = round_up(ceil_div(s.ho, ceil_div(s.ho, rows)), shrink.h);  // no window is in two bands
  const int64_t bands = ceil_div(s.ho, rows), panels = ceil_div(s.o, gemm_nr());
  const int64_t k = s.kw * s.c, panel = s.kh * k * gemm_nr();
  parallel(s.n * tiles * bands, threads, [&](int64_t piece, int) {
    const int64_t clip = piece / bands / tiles, t0 = piece / bands % tiles * m;
    const int64_t h0 = piece % bands * rows, high = std::min(rows, s.ho - h0);
    const int64_t r0 = h0 * s.sh - s.ph, r1 = (h0 + high - 1) * s.sh - s.ph + s.kh;
    const int64_t frame = (r1 - r0) * pitch, point = high * line;
    float* const strip = scratch(0, N * frame);
    for (int64_t i = 0; i < N; ++i) {
      const int64_t t = t0 - s.pt + i;
      if (t < 0 || t >= s.t)
        zero(strip + i * frame, frame);
      else
        fill_strip(strip + i * frame, x + (clip * s.t + t) * s.h * s.w * s.c, s, s.c, 1, r0, r1, -s.pw,
                   columns - s.pw);
    }
    to_points_in_time<N>(strip, frame, bt);
    float* const products = scratch(1, N * point);
    const Places places{1, high, s.wo, frame, s.sh * pitch, s.sw * s.c, high * s.wo, s.wo};
    int64_t taps[MAX_TAPS];
    for (int64_t r = 0; r < s.kh; ++r) taps[r] = r * pitch;
    Ahead ahead{};
    for (int64_t p = 0; p < N; ++p) {
      const Output out{products + p * point, s.o, nullptr, 0, nullptr, false};
      for (int64_t j = 0; j < panels; ++j)
        product(places, strip + p * frame, taps, static_cast<int>(s.kh), k, packed + (p * panels + j) * panel,
                j * gemm_nr(), 0, 0, out, ahead);
    }
    const int64_t frames = std::min(m, s.to - t0), wide = shrink.columns, channels = line / wide;
    const auto row = [&](int64_t i, int64_t h, int64_t to, float* where) {
      from_points<N>(products + h * line, point, at + i * N, epilogue.bias,
                     epilogue.residual ? epilogue.residual + to : nullptr, epilogue.relu, line, where);
    };
    for (int64_t i = 0; i < frames; ++i) {
      const int64_t f = clip * s.to + t0 + i;
      if (shrink.h == 1 && shrink.w == 1) {
        for (int64_t h = 0; h < high; ++h) row(i, h, (f * s.ho + h0 + h) * line, y + (f * s.ho + h0 + h) * line);
        continue;
      }
      float* const window = scratch(2, shrink.h * line);
      for (int64_t h = 0; h < high && (h0 + h) / shrink.h < shrink.ho; h += shrink.h) {
        const int64_t there = std::min(shrink.h, high - h);
        for (int64_t r = 0; r < there; ++r) row(i, h + r, 0, window + r * line);
        shrink_rows(window, wide, channels, there, shrink.w, shrink.wo,
                    y + (f * shrink.ho + (h0 + h) / shrink.h) * shrink.wo * channels);
      }
    }
  });
}

}  // namespace

void conv_in_time(const float* x, const float* packed, const float* bt, const float* at, float* y, const ConvShape& s,
                  int64_t points, const PlaneShrink& shrink, const ConvEpilogue& epilogue, int threads) {
  (points == 4 ? run<4> : points == 6 ? run<6> : run<8>)(x, packed, bt, at, y, s, shrink, epilogue,
                                                                       threads);
}

}  // namespace lean3d::LEAN3D_ISA
