// Dense convolutions.
#include "blocks.h"

namespace lean3d::LEAN3D_ISA {
namespace {

// The places of x that a block of a strided 1 x 1 kernel sees, in each of `frames`; x points at the first one.
void gather_strip(float* strip, const float* x, const ConvShape& s, int64_t step, int64_t frames, const Block& b) {
  for (int64_t f = 0; f < frames; ++f)
    for (int64_t h = b.h0; h < b.h1; ++h)
      for (int64_t w = b.w0; w < b.w1; ++w, strip += step)
        copy(strip, x + ((f * s.h + h * s.sh) * s.w + w * s.sw) * s.c, s.c);
}

}  // namespace

void conv_direct(const float* x, const float* packed, float* y, const ConvShape& shape, const ConvEpilogue& epilogue,
                 int threads) {
  ConvShape s = shape;
  // A pointwise kernel with a stride sees few places: they are gathered, and then it has none.
  const bool gathers = s.kh == 1 && s.kw == 1 && s.sh * s.sw > 1 && !s.ph && !s.pw && s.o >= 128;
  // Besides for zeros around it, x is copied where its places lie a multiple of 1 KiB apart: their lines would fight
  // for the same place in the first-level cache. Not for few outputs, to which a copy is dear.
  const bool copies = gathers || s.ph || s.pw || (s.c * s.sw % 256 == 0 && s.o >= 128);
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
  ConvShape in = s;  // what the product steps over
  if (gathers) in.sh = in.sw = 1;
  const int64_t step = copies ? step_of(s.c) : s.c;
  // Adjacent places of a kernel's row are one tap with all their channels.
  const int64_t wide = step == s.c ? s.kw : 1;
  const int64_t k = wide * s.c, all = s.kt * s.kh * s.kw * s.c;
  const Blocks blocks = cut(in, step, threads, true, s.kt > 1 ? std::min<int64_t>(s.to, 4) : 1);
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
      const int64_t rows = gathers ? b.h1 - b.h0 : r1 - r0, columns = gathers ? b.w1 - b.w0 : q1 - q0;
      float* strip = scratch(0, (f1 - f0) * rows * columns * step);
      if (gathers)
        gather_strip(strip, base, s, step, f1 - f0, b);
      else
        fill_strip(strip, base, s, step, f1 - f0, r0, r1, q0, q1);
      base = strip;
      row = columns * step;
      frame = rows * row;
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
      if (gathers)  // rows that are seen, with the places between those that are
        ahead = {x + (((next.n * s.t + n0) * s.h + begin) * s.w + next.w0 * s.sw) * s.c,
                 (end_frame(next) - n0) * (next.h1 - next.h0),
                 (next.w1 - next.w0) * s.sw * s.c,
                 s.sh * s.w * s.c,
                 0};
      else
        ahead = {x + (((next.n * s.t + n0) * s.h + begin) * s.w + place) * s.c,
                 end_frame(next) - n0,
                 (end - begin) * width * s.c,
                 s.h * s.w * s.c,
                 0};
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
        const Places places{together,    b.h1 - b.h0,  b.w1 - b.w0, s.st * frame,
                            in.sh * row, in.sw * step, s.ho * s.wo, s.wo};
        const int64_t at = b.h0 * s.wo + b.w0;
        product(places, base, taps, count, k, packed + (j * all + a0 * s.kh * s.kw * s.c) * gemm_nr(), j * gemm_nr(),
                (b.n * s.to + t) * s.ho * s.wo + at, b.n * s.ho * s.wo + at, out, ahead);
      }
  });
}

}  // namespace lean3d::LEAN3D_ISA
