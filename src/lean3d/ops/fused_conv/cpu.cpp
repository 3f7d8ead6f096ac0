#include "cpu.h"

#include <algorithm>
#include <cstring>

#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

constexpr int MAX_TAPS = 512;            // bases of a product; callers keep to it
constexpr int64_t STRIP = 128 << 10;     // floats of input that a block works on: they stay in the second-level cache
constexpr int64_t LARGE_WEIGHTS = 128 << 10;  // floats beyond which weights should meet many places at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- products over blocks of output places ---------------------------------------------------------------------

// Places of a block, frame by frame, row by row. Steps from one to the next, inputs' in floats, outputs' in places.
struct Places {
  int64_t frames, rows, columns;
  int64_t in_frame, in_row, in_column;
  int64_t out_frame, out_row;
};

// Where sums go and what is added: the same for all blocks.
struct Output {
  float* y;
  int64_t channels;  // O
  const float* bias;
  int64_t bias_stride;  // 0: one row for all; O: one for each place
  const float* residual;
  bool relu;
};

// As few loops as the memory allows: rows that follow each other in input and output are one row.
inline Places merged(Places p, bool frames_too) {
  if (p.rows > 1 && p.in_row == p.columns * p.in_column && p.out_row == p.columns) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  if (frames_too && p.rows == 1 && p.in_frame == p.columns * p.in_column && p.out_frame == p.columns) {
    p.columns *= p.frames;
    p.frames = 1;
  }
  return p;
}

// Input of the next block, which comes from memory while this one is computed: some lines with each tile.
struct Ahead {
  const float* at;
  int64_t runs, run, step;  // runs of adjacent floats, from the start of one to the next
  int64_t per_tile;         // lines
  int64_t done;             // floats of the current run
};

inline void prefetch(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.per_tile && ahead.runs > 0; ++i) {
    __builtin_prefetch(ahead.at + ahead.done, 0, 2);
    ahead.done += 16;
    if (ahead.done >= ahead.run) {
      ahead.done = 0;
      ahead.at += ahead.step;
      --ahead.runs;
    }
  }
}

// One panel of the product for a block, whose first output place is `place`, and `bias_place` among the bias rows,
// where each place has one, the same for all frames.
void product(const Places& block, const float* base, const int64_t* taps, int num_taps, int64_t k, const float* panel,
             int64_t first_channel, int64_t place, int64_t bias_place, const Output& out, Ahead& ahead) {
  const Places p = merged(block, !out.bias_stride);
  const int columns = static_cast<int>(std::min<int64_t>(gemm_nr(), out.channels - first_channel));
  const int64_t mr = gemm_mr(), ldc = out.channels, all = p.frames * p.rows;
  const bool pairs = 2 * p.columns <= mr;
  const int64_t tiles = ceil_div(p.columns, mr);
  const auto in_at = [&](int64_t row) { return row / p.rows * p.in_frame + row % p.rows * p.in_row; };
  const auto out_at = [&](int64_t row) { return row / p.rows * p.out_frame + row % p.rows * p.out_row; };
  const auto bias_at = [&](int64_t row) { return out.bias_stride ? bias_place + row % p.rows * p.out_row : 0; };
  const float* bases[MAX_TAPS];
  Epilogue e{nullptr, nullptr, ldc, out.relu, out.bias_stride};
  for (int64_t row = 0; row < all;) {
    const bool pair = pairs && row + 1 < all && out_at(row + 1) == out_at(row) + p.columns &&
                      (!out.bias_stride || bias_at(row + 1) == bias_at(row) + p.columns);
    for (int64_t tile = 0, column = 0; tile < tiles; ++tile) {
      const int64_t count = p.columns / tiles + (tile < p.columns % tiles);
      const float* from = base + in_at(row) + column * p.in_column;
      for (int i = 0; i < num_taps; ++i) bases[i] = from + taps[i];
      prefetch(ahead);
      const int64_t at = (place + out_at(row) + column) * ldc + first_channel;
      if (out.bias) e.bias = out.bias + first_channel + (bias_at(row) + column) * out.bias_stride;
      if (out.residual) e.residual = out.residual + at;
      if (pair)
        gemm_tile_pair(static_cast<int>(count), columns, bases, num_taps, p.in_column, in_at(row + 1) - in_at(row), k,
                       panel, out.y + at, ldc, e);
      else
        gemm_tile(static_cast<int>(count), columns, bases, num_taps, p.in_column, k, panel, out.y + at, ldc, e);
      column += count;
    }
    row += pair ? 2 : 1;
  }
}

// ---- blocks -----------------------------------------------------------------------------------------------------

struct Blocks {
  int64_t frames, rows, columns;  // of output, of one block
  int64_t groups;                 // the panels of weights are cut in so many
  int64_t pieces;
};

struct Block {
  int64_t n, t0, t1, h0, h1, w0, w1, j0, j1;
};

inline int64_t strip_size(const ConvShape& s, int64_t step, int64_t frames, int64_t rows, int64_t columns) {
  return ((frames - 1) * s.st + s.kt) * ((rows - 1) * s.sh + s.kh) * ((columns - 1) * s.sw + s.kw) * step;
}

