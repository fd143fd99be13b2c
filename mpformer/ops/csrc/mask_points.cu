// Mask losses on sampled points, and random numbers, on NVIDIA GPUs, sm_80 and later. Compiled at run time by
// NVRTC (mpformer/ops/nvrtc.py), without any header but our own, for one set of constants:
//
//   VALUE_TYPE   of the predicted masks: 0 float, 1 bfloat16, 2 half
//   STAGED       1: the forward pass copies a pair's predicted mask to shared memory
//   REMEMBERED   1: it keeps the uncertainty of all candidates there, too
//
// A block works on one predicted mask, and no block writes where another does. Philox makes the points wherever
// they are needed; only the kept ones pass through memory. Atomics add integers, whose sum has no order, and
// floats are added in an order that the number of points alone decides: every run gives the same bits.
//
// Forward. The candidates are gone through once for each digit of their uncertainty (11, 11, 9 bits: a histogram
// in shared memory tells which digit the last kept one has) and once more to write the kept ones in their order.
// What costs is looking up at random places: L1 has 32 lines to find for a warp, shared memory conflicts in its
// banks to solve, 3 to 4 at random. So the mask is staged if it fits (256 x 256 in 16 bits does on sm_80, 90 and
// 100, in float on none). Where there is room behind it, or no room for it, the uncertainty of the candidates is
// remembered (4 bytes each, 150 KB for the usual 37,632) and looked up once, not four times. In the machine code
// for sm_90 a candidate takes 66 instructions each time, 14 of them in Philox. Device memory sees a staged mask
// once, a kept point twice, and the true mask at the kept and uniform points.
//
// Backward. The gradient is added up in shared memory, in as few bands of rows as fit (256 x 256: 3 on sm_90, 4
// on sm_80, 6 on sm_120), and every element of it is written once, also where a mask has no pair. Fixed point
// with 64 bits makes the sum independent of its order, in two words of 32 bits, which shared memory adds at
// once: 64 bits are a loop of compare and swap on sm_90. A point takes about 75 instructions in every band to
// see whether it lies there, and 270 to be added. Sorting the points by cell would need more passes and memory.
#include "elements.cuh"
#include "philox.h"

using mpformer::FourWords;
using mpformer::philox;
using mpformer::Stream;
using mpformer::Word;

typedef ElementOf<VALUE_TYPE>::type Value;

constexpr int THREADS = 1024, LANES = 32, WARPS = THREADS / LANES;
constexpr int MAPS = 32;  // predicted masks of that many heads
constexpr unsigned ALL = 0xffffffffu;
static_assert(WARPS == LANES, "one warp adds up what the warps have");

// counted points; sums over them of the cross-entropy, the probability, the truth, and their product
enum Sum { COUNTED, CROSS_ENTROPY, PROBABILITY, TRUTH, OVERLAP, SUMS };

struct PairRow {
  int map, image, query, object, row;
};

// A call; mpformer/ops/mask_points_cuda.py mirrors this layout.
struct Problem {
  const Value* maps[MAPS];  // [images, queries, height, width] each, the last two contiguous
  Value* grad_maps[MAPS];   // contiguous
  long long image_stride[MAPS], query_stride[MAPS];
  const PairRow* table;        // [pairs]
  const unsigned char* masks;  // [objects, mask_height, mask_width], 0 or 1
  const Stream* streams;       // [rows]
  const float* limits;         // [pairs, 2] or null
  const Word* given;           // [rows, important] or null
  Word* chosen;                // [pairs, important] where none are given
  float *losses, *sums;        // [2, pairs], [pairs, SUMS]
  const float* grad;           // [2, pairs]
  const int* pair_of;          // [maps, images, queries]: the pair of each predicted mask, -1 if it has none
  int pairs, images, queries;
  int height, width, mask_height, mask_width;
  int candidates, important, uniform;
  int band;      // rows of the gradient that are added up together
  int low_bits;  // of the fixed-point numbers: those in the lower word
};

#ifndef EMULATED
extern __shared__ uint4 dynamic[];
#endif

// ---- points

struct Pair {
  const Value* map;
  const unsigned char* mask;
  Word* kept;
  Stream stream;
  float limit_x, limit_y;  // in units of packed points

  __device__ bool counts(Word point) const {
    return float(point & 0xffff) < limit_x && float(point >> 16) < limit_y;
  }
};

