#include "cpu.h"

#include "../gemm/cpu.h"
#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B;  // the points of F(4, 3) besides 0: A, -A, B, -B

// B^T of F(2, 3) (4 places) and of F(4, 3) (6 places), and A^T, over vectors of channels. At stride 2 F(4, 2) (5 places):
// the points 0, A, -A, B and infinity.
// B^T of F(4, 2) but for infinity: all there is to a filter with one tap, which is 0 there.
inline void finite_points(const vec* d, vec* v) {
  const vec even = d[3] - A2 * d[1], odd = B * (A * d[1]) - A * d[2], rest = B * d[2] - d[3];
  v[0] = (A2 * B) * d[0] - A2 * d[1] - rest;
  v[1] = odd + rest;
  v[2] = rest - odd;
  v[3] = even;
}

template <int N>
inline void to_points(const vec* d, vec* v) {
  if constexpr (N == 1) {
    v[0] = d[0];
  } else if constexpr (N == 4) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  } else if constexpr (N == 5) {
    finite_points(d, v);
    v[4] = (A2 * B) * d[1] - A2 * d[2] + (d[4] - B * d[3]);
  } else {
    const vec even = B2 * d[2] - d[4], odd = d[3] - B2 * d[1];
    const vec even2 = d[4] - A2 * d[2], odd2 = d[3] - A2 * d[1];
    v[0] = A2 * B2 * d[0] + (d[4] - (A2 + B2) * d[2]);
    v[1] = even - A * odd;
    v[2] = even + A * odd;
    v[3] = even2 + B * odd2;
    v[4] = even2 - B * odd2;
    v[5] = A2 * B2 * d[1] + (d[5] - (A2 + B2) * d[3]);
  }
}

template <int N>
inline void from_points(const vec* p, vec* y) {
  if constexpr (N == 1) {
    y[0] = p[0];
  } else if constexpr (N == 4) {
    y[0] = p[0] + p[1] + p[2];
    y[1] = p[1] - p[2] + p[3];
  } else if constexpr (N == 5) {
    const vec even = p[1] + p[2], odd = p[1] - p[2];
    y[0] = p[0] + even + p[3];
    y[1] = A * odd + B * p[3];
    y[2] = A2 * even + B2 * p[3];
    y[3] = A2 * A * odd + (B2 * B * p[3] + p[4]);
  } else {
    const vec even = p[1] + p[2], odd = p[1] - p[2], even2 = p[3] + p[4], odd2 = p[3] - p[4];
    y[0] = p[0] + even + even2;
    y[1] = A * odd + B * odd2;
    y[2] = A2 * even + B2 * even2;
    y[3] = A2 * A * odd + (B2 * B * odd2 + p[5]);
  }
}

constexpr int outputs_of(int n) { return n == 1 ? 1 : n == 5 ? 4 : n - 2; }
constexpr int MOST = 6;         // places of a tile on an axis
constexpr int STRIDED = 9;      // those of 4 outputs at stride 2
constexpr int MOST_FRAMES = 4;  // of those in time, that one point is made of

inline vec load_part(const float* p, bool whole, mask m) { return whole ? load(p) : load(p, m); }

// One tile along time, its places anywhere, into the row v; points lie `stride` apart.
template <int N>
void transform_time(const float* const* places, int64_t channels, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const bool whole = c + LANES <= channels;
    const mask m = tail(static_cast<int>(channels - c));
    vec d[N], p[N];
#pragma GCC unroll 6
    for (int t = 0; t < N; ++t) d[t] = load_part(places[t] + c, whole, m);
    to_points<N>(d, p);
#pragma GCC unroll 6
    for (int t = 0; t < N; ++t) store(v + t * stride + c, p[t]);
  }
}

