// The inner loops of multi-scale deformable attention. This file is compiled once per instruction set, with
// MPFORMER_KERNEL (the name of the table it defines) and MPFORMER_LANES (floats per vector).
//
// A tile of queries is prepared first, with the query as the innermost index: conversion to float, softmax,
// cell and bilinear weights of every point, in loops that the compiler vectorises over queries. Then every
// query gathers its points, vectorised over channels. Nothing here depends on the number of threads.
#include <cstring>

#include "deform_attn_cpu.h"
#include "deform_attn_types.h"

namespace mpformer {
namespace {

constexpr int kLanes = MPFORMER_LANES;
typedef float Vec __attribute__((vector_size(4 * MPFORMER_LANES), may_alias));
typedef float Vec4 __attribute__((vector_size(16), may_alias));

// ---- slabs

template <class T>
void pack_rows(const Problem& p, const Level& level, int64_t b, int64_t h, int64_t row0, int64_t row1,
               float* slab) {
  const int64_t channels = p.channels, padded = round_up(channels, kLanes);
  for (int64_t row = row0; row < row1; row++) {
    float* to = slab + row * level.pitch * padded;
    if (row == 0 || row > level.height) {
      std::memset(to, 0, sizeof(float) * level.pitch * padded);
      continue;
    }
    std::memset(to, 0, sizeof(float) * padded);
    std::memset(to + (level.pitch - 1) * padded, 0, sizeof(float) * padded);
    for (int64_t x = 0; x < level.width; x++) {
      const T* from = address<T>(p.value, b, level.first_row + (row - 1) * level.width + x, h);
      prefetch(from + 16 * p.value.row_stride, channels - 1);
      to += padded;
      for (int64_t c = 0; c < channels; c++) to[c] = to_float(from[c]);
      for (int64_t c = channels; c < padded; c++) to[c] = 0;
    }
  }
}

void pack(const Problem& p, const Level& level, int64_t b, int64_t h, int64_t row0, int64_t row1,
          float* slab) {
  if (p.value.type == kFloat) pack_rows<float>(p, level, b, h, row0, row1, slab);
  if (p.value.type == kBfloat16) pack_rows<Bfloat16>(p, level, b, h, row0, row1, slab);
  if (p.value.type == kHalf) pack_rows<Half>(p, level, b, h, row0, row1, slab);
}

template <class T>
void unpack_rows(const Problem& p, const Level& level, int64_t b, int64_t h, const float* slab) {
  const int64_t padded = round_up(p.channels, kLanes);
  for (int64_t y = 0; y < level.height; y++) {
    for (int64_t x = 0; x < level.width; x++) {
      const float* from = slab + ((y + 1) * level.pitch + x + 1) * padded;
      T* to = address<T>(p.grad_value, b, level.first_row + y * level.width + x, h);
      for (int64_t c = 0; c < p.channels; c++) from_float(from[c], to[c]);
    }
  }
}

// ---- preparing a tile

// Elements [first, first + count) of every query of the tile, turned so that the query is last.
template <class T>
void load_as(const Array& a, int64_t b, int64_t h, int64_t q0, int n, int64_t first, int64_t count,
             float* out) {
  for (int i = 0; i < n; i++) {
    const T* from = address<T>(a, b, q0 + i, h) + first;
    prefetch(from + kTile * a.row_stride, count);
    for (int64_t j = 0; j < count; j++) out[j * kTile + i] = to_float(from[j]);
  }
}

void load(const Array& a, int64_t b, int64_t h, int64_t q0, int n, int64_t first, int64_t count, float* out) {
  if (a.type == kFloat) load_as<float>(a, b, h, q0, n, first, count, out);
  if (a.type == kBfloat16) load_as<Bfloat16>(a, b, h, q0, n, first, count, out);
  if (a.type == kHalf) load_as<Half>(a, b, h, q0, n, first, count, out);
}

// Vectors of queries. A comparison gives an IntVec of all ones or zeros.
typedef int32_t IntVec __attribute__((vector_size(4 * MPFORMER_LANES), may_alias));

INLINE const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
INLINE Vec bits_as_vec(IntVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
INLINE IntVec vec_as_bits(Vec v) {
  IntVec bits;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
INLINE Vec select(IntVec mask, Vec yes, Vec no) {
  return bits_as_vec((mask & vec_as_bits(yes)) | (~mask & vec_as_bits(no)));
}
INLINE Vec all(float x) { return Vec{} + x; }

// e^x for x <= 0, to 2 units in the last place; 0 below the normal range; NaN stays NaN.
INLINE Vec exponential(Vec x) {
  const IntVec tiny = x < -87.0f;
  const Vec clamped = select(tiny, all(-87.0f), x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145752f;  // ln 2 in two parts
  r = r - n * 1.42860677e-6f;
  Vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  const Vec scale = bits_as_vec((vec_as_bits(shifted) + 127) << 23);
  return select(tiny, Vec{}, e * scale);
}

__attribute__((noinline)) void softmax(int64_t count, float* w) {
  for (int i = 0; i < kTile; i += kLanes) {
    Vec top = at(w + i), sum = {};
    for (int64_t j = kTile; j < count * kTile; j += kTile)
      top = select(at(w + j + i) > top, at(w + j + i), top);
    for (int64_t j = 0; j < count * kTile; j += kTile)
      sum += at(w + j + i) = exponential(at(w + j + i) - top);
    sum = 1.0f / sum;
    for (int64_t j = 0; j < count * kTile; j += kTile) at(w + j + i) *= sum;
  }
}

// Cells and bilinear weights of the points of one level, from coordinates (and reference points if fused).
void place(const Level& level, bool fused, int64_t points, int64_t base, const float* xy,
           const float* reference, float* fraction_x, float* fraction_y, float* const corner[4],
           int32_t* cell) {
  const float width = float(level.width), height = float(level.height);
  const float per_x = fused ? 1.0f : width, per_y = fused ? 1.0f : height;
  const float inverse_width = fused ? 1.0f / width : 1.0f, inverse_height = fused ? 1.0f / height : 1.0f;
  const int32_t first = int32_t(base) + level.pitch + 1, zero = int32_t(base) + level.zero;
  for (int64_t j = 0; j < points * kTile; j += kTile) {
    for (int i = 0; i < kTile; i += kLanes) {
      const Vec given_x = at(xy + 2 * j + i), given_y = at(xy + 2 * j + kTile + i);
      const Vec reference_x = at(reference + i), reference_y = at(reference + kTile + i);
      const Vec x = reference_x * width + given_x * per_x - 0.5f;
      const Vec y = reference_y * height + given_y * per_y - 0.5f;
      // Zero for a finite location, NaN for any other: it poisons the weights of a point that has no cells.
      const Vec poison =
          (reference_x + given_x * inverse_width) * 0.0f + (reference_y + given_y * inverse_height) * 0.0f;
      const IntVec inside = (x > -1.0f) & (x < width) & (y > -1.0f) & (y < height);
      const Vec x_in = select(inside, x, Vec{}), y_in = select(inside, y, Vec{});
      IntVec column = __builtin_convertvector(x_in, IntVec), row = __builtin_convertvector(y_in, IntVec);
      column += __builtin_convertvector(column, Vec) > x_in;  // -1 where truncation rounded up
      row += __builtin_convertvector(row, Vec) > y_in;
      const Vec fx = x_in - __builtin_convertvector(column, Vec) + poison;
      const Vec fy = y_in - __builtin_convertvector(row, Vec) + poison;
      const Vec right_above = fx * (1 - fy), right_below = fx * fy;
      at(fraction_x + j + i) = fx;
      at(fraction_y + j + i) = fy;
      at(corner[0] + j + i) = (1 - fx) * (1 - fy);
      at(corner[1] + j + i) = right_above;
      at(corner[2] + j + i) = (1 - fx) * fy;
      at(corner[3] + j + i) = right_below;
      *reinterpret_cast<IntVec*>(cell + j + i) =
          (inside & (row * level.pitch + column + first)) | (~inside & zero);
    }
  }
}

// Loads and prepares levels [level0, level1) of up to kTile queries; `weights` end up as [points of those
// levels].
void prepare(const Problem& p, const Level* levels, int64_t level0, int64_t level1, int64_t b, int64_t h,
             int64_t q0, int n, const Tile& t) {
  const int64_t k = p.points_per_level, count = (level1 - level0) * k;
  const bool fused = p.reference.data != nullptr;
  load(p.points, b, h, q0, n, level0 * k * 2, count * 2, t.coordinates);
  const float* weights = t.weights;
  if (fused) {
    load(p.reference, b, 0, q0, n, level0 * 2, (level1 - level0) * 2, t.reference);
    load(p.weights, b, h, q0, n, 0, p.levels * k, t.weights);
    softmax(p.levels * k, t.weights);
    weights += level0 * k * kTile;
  } else {
    load(p.weights, b, h, q0, n, level0 * k, count, t.weights);
  }
  if (weights != t.weights) std::memmove(t.weights, weights, sizeof(float) * count * kTile);
  for (int64_t l = level0; l < level1; l++) {
    const int64_t j = (l - level0) * k * kTile;
    float* const corner[4] = {t.corner[0] + j, t.corner[1] + j, t.corner[2] + j, t.corner[3] + j};
    place(levels[l], fused, k, levels[l].first_cell - levels[level0].first_cell, t.coordinates + 2 * j,
          t.reference + (fused ? (l - level0) * 2 * kTile : 0), t.fraction_x + j, t.fraction_y + j, corner,
          t.cell + j);
  }
}

// ---- forward

// One query, N vectors of channels: sum over points of weight * bilinear sample.
template <int N>
INLINE void gather(const Problem& p, const Level* levels, const Tile& t, int i, const float* slab,
                   int64_t padded, float* out) {
  // Copies: the compiler need not fear that a store changes the pointers.
  const float *c0 = t.corner[0] + i, *c1 = t.corner[1] + i, *c2 = t.corner[2] + i, *c3 = t.corner[3] + i;
  const float* weights = t.weights + i;
  const int32_t* cells = t.cell + i;
  Vec sum[N] = {};
  int64_t j = 0;
  for (int64_t l = 0; l < p.levels; l++) {
    const int64_t down = levels[l].pitch * padded;
    for (int64_t point = 0; point < p.points_per_level; point++, j += kTile) {
      const float* above = slab + cells[j] * padded;
      const float* below = above + down;
      const float w0 = c0[j], w1 = c1[j], w2 = c2[j], w3 = c3[j], weight = weights[j];
      for (int v = 0; v < N; v++) {
        const int64_t c = v * kLanes;
        sum[v] += weight * (w0 * at(above + c) + w1 * at(above + padded + c) + w2 * at(below + c) +
                            w3 * at(below + padded + c));
      }
    }
  }
  for (int v = 0; v < N; v++) at(out + v * kLanes) = sum[v];
}

template <class T>
INLINE void store(const float* from, int64_t count, T* to) {
  for (int64_t c = 0; c < count; c++) from_float(from[c], to[c]);
}

// N: vectors per head, known to the compiler for the common head sizes, 0 for any other.
template <int N>
void forward_queries(const Problem& p, const Level* levels, int64_t b, int64_t h, int64_t q0, int64_t q1,
                     const float* slab, const Tile& t) {
  const int64_t padded = N ? N * kLanes : round_up(p.channels, kLanes);
  for (int64_t q = q0; q < q1; q += kTile) {
    const int n = int(q1 - q < kTile ? q1 - q : kTile);
    prepare(p, levels, 0, p.levels, b, h, q, n, t);
    for (int i = 0; i < n; i++) {
      for (int64_t c = 0; c < padded; c += 4 * kLanes) {
        alignas(64) float row[4 * kLanes];
        const int64_t left = padded - c < 4 * kLanes ? padded - c : 4 * kLanes;
        if (N) {
          gather<N ? N : 1>(p, levels, t, i, slab, padded, row);
        } else if (left == 4 * kLanes) {
          gather<4>(p, levels, t, i, slab + c, padded, row);
        } else {
          for (int64_t part = 0; part < left; part += kLanes)
            gather<1>(p, levels, t, i, slab + c + part, padded, row + part);
        }
        const int64_t count = p.channels - c < left ? p.channels - c : left;
        if (p.output.type == kFloat) store(row, count, address<float>(p.output, b, q + i, h) + c);
        if (p.output.type == kBfloat16) store(row, count, address<Bfloat16>(p.output, b, q + i, h) + c);
        if (p.output.type == kHalf) store(row, count, address<Half>(p.output, b, q + i, h) + c);
      }
    }
  }
}

void forward(const Problem& p, const Level* levels, int64_t b, int64_t h, int64_t q0, int64_t q1,
             const float* slab, const Tile& t) {
  const int64_t vectors = round_up(p.channels, kLanes) / kLanes;
  const auto run = vectors == 1   ? forward_queries<1>
                   : vectors == 2 ? forward_queries<2>
                   : vectors == 3 ? forward_queries<3>
                   : vectors == 4 ? forward_queries<4>
                                  : forward_queries<0>;
  run(p, levels, b, h, q0, q1, slab, t);
}

// ---- backward

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int Int4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Int4{i, j, k, l})
#endif

INLINE Vec4 fold(const Vec& v) {  // to four lanes
  Vec4 part[kLanes / 4];
  std::memcpy(part, &v, sizeof(Vec));
  for (int width = kLanes / 8; width > 0; width /= 2)
    for (int k = 0; k < width; k++) part[k] += part[k + width];
  return part[0];
}

INLINE Vec4 sums(const Vec& a, const Vec& b, const Vec& c, const Vec& d) {  // of each vector, in one
  const Vec4 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  const Vec4 wx = SHUFFLE(w, x, 0, 4, 1, 5) + SHUFFLE(w, x, 2, 6, 3, 7);
  const Vec4 yz = SHUFFLE(y, z, 0, 4, 1, 5) + SHUFFLE(y, z, 2, 6, 3, 7);
  return SHUFFLE(wx, yz, 0, 1, 4, 5) + SHUFFLE(wx, yz, 2, 3, 6, 7);
}

// One query and level: scatters its gradient row into the slab and leaves, in place of the corner weights,
// the dot products of the gradient with the four corners of every point. `first` is the level's first point
// in the tile.
template <int N>
INLINE void scatter(const Tile& t, int i, int64_t first, int64_t points, int64_t down, int64_t vectors,
                    const float* value_slab, float* grad_slab, const float* grad) {
  const int64_t padded = vectors * kLanes, start = first * kTile + i;
  float *c0 = t.corner[0] + start, *c1 = t.corner[1] + start, *c2 = t.corner[2] + start,
        *c3 = t.corner[3] + start;
  const float* weights = t.weights + start;
  const int32_t* cells = t.cell + start;
  Vec kept[N ? N : 1];
  for (int v = 0; v < N; v++) kept[v] = at(grad + v * kLanes);
  for (int64_t j = 0; j < points * kTile; j += kTile) {
    const int64_t cell = cells[j] * padded;
    const float *above = value_slab + cell, *below = above + down;
    float *into_above = grad_slab + cell, *into_below = into_above + down;
    const float weight = weights[j];
    const float w0 = weight * c0[j], w1 = weight * c1[j], w2 = weight * c2[j], w3 = weight * c3[j];
    Vec dot[4] = {};
    for (int64_t v = 0; v < (N ? N : vectors); v++) {
      const int64_t c = v * kLanes;
      const Vec g = N ? kept[N ? v : 0] : at(grad + c);
      dot[0] += g * at(above + c);
      dot[1] += g * at(above + padded + c);
      dot[2] += g * at(below + c);
      dot[3] += g * at(below + padded + c);
      at(into_above + c) += w0 * g;
      at(into_above + padded + c) += w1 * g;
      at(into_below + c) += w2 * g;
      at(into_below + padded + c) += w3 * g;
    }
    const Vec4 d = sums(dot[0], dot[1], dot[2], dot[3]);
    c0[j] = d[0], c1[j] = d[1], c2[j] = d[2], c3[j] = d[3];
  }
}

// Gradients of one level's points in the tile, from the dot products: of the weights into corner[0], of the
// coordinates into corner[1] and corner[2].
void point_gradients(const Level& level, bool fused, int64_t first, int64_t points, const Tile& t) {
  const float per_x = fused ? 1.0f : float(level.width), per_y = fused ? 1.0f : float(level.height);
  for (int64_t i = first * kTile; i < (first + points) * kTile; i += kLanes) {
    const Vec x = at(t.fraction_x + i), y = at(t.fraction_y + i), a = at(t.weights + i);
    const Vec d0 = at(t.corner[0] + i), d1 = at(t.corner[1] + i);
    const Vec d2 = at(t.corner[2] + i), d3 = at(t.corner[3] + i);
    at(t.corner[0] + i) = (1 - y) * ((1 - x) * d0 + x * d1) + y * ((1 - x) * d2 + x * d3);
    at(t.corner[1] + i) = per_x * a * ((1 - y) * (d1 - d0) + y * (d3 - d2));
    at(t.corner[2] + i) = per_y * a * ((1 - x) * (d2 - d0) + x * (d3 - d1));
  }
}

// The gradient of the softmax's output to that of the logits, in place.
__attribute__((noinline)) void softmax_gradient(int64_t count, const float* weights, float* grads) {
  for (int i = 0; i < kTile; i += kLanes) {
    const float* weight = weights + i;
    float* grad = grads + i;
    Vec mean = {};
    for (int64_t j = 0; j < count * kTile; j += kTile) mean += at(weight + j) * at(grad + j);
    for (int64_t j = 0; j < count * kTile; j += kTile) at(grad + j) = at(weight + j) * (at(grad + j) - mean);
  }
}

void store_weights(const Problem& p, int64_t b, int64_t h, int64_t q0, int n, int64_t first, int64_t count,
                   const float* grads) {
  for (int i = 0; i < n; i++) {
    float* to = address<float>(p.grad_weights, b, q0 + i, h) + first;
    for (int64_t j = 0; j < count; j++) to[j] = grads[j * kTile + i];
  }
}

void store_points(const Problem& p, int64_t b, int64_t h, int64_t q0, int n, int64_t first, int64_t count,
                  const float* grads_x, const float* grads_y) {
  for (int i = 0; i < n; i++) {
    float* to = address<float>(p.grad_points, b, q0 + i, h) + 2 * first;
    for (int64_t j = 0; j < count; j++) {
      to[2 * j] = grads_x[j * kTile + i];
      to[2 * j + 1] = grads_y[j * kTile + i];
    }
  }
}

template <class T>
INLINE void load_row(const Array& a, int64_t b, int64_t q, int64_t h, int64_t count, float* to) {
  const T* from = address<T>(a, b, q, h);
  prefetch(from + kTile * a.row_stride, count - 1);
  for (int64_t c = 0; c < count; c++) to[c] = to_float(from[c]);
}

template <int N>
void backward_queries(const Problem& p, const Level* levels, int64_t level0, int64_t level1, int64_t b,
                      int64_t h, const float* value_slab, float* grad_slab, const Tile& t, float* row) {
  const int64_t vectors = N ? N : round_up(p.channels, kLanes) / kLanes, padded = vectors * kLanes;
  const int64_t points = p.points_per_level, count = (level1 - level0) * points;
  const bool fused = p.reference.data != nullptr;
  for (int64_t q = 0; q < p.queries; q += kTile) {
    const int n = int(p.queries - q < kTile ? p.queries - q : kTile);
    prepare(p, levels, level0, level1, b, h, q, n, t);
    for (int i = 0; i < n; i++) {
      if (p.output.type == kFloat) load_row<float>(p.output, b, q + i, h, p.channels, row);
      if (p.output.type == kBfloat16) load_row<Bfloat16>(p.output, b, q + i, h, p.channels, row);
      if (p.output.type == kHalf) load_row<Half>(p.output, b, q + i, h, p.channels, row);
      for (int64_t l = level0; l < level1; l++)
        scatter<N>(t, i, (l - level0) * points, points, levels[l].pitch * padded, vectors, value_slab,
                   grad_slab, row);
    }
    for (int64_t l = level0; l < level1; l++)
      point_gradients(levels[l], fused, (l - level0) * points, points, t);
    if (fused && count == p.levels * points) softmax_gradient(count, t.weights, t.corner[0]);
    store_weights(p, b, h, q, n, level0 * points, count, t.corner[0]);
    store_points(p, b, h, q, n, level0 * points, count, t.corner[1], t.corner[2]);
  }
}

void backward(const Problem& p, const Level* levels, int64_t level0, int64_t level1, int64_t b, int64_t h,
              const float* value_slab, float* grad_slab, const Tile& t) {
  const int64_t padded = round_up(p.channels, kLanes);
  const int64_t cells =
      levels[level1 - 1].first_cell + cells_of(levels[level1 - 1]) - levels[level0].first_cell;
  std::memset(grad_slab, 0, sizeof(float) * (cells + 1) * padded);
  float* row = grad_slab + cells * padded;  // the slab has room for one more row
  const auto run = padded == kLanes       ? backward_queries<1>
                   : padded == 2 * kLanes ? backward_queries<2>
                   : padded == 3 * kLanes ? backward_queries<3>
                   : padded == 4 * kLanes ? backward_queries<4>
                                          : backward_queries<0>;
  run(p, levels, level0, level1, b, h, value_slab, grad_slab, t, row);
  for (int64_t l = level0; l < level1; l++) {
    const float* slab = grad_slab + (levels[l].first_cell - levels[level0].first_cell) * padded;
    if (p.grad_value.type == kFloat) unpack_rows<float>(p, levels[l], b, h, slab);
    if (p.grad_value.type == kBfloat16) unpack_rows<Bfloat16>(p, levels[l], b, h, slab);
    if (p.grad_value.type == kHalf) unpack_rows<Half>(p, levels[l], b, h, slab);
  }
}

void softmax_backward(const Problem& p, int64_t b, int64_t h, int64_t q0, int64_t q1, const Tile& t) {
  const int64_t count = p.levels * p.points_per_level;
  for (int64_t q = q0; q < q1; q += kTile) {
    const int n = int(q1 - q < kTile ? q1 - q : kTile);
    load(p.weights, b, h, q, n, 0, count, t.weights);
    load(p.grad_weights, b, h, q, n, 0, count, t.corner[0]);
    softmax(count, t.weights);
    softmax_gradient(count, t.weights, t.corner[0]);
    store_weights(p, b, h, q, n, 0, count, t.corner[0]);
  }
}

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
const Kernel MPFORMER_KERNEL = {
    TEXT(MPFORMER_KERNEL) + sizeof("kernel_") - 1, kLanes, pack, forward, backward, softmax_backward};

}  // namespace mpformer
