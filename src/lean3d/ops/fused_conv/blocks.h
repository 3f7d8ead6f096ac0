// What the kernels beside have in common: products over blocks of output places, and how layers are cut into blocks.
// Included once by each, for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../native/parallel.h"
#include "../native/simd.h"
#include "cpu.h"

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

// Input of the next block, which comes from memory while this one is computed: a line with each step of a product.
struct Ahead {
  const float* at;
  int64_t runs, run, step;  // runs of adjacent floats, from the start of one to the next
  int64_t done;             // floats of the current run
};

// Where the next `lines` are; null: all are there.
inline const float* next_lines(Ahead& ahead, int64_t lines) {
  if (ahead.runs <= 0) return nullptr;
  const float* found = ahead.at + ahead.done;
  ahead.done += 16 * lines;
  while (ahead.runs > 0 && ahead.done >= ahead.run) {
    ahead.done = 0;
    ahead.at += ahead.step;
    --ahead.runs;
  }
  return found;
}

// One panel of the product for a block, whose first output place is `place`, and `bias_place` among the bias rows,
// where each place has one, the same for all frames.
inline void product(const Places& block, const float* base, const int64_t* taps, int num_taps, int64_t k, const float* panel,
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
      const int64_t at = (place + out_at(row) + column) * ldc + first_channel;
      if (out.bias) e.bias = out.bias + first_channel + (bias_at(row) + column) * out.bias_stride;
      if (out.residual) e.residual = out.residual + at;
      if (pair)
        gemm_tile_pair(static_cast<int>(count), columns, bases, num_taps, p.in_column, in_at(row + 1) - in_at(row), k,
                       panel, out.y + at, ldc, e);
      else
        gemm_tile(static_cast<int>(count), columns, bases, num_taps, p.in_column, k, panel, out.y + at, ldc, e,
                  next_lines(ahead, num_taps * k));
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
inline Blocks cut(const ConvShape& s, int64_t step, int threads, bool split_panels, int64_t few) {
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

inline Block block_of(const ConvShape& s, const Blocks& b, int64_t piece) {
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
inline void fill_strip(float* strip, const float* x, const ConvShape& s, int64_t step, int64_t frames, int64_t r0, int64_t r1,
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

}  // namespace lean3d::LEAN3D_ISA