__device__ Pair pair_at(const Problem& p, int number) {
  const PairRow at = p.table[number];
  Pair pair;
  pair.map = p.maps[at.map] + at.image * p.image_stride[at.map] + at.query * p.query_stride[at.map];
  pair.mask = p.masks + (long long)at.object * p.mask_height * p.mask_width;
  pair.kept = p.given ? const_cast<Word*>(p.given) + (long long)at.row * p.important
                      : p.chosen + (long long)number * p.important;
  pair.stream = p.streams[at.row];
  pair.limit_x = p.limits ? p.limits[2 * number] * 65536.0f - 0.5f : 65536.0f;
  pair.limit_y = p.limits ? p.limits[2 * number + 1] * 65536.0f - 0.5f : 65536.0f;
  return pair;
}

// Point i of the losses: a kept or a uniform one. Of the four of these that Philox makes together one is used: to
// make them again is cheap, and the code for a point is there once.
__device__ Word point_at(const Problem& p, const Pair& pair, int i) {
  if (i < p.important) return pair.kept[i];
  const int drawn = i - p.important, j = drawn % 4;
  const FourWords four = philox(pair.stream, 1, drawn / 4);
  // by comparisons, as an array with a variable index lies in memory
  return j == 0 ? four.word[0] : j == 1 ? four.word[1] : j == 2 ? four.word[2] : four.word[3];
}

// ---- look-up: bilinear, zero outside of the map

struct Cell {
  int row, column;  // of the upper left corner, from -1
  float x, y;       // 0..1 between the left and right, upper and lower corners
};

__device__ Cell locate(Word point, int height, int width) {
  const float scale_x = width * (1.0f / 65536.0f), scale_y = height * (1.0f / 65536.0f);
  // one cell further, so that the conversion to an integer rounds down
  const float x = fmaf(float(point & 0xffff), scale_x, 0.5f * scale_x + 0.5f);
  const float y = fmaf(float(point >> 16), scale_y, 0.5f * scale_y + 0.5f);
  const int column = int(x), row = int(y);
  return {row - 1, column - 1, x - float(column), y - float(row)};
}

__device__ float to_float(unsigned char x) { return float(x); }

// A candidate must have the same bits in every pass: `fmaf` leaves the compiler nothing to contract.
template <class T>
__device__ float look_up(const T* map, int height, int width, const Cell& at) {
  const bool left = at.column >= 0, right = at.column + 1 < width;
  const bool above = at.row >= 0, below = at.row + 1 < height;
  const T* corner = map + at.row * width + at.column;
  const float upper_left = above && left ? to_float(corner[0]) : 0.0f;
  const float upper_right = above && right ? to_float(corner[1]) : 0.0f;
  const float lower_left = below && left ? to_float(corner[width]) : 0.0f;
  const float lower_right = below && right ? to_float(corner[width + 1]) : 0.0f;
  const float upper = fmaf(at.x, upper_right - upper_left, upper_left);
  const float lower = fmaf(at.x, lower_right - lower_left, lower_left);
  return fmaf(at.y, lower - upper, upper);
}

// What the losses are made of at a point.
struct Sample {
  float logit, truth;
  float small;               // exp(-|logit|)
  float probability, slope;  // and its slope by the logit
};

__device__ Sample sample(const Problem& p, const Pair& pair, const Value* map, Word point, const Cell& at) {
  Sample s;
  s.logit = look_up(map, p.height, p.width, at);
  s.truth = look_up(pair.mask, p.mask_height, p.mask_width, locate(point, p.mask_height, p.mask_width));
  s.small = expf(-fabsf(s.logit));
  const float inverse = 1.0f / (1.0f + s.small);
  s.probability = s.logit >= 0 ? inverse : s.small * inverse;
  s.slope = s.small * inverse * inverse;
  return s;
}

// ---- work that a block shares

// The sum of x over the lanes of a warp up to this one.
__device__ Word sum_upto(Word x) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    const Word other = __shfl_up_sync(ALL, x, step, LANES);
    if (threadIdx.x % LANES >= step) x += other;
  }
  return x;
}

// The sum of x over the threads before this one, and over all of them.
__device__ Word sum_before(Word x, Word& all) {
  __shared__ Word of_warp[WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const Word upto = sum_upto(x);
  __syncthreads();  // the sums of the call before have been read
  if (lane == LANES - 1) of_warp[warp] = upto;
  __syncthreads();
  const Word mine = of_warp[lane], warps = sum_upto(mine);  // every warp adds up the sums of all
  all = __shfl_sync(ALL, warps, LANES - 1, LANES);
  return upto - x + __shfl_sync(ALL, warps - mine, warp, LANES);
}

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step, LANES);
  return x;
}