// One tile of the plane. What is transformed is a sum of FRAMES frames, each with its factor: a point in time. Without
// factors it is one frame as it is.
template <int FRAMES, int NH, int NW>
void transform_plane(const float* const* places, const float* factors, int64_t channels, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const bool whole = c + LANES <= channels;
    const mask m = tail(static_cast<int>(channels - c));
    vec a[NH][NW];
    for (int h = 0; h < NH; ++h) {
      vec d[NW];
#pragma GCC unroll 6
      for (int w = 0; w < NW; ++w) {
        const float* const* place = places + h * NW + w;
        if constexpr (FRAMES == 0) {
          d[w] = load_part(*place + c, whole, m);
        } else {
          d[w] = factors[0] * load_part(*place + c, whole, m);
#pragma GCC unroll 4
          for (int f = 1; f < FRAMES; ++f) d[w] += factors[f] * load_part(place[f * NH * NW] + c, whole, m);
        }
      }
      to_points<NW>(d, a[h]);
    }
    for (int w = 0; w < NW; ++w) {
      vec d[NH], p[NH];
#pragma GCC unroll 6
      for (int h = 0; h < NH; ++h) d[h] = a[h][w];
      to_points<NH>(d, p);
#pragma GCC unroll 6
      for (int h = 0; h < NH; ++h) store(v + (h * NW + w) * stride + c, p[h]);
    }
  }
}

// At stride 2 in the plane the taps 0 and 2 meet even places, and tap 1 odd ones: a sum of four convolutions at stride 1,
// over the even or odd places of either axis, each a tile of F(4, 2) that shares its points, and so its products' sum,
// with the others. A filter of one tap has 4 points, one of two taps 5: 9 products on an axis instead of 12. At each
// point the halves that have it follow each other in the row, `channels_all` apart.
void transform_strided(const float* const* places, int64_t channels, int64_t channels_all, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const bool whole = c + LANES <= channels;
    const mask m = tail(static_cast<int>(channels - c));
    vec a[STRIDED][STRIDED];  // points of the even places, then of the odd ones
    for (int h = 0; h < STRIDED; ++h) {
      const float* const* place = places + h * STRIDED;
      vec even[5], odd[4];
#pragma GCC unroll 5
      for (int w = 0; w < 5; ++w) even[w] = load_part(place[2 * w] + c, whole, m);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) odd[w] = load_part(place[2 * w + 1] + c, whole, m);
      to_points<5>(even, a[h]);
      finite_points(odd, a[h] + 5);
    }
    for (int w = 0; w < STRIDED; ++w) {
      const bool odd_w = w >= 5;
      const int point_w = odd_w ? w - 5 : w, halves = point_w < 4 ? 2 : 1;
      vec even[5], odd[4], p[STRIDED];
#pragma GCC unroll 5
      for (int h = 0; h < 5; ++h) even[h] = a[2 * h][w];
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) odd[h] = a[2 * h + 1][w];
      to_points<5>(even, p);
      finite_points(odd, p + 5);
#pragma GCC unroll 9
      for (int h = 0; h < STRIDED; ++h) {
        const bool odd_h = h >= 5;
        float* to = v + ((odd_h ? h - 5 : h) * 5 + point_w) * stride + (odd_h * halves + odd_w) * channels_all + c;
        if (whole)
          store(to, p[h]);
        else
          store(to, p[h], m);
      }
    }
  }
}

// Where a tile of outputs goes: strides of y (and of the residual) in floats, and how much of it is inside.
struct Target {
  float* y;
  const float* residual;
  const float* bias;
  int64_t strides[3], residual_strides[3];
  int64_t inside[3];
  int columns;
  bool relu;

  void put(vec value, int c, bool whole, mask m, int64_t t, int64_t h, int64_t w) const {
    if (bias) value += load_part(bias + c, whole, m);
    if (residual)
      value += load_part(residual + t * residual_strides[0] + h * residual_strides[1] + w * residual_strides[2] + c, whole, m);
    if (relu) value = lean3d::LEAN3D_ISA::relu(value);
    float* to = y + t * strides[0] + h * strides[1] + w * strides[2] + c;
    if (whole)
      store(to, value);
    else
      store(to, value, m);
  }
};

