#include "cpu.h"

#include "../gemm/cpu.h"
#include "../native/parallel.h"
#include "../native/simd.h"

namespace lean3d::LEAN3D_ISA {
namespace {

constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B;  // the points of F(4, 3) besides 0: A, -A, B, -B

// B^T of F(2, 3) (4 places) and of F(4, 3) (6 places), and A^T, over vectors of channels.
template <int N>
inline void to_points(const vec* d, vec* v) {
  if constexpr (N == 1) {
    v[0] = d[0];
  } else if constexpr (N == 4) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
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
  } else {
    const vec even = p[1] + p[2], odd = p[1] - p[2], even2 = p[3] + p[4], odd2 = p[3] - p[4];
    y[0] = p[0] + even + even2;
    y[1] = A * odd + B * odd2;
    y[2] = A2 * even + B2 * even2;
    y[3] = A2 * A * odd + (B2 * B * odd2 + p[5]);
  }
}

constexpr int outputs_of(int n) { return n == 1 ? 1 : n - 2; }
constexpr int MOST = 6;  // places of a tile on an axis

// One tile of x, its places anywhere, into the row v; positions lie `stride` apart.
template <int NT, int NH, int NW>
void transform_tile(const float* const* places, int64_t channels, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const bool whole = c + LANES <= channels;
    const mask m = tail(static_cast<int>(channels - c));
    vec a[NT][NH][NW];
    for (int t = 0; t < NT; ++t) {
      for (int h = 0; h < NH; ++h) {
        const float* const* here = places + (t * NH + h) * NW;
        vec d[NW];
        if (whole) {
#pragma GCC unroll 6
          for (int w = 0; w < NW; ++w) d[w] = load(here[w] + c);
        } else {
#pragma GCC unroll 6
          for (int w = 0; w < NW; ++w) d[w] = load(here[w] + c, m);
        }
        to_points<NW>(d, a[t][h]);
      }
      if constexpr (NH > 1 || NT == 1) {
        for (int w = 0; w < NW; ++w) {
          vec d[NH], p[NH];
#pragma GCC unroll 6
          for (int h = 0; h < NH; ++h) d[h] = a[t][h][w];
          to_points<NH>(d, p);
#pragma GCC unroll 6
          for (int h = 0; h < NH; ++h) {
            if constexpr (NT == 1)
              store(v + (h * NW + w) * stride + c, p[h]);
            else
              a[t][h][w] = p[h];
          }
        }
      }
    }
    if constexpr (NT > 1) {
      for (int h = 0; h < NH; ++h) {
        for (int w = 0; w < NW; ++w) {
          vec d[NT], p[NT];
#pragma GCC unroll 6
          for (int t = 0; t < NT; ++t) d[t] = a[t][h][w];
          to_points<NT>(d, p);
#pragma GCC unroll 6
          for (int t = 0; t < NT; ++t) store(v + ((t * NH + h) * NW + w) * stride + c, p[t]);
        }
      }
    }
  }
}

// Where a tile of outputs goes: strides of y (and of the residual) in floats, and how much of it is inside.
struct Target {
  float* y;
  const float* residual;
  int64_t strides[3], residual_strides[3];
  int inside[3];
  bool relu;
};

