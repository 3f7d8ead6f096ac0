// The SmallBig unit.
#include "blocks.h"

namespace lean3d::LEAN3D_ISA {
namespace {

constexpr int64_t CHANNELS = 128;
constexpr int MAX_WINDOW = 64;

// Maxima over `count` floats (a multiple of LANES) of NUM arrays, of `num` where NUM is 0.
template <int NUM>
inline void maximum(const float* const* from, int num, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    vec v = load(from[0] + i);
#pragma GCC unroll 3
    for (int k = 1; k < (NUM ? NUM : num); ++k) v = max(v, load(from[k] + i));
    store(to + i, v);
  }
}

inline void maximum(const float* const* from, int num, float* to, int64_t count) {
  num == 3 ? maximum<3>(from, num, to, count) : maximum<0>(from, num, to, count);
}

// The pool of one clip's channels [c0, c0 + channels), columns [left, right), for rows that come one after another.
// Over time first, then along the width: what is left is a maximum of the last `window_h` rows.
struct Pool {
  const ConvShape& s;
  const float* clip;
  int64_t c0, channels, left, right;
  int64_t rt, rh, rw;
  int64_t from, until, width;  // columns that maxima are over, floats of each in the buffers
  float* over_time;            // one row
  float* over_width;           // a ring of 2 rh + 1 rows

  float* ring_row(int64_t r) const { return over_width + r % (2 * rh + 1) * (until - from) * width; }

  template <int FRAMES>
  void row_over_time(int64_t r, int64_t first, int frames_) const {
    const int frames = FRAMES ? FRAMES : frames_;
    const int64_t frame = s.h * s.w * s.c;
    const mask m = tail(static_cast<int>(channels % LANES));
    const float* p = clip + ((first * s.h + r) * s.w + from) * s.c + c0;
    float* to = over_time;
    for (int64_t w = from; w < until; ++w, p += s.c, to += width) {
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES) {
        vec v = load(p + c);
#pragma GCC unroll 3
        for (int f = 1; f < frames; ++f) v = max(v, load(p + f * frame + c));
        store(to + c, v);
      }
      if (c < channels) {
        vec v = load(p + c, m);
        for (int f = 1; f < frames; ++f) v = max(v, load(p + f * frame + c, m));
        store(to + c, v);
      }
    }
  }

  // Take in row r of frame t.
  void row(int64_t t, int64_t r) const {
    const int64_t first = std::max<int64_t>(0, t - rt), last = std::min(s.t - 1, t + rt);
    if (last - first == 2)
      row_over_time<3>(r, first, 3);
    else
      row_over_time<0>(r, first, static_cast<int>(last - first + 1));
    const auto columns = [&](int64_t begin, int64_t end, int64_t q0, int64_t q1) {  // around begin: [q0, q1]
      const float* around[MAX_WINDOW];
      for (int64_t q = q0; q <= q1; ++q) around[q - q0] = over_time + (q - from) * width;
      maximum(around, static_cast<int>(q1 - q0 + 1), ring_row(r) + (begin - from) * width, (end - begin) * width);
    };
    const int64_t inner = std::min(right, std::max(left, from + rw)), end = std::max(inner, std::min(right, until - rw));
    for (int64_t w = left; w < inner; ++w) columns(w, w + 1, std::max(from, w - rw), std::min(until - 1, w + rw));
    if (inner < end) columns(inner, end, inner - rw, inner + rw);
    for (int64_t w = end; w < right; ++w) columns(w, w + 1, std::max(from, w - rw), std::min(until - 1, w + rw));
  }

  // x and its pool side by side, places of row r; the rows around it have been taken in.
  void emit(int64_t t, int64_t r, float* to) const {
    const float* around[MAX_WINDOW];
    int num = 0;
    for (int64_t q = std::max<int64_t>(0, r - rh); q <= std::min(s.h - 1, r + rh); ++q)
      around[num++] = ring_row(q) + (left - from) * width;
    const float* x = clip + ((t * s.h + r) * s.w + left) * s.c + c0;
    num == 3 ? side_by_side<3>(x, around, num, to) : side_by_side<0>(x, around, num, to);
  }

