// Multi-scale deformable attention on NVIDIA GPUs, sm_80 and later. Compiled at run time by NVRTC
// (mpformer/ops/nvrtc.py), without any header but our own, for one set of constants:
//
//   VALUE_TYPE, POINT_TYPE, WEIGHT_TYPE   0 float, 1 bfloat16, 2 half
//   CHANNELS, LEVELS, POINTS              head size, levels, points per level
//   FUSED                                 1: points are offsets in cells, weights are logits
//   VEC, LANES                            chosen by mpformer/ops/cuda.py for the head size and the type of
//   value
//
// LANES neighbouring lanes of a warp serve one (image, query, head), called a pair here; every lane holds VEC
// neighbouring channels, loaded and stored at once. The points of a pair are prepared once, lane i taking
// points i, i + LANES, ...; each is then handed to the other lanes by shuffles. Sums are in float.

#include "elements.cuh"

typedef ElementOf<VALUE_TYPE>::type Value;
typedef ElementOf<POINT_TYPE>::type Coordinate;
typedef ElementOf<WEIGHT_TYPE>::type Weight;

#ifndef EMULATED  // tests/ops/cuda_emulation.h defines it for a processor without PTX
// Adds N neighbouring floats in one transaction, without returning the old ones.
template <int N>
__device__ void add(float* to, const float* x);
template <>
__device__ void add<1>(float* to, const float* x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x[0]) : "memory");
}
#if __CUDA_ARCH__ >= 900
template <>
__device__ void add<2>(float* to, const float* x) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x[0]), "f"(x[1]) : "memory");
}
template <>
__device__ void add<4>(float* to, const float* x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
#define HAS_VECTOR_ADD 1
#endif
#endif

// N neighbouring elements, moved as one word of N * sizeof(T) bytes. The address is a multiple of that.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
  typedef unsigned short type;
};
template <>
struct WordOf<4> {
  typedef unsigned type;
};
template <>
struct WordOf<8> {
  typedef uint2 type;
};
template <>
struct WordOf<16> {
  typedef uint4 type;
};
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

template <int N, class T>
__device__ void load(const T* from, float* to) {
  typedef typename WordOf<sizeof(T) * N>::type Word;
  Pack<T, N> pack;
  *reinterpret_cast<Word*>(&pack) = __ldg(reinterpret_cast<const Word*>(from));
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = to_float(pack.item[i]);
}

template <int N, class T>
__device__ void store(const float* from, T* to) {
  typedef typename WordOf<sizeof(T) * N>::type Word;
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i++) from_float(from[i], pack.item[i]);
  *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(&pack);
}

// ---- the shape of the work

__device__ float infinity() { return __int_as_float(0x7f800000); }

static_assert(CHANNELS % VEC == 0 && VEC * sizeof(Value) <= 16, "a lane's channels are one word");
static_assert(LANES <= 32 && (LANES & (LANES - 1)) == 0, "a pair's lanes are a power of two within a warp");
constexpr int CHUNKS = (CHANNELS + LANES * VEC - 1) / (LANES * VEC);  // 1 unless a head exceeds 32 lanes
constexpr int K = LEVELS * POINTS;
constexpr int SLOTS = (K + LANES - 1) / LANES;  // points that one lane prepares
constexpr unsigned ALL = 0xffffffffu;
constexpr int ADD = VEC < 4 ? VEC : 4;  // floats per addition to global memory

struct Sizes {
  int height[LEVELS], width[LEVELS];
  int start[LEVELS];       // first row of the level in value
  int cell_start[LEVELS];  // first cell of the level; cells are (height + 1) x (width + 1), from (-1, -1)
  int batch, rows, queries, heads, cells;
  int reference_batch;  // 1 or batch
};

__device__ float sum_over_lanes(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step, LANES);
  return x;
}

// Where this thread works. Threads past the last pair redo it, for the shuffles' sake, and store nothing.
struct Place {
  int lane, head, query, image;
  long long pair;
  bool active;
};

__device__ Place place_of_thread(const Sizes& sizes) {
  const long long pairs = (long long)sizes.batch * sizes.queries * sizes.heads;
  const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  Place place;
  place.lane = (int)(thread % LANES);
  place.pair = thread / LANES;
  place.active = place.pair < pairs;
  if (!place.active) place.pair = pairs - 1;
  place.head = (int)(place.pair % sizes.heads);
  const long long row = place.pair / sizes.heads;
  place.query = (int)(row % sizes.queries);
  place.image = (int)(row / sizes.queries);
  return place;
}