inline int64_t halves(int64_t size) { return (size + 1) / 2; }

// Blocks whose input is no larger than STRIP, twice that where weights are large, as many as keep all threads busy.
// `step`: floats of an input place. Where outputs share what is around them in time, blocks keep `few` frames as long as
// rows can go.
Blocks cut(const ConvShape& s, int64_t step, int threads, bool split_panels, int64_t few) {
  Blocks b{s.to, s.ho, s.wo, 1, 0};
  const int64_t mr = gemm_mr();
  const bool heavy = s.kt * s.kh * s.kw * s.c * s.o > LARGE_WEIGHTS;
  const int64_t most = heavy ? 2 * STRIP : STRIP;
  const auto large = [&] { return strip_size(s, step, b.frames, b.rows, b.columns) > most; };
  while (large() && b.frames > few) b.frames = std::max(few, halves(b.frames));
  while (large() && b.rows > 1 && (b.rows > 4 || s.kh == 1 || b.frames == 1)) b.rows = halves(b.rows);
  while (large() && b.columns > 4 * mr) b.columns = round_up(halves(b.columns), mr);
  while (large() && b.frames > 1) b.frames = halves(b.frames);
  while (large() && b.rows > 1) b.rows = halves(b.rows);
  const auto count = [&] { return s.n * ceil_div(s.to, b.frames) * ceil_div(s.ho, b.rows) * ceil_div(s.wo, b.columns); };
  const int64_t panels = ceil_div(s.o, gemm_nr());
  const int64_t least = heavy && split_panels ? 14 * mr : 4 * mr;
  if (threads > 1) {
    while (count() < 4 * threads) {
      if (b.frames * b.rows * b.columns < 2 * least) break;
      if (b.frames > 1)
        b.frames = halves(b.frames);
      else if (b.rows > 1)
        b.rows = halves(b.rows);
      else
        b.columns = round_up(halves(b.columns), mr);
    }
    if (split_panels) b.groups = std::min(panels, ceil_div(4 * threads, count()));
  }
  b.pieces = count() * b.groups;
  return b;
}

Block block_of(const ConvShape& s, const Blocks& b, int64_t piece) {
  const int64_t panels = ceil_div(s.o, gemm_nr());
  Block k;
  const auto next = [&](int64_t parts) {
    const int64_t i = piece % parts;
    piece /= parts;
    return i;
  };
  const int64_t group = next(b.groups);
  k.j0 = panels * group / b.groups;
  k.j1 = panels * (group + 1) / b.groups;
  const int64_t tail_w = next(ceil_div(s.wo, b.columns)), tail_h = next(ceil_div(s.ho, b.rows));
  k.w0 = tail_w * b.columns;
  k.w1 = std::min(s.wo, k.w0 + b.columns);
  k.h0 = tail_h * b.rows;
  k.h1 = std::min(s.ho, k.h0 + b.rows);
  k.t0 = next(ceil_div(s.to, b.frames)) * b.frames;
  k.t1 = std::min(s.to, k.t0 + b.frames);
  k.n = piece;
  return k;
}

// Floats from one place of a strip to the next: not a multiple of 4 KiB, whose rows would fight for the same lines.
inline int64_t step_of(int64_t channels) { return channels >= 128 && channels % 64 == 0 ? channels + 16 : channels; }

inline void zero(float* p, int64_t count) { std::memset(p, 0, sizeof(float) * count); }
inline void copy(float* to, const float* from, int64_t count) { std::memcpy(to, from, sizeof(float) * count); }

// `frames` x rows [r0, r1) x columns [q0, q1) of x, zeros where x has none; x points at the first frame.
void fill_strip(float* strip, const float* x, const ConvShape& s, int64_t step, int64_t frames, int64_t r0, int64_t r1,
                int64_t q0, int64_t q1) {
  const int64_t pitch = (q1 - q0) * step;
  const int64_t left = std::min(q1, std::max<int64_t>(0, q0)), right = std::max(left, std::min(s.w, q1));
  for (int64_t f = 0; f < frames; ++f)
    for (int64_t r = r0; r < r1; ++r, strip += pitch) {
      if (r < 0 || r >= s.h) {
        zero(strip, pitch);
        continue;
      }
      const float* from = x + ((f * s.h + r) * s.w + left) * s.c;
      float* to = strip + (left - q0) * step;
      zero(strip, to - strip);
      if (step == s.c)
        copy(to, from, (right - left) * step);
      else
        for (int64_t w = left; w < right; ++w) copy(to + (w - left) * step, from + (w - left) * s.c, s.c);
      to += (right - left) * step;
      zero(to, strip + pitch - to);
    }
}

}  // namespace

// ---- dense ------------------------------------------------------------------------------------------------------