// The sums over all threads, on the first warp.
__device__ void add_up(float (&sums)[SUMS]) {
  __shared__ float of_warp[SUMS][WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
#pragma unroll
  for (int k = 0; k < SUMS; k++) {
    const float sum = sum_of_warp(sums[k]);
    if (lane == 0) of_warp[k][warp] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int k = 0; k < SUMS; k++) sums[k] = sum_of_warp(of_warp[k][lane]);
}

// ---- the least certain candidates

// The uncertainty of a candidate is the bits of its |logit|. What is known of that of the last one that is kept:
struct Last {
  int shift;    // its bits from here up
  Word digits;  // these bits
  int wanted;   // of the candidates with the same ones so many are kept
  int found;    // and so many there are
};

constexpr int ALL_BITS = 31, BIN_BITS = 11, BINS = 1 << BIN_BITS;
static_assert(BINS == 2 * THREADS, "a thread looks at two bins");

struct Candidates {
  const Problem& p;
  const Pair& pair;
  const Value* map;
  Word* remembered;

  // That of candidate 4 * block + j. All are asked for a first time, and may be remembered from then on.
  __device__ Word uncertainty(const FourWords& points, int block, int j, bool first_time) const {
    // the four of a thread lie apart, those of neighbouring threads side by side
    Word* memory = remembered + j * ((p.candidates + 3) / 4) + block;
    if (REMEMBERED && !first_time) return *memory;
    const float logit = look_up(map, p.height, p.width, locate(points.word[j], p.height, p.width));
    const Word bits = __float_as_uint(logit) & 0x7fffffff;
    if (REMEMBERED) *memory = bits;
    return bits;
  }

  // The next digit of the last one.
  __device__ Last narrowed(const Last& last) const {
    __shared__ Word bins[BINS];
    __shared__ Last result;
    const int shift = max(last.shift - BIN_BITS, 0), width = last.shift - shift;
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    for (int block = threadIdx.x; 4 * block < p.candidates; block += THREADS) {
      const FourWords points = philox(pair.stream, 0, block);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (4 * block + j >= p.candidates) continue;
        const Word bits = uncertainty(points, block, j, last.shift == ALL_BITS);
        if (bits >> last.shift == last.digits) atomicAdd(&bins[bits >> shift & ((1 << width) - 1)], 1u);
      }
    }
    __syncthreads();
    const Word even = bins[2 * threadIdx.x], odd = bins[2 * threadIdx.x + 1];
    Word all;
    const Word before = sum_before(even + odd, all), wanted = last.wanted;
    const bool in_odd = before + even < wanted;
    if (before < wanted && wanted <= before + even + odd)  // on one thread
      result = {shift, last.digits << width | (2 * threadIdx.x + in_odd), int(wanted - before - in_odd * even),
                int(in_odd ? odd : even)};
    __syncthreads();
    return result;
  }

  // Writes the kept candidates in their order.
  __device__ void write(const Last& last) const {
    Word certain_so_far = 0, last_so_far = 0;
    for (int first = 0; 4 * first < p.candidates; first += THREADS) {
      const int block = first + threadIdx.x;
      const FourWords points = philox(pair.stream, 0, block);
      bool is_kept[4] = {}, is_last[4] = {};
      Word mine = 0;  // two counts of at most 4 * THREADS
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (4 * block + j >= p.candidates) continue;
        const Word digits = uncertainty(points, block, j, false) >> last.shift;
        is_kept[j] = digits < last.digits;
        is_last[j] = digits == last.digits;
        mine += is_kept[j] | Word(is_last[j]) << 16;
      }
      Word all;
      const Word before = sum_before(mine, all);
      Word kept = certain_so_far + (before & 0xffff), ties = last_so_far + (before >> 16);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const bool first_of_equal = is_last[j] && ties < last.wanted;
        if (is_kept[j] || first_of_equal) pair.kept[kept + min(ties, Word(last.wanted))] = points.word[j];
        kept += is_kept[j];
        ties += is_last[j];
      }
      certain_so_far += all & 0xffff;
      last_so_far += all >> 16;
    }
  }

  __device__ void keep_least_certain() const {
    Last last = {ALL_BITS, 0, p.important, p.candidates};
    do last = narrowed(last);
    while (last.shift > 0 && last.wanted < last.found);
    write(last);
  }
};