// The points that this lane prepared: point lane + slot * LANES in each slot.
struct Prepared {
  int corner[SLOTS];  // 16 * (row of the upper left corner in value) + a bit for each corner inside the map
  int cell[SLOTS];    // of the upper left corner, counted as in Sizes; -1 if no corner is inside
  float fx[SLOTS], fy[SLOTS], weight[SLOTS];
};

__device__ Prepared prepare(const Place& at, const Sizes& sizes, const float* reference,
                            const Coordinate* points, const Weight* weights) {
  Prepared p;
  float top = -infinity();
#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
    const int k = at.lane + slot * LANES;
    p.corner[slot] = 0;
    p.cell[slot] = -1;
    p.fx[slot] = p.fy[slot] = 0;
    p.weight[slot] = FUSED ? -infinity() : 0.0f;
    if (k >= K) continue;
    load<1>(weights + at.pair * K + k, &p.weight[slot]);
    top = p.weight[slot] > top ? p.weight[slot] : top;

    const int level = k / POINTS, width = sizes.width[level], height = sizes.height[level];
    float given[2], x, y, poison;
    load<2>(points + (at.pair * K + k) * 2, given);
    if (FUSED) {
      float origin[2];
      const long long row = (long long)(sizes.reference_batch == 1 ? 0 : at.image) * sizes.queries + at.query;
      load<2>(reference + (row * LEVELS + level) * 2, origin);
      x = origin[0] * width + given[0] - 0.5f;
      y = origin[1] * height + given[1] - 0.5f;
      // Zero for a finite location, NaN for any other.
      poison = (origin[0] + given[0] / width) * 0.0f + (origin[1] + given[1] / height) * 0.0f;
    } else {
      x = given[0] * width - 0.5f;
      y = given[1] * height - 0.5f;
      poison = given[0] * 0.0f + given[1] * 0.0f;
    }
    if (x > -1.0f && x < width && y > -1.0f && y < height) {
      const float left = floorf(x), above = floorf(y);
      const int column = (int)left, row = (int)above;
      p.fx[slot] = x - left;
      p.fy[slot] = y - above;
      const int inside_left = column >= 0, inside_right = column + 1 < width;
      const int inside_above = row >= 0, inside_below = row + 1 < height;
      const int mask = (inside_above & inside_left) | (inside_above & inside_right) << 1 |
                       (inside_below & inside_left) << 2 | (inside_below & inside_right) << 3;
      p.corner[slot] = (sizes.start[level] + row * width + column) * 16 + mask;
      p.cell[slot] = sizes.cell_start[level] + (row + 1) * (width + 1) + column + 1;
    } else {
      p.fx[slot] = p.fy[slot] = poison;
    }
  }
  if (FUSED) {  // softmax over the K logits, spread over slots and lanes
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(ALL, top, step, LANES);
      top = other > top ? other : top;
    }
    float sum = 0;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
      p.weight[slot] = expf(p.weight[slot] - top);
      sum += p.weight[slot];
    }
    sum = sum_over_lanes(sum);
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) p.weight[slot] /= sum;
  }
  return p;
}

// Point `lane` + slot * LANES, on every lane of the pair.
struct Point {
  int corner;
  float fx, fy, weight;
  __device__ float corner_weight(int i) const { return (i & 1 ? fx : 1 - fx) * (i & 2 ? fy : 1 - fy); }
};

__device__ Point broadcast(const Prepared& p, int slot, int lane) {
  Point point;
  point.corner = __shfl_sync(ALL, p.corner[slot], lane, LANES);
  point.fx = __shfl_sync(ALL, p.fx[slot], lane, LANES);
  point.fy = __shfl_sync(ALL, p.fy[slot], lane, LANES);
  point.weight = __shfl_sync(ALL, p.weight[slot], lane, LANES);
  return point;
}

// Distance in rows of value from the upper left corner to corner i.
__device__ int step_to(int i, int width) { return (i & 1) + (i & 2 ? width : 0); }

__device__ int channel_of(int lane, int chunk) { return (chunk * LANES + lane) * VEC; }

// ---- forward