// The products of one tile (points lie `stride` apart) back to outputs.
template <int N>
void finish_time(const float* products, int64_t stride, const Target& target) {
  constexpr int M = outputs_of(N);
  for (int c = 0; c < target.columns; c += LANES) {
    const bool whole = c + LANES <= target.columns;
    const mask m = tail(target.columns - c);
    vec p[N], y[M];
#pragma GCC unroll 6
    for (int t = 0; t < N; ++t) p[t] = load(products + t * stride + c);
    from_points<N>(p, y);
#pragma GCC unroll 6
    for (int t = 0; t < M; ++t)
      if (t < target.inside[0]) target.put(y[t], c, whole, m, t, 0, 0);
  }
}

// A point in time adds to `frames` frames of outputs, with a factor each; the last one finishes them.
struct Sum {
  float* sum;  // (frames, MH, MW, stride), null where there is one point
  int64_t stride;
  const float* factors;
  int64_t factor_stride, frames;
  bool first, last;
};

template <int NH, int NW>
void finish_plane(const float* products, int64_t stride, const Target& target, const Sum& sum) {
  constexpr int MH = outputs_of(NH), MW = outputs_of(NW);
  for (int c = 0; c < target.columns; c += LANES) {
    const bool whole = c + LANES <= target.columns;
    const mask m = tail(target.columns - c);
    vec rows[NH][MW], a[MH][MW];
    for (int h = 0; h < NH; ++h) {
      vec p[NW];
#pragma GCC unroll 6
      for (int w = 0; w < NW; ++w) p[w] = load(products + (h * NW + w) * stride + c);
      from_points<NW>(p, rows[h]);
    }
    for (int w = 0; w < MW; ++w) {
      vec p[NH], y[MH];
#pragma GCC unroll 6
      for (int h = 0; h < NH; ++h) p[h] = rows[h][w];
      from_points<NH>(p, y);
#pragma GCC unroll 6
      for (int h = 0; h < MH; ++h) a[h][w] = y[h];
    }
    if (!sum.sum) {
      for (int h = 0; h < target.inside[1]; ++h)
        for (int w = 0; w < target.inside[2]; ++w) target.put(a[h][w], c, whole, m, 0, h, w);
      continue;
    }
    for (int64_t t = 0; t < sum.frames; ++t) {
      const float factor = sum.factors[t * sum.factor_stride];
      float* at = sum.sum + t * MH * MW * sum.stride + c;
      if (sum.last) {
        if (t < target.inside[0])
          for (int h = 0; h < target.inside[1]; ++h)
            for (int w = 0; w < target.inside[2]; ++w)
              target.put(load(at + (h * MW + w) * sum.stride) + factor * a[h][w], c, whole, m, t, h, w);
      } else if (sum.first) {
        for (int h = 0; h < MH; ++h)
          for (int w = 0; w < MW; ++w) store(at + (h * MW + w) * sum.stride, factor * a[h][w]);
      } else if (factor != 0.0f) {
        for (int h = 0; h < MH; ++h)
          for (int w = 0; w < MW; ++w)
            store(at + (h * MW + w) * sum.stride, load(at + (h * MW + w) * sum.stride) + factor * a[h][w]);
      }
    }
  }
}

using TransformPlane = void (*)(const float* const*, const float*, int64_t, float*, int64_t);
using FinishPlane = void (*)(const float*, int64_t, const Target&, const Sum&);
struct Plane {
  TransformPlane transform[MOST_FRAMES + 1];  // by frames
  FinishPlane finish;
};
template <int NH, int NW>
constexpr Plane plane{{&transform_plane<0, NH, NW>, &transform_plane<1, NH, NW>, &transform_plane<2, NH, NW>,
                       &transform_plane<3, NH, NW>, &transform_plane<4, NH, NW>},
                      &finish_plane<NH, NW>};
