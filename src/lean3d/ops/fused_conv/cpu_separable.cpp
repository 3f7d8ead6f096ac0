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

void conv_stage_two(const float* x, const float* weight, const float* bias, bool relu, const float* packed, float* y,
                    const ConvShape& s, const ConvEpilogue& epilogue, int threads) {
  const Depthwise d{s.c, round_up(s.c, 16), bias, relu};
  const int64_t step = step_of(s.c), mr = gemm_mr();
  // The middle of a block lies in a strip of the second-level cache: more of it where weights are large.
  const int64_t wanted = s.c * s.o > LARGE_WEIGHTS ? 14 * mr : 8 * mr;
  int64_t rows = std::max<int64_t>(1, std::min(s.ho, wanted / s.wo)), frames = 1;
  if (rows == s.ho) frames = std::max<int64_t>(1, std::min(s.to, wanted / (s.ho * s.wo)));
  rows = ceil_div(s.ho, ceil_div(s.ho, rows));
  const int64_t by_rows = ceil_div(s.ho, rows), by_frames = ceil_div(s.to, frames);
  const Output out{y, s.o, epilogue.bias, 0, epilogue.residual, epilogue.relu};
  const int64_t zero_tap = 0;
  parallel(s.n * by_frames * by_rows, threads, [&](int64_t piece, int) {
    const int64_t n = piece / (by_frames * by_rows), t0 = piece / by_rows % by_frames * frames;
    const int64_t h0 = piece % by_rows * rows;
    const int64_t t1 = std::min(s.to, t0 + frames), h1 = std::min(s.ho, h0 + rows);
    float* middle = scratch(0, (t1 - t0) * (h1 - h0) * s.wo * step);
    float* to = middle;
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t h = h0; h < h1; ++h, to += s.wo * step)
        depthwise_row(d, s, x + n * s.t * s.h * s.w * s.c, weight, t, h, nullptr, to, step);
    Ahead ahead{};
    const Places places{t1 - t0, h1 - h0, s.wo, (h1 - h0) * s.wo * step, s.wo * step, step, s.ho * s.wo, s.wo};
    for (int64_t j = 0; j < s.o; j += gemm_nr())
      product(places, middle, &zero_tap, 1, s.c, packed + j * s.c, j, ((n * s.to + t0) * s.ho + h0) * s.wo, 0, out, ahead);
  });
}

}  // namespace lean3d::LEAN3D_ISA