void conv_direct(const float* x, const float* packed, float* y, const ConvShape& shape, const ConvEpilogue& epilogue,
                 int threads) {
  ConvShape s = shape;
  // Besides for zeros around it, x is copied where its places lie a multiple of 1 KiB apart: their lines would fight
  // for the same place in the first-level cache. Not for few outputs, to which a copy is dear.
  const bool copies = s.ph || s.pw || (s.c * s.sw % 256 == 0 && s.o >= 128);
  if (s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && !s.ph && !s.pw) {
    s.w *= s.h;
    s.wo *= s.ho;
    s.h = s.ho = 1;
    if (s.kt == 1 && s.st == 1 && !s.pt && !epilogue.offset) {
      s.w *= s.n * s.t;
      s.wo *= s.n * s.to;
      s.n = s.t = s.to = 1;
    }
  }
  const int64_t step = copies ? step_of(s.c) : s.c;
  // Adjacent places of a kernel's row are one tap with all their channels.
  const int64_t wide = step == s.c ? s.kw : 1;
  const int64_t k = wide * s.c, all = s.kt * s.kh * s.kw * s.c;
  const Blocks blocks = cut(s, step, threads, true, s.kt > 1 ? std::min<int64_t>(s.to, 4) : 1);
  const Output out{y,
                   s.o,
                   epilogue.offset ? epilogue.offset : epilogue.bias,
                   epilogue.offset ? s.o : 0,
                   epilogue.residual,
                   epilogue.relu};
  // A block's input frames that exist.
  const auto first_frame = [&](const Block& b) { return std::max<int64_t>(0, b.t0 * s.st - s.pt); };
  const auto end_frame = [&](const Block& b) {
    return std::max(first_frame(b), std::min(s.t, (b.t1 - 1) * s.st - s.pt + s.kt));
  };
  parallel(blocks.pieces, threads, [&](int64_t piece, int) {
    const Block b = block_of(s, blocks, piece);
    const int64_t f0 = first_frame(b), f1 = end_frame(b);
    const int64_t r0 = b.h0 * s.sh - s.ph, r1 = (b.h1 - 1) * s.sh - s.ph + s.kh;
    const int64_t q0 = b.w0 * s.sw - s.pw, q1 = (b.w1 - 1) * s.sw - s.pw + s.kw;
    const float* base = x + (b.n * s.t + f0) * s.h * s.w * s.c;
    int64_t frame = s.h * s.w * s.c, row = s.w * s.c;
    if (copies) {
      float* strip = scratch(0, (f1 - f0) * (r1 - r0) * (q1 - q0) * step);
      fill_strip(strip, base, s, step, f1 - f0, r0, r1, q0, q1);
      base = strip;
      row = (q1 - q0) * step;
      frame = (r1 - r0) * row;
    } else {
      base += r0 * row + q0 * step;
    }
    Ahead ahead{};
    if (piece + threads < blocks.pieces) {
      const Block next = block_of(s, blocks, piece + threads);
      const int64_t n0 = first_frame(next), place = s.h == 1 ? next.w0 * s.sw : 0;
      const int64_t begin = std::max<int64_t>(0, next.h0 * s.sh - s.ph);
      const int64_t end = std::min(s.h, (next.h1 - 1) * s.sh - s.ph + s.kh);
      const int64_t width = s.h == 1 ? (next.w1 - next.w0 - 1) * s.sw + s.kw : s.w;
      ahead = {x + (((next.n * s.t + n0) * s.h + begin) * s.w + place) * s.c,
               end_frame(next) - n0,
               (end - begin) * width * s.c,
               s.h * s.w * s.c,
               0,
               0};
      const int64_t tiles = (b.t1 - b.t0) * (b.h1 - b.h0) * ceil_div(b.w1 - b.w0, gemm_mr()) * (b.j1 - b.j0);
      ahead.per_tile = ceil_div(ahead.runs * ahead.run, 16 * tiles);
    }
    int64_t taps[MAX_TAPS];
    const int64_t together = s.kt == 1 && !s.pt ? b.t1 - b.t0 : 1;  // output frames with the same taps
    for (int64_t j = b.j0; j < b.j1; ++j)
      for (int64_t t = b.t0; t < b.t1; t += together) {
        const int64_t begin = t * s.st - s.pt;  // taps outside time are left out
        const int64_t a0 = std::max<int64_t>(0, -begin), a1 = std::max(a0, std::min(s.kt, s.t - begin));
        int count = 0;
        for (int64_t a = a0; a < a1; ++a)
          for (int64_t r = 0; r < s.kh; ++r)
            for (int64_t q = 0; q < s.kw; q += wide) taps[count++] = (begin + a - f0) * frame + r * row + q * step;
        const Places places{together,  b.h1 - b.h0,   b.w1 - b.w0, s.st * frame,
                            s.sh * row, s.sw * step, s.ho * s.wo, s.wo};
        const int64_t at = b.h0 * s.wo + b.w0;
        product(places, base, taps, count, k, packed + (j * all + a0 * s.kh * s.kw * s.c) * gemm_nr(), j * gemm_nr(),
                (b.n * s.to + t) * s.ho * s.wo + at, b.n * s.ho * s.wo + at, out, ahead);
      }
  });
}

// ---- one kernel a channel -----------------------------------------------------------------------------------------

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

// ---- the SmallBig unit ----------------------------------------------------------------------------------------------

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