template <int NH>
const Plane& pick(int64_t w) {
  return w == 1 ? plane<NH, 1> : w == 2 ? plane<NH, 4> : plane<NH, 6>;
}
const FinishPlane finish_strided = &finish_plane<5, 5>;
const Plane& pick(int64_t h, int64_t w) { return h == 1 ? pick<1>(w) : h == 2 ? pick<4>(w) : pick<6>(w); }

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// The next odd number of cache lines: rows that far apart spread over the sets of a cache.
inline int64_t odd_lines(int64_t floats) { return (up(floats, 16) | 1) * 16; }

constexpr int MOST_TAPS = 16, LINE = 16;                 // taps in time; floats of a cache line
constexpr int64_t CHUNK = 64 << 10, PANELS = 256 << 10;  // floats of V and of weights that share a second-level cache

struct Block {
  int64_t clip, frame, frames, tile, tiles;  // frames: outputs' tiles in time;  tiles: of the plane
};

class Run {
 public:
  Run(const FastConv& layer, const FastConvData& data, int threads)
      : layer_(layer), data_(data), threads_(threads), kernels_(pick(layer.m[1], layer.m[2])) {
    for (int axis = 0; axis < 3; ++axis) {
      n_[axis] = layer.m[axis] == 1 ? 1 : layer.m[axis] + layer.taps[axis] - 1;
      if (layer.strided && axis > 0) n_[axis] = 5;
      count_[axis] = up(layer.out[axis], layer.m[axis]);
    }
    only_time_ = n_[1] * n_[2] == 1;
    taps_ = layer.m[0] == 1 ? layer.taps[0] : 1;
    steps_ = only_time_ ? 1 : n_[0];
    positions_ = n_[0] * n_[1] * n_[2] / steps_;
    plane_ = count_[1] * count_[2];
    depth_ = layer.channels[0] + layer.channels[1];
    columns_ = gemm_nr();
    panels_ = up(layer.outputs, columns_);
    rows_ = layer.block_frames * layer.block_tiles;
    row_ = odd_lines(layer.strided ? 4 * depth_ : up(depth_, 16) * 16 + (layer.channels[1] ? 16 : 0));
    position_ = odd_lines((layer.block_frames + taps_ - 1) * layer.block_tiles * row_);
    product_row_ = odd_lines(panels_ * columns_);
    product_position_ = odd_lines(rows_ * product_row_);
    sums_ = steps_ == 1 ? 0 : layer.m[0] * layer.m[1] * layer.m[2] * product_row_;
    const int64_t zeros = most(layer.channels[0], layer.channels[1]);
    float* blank = scratch(2, zeros);
    for (int64_t c = 0; c < zeros; ++c) blank[c] = 0.0f;
    blank_ = blank;
  }

  void operator()() const {
    const int64_t in_time = up(count_[0], layer_.block_frames), in_plane = up(plane_, layer_.block_tiles);
    const int64_t blocks = layer_.clips * in_plane * in_time;
    const auto block = [&](int64_t index) {  // time runs fastest: neighbours in time share frames
      Block b;
      b.frame = index % in_time * layer_.block_frames;
      b.tile = index / in_time % in_plane * layer_.block_tiles;
      b.clip = index / in_time / in_plane;
      b.frames = least(layer_.block_frames, count_[0] - b.frame);
      b.tiles = least(layer_.block_tiles, plane_ - b.tile);
      return b;
    };
    if (!layer_.shared) {
      parallel(blocks, threads_, [&](int64_t index, int) {
        const Block b = block(index);
        const Room room = take_room();
        for (int64_t step = 0; step < steps_; ++step) {
          transform(b, step, room.v, 0, inputs_of(b));
          for (int64_t position = 0; position < positions_; ++position)
            multiply(b, step, position, 0, panels_, room);
          finish(b, step, room, 0, b.frames * b.tiles);
        }
      });
      return;
    }
    const Room room = take_room();
    const int64_t parts = least(panels_, up(4 * threads_, positions_));
    for (int64_t index = 0; index < blocks; ++index) {
      const Block b = block(index);
      const auto in_chunks = [&](int64_t rows, const auto& body) {
        const int64_t chunk = up(most(rows, 1), 4 * threads_);
        parallel(up(rows, chunk), threads_,
                 [&](int64_t piece, int) { body(piece * chunk, least(rows, (piece + 1) * chunk)); });
      };
      for (int64_t step = 0; step < steps_; ++step) {
        in_chunks(inputs_of(b), [&](int64_t begin, int64_t end) { transform(b, step, room.v, begin, end); });
        parallel(positions_ * parts, threads_, [&](int64_t piece, int) {
          const int64_t part = piece % parts;
          multiply(b, step, piece / parts, panels_ * part / parts, panels_ * (part + 1) / parts, room);
        });
        in_chunks(b.frames * b.tiles, [&](int64_t begin, int64_t end) { finish(b, step, room, begin, end); });
      }
    }
  }

