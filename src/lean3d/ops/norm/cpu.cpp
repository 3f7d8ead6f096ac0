#include "cpu.h"

#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef int32_t ints __attribute__((vector_size(LANES * 4)));

// Sums are taken in blocks that stay in a cache, in float; blocks are put together in double. The number of parts does
// not depend on the threads, so that the result doesn't either.
constexpr int64_t BLOCK = 16 << 10;  // floats
constexpr int64_t PARTS = 32;
constexpr int ROWS = 8;  // summed in registers before the sum in memory is touched

inline int64_t block_rows(int64_t c) { return larger(ROWS, BLOCK / c / ROWS * ROWS); }

// Rows of a part: whole blocks.
struct Parts {
  int64_t count, length;
  explicit Parts(const NormShape& s) {
    const int64_t blocks = (s.rows() + block_rows(s.c) - 1) / block_rows(s.c);
    const int64_t each = (blocks + PARTS - 1) / PARTS;
    count = (blocks + each - 1) / each;
    length = each * block_rows(s.c);
  }
};

// body(first channel, mask) for each vector of channels
template <class Body>
inline void along_channels(int64_t c, const Body& body) {
  for (int64_t j = 0; j < c; j += LANES) body(j, tail(static_cast<int>(smaller(LANES, c - j))));
}

template <int COUNT>
struct Group {
  static constexpr int count = COUNT;
};

// body(row, group) for groups of ROWS rows and then single ones
template <class Body>
inline void along_rows(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + ROWS <= count; i += ROWS) body(i, Group<ROWS>{});
  for (; i < count; ++i) body(i, Group<1>{});
}

// Means and sums of squared distances from them, of `count` rows: put together as in Chan, Golub & LeVeque, 1979.
struct Moments {
  double *mean, *spread;

  void merge(double have, double more, const double* other_mean, const double* other_spread, int64_t c) {
    const double all = have + more, share = more / all, weight = have * share;
    for (int64_t j = 0; j < c; ++j) {
      const double distance = other_mean[j] - mean[j];
      mean[j] += distance * share;
      spread[j] += other_spread[j] + distance * distance * weight;
    }
  }
};

// In float: a rounded mean, the sum of distances from it, which is what the rounding left, and the sum of their squares.
void block_moments(const float* x, int64_t rows, int64_t c, float* mean, float* left, float* spread) {
  along_channels(c, [&](int64_t j, mask m) {
    store(mean + j, vec{}, m);
    store(left + j, vec{}, m);
    store(spread + j, vec{}, m);
  });
  along_rows(rows, [&](int64_t i, auto group) {
    along_channels(c, [&](int64_t j, mask m) {
      vec sum = load(mean + j, m);
      for (int r = 0; r < group.count; ++r) sum += load(x + (i + r) * c + j, m);
      store(mean + j, sum, m);
    });
  });
  const float share = 1.0f / static_cast<float>(rows);
  along_channels(c, [&](int64_t j, mask m) { store(mean + j, load(mean + j, m) * share, m); });
  along_rows(rows, [&](int64_t i, auto group) {
    along_channels(c, [&](int64_t j, mask m) {
      const vec middle = load(mean + j, m);
      vec sum = load(left + j, m), squares = load(spread + j, m);
      for (int r = 0; r < group.count; ++r) {
        const vec distance = load(x + (i + r) * c + j, m) - middle;
        sum += distance;
        squares += distance * distance;
      }
      store(left + j, sum, m);
      store(spread + j, squares, m);
    });
  });
}

inline double* doubles(int slot, int64_t count) { return reinterpret_cast<double*>(scratch(slot, 2 * count)); }

// Mean and sum of squared distances of each channel of x, in doubles of the calling thread.
Moments moments(const NormShape& s, const float* x, int threads) {
  const Parts parts(s);
  double* all = doubles(0, parts.count * 2 * s.c);
  parallel(parts.count, threads, [&](int64_t part, int) {
    const int64_t first = part * parts.length, end = smaller(first + parts.length, s.rows());
    const Moments total{all + part * 2 * s.c, all + part * 2 * s.c + s.c};
    float* mean = scratch(1, 3 * s.c);
    float* left = mean + s.c;
    float* spread = left + s.c;
    double* block_mean = doubles(2, 2 * s.c);
    double* block_spread = block_mean + s.c;
    for (int64_t j = 0; j < 2 * s.c; ++j) total.mean[j] = 0.0;
    for (int64_t i = first; i < end; i += block_rows(s.c)) {
      const int64_t rows = smaller(block_rows(s.c), end - i);
      block_moments(x + i * s.c, rows, s.c, mean, left, spread);
      for (int64_t j = 0; j < s.c; ++j) {
        const double rest = static_cast<double>(left[j]) / static_cast<double>(rows);
        block_mean[j] = mean[j] + rest;
        block_spread[j] = spread[j] - rest * left[j];
      }
      Moments(total).merge(static_cast<double>(i - first), static_cast<double>(rows), block_mean, block_spread, s.c);
    }
  });
  Moments total{all, all + s.c};
  for (int64_t part = 1; part < parts.count; ++part) {
    const double have = static_cast<double>(part * parts.length);
    const double more = static_cast<double>(smaller(parts.length, s.rows() - part * parts.length));
    total.merge(have, more, all + part * 2 * s.c, all + part * 2 * s.c + s.c, s.c);
  }
  return total;
}