// The products of one tile (positions lie NR apart) back to outputs: `columns` channels from the target on.
template <int NT, int NH, int NW>
void finish_tile(const float* products, int64_t stride, int columns, const float* bias, const Target& target) {
  constexpr int MT = outputs_of(NT), MH = outputs_of(NH), MW = outputs_of(NW);
  for (int c = 0; c < columns; c += LANES) {
    const bool whole = c + LANES <= columns;
    const mask m = tail(columns - c);
    const vec b = !bias ? vec{} : whole ? load(bias + c) : load(bias + c, m);
    vec a[NT][MH][MW];
    for (int t = 0; t < NT; ++t) {
      vec rows[NH][MW];
      for (int h = 0; h < NH; ++h) {
        vec p[NW];
#pragma GCC unroll 6
        for (int w = 0; w < NW; ++w) p[w] = load(products + ((t * NH + h) * NW + w) * stride + c);
        from_points<NW>(p, rows[h]);
      }
      for (int w = 0; w < MW; ++w) {
        vec p[NH], y[MH];
#pragma GCC unroll 6
        for (int h = 0; h < NH; ++h) p[h] = rows[h][w];
        from_points<NH>(p, y);
#pragma GCC unroll 6
        for (int h = 0; h < MH; ++h) a[t][h][w] = y[h];
      }
    }
    for (int h = 0; h < target.inside[1]; ++h) {
      for (int w = 0; w < target.inside[2]; ++w) {
        vec p[NT], y[MT];
#pragma GCC unroll 6
        for (int t = 0; t < NT; ++t) p[t] = a[t][h][w];
        from_points<NT>(p, y);
        float* to = target.y + h * target.strides[1] + w * target.strides[2] + c;
        const float* from =
            target.residual ? target.residual + h * target.residual_strides[1] + w * target.residual_strides[2] + c : nullptr;
#pragma GCC unroll 6
        for (int t = 0; t < MT; ++t) {
          if (t >= target.inside[0]) break;
          vec out = y[t] + b;
          if (from) {
            const float* r = from + t * target.residual_strides[0];
            out += whole ? load(r) : load(r, m);
          }
          if (target.relu) out = relu(out);
          if (whole)
            store(to + t * target.strides[0], out);
          else
            store(to + t * target.strides[0], out, m);
        }
      }
    }
  }
}

struct Kernels {
  void (*transform)(const float* const*, int64_t, float*, int64_t);
  void (*finish)(const float*, int64_t, int, const float*, const Target&);
};
template <int NT, int NH, int NW>
constexpr Kernels kernels{&transform_tile<NT, NH, NW>, &finish_tile<NT, NH, NW>};
template <int NT, int NH>
Kernels pick(int64_t w) {
  return w == 1 ? kernels<NT, NH, 1> : w == 2 ? kernels<NT, NH, 4> : kernels<NT, NH, 6>;
}
template <int NT>
Kernels pick(int64_t h, int64_t w) {
  return h == 1 ? pick<NT, 1>(w) : h == 2 ? pick<NT, 4>(w) : pick<NT, 6>(w);
}
Kernels pick(const int64_t* m) {
  return m[0] == 1 ? pick<1>(m[1], m[2]) : m[0] == 2 ? pick<4>(m[1], m[2]) : pick<6>(m[1], m[2]);
}

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// The next odd number of cache lines: rows that far apart spread over the sets of a cache.
inline int64_t odd_lines(int64_t floats) { return (up(floats, 16) | 1) * 16; }

struct Block {
  int64_t clip, frame, frames, tile, tiles;  // frames: outputs' tiles in time;  tiles: of the plane
};

class Run {
 public:
  Run(const FastConv& layer, const FastConvData& data, int threads)
      : layer_(layer), data_(data), threads_(threads), kernels_(pick(layer.m)) {
    for (int axis = 0; axis < 3; ++axis) {
      n_[axis] = static_cast<int>(layer.m[axis] == 1 ? 1 : layer.m[axis] + 2);
      count_[axis] = up(layer.out[axis], layer.m[axis]);
    }
    taps_ = layer.m[0] == 1 ? layer.taps[0] : 1;
    positions_ = n_[0] * n_[1] * n_[2];
    plane_ = count_[1] * count_[2];
    depth_ = layer.channels[0] + layer.channels[1];
    columns_ = gemm_nr();
    panels_ = up(layer.outputs, columns_);
    row_ = odd_lines(up(depth_, 16) * 16 + (layer.channels[1] ? 16 : 0));
    rows_ = (layer.block_frames + taps_ - 1) * layer.block_tiles;
    position_ = odd_lines(rows_ * row_);
    product_row_ = odd_lines(positions_ * columns_);
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
    const int64_t groups = up(panels_, layer_.block_panels);
    if (layer_.shared) {
      float* v = scratch(0, positions_ * position_);
      for (int64_t index = 0; index < blocks; ++index) {
        const Block b = block(index);
        const int64_t rows = rows_of(b), chunk = up(rows, 4 * threads_);
        parallel(up(rows, chunk), threads_,
                 [&](int64_t piece, int) { transform(b, v, piece * chunk, least(rows, (piece + 1) * chunk)); });
        parallel(groups, threads_, [&](int64_t group, int) { multiply(b, v, group); });
      }
    } else {
      parallel(blocks, threads_, [&](int64_t index, int) {
        const Block b = block(index);
        float* v = scratch(0, positions_ * position_);
        transform(b, v, 0, rows_of(b));
        for (int64_t group = 0; group < groups; ++group) multiply(b, v, group);
      });
    }
  }