// ---- kernels

// numbers [rows, count]: four to a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
    random_bits(const Stream* streams, Word* numbers, int call, int count, int rows) {
  const int blocks = (count + 3) / 4;
  const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x, row = thread / blocks;
  const int first = int(thread % blocks) * 4;
  if (row >= rows) return;
  const FourWords words = philox(streams[row], call, first / 4);
  Word* to = numbers + row * count + first;
  if (count % 4 == 0) {
    *reinterpret_cast<uint4*>(to) = {words.word[0], words.word[1], words.word[2], words.word[3]};
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (first + j < count) to[j] = words.word[j];
  }
}

constexpr int PER_LOAD = sizeof(uint4) / sizeof(Value);
__device__ void copy(const Value* from, int count, Value* to) {
  const int loads = reinterpret_cast<unsigned long long>(from) % sizeof(uint4) == 0 ? count / PER_LOAD : 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < loads; i += THREADS)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  for (int i = loads * PER_LOAD + threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

// A block per pair.
extern "C" __global__ void __launch_bounds__(THREADS) mask_points_forward(const __grid_constant__ Problem p) {
  const Pair pair = pair_at(p, blockIdx.x);
  const int cells = p.height * p.width;
  const Value* map = pair.map;
  if (STAGED) {
    map = reinterpret_cast<Value*>(dynamic);
    copy(pair.map, cells, reinterpret_cast<Value*>(dynamic));
    __syncthreads();
  }
  if (!p.given && p.important > 0) {
    uint4* behind = dynamic + (STAGED ? (cells + PER_LOAD - 1) / PER_LOAD : 0);
    Candidates{p, pair, map, reinterpret_cast<Word*>(behind)}.keep_least_certain();
    __syncthreads();  // the threads of a block see what it has written
  }
  float sums[SUMS] = {};
  for (int i = threadIdx.x; i < p.important + p.uniform; i += THREADS) {
    const Word point = point_at(p, pair, i);
    if (!pair.counts(point)) continue;
    const Sample s = sample(p, pair, map, point, locate(point, p.height, p.width));
    sums[COUNTED] += 1;
    sums[CROSS_ENTROPY] += (s.logit >= 0 ? s.logit : 0.0f) + log1pf(s.small) - s.truth * s.logit;
    sums[PROBABILITY] += s.probability;
    sums[TRUTH] += s.truth;
    sums[OVERLAP] += s.probability * s.truth;
  }
  add_up(sums);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < SUMS; k++) p.sums[blockIdx.x * SUMS + k] = sums[k];
  p.losses[blockIdx.x] = sums[CROSS_ENTROPY] / (sums[COUNTED] < 1 ? 1.0f : sums[COUNTED]);
  p.losses[p.pairs + blockIdx.x] = 1 - (2 * sums[OVERLAP] + 1) / (sums[PROBABILITY] + sums[TRUTH] + 1);
}

// The gradient of a pair's losses by the logit at a point; zero for pair -1.
struct Slope {
  float per_point = 0;                // of the cross-entropy
  float constant = 0, per_truth = 0;  // of dice = 1 - numerator / denominator, by the probability
  float bound = 0;                    // no point has a larger gradient; not finite if one may be so

  __device__ Slope(const Problem& p, int pair) {
    if (pair < 0) return;
    const float* sums = p.sums + pair * SUMS;
    const float numerator = 2 * sums[OVERLAP] + 1, denominator = sums[PROBABILITY] + sums[TRUTH] + 1;
    const float grad_dice = p.grad[p.pairs + pair];
    per_point = p.grad[pair] / (sums[COUNTED] < 1 ? 1.0f : sums[COUNTED]);
    constant = grad_dice * numerator / (denominator * denominator);
    per_truth = -2 * grad_dice / denominator;
    bound = fabsf(per_point) + 0.25f * (fabsf(constant) + fabsf(per_truth));
  }

  __device__ float at(const Sample& s) const {
    return per_point * (s.probability - s.truth) + s.slope * (constant + per_truth * s.truth);
  }
};