extern "C" __global__ void __launch_bounds__(256)
    deform_attn_forward(const Value* value, const float* reference, const Coordinate* points,
                        const Weight* weights, Value* output, const __grid_constant__ Sizes sizes) {
  const Place at = place_of_thread(sizes);
  const Prepared p = prepare(at, sizes, reference, points, weights);
  const long long row_stride = (long long)sizes.heads * CHANNELS;
  const Value* map = value + at.image * sizes.rows * row_stride + at.head * CHANNELS;
  float sum[CHUNKS][VEC] = {};

#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
#pragma unroll 4
    for (int lane = 0; lane < LANES; lane++) {
      const int k = slot * LANES + lane;
      if (k >= K) break;
      const Point point = broadcast(p, slot, lane);
      const int width = sizes.width[k / POINTS];
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = channel_of(at.lane, chunk);
        float sample[VEC] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!(point.corner >> i & 1) || channel >= CHANNELS) continue;
          float corner[VEC];
          load<VEC>(map + ((point.corner >> 4) + step_to(i, width)) * row_stride + channel, corner);
#pragma unroll
          for (int v = 0; v < VEC; v++) sample[v] += point.corner_weight(i) * corner[v];
        }
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          // A location that is not finite has no corners and NaN fractions; finite ones outside give zero.
          sum[chunk][v] += point.weight * (sample[v] + point.fx * 0.0f);
        }
      }
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int channel = channel_of(at.lane, chunk);
    if (at.active && channel < CHANNELS) store<VEC>(sum[chunk], output + at.pair * CHANNELS + channel);
  }
}

// ---- backward

// What the sorted form of the backward pass keeps of a point.
struct alignas(16) Record {
  float fx, fy, weight;
  int query;
};

// Gradients of points and weights (of offsets and logits if FUSED). The gradient of value is either added to
// the float buffer `grad_value` at once (ATOMIC), or left to deform_attn_backward_value by writing, for every
// point, its record and the cell it lies in; points without corners get the number of all cells.
template <bool ATOMIC>
__device__ void backward(const Value* grad, const Value* value, const float* reference,
                         const Coordinate* points, const Weight* weights, Coordinate* grad_points,
                         Weight* grad_weights, float* grad_value, int* cells, Record* records,
                         const Sizes& sizes) {
  const Place at = place_of_thread(sizes);
  const Prepared p = prepare(at, sizes, reference, points, weights);
  const long long row_stride = (long long)sizes.heads * CHANNELS;
  const long long map = at.image * sizes.rows * row_stride + at.head * CHANNELS;
  float g[CHUNKS][VEC] = {};
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int channel = channel_of(at.lane, chunk);
    if (channel < CHANNELS) load<VEC>(grad + at.pair * CHANNELS + channel, g[chunk]);
  }

  float weight_slope[SLOTS] = {}, x_slope[SLOTS] = {}, y_slope[SLOTS] = {};
#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
#pragma unroll 2
    for (int lane = 0; lane < LANES; lane++) {
      const int k = slot * LANES + lane;
      if (k >= K) break;
      const Point point = broadcast(p, slot, lane);
      const int width = sizes.width[k / POINTS];
      float dot[4] = {};
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = channel_of(at.lane, chunk);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!(point.corner >> i & 1) || channel >= CHANNELS) continue;
          const long long where = map + ((point.corner >> 4) + step_to(i, width)) * row_stride + channel;
          float corner[VEC], share[VEC];
          load<VEC>(value + where, corner);
          const float weight = point.weight * point.corner_weight(i);
#pragma unroll
          for (int v = 0; v < VEC; v++) {
            dot[i] += g[chunk][v] * corner[v];
            share[v] = weight * g[chunk][v];
          }
          if (ATOMIC && at.active) {
#pragma unroll
            for (int v = 0; v < VEC; v += ADD) add<ADD>(grad_value + where + v, share + v);
          }
        }
      }
      const float fx = point.fx, fy = point.fy;
      const float by_weight =
          (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
      const float by_x = (1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]);
      const float by_y = (1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1]);
      const float all_weight = sum_over_lanes(by_weight), all_x = sum_over_lanes(by_x),
                  all_y = sum_over_lanes(by_y);
      if (at.lane == lane) {
        weight_slope[slot] = all_weight;
        x_slope[slot] = all_x;
        y_slope[slot] = all_y;
      }
    }
  }

  float mean = 0;
  if (FUSED) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) mean += p.weight[slot] * weight_slope[slot];
    mean = sum_over_lanes(mean);
  }