 private:
  // With taps in time V has rows for the input frames that a block sees, [first, end) within the clip.
  int64_t first_frame(const Block& b) const { return most(0, b.frame - layer_.padding[0]); }
  int64_t end_frame(const Block& b) const {
    return most(first_frame(b), least(layer_.in[0], b.frame + b.frames - 1 - layer_.padding[0] + taps_));
  }
  bool by_taps() const { return layer_.m[0] == 1; }
  int64_t rows_of(const Block& b) const {
    return (by_taps() ? end_frame(b) - first_frame(b) : b.frames) * b.tiles;
  }

  void transform(const Block& b, float* v, int64_t begin, int64_t end) const {
    const int64_t height = layer_.in[1], width = layer_.in[2];
    for (int source = 0; source < 2; ++source) {
      const int64_t channels = layer_.channels[source];
      if (!channels) continue;
      const float* places[MOST * MOST * MOST];
      for (int64_t row = begin; row < end; ++row) {
        const int64_t tile = b.tile + row % b.tiles;
        const int64_t t0 = by_taps() ? first_frame(b) + row / b.tiles
                                     : (b.frame + row / b.tiles) * layer_.m[0] - layer_.padding[0];
        const int64_t h0 = tile / count_[2] * layer_.m[1] - layer_.padding[1];
        const int64_t w0 = tile % count_[2] * layer_.m[2] - layer_.padding[2];
        const float** place = places;
        for (int64_t t = t0; t < t0 + n_[0]; ++t)
          for (int64_t h = h0; h < h0 + n_[1]; ++h) {
            const bool inside = t >= 0 && t < layer_.in[0] && h >= 0 && h < height;
            const float* line =
                data_.x[source] + (((b.clip * layer_.in[0] + t) * height + h) * width) * channels;
            for (int64_t w = w0; w < w0 + n_[2]; ++w)
              *place++ = inside && w >= 0 && w < width ? line + w * channels : blank_;
          }
        kernels_.transform(places, channels, v + row * row_ + (source ? layer_.channels[0] : 0), position_);
      }
    }
  }