// Work for the points that are chosen, in any order. A warp collects them until it has one for each lane: without
// that most lanes would wait while few work.
template <class Choose, class Work>
__device__ void for_points(const Problem& p, const Pair& pair, Choose choose, Work work) {
  __shared__ Word of_warp[WARPS][2 * LANES];
  const int lane = threadIdx.x % LANES, points = p.important + p.uniform;
  Word* collected = of_warp[threadIdx.x / LANES];
  for (int first = 0, count = 0; first < points || count > 0; first += THREADS) {
    const int i = first + threadIdx.x;
    const Word point = i < points ? point_at(p, pair, i) : 0;
    const bool chosen = i < points && choose(point);
    const unsigned lanes = __ballot_sync(ALL, chosen);
    if (chosen) collected[count + __popc(lanes & ((1u << lane) - 1))] = point;
    count += __popc(lanes);
    __syncwarp();
    if (count < LANES && first + THREADS < points) continue;
    const int now = min(count, LANES);
    count -= now;
    if (lane < now) work(collected[count + lane]);
    __syncwarp();  // before the place is used again
  }
}

// Sums of floats in fixed point, in shared memory.
struct Band {
  Word* low;
  int* high;
  int low_bits;
  float scale, inverse;  // powers of two

  // For 2^(32 - low_bits) numbers up to `bound`. Each is an integer up to 2^(2 low_bits - 2): low_bits of it are
  // added to the lower word, the others, with the sign, to the upper one, and neither overflows.
  __device__ Band(int cells, int low_bits, float bound) : low_bits(low_bits) {
    low = reinterpret_cast<Word*>(dynamic);
    high = reinterpret_cast<int*>(low + cells);
    // bound < 2^exponent; far below any float that matters the numbers lose bits instead of the scale overflowing
    const int exponent = max(int(__float_as_uint(bound) >> 23) - 126, -60);
    const int shift = 2 * low_bits - 2 - exponent;
    scale = __uint_as_float(unsigned(127 + shift) << 23);
    inverse = __uint_as_float(unsigned(127 - shift) << 23);
  }

  __device__ void clear(int cell) const { low[cell] = high[cell] = 0; }

  __device__ void add(int cell, float x) const {
    const long long fixed = llrintf(x * scale);
    atomicAdd(&low[cell], Word(fixed) & ((1u << low_bits) - 1));
    atomicAdd(&high[cell], int(fixed >> low_bits));
  }

  __device__ float sum(int cell) const {
    return float(((long long)high[cell] << low_bits) + low[cell]) * inverse;
  }
};

// A block per predicted mask, whether it has a pair or not.
extern "C" __global__ void __launch_bounds__(THREADS) mask_points_backward(const __grid_constant__ Problem p) {
  const int query = blockIdx.x % p.queries, image = blockIdx.x / p.queries % p.images;
  const int map = blockIdx.x / p.queries / p.images;
  const int cells = p.height * p.width;
  Value* grad = p.grad_maps[map] + ((long long)image * p.queries + query) * cells;
  const int number = p.pair_of[blockIdx.x];
  const Slope slope(p, number);
  if (!(slope.bound > 0 && slope.bound * 0 == 0)) {  // zero, or not a number all over if a loss is none
    for (int i = threadIdx.x; i < cells; i += THREADS) from_float(slope.bound * 0, grad[i]);
    return;
  }

  const Pair pair = pair_at(p, number);
  const Band band(p.band * p.width, p.low_bits, slope.bound);
  for (int i = threadIdx.x; i < p.band * p.width; i += THREADS) band.clear(i);
  for (int top = 0; top < p.height; top += p.band) {
    const int bottom = min(top + p.band, p.height);
    __syncthreads();
    const auto is_in_band = [&](Word point) {
      const int row = locate(point, p.height, p.width).row;
      return row + 1 >= top && row < bottom && pair.counts(point);
    };
    for_points(p, pair, is_in_band, [&](Word point) {
      const Cell at = locate(point, p.height, p.width);
      const float g = slope.at(sample(p, pair, pair.map, point, at));
      const float lower = g * at.y, upper = g - lower;
      const float lower_right = lower * at.x, upper_right = upper * at.x;
      const bool left = at.column >= 0, right = at.column + 1 < p.width;
      const int cell = (at.row - top) * p.width + at.column;
      if (at.row >= top) {
        if (left) band.add(cell, upper - upper_right);
        if (right) band.add(cell + 1, upper_right);
      }
      if (at.row + 1 < bottom) {
        if (left) band.add(cell + p.width, lower - lower_right);
        if (right) band.add(cell + p.width + 1, lower_right);
      }
    });
    __syncthreads();
    for (int i = threadIdx.x; i < (bottom - top) * p.width; i += THREADS) {
      from_float(band.sum(i), grad[top * p.width + i]);
      band.clear(i);
    }
  }
}