// body(first row, rows, its first row in one frame for all) on pieces of frames
template <class Body>
void along_frames(const NormShape& s, int threads, const Body& body) {
  const int64_t rows = smaller(s.plane, larger(1, 4 * BLOCK / s.c));
  const int64_t pieces = (s.plane + rows - 1) / rows;
  // Several small frames make one piece of work.
  const int64_t frames = larger(1, smaller(BLOCK / (s.plane * s.c), s.n * s.t / (4 * threads)));
  const int64_t groups = (s.n * s.t + frames - 1) / frames;
  parallel(groups * pieces, threads, [&](int64_t work, int) {
    const int64_t piece = work % pieces, group = work / pieces;
    const int64_t first = piece * rows, count = smaller(rows, s.plane - first);
    for (int64_t frame = group * frames; frame < smaller((group + 1) * frames, s.n * s.t); ++frame)
      body(frame * s.plane + first, count, frame / s.t * s.plane + first);
  });
}

// x after the normalisation. The mean goes first: large means would cancel in x * scale + shift.
struct Normalise {
  const float *mean, *scale, *bias;  // scale: weight / deviation
  inline vec operator()(vec x, int64_t j, mask m) const {
    return (x - load(mean + j, m)) * load(scale + j, m) + load(bias + j, m);
  }
};

// y = norm(x), what is added, relu
template <bool RELU, int ADDED>
void apply(const float* x, const Normalise& norm, const float* a, const float* b, int64_t rows, int64_t c, float* y) {
  for (int64_t i = 0; i < rows; ++i)
    along_channels(c, [&](int64_t j, mask m) {
      const int64_t at = i * c + j;
      vec value = norm(load(x + at, m), j, m);
      if (ADDED > 0) value += load(a + at, m);
      if (ADDED > 1) value += load(b + at, m);
      if (RELU) value = relu(value);
      store(y + at, value, m);
    });
}

// The ReLU's gradient: none where its result was 0. As in torch a NaN lets it pass.
inline vec masked_by(vec dy, vec value) { return (vec)((ints)dy & ~(value <= 0.0f)); }

enum class Mask { none, from_x, from_y };

struct BackwardRows {
  const float *x, *y, *dy;
  Normalise norm;
  float* masked;

  template <Mask MASK>
  inline vec gradient(int64_t at, int64_t j, mask m, vec value) const {
    const vec g = load(dy + at, m);
    if (MASK == Mask::from_x) return masked_by(g, norm(value, j, m));
    if (MASK == Mask::from_y) return masked_by(g, load(y + at, m));
    return g;
  }
};

// Sums of g and of g (x - mean) over rows, in float.
template <Mask MASK>
void block_sums(const BackwardRows& in, int64_t first, int64_t rows, int64_t c, float* sum_g, float* sum_gx) {
  along_channels(c, [&](int64_t j, mask m) {
    store(sum_g + j, vec{}, m);
    store(sum_gx + j, vec{}, m);
  });
  along_rows(rows, [&](int64_t i, auto group) {
    along_channels(c, [&](int64_t j, mask m) {
      vec g_all = load(sum_g + j, m), gx_all = load(sum_gx + j, m);
      const vec middle = load(in.norm.mean + j, m);
      for (int r = 0; r < group.count; ++r) {
        const int64_t at = (first + i + r) * c + j;
        const vec value = load(in.x + at, m);
        const vec g = in.gradient<MASK>(at, j, m, value);
        if (MASK == Mask::from_y) store(in.masked + at, g, m);
        g_all += g;
        gx_all += g * (value - middle);
      }
      store(sum_g + j, g_all, m);
      store(sum_gx + j, gx_all, m);
    });
  });
}