  // One group of panels: the products at all positions, then the outputs.
  void multiply(const Block& b, const float* v, int64_t group) const {
    const int64_t first = group * layer_.block_panels, panels = least(layer_.block_panels, panels_ - first);
    const int64_t all = b.frames * b.tiles;
    float* products = scratch(1, layer_.block_frames * layer_.block_tiles * product_row_ * layer_.block_panels);
    for (int64_t position = 0; position < positions_; ++position)
      for (int64_t panel = 0; panel < panels; ++panel)
        product(b, v + position * position_,
                data_.weights + ((first + panel) * positions_ + position) * taps_ * depth_ * columns_,
                products + panel * all * product_row_ + position * columns_);
    for (int64_t row = 0; row < all; ++row) {
      const int64_t tile = b.tile + row % b.tiles;
      const int64_t at[3] = {(b.frame + row / b.tiles) * layer_.m[0], tile / count_[2] * layer_.m[1],
                             tile % count_[2] * layer_.m[2]};
      Target target;
      target.relu = data_.relu;
      target.strides[2] = target.residual_strides[2] = layer_.outputs;
      target.strides[1] = target.residual_strides[1] = layer_.out[2] * layer_.outputs;
      target.strides[0] = layer_.out[1] * layer_.out[2] * layer_.outputs;
      target.residual_strides[0] = data_.residual_still ? 0 : target.strides[0];
      int64_t y = b.clip * layer_.out[0] * target.strides[0];
      int64_t residual = data_.residual_still ? b.clip * target.strides[0] : y;
      for (int axis = 0; axis < 3; ++axis) {
        target.inside[axis] = static_cast<int>(least(layer_.m[axis], layer_.out[axis] - at[axis]));
        y += at[axis] * target.strides[axis];
        residual += at[axis] * target.residual_strides[axis];
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = (first + panel) * columns_;
        target.y = data_.y + y + column;
        target.residual = data_.residual ? data_.residual + residual + column : nullptr;
        kernels_.finish(products + (panel * all + row) * product_row_, columns_,
                        static_cast<int>(least(columns_, layer_.outputs - column)),
                        data_.bias ? data_.bias + column : nullptr, target);
      }
    }
  }

  // All rows at one position and panel.
  void product(const Block& b, const float* v, const float* panel, float* products) const {
    if (taps_ == 1 && !layer_.padding[0]) return rows(b.frames * b.tiles, v, 0, 0, 1, panel, products);
    if (!by_taps()) return rows(b.frames * b.tiles, v, 0, 0, 1, panel, products);
    // Frames that see the same taps go together; those outside of the clip are left out.
    const int64_t begin = first_frame(b);
    for (int64_t frame = b.frame, next; frame < b.frame + b.frames; frame = next) {
      const int64_t tap = most(0, layer_.padding[0] - frame), end = taps_end(frame);
      for (next = frame + 1; next < b.frame + b.frames; ++next)
        if (most(0, layer_.padding[0] - next) != tap || taps_end(next) != end) break;
      rows((next - frame) * b.tiles, v + (frame - layer_.padding[0] - begin) * b.tiles * row_, b.tiles * row_, tap, end,
           panel, products + (frame - b.frame) * b.tiles * product_row_);
    }
  }
  int64_t taps_end(int64_t frame) const { return least(taps_, layer_.in[0] + layer_.padding[0] - frame); }

  // Rows in even tiles of the product, summing over taps [tap, end), which lie `stride` apart from v on.
  void rows(int64_t count, const float* v, int64_t stride, int64_t tap, int64_t end, const float* panel,
            float* products) const {
    const float* taps[16];
    const int64_t tiles = up(count, gemm_mr());
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t from = count * tile / tiles, to = count * (tile + 1) / tiles;
      for (int64_t k = tap; k < end; ++k) taps[k - tap] = v + k * stride + from * row_;
      gemm_tile(static_cast<int>(to - from), static_cast<int>(columns_), taps, static_cast<int>(most(0, end - tap)),
                row_, depth_, panel + tap * depth_ * columns_, products + from * product_row_, product_row_, Epilogue{});
    }
  }

  const FastConv& layer_;
  const FastConvData& data_;
  const int threads_;
  const Kernels kernels_;
  int n_[3];
  int64_t count_[3];                               // tiles on each axis
  int64_t taps_, positions_, plane_, depth_;       // taps in the product; tiles of the plane; channels of both inputs
  int64_t columns_, panels_;
  int64_t row_, rows_, position_, product_row_;    // strides of V (positions, rows, channels); rows at most; of M
  const float* blank_;
};

}  // namespace

void fast_conv(const FastConv& layer, const FastConvData& data, int threads) { Run(layer, data, threads)(); }

}  // namespace lean3d::LEAN3D_ISA