 private:
  struct Room {
    float* v;         // (positions, rows, channels)
    float* products;  // (positions, rows, outputs)
    float* sums;      // (rows, places of a tile of outputs, outputs)
  };
  Room take_room() const {
    return {scratch(0, positions_ * position_), scratch(1, positions_ * product_position_), scratch(3, rows_ * sums_)};
  }

  // With taps in time V has rows for the input frames that a block sees, [first, end) within the clip.
  int64_t first_frame(const Block& b) const { return most(0, b.frame - layer_.padding[0]); }
  int64_t end_frame(const Block& b) const {
    return most(first_frame(b), least(layer_.in[0], b.frame + b.frames - 1 - layer_.padding[0] + taps_));
  }
  bool by_taps() const { return layer_.m[0] == 1; }
  int64_t inputs_of(const Block& b) const { return (by_taps() ? end_frame(b) - first_frame(b) : b.frames) * b.tiles; }

  // Rows [begin, end) of V; where time is transformed around the plane, at one point in time.
  void transform(const Block& b, int64_t step, float* v, int64_t begin, int64_t end) const {
    const float* places[MOST_FRAMES * MOST * MOST];  // and no less than STRIDED * STRIDED
    for (int source = 0; source < 2; ++source) {
      const int64_t channels = layer_.channels[source];
      if (!channels) continue;
      float* to = v + (source ? layer_.channels[0] : 0);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t tile = b.tile + row % b.tiles;
        const int64_t stride = layer_.strided ? 2 : 1;
        const int64_t h0 = tile / count_[2] * layer_.m[1] * stride - layer_.padding[1];
        const int64_t w0 = tile % count_[2] * layer_.m[2] * stride - layer_.padding[2];
        const int64_t high = layer_.strided ? STRIDED : n_[1], wide = layer_.strided ? STRIDED : n_[2];
        const float** place = places;
        const auto frame = [&](int64_t t) {
          for (int64_t h = h0; h < h0 + high; ++h) {
            const bool inside = t >= 0 && t < layer_.in[0] && h >= 0 && h < layer_.in[1];
            const float* line = inside ? data_.x[source] + (((b.clip * layer_.in[0] + t) * layer_.in[1] + h) *
                                                            layer_.in[2]) * channels
                                       : nullptr;
            for (int64_t w = w0; w < w0 + wide; ++w)
              *place++ = inside && w >= 0 && w < layer_.in[2] ? line + w * channels : blank_;
          }
        };
        if (by_taps()) {
          frame(first_frame(b) + row / b.tiles);
          if (layer_.strided)
            transform_strided(places, channels, depth_, to + row * row_, position_);
          else
            kernels_.transform[0](places, nullptr, channels, to + row * row_, position_);
          continue;
        }
        const int64_t t0 = (b.frame + row / b.tiles) * layer_.m[0] - layer_.padding[0];
        if (only_time_) {
          for (int64_t t = t0; t < t0 + n_[0]; ++t) frame(t);
          (n_[0] == 4 ? transform_time<4> : transform_time<6>)(places, channels, to + row * row_, position_);
          continue;
        }
        float factors[MOST_FRAMES];
        int frames = 0;
        for (int64_t t = 0; t < n_[0]; ++t) {
          const float factor = data_.time_in[step * n_[0] + t];
          if (factor == 0.0f || t0 + t < 0 || t0 + t >= layer_.in[0]) continue;
          factors[frames++] = factor;
          frame(t0 + t);
        }
        if (!frames) frame(-1);
        kernels_.transform[frames](places, factors, channels, to + row * row_, position_);
      }
    }
  }

  // At stride 2: how many of the four convolutions have this point, and how many there are before it, in all.
  int64_t halves(int64_t position) const {
    return layer_.strided ? (position / 5 < 4 ? 2 : 1) * (position % 5 < 4 ? 2 : 1) : 1;
  }
  int64_t before(int64_t position) const {
    return layer_.strided ? position / 5 * 18 + position % 5 * (position / 5 < 4 ? 4 : 2) : position;
  }

  // What the products at hand ask for meanwhile: the panel that comes next, and then rows that come after all panels.
  struct Soon {
    const float* panel;
    const float* rows;
  };

  // The products at one position and panels [begin, end).
  void multiply(const Block& b, int64_t step, int64_t position, int64_t begin, int64_t end, const Room& room) const {
    const float* v = room.v + position * position_;
    float* products = room.products + position * product_position_;
    const int64_t depth = halves(position) * depth_, panel_size = taps_ * depth * columns_;
    const float* panels = data_.weights + before(step * positions_ + position) * panels_ * taps_ * depth_ * columns_;
    const float* next = position + 1 < positions_ ? v + position_ : nullptr;
    if (by_taps()) {
      Soon soon{nullptr, next};
      for (int64_t p = begin; p < end; ++p) {
        soon.panel = panels + (p + 1) * panel_size;
        frames(b, v, depth, panels + p * panel_size, products + p * columns_, soon);
      }
      return;
    }
    // A chunk of rows stays in the cache while panels pass; as many panels as stay there, too, while chunks pass.
    const int64_t all = b.frames * b.tiles;
    const int64_t chunks = up(all * row_, CHUNK), together = chunks == 1 ? end - begin : most(1, PANELS / panel_size);
    for (int64_t first = begin; first < end; first += together)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = all * chunk / chunks, to = all * (chunk + 1) / chunks;
        Soon soon{nullptr, chunk + 1 < chunks ? v + to * row_ : next};
        for (int64_t p = first; p < least(end, first + together); ++p) {
          soon.panel = chunk == 0 ? panels + (p + 1) * panel_size : nullptr;
          rows(to - from, v + from * row_, depth, 0, 0, 1, panels + p * panel_size,
               products + from * product_row_ + p * columns_, soon);
        }
      }
  }

  // Rows [begin, end) of the products back to outputs, or what this step adds to them.
  void finish(const Block& b, int64_t step, const Room& room, int64_t begin, int64_t end) const {
    Target target;
    target.columns = static_cast<int>(layer_.outputs);
    target.bias = data_.bias;
    target.relu = data_.relu;
    target.strides[2] = target.residual_strides[2] = layer_.outputs;
    target.strides[1] = target.residual_strides[1] = layer_.out[2] * layer_.outputs;
    target.strides[0] = layer_.out[1] * layer_.out[2] * layer_.outputs;
    target.residual_strides[0] = data_.residual_still ? 0 : target.strides[0];
    Sum sum{nullptr, product_row_, nullptr, 0, 0, step == 0, step == steps_ - 1};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t tile = b.tile + row % b.tiles;
      const int64_t at[3] = {(b.frame + row / b.tiles) * layer_.m[0], tile / count_[2] * layer_.m[1],
                             tile % count_[2] * layer_.m[2]};
      int64_t y = b.clip * layer_.out[0] * target.strides[0];
      int64_t residual = b.clip * (data_.residual_still ? 1 : layer_.out[0]) * target.strides[0];
      for (int axis = 0; axis < 3; ++axis) {
        target.inside[axis] = least(layer_.m[axis], layer_.out[axis] - at[axis]);
        y += at[axis] * target.strides[axis];
        residual += at[axis] * target.residual_strides[axis];
      }
      target.y = data_.y + y;
      target.residual = data_.residual ? data_.residual + residual : nullptr;
      if (steps_ > 1) {
        sum.sum = room.sums + row * sums_;
        sum.factors = data_.time_out + step;
        sum.factor_stride = n_[0];
        sum.frames = layer_.m[0];
      }
      const float* from = room.products + row * product_row_;
      if (only_time_)
        (n_[0] == 4 ? finish_time<4> : finish_time<6>)(from, product_position_, target);
      else
        (layer_.strided ? finish_strided : kernels_.finish)(from, product_position_, target, sum);
    }
  }

  // All rows at one position and panel, summed over taps in time.
  void frames(const Block& b, const float* v, int64_t depth, const float* panel, float* products, Soon& soon) const {
    // Frames that see the same taps go together; those outside of the clip are left out.
    const int64_t begin = first_frame(b);
    for (int64_t frame = b.frame, next; frame < b.frame + b.frames; frame = next) {
      const int64_t tap = most(0, layer_.padding[0] - frame), end = taps_end(frame);
      for (next = frame + 1; next < b.frame + b.frames; ++next)
        if (most(0, layer_.padding[0] - next) != tap || taps_end(next) != end) break;
      rows((next - frame) * b.tiles, v + (frame - layer_.padding[0] - begin) * b.tiles * row_, depth, b.tiles * row_,
           tap, end, panel, products + (frame - b.frame) * b.tiles * product_row_, soon);
    }
  }
  int64_t taps_end(int64_t frame) const { return least(taps_, layer_.in[0] + layer_.padding[0] - frame); }

  // Rows in even tiles of the product, summing over taps [tap, end), which lie `stride` apart from v on.
  void rows(int64_t count, const float* v, int64_t depth, int64_t stride, int64_t tap, int64_t end, const float* panel,
            float* products, Soon& soon) const {
    const float* taps[MOST_TAPS];
    const int64_t tiles = up(count, gemm_mr()), sum = most(0, end - tap), fetched = sum * depth * LINE;
    const float* const panel_end = soon.panel + taps_ * depth * columns_;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t from = count * tile / tiles, to = count * (tile + 1) / tiles;
      for (int64_t k = tap; k < end; ++k) taps[k - tap] = v + k * stride + from * row_;
      const float*& next = soon.panel && soon.panel < panel_end ? soon.panel : soon.rows;
      gemm_tile(static_cast<int>(to - from), static_cast<int>(columns_), taps, static_cast<int>(sum), row_, depth,
                panel + tap * depth * columns_, products + from * product_row_, product_row_, Epilogue{}, next);
      if (next) next += fetched;
    }
  }

  const FastConv& layer_;
  const FastConvData& data_;
  const int threads_;
  const Plane& kernels_;
  int64_t n_[3], count_[3];     // places of a tile, and tiles, on each axis
  bool only_time_;
  int64_t taps_, steps_, positions_;  // taps in the product; points in time one by one, and points in each
  int64_t plane_, depth_;       // tiles of the plane; channels of both inputs
  int64_t columns_, panels_;
  int64_t rows_;                // of the product, in a block, at most
  int64_t row_, position_;                  // strides of V (positions, rows, channels)
  int64_t product_row_, product_position_;  // strides of M (positions, rows, outputs)
  int64_t sums_;                            // floats of a row's sums
  const float* blank_;
};

}  // namespace

void fast_conv(const FastConv& layer, const FastConvData& data, int threads) { Run(layer, data, threads)(); }

}  // namespace lean3d::LEAN3D_ISA