  template <int NUM>
  void side_by_side(const float* x, const float* const* around, int num, float* to) const {
    const mask m = tail(static_cast<int>(channels % LANES));
    for (int64_t w = 0; w < right - left; ++w, x += s.c, to += 2 * channels)
      for (int64_t c = 0; c < channels; c += LANES) {
        vec v = load(around[0] + w * width + c);
#pragma GCC unroll 3
        for (int i = 1; i < (NUM ? NUM : num); ++i) v = max(v, load(around[i] + w * width + c));
        if (channels - c >= LANES) {
          store(to + c, load(x + c));
          store(to + channels + c, v);
        } else {
          store(to + c, load(x + c, m), m);
          store(to + channels + c, v, m);
        }
      }
  }
};

}  // namespace

int64_t small_big_channels() { return CHANNELS; }

void conv_small_big(const float* x, const float* packed, float* y, const ConvShape& s, int64_t window_t,
                    int64_t window_h, int64_t window_w, const ConvEpilogue& epilogue, int threads) {
  const int64_t most = std::min(CHANNELS, s.c), width = round_up(most, LANES);
  const Blocks blocks = cut(s, 2 * most, threads, false, std::min<int64_t>(s.to, 4));
  const int64_t rt = window_t / 2, rh = window_h / 2, rw = window_w / 2;
  parallel(blocks.pieces, threads, [&](int64_t piece, int) {
    const Block b = block_of(s, blocks, piece);
    const int64_t r0 = b.h0 * s.sh - s.ph, r1 = (b.h1 - 1) * s.sh - s.ph + s.kh;
    const int64_t q0 = b.w0 * s.sw - s.pw, q1 = (b.w1 - 1) * s.sw - s.pw + s.kw;
    const int64_t left = std::min(q1, std::max<int64_t>(0, q0)), right = std::max(left, std::min(s.w, q1));
    const int64_t begin = std::max<int64_t>(0, r0), end = std::max(begin, std::min(s.h, r1));
    const int64_t from = std::max<int64_t>(0, left - rw), until = std::min(s.w, right + rw);
    const int64_t row = std::max<int64_t>(0, until - from) * width;
    float* strip = scratch(0, (b.t1 - b.t0) * (r1 - r0) * (q1 - q0) * 2 * most);
    float* over_time = scratch(1, row);
    float* over_width = scratch(2, window_h * row);
    const float* clip = x + b.n * s.t * s.h * s.w * s.c;
    const float* panels = packed;
    Ahead ahead{};
    for (int64_t c0 = 0; c0 < s.c; c0 += most) {
      const int64_t channels = std::min(most, s.c - c0), step = 2 * channels, pitch = (q1 - q0) * step;
      const Pool pool{s, clip, c0, channels, left, right, rt, rh, rw, from, until, width, over_time, over_width};
      for (int64_t t = b.t0; t < b.t1; ++t) {
        float* frame = strip + (t - b.t0) * (r1 - r0) * pitch;
        for (int64_t r = r0; r < r1; ++r) {
          float* to = frame + (r - r0) * pitch;
          if (r < begin || r >= end) {
            zero(to, pitch);
          } else {
            zero(to, (left - q0) * step);
            zero(to + (right - q0) * step, (q1 - right) * step);
          }
        }
        for (int64_t r = begin, next = std::max<int64_t>(0, begin - rh); r < end; ++r) {
          for (; next < std::min(s.h, r + rh + 1); ++next) pool.row(t, next);
          pool.emit(t, r, frame + (r - r0) * pitch + (left - q0) * step);
        }
      }
      // Sums over the channels so far wait in y.
      const bool once = c0 == 0, finished = c0 + channels == s.c;
      const Output out{y, s.o, once ? epilogue.bias : nullptr, 0, once ? epilogue.residual : y,
                       finished && epilogue.relu};
      int64_t taps[MAX_TAPS];
      for (int64_t r = 0; r < s.kh; ++r) taps[r] = r * pitch;
      const int64_t k = s.kw * step;
      const Places places{b.t1 - b.t0, b.h1 - b.h0, b.w1 - b.w0, (r1 - r0) * pitch,
                          s.sh * pitch, s.sw * step, s.ho * s.wo, s.wo};
      for (int64_t j = 0; j < s.o; j += gemm_nr())
        product(places, strip, taps, static_cast<int>(s.kh), k, panels + j * s.kh * k, j,
                ((b.n * s.to + b.t0) * s.ho + b.h0) * s.wo + b.w0, 0, out, ahead);
      panels += round_up(s.o, gemm_nr()) * s.kh * k;
    }
  });
}

}  // namespace lean3d::LEAN3D_ISA