#pragma unroll
  for (int slot = 0; slot < SLOTS; slot++) {
    const int k = at.lane + slot * LANES;
    if (k >= K || !at.active) continue;
    const int level = k / POINTS, width = sizes.width[level];
    const long long i = at.pair * K + k;
    const float by_weight = FUSED ? p.weight[slot] * (weight_slope[slot] - mean) : weight_slope[slot];
    const float by_point[2] = {p.weight[slot] * x_slope[slot] * (FUSED ? 1 : width),
                               p.weight[slot] * y_slope[slot] * (FUSED ? 1 : sizes.height[level])};
    store<1>(&by_weight, grad_weights + i);
    store<2>(by_point, grad_points + 2 * i);
    if (!ATOMIC) {
      const int pair = at.image * sizes.heads + at.head;
      cells[i] = (p.cell[slot] < 0 ? sizes.batch * sizes.heads : pair) * sizes.cells + max(p.cell[slot], 0);
      records[i] = Record{p.fx[slot], p.fy[slot], p.weight[slot], at.query};
    }
  }
}

#ifdef HAS_VECTOR_ADD
extern "C" __global__ void __launch_bounds__(256)
    deform_attn_backward_add(const Value* grad, const Value* value, const float* reference,
                             const Coordinate* points, const Weight* weights, Coordinate* grad_points,
                             Weight* grad_weights, float* grad_value, const __grid_constant__ Sizes sizes) {
  backward<true>(grad, value, reference, points, weights, grad_points, grad_weights, grad_value, nullptr,
                 nullptr, sizes);
}
#endif

extern "C" __global__ void __launch_bounds__(256)
    deform_attn_backward_record(const Value* grad, const Value* value, const float* reference,
                                const Coordinate* points, const Weight* weights, Coordinate* grad_points,
                                Weight* grad_weights, int* cells, Record* records,
                                const __grid_constant__ Sizes sizes) {
  backward<false>(grad, value, reference, points, weights, grad_points, grad_weights, nullptr, cells, records,
                  sizes);
}

// The gradient of value without additions to memory: LANES lanes own one row and head and collect the points
// of the four cells around it, in the order of the sort. `first` holds, for every cell and the end, its place
// in `order`.
extern "C" __global__ void __launch_bounds__(256)
    deform_attn_backward_value(const Value* grad, const int* first, const long long* order,
                               const Record* records, Value* grad_value,
                               const __grid_constant__ Sizes sizes) {
  const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = (int)(thread % LANES);
  const long long owner = thread / LANES;
  const int head = (int)(owner % sizes.heads), row = (int)(owner / sizes.heads % sizes.rows);
  const long long image = owner / sizes.heads / sizes.rows;
  if (image >= sizes.batch) return;
  int level = 0;
  while (level + 1 < LEVELS && row >= sizes.start[level + 1]) level++;
  const int width = sizes.width[level], y = (row - sizes.start[level]) / width,
            x = (row - sizes.start[level]) % width;
  const int* cells = first + (image * sizes.heads + head) * sizes.cells + sizes.cell_start[level];

  float sum[CHUNKS][VEC] = {};
  for (int i = 0; i < 4; i++) {  // this row is corner i of that cell
    const int* cell = cells + (y + 1 - (i >> 1)) * (width + 1) + x + 1 - (i & 1);
    for (int at = cell[0]; at < cell[1]; at++) {
      const Record record = records[order[at]];
      const float weight =
          record.weight * (i & 1 ? record.fx : 1 - record.fx) * (i & 2 ? record.fy : 1 - record.fy);
      const Value* from = grad + ((image * sizes.queries + record.query) * sizes.heads + head) * CHANNELS;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = channel_of(lane, chunk);
        if (channel >= CHANNELS) continue;
        float g[VEC];
        load<VEC>(from + channel, g);
#pragma unroll
        for (int v = 0; v < VEC; v++) sum[chunk][v] += weight * g[v];
      }
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int channel = channel_of(lane, chunk);
    if (channel < CHANNELS) store<VEC>(sum[chunk], grad_value + owner * CHANNELS + channel);
  }
}