// dx = scale * (g - mean of g - (x - mean) * slope)
template <Mask MASK>
void block_dx(const BackwardRows& in, const float* mean_g, const float* slope, int64_t first, int64_t rows, int64_t c,
              float* dx) {
  for (int64_t i = first; i < first + rows; ++i)
    along_channels(c, [&](int64_t j, mask m) {
      const int64_t at = i * c + j;
      const vec value = load(in.x + at, m);
      const vec g = MASK == Mask::from_y ? load(in.masked + at, m) : in.gradient<MASK>(at, j, m, value);
      const vec rest = g - load(mean_g + j, m) - (value - load(in.norm.mean + j, m)) * load(slope + j, m);
      store(dx + at, load(in.norm.scale + j, m) * rest, m);
    });
}

template <Mask MASK>
void backward(const NormShape& s, const BackwardRows& in, const float* rstd, float* dx, float* dweight, float* dbias,
              float* mean_g, float* slope, int threads) {
  const Parts parts(s);
  double* all = doubles(0, parts.count * 2 * s.c);
  parallel(parts.count, threads, [&](int64_t part, int) {
    double* total = all + part * 2 * s.c;
    float* sums = scratch(1, 2 * s.c);
    for (int64_t j = 0; j < 2 * s.c; ++j) total[j] = 0.0;
    const int64_t end = smaller((part + 1) * parts.length, s.rows());
    for (int64_t i = part * parts.length; i < end; i += block_rows(s.c)) {
      block_sums<MASK>(in, i, smaller(block_rows(s.c), end - i), s.c, sums, sums + s.c);
      for (int64_t j = 0; j < 2 * s.c; ++j) total[j] += sums[j];
    }
  });
  for (int64_t part = 1; part < parts.count; ++part)
    for (int64_t j = 0; j < 2 * s.c; ++j) all[j] += all[part * 2 * s.c + j];
  const double rows = static_cast<double>(s.rows());
  for (int64_t j = 0; j < s.c; ++j) {
    dbias[j] = static_cast<float>(all[j]);
    dweight[j] = static_cast<float>(all[s.c + j] * rstd[j]);
    mean_g[j] = static_cast<float>(all[j] / rows);
    slope[j] = static_cast<float>(all[s.c + j] / rows * rstd[j] * rstd[j]);
  }
  if (!dx) return;
  along_frames(s, threads, [&](int64_t first, int64_t count, int64_t) {
    block_dx<MASK>(in, mean_g, slope, first, count, s.c, dx);
  });
}

inline Normalise normalise(const NormParameters& p, const float* mean, const float* rstd, int64_t c, float* scale) {
  for (int64_t j = 0; j < c; ++j) scale[j] = p.weight[j] * rstd[j];
  return {mean, scale, p.bias};
}

}  // namespace

void norm_forward(const NormShape& s, const float* x, const NormParameters& parameters, const Added& a, const Added& b,
                  bool relu, double eps, double momentum, float* running_mean, float* running_var, float* mean,
                  float* rstd, float* y, int threads) {
  const Moments of_x = moments(s, x, threads);
  const double rows = static_cast<double>(s.rows());
  for (int64_t j = 0; j < s.c; ++j) {
    mean[j] = static_cast<float>(of_x.mean[j]);
    rstd[j] = static_cast<float>(1.0 / __builtin_sqrt(of_x.spread[j] / rows + eps));
    running_mean[j] += static_cast<float>(momentum * (of_x.mean[j] - running_mean[j]));
    running_var[j] += static_cast<float>(momentum * (of_x.spread[j] / (rows - 1.0) - running_var[j]));
  }
  const Normalise norm = normalise(parameters, mean, rstd, s.c, scratch(3, s.c));
  const int added = (a.data != nullptr) + (b.data != nullptr);
  const auto run = added == 0 ? (relu ? apply<true, 0> : apply<false, 0>)
                   : added == 1 ? (relu ? apply<true, 1> : apply<false, 1>)
                                : (relu ? apply<true, 2> : apply<false, 2>);
  along_frames(s, threads, [&](int64_t first, int64_t count, int64_t first_in_one) {
    const auto from = [&](const Added& what) {
      return what.data ? what.data + (what.one_frame ? first_in_one : first) * s.c : nullptr;
    };
    run(x + first * s.c, norm, from(a), from(b), count, s.c, y + first * s.c);
  });
}

void norm_backward(const NormShape& s, const float* x, const float* y, const float* dy, const NormParameters& parameters,
                   bool relu, const float* mean, const float* rstd, float* masked, float* dx, float* dweight,
                   float* dbias, int threads) {
  float* mine = scratch(3, 3 * s.c);
  const BackwardRows in{x, y, dy, normalise(parameters, mean, rstd, s.c, mine), masked};
  const auto run = !relu ? backward<Mask::none> : masked ? backward<Mask::from_y> : backward<Mask::from_x>;
  run(s, in, rstd, dx, dweight, dbias, mine + s.c, mine + 2 * s.c, threads);
}

}  // namespace lean3d::LEAN3D_ISA
