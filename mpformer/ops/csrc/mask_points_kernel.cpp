// The inner loops of the mask losses on sampled points. This file is compiled once per instruction set, with
// MPFORMER_KERNEL (the name of the table it defines). Loops over the lanes of a block are for the compiler to
// vectorise. Sums run in an order that depends on nothing but the number of points.
//
// No templates of the standard library: the linker keeps one copy of each, which might be that for AVX-512.
#include <cstring>

#include "mask_points.h"

namespace mpformer {
namespace {

constexpr int kBlock = 64;    // points that are worked on together
constexpr int kPartial = 16;  // partial sums of every sum

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// `condition ? a : b` without a jump, which would keep a loop from being vectorised.
inline float choose(bool condition, float a, float b) {
  const int32_t mask = -int32_t(condition);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// ---- packed points: x in the lower, y in the upper 16 bits, in units of 1/65536, at the centre of the unit

constexpr float kUnit = 1.0f / 65536.0f;

// Where a block of points lies in a map that has a border of one zero cell on every side.
struct Cells {
  int32_t upper_left[kBlock];
  float x[kBlock], y[kBlock];  // 0..1 between the left and right, upper and lower cells
};

inline void locate(const uint32_t* points, int height, int width, Cells& c) {
  const float scale_x = width * kUnit, scale_y = height * kUnit;
  const float first_x = 0.5f * scale_x + 0.5f, first_y = 0.5f * scale_y + 0.5f;
  const int32_t pitch = width + 2;
  for (int i = 0; i < kBlock; i++) {
    const float x = float(int32_t(points[i] & 0xffff)) * scale_x + first_x;
    const float y = float(int32_t(points[i] >> 16)) * scale_y + first_y;
    const int32_t column = int32_t(x), row = int32_t(y);
    c.x[i] = x - float(column);
    c.y[i] = y - float(row);
    c.upper_left[i] = row * pitch + column;
  }
}

// The four corners of a block of points: a value and its right neighbour, in the upper and the lower row.
struct Corners {
  float upper_left[kBlock], upper_right[kBlock], lower_left[kBlock], lower_right[kBlock];
};

inline void read_corners(const float* bordered, int32_t pitch, const Cells& c, Corners& to) {
  for (int i = 0; i < kBlock; i++) {
    const int32_t upper = c.upper_left[i], lower = upper + pitch;
    to.upper_left[i] = bordered[upper];
    to.upper_right[i] = bordered[upper + 1];
    to.lower_left[i] = bordered[lower];
    to.lower_right[i] = bordered[lower + 1];
  }
}

// Bytes are read four at a time, so that the compiler can gather them: three more may be read than there are.
inline void read_corners(const uint8_t* bordered, int32_t pitch, const Cells& c, Corners& to) {
  typedef uint32_t Word __attribute__((aligned(1), may_alias));
  uint32_t upper[kBlock], lower[kBlock];
  for (int i = 0; i < kBlock; i++) {
    upper[i] = *reinterpret_cast<const Word*>(bordered + c.upper_left[i]);
    lower[i] = *reinterpret_cast<const Word*>(bordered + c.upper_left[i] + pitch);
  }
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  for (int i = 0; i < kBlock; i++) {
    upper[i] = __builtin_bswap32(upper[i]);
    lower[i] = __builtin_bswap32(lower[i]);
  }
#endif
  for (int i = 0; i < kBlock; i++) {
    to.upper_left[i] = float(int32_t(upper[i] & 0xff));
    to.upper_right[i] = float(int32_t(upper[i] >> 8 & 0xff));
    to.lower_left[i] = float(int32_t(lower[i] & 0xff));
    to.lower_right[i] = float(int32_t(lower[i] >> 8 & 0xff));
  }
}

template <class T>
inline void interpolate(const T* bordered, int32_t pitch, const Cells& c, float* values) {
  Corners corners;
  read_corners(bordered, pitch, c, corners);
  for (int i = 0; i < kBlock; i++) {
    const float first = corners.upper_left[i], second = corners.lower_left[i];
    const float upper = first + c.x[i] * (corners.upper_right[i] - first);
    const float lower = second + c.x[i] * (corners.lower_right[i] - second);
    values[i] = upper + c.y[i] * (lower - upper);
  }
}

template <class T>
void add_border(const T* map, int height, int width, T* bordered) {
  const int pitch = width + 2;
  std::memset(bordered, 0, sizeof(T) * pitch);
  for (int row = 0; row < height; row++) {
    T* to = bordered + (row + 1) * pitch;
    to[0] = to[width + 1] = 0;
    std::memcpy(to + 1, map + int64_t(row) * width, sizeof(T) * width);
  }
  std::memset(bordered + int64_t(height + 1) * pitch, 0, sizeof(T) * pitch);
}

// ---- exp(-|x|) and what follows from it (polynomials of the Cephes library: 1 to 2 units of the last place)

inline float exp_of_negative(float x) {
  x = choose(x > -87.0f, x, -87.0f);
  const float n = float(int32_t(x * 1.44269504089f - 0.5f));
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((int32_t(n) + 127) << 23);
}

// log(1 + e) for 0 <= e <= 1
inline float log_of_one_plus(float e) {
  const bool large = e > 0.41421356f;
  const float z = choose(large, 0.5f * (e - 1.0f), e);
  float p = 7.0376836292e-2f;
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  const float square = z * z;
  return z - 0.5f * square + z * square * p + choose(large, 0.693147181f, 0.0f);
}

// ---- the least certain candidates

enum Call : Word { kCandidates, kUniform };
constexpr int kBinBits = 11, kBins = 1 << kBinBits;

struct Scratch {
  float* logits;         // bordered
  float* grad;           // bordered
  uint8_t* mask;         // bordered
  uint32_t* uniform;     // [uniform]: points
  float* truth;          // [uniform]: the true mask at them
  uint32_t* points;      // [candidates]
  uint32_t* uncertainty; // [candidates]
  uint32_t* within;      // [candidates]
  uint32_t* bins;        // [kBins]
};

// The n-th smallest (n from 1) of `count` numbers below 2^31. Numbers are told apart by their upper bits first;
// those of the bin that holds the n-th one go on. `values` is used up.
uint32_t nth_smallest(uint32_t* values, int64_t count, int64_t n, uint32_t* bins) {
  for (int shift = 31 - kBinBits;; shift = shift > kBinBits ? shift - kBinBits : 0) {
    std::memset(bins, 0, sizeof(uint32_t) * kBins);
    for (int64_t i = 0; i < count; i++) bins[(values[i] >> shift) & (kBins - 1)]++;
    uint32_t bin = 0;
    while (bins[bin] < n) n -= bins[bin++];
    int64_t inside = 0;
    for (int64_t i = 0; i < count; i++) {
      const uint32_t value = values[i];
      values[inside] = value;
      inside += ((value >> shift) & (kBins - 1)) == bin;
    }
    count = inside;
    if (shift == 0) return values[0];
  }
}

void keep_least_certain(const MaskProblem& p, MaskPair& pair, const Scratch& s) {
  random_bits(pair.stream, kCandidates, p.candidates, s.points);
  for (int64_t first = 0; first < p.candidates; first += kBlock) {
    const int count = int(smaller(kBlock, p.candidates - first));
    uint32_t block[kBlock] = {};
    std::memcpy(block, s.points + first, sizeof(uint32_t) * count);
    Cells cells;
    float values[kBlock];
    locate(block, p.height, p.width, cells);
    interpolate(s.logits, p.width + 2, cells, values);
    uint32_t bits[kBlock];
    std::memcpy(bits, values, sizeof(bits));
    for (int i = 0; i < kBlock; i++) bits[i] &= 0x7fffffff;
    std::memcpy(s.uncertainty + first, bits, sizeof(uint32_t) * count);
  }
  std::memcpy(s.within, s.uncertainty, sizeof(uint32_t) * p.candidates);
  const uint32_t last = nth_smallest(s.within, p.candidates, p.important, s.bins);
  int64_t ties = p.important;
  for (int64_t i = 0; i < p.candidates; i++) ties -= s.uncertainty[i] < last;
  // of candidates as uncertain as the last one the first are kept, so that the choice is one
  int64_t kept = 0;
  for (int64_t i = 0; i < p.candidates && kept < p.important; i++) {
    const bool tie = s.uncertainty[i] == last && ties > 0;
    pair.kept[kept] = s.points[i];
    kept += s.uncertainty[i] < last || tie;
    ties -= tie;
  }
}

// ---- the losses of a pair

// The points of a pair, block by block: kept ones, then uniform ones. A point that does not count has count 0.
// With `again` the uniform points and the true mask at them are in the scratch memory already.
template <class F>
inline void for_blocks(const MaskProblem& p, const MaskPair& pair, const Scratch& s, bool again, F&& work) {
  if (!again) random_bits(pair.stream, kUniform, p.uniform, s.uniform);
  const uint32_t* parts[] = {pair.kept, s.uniform};
  const int64_t sizes[] = {p.important, p.uniform};
  const float limit_x = pair.limit_x * 65536.0f - 0.5f, limit_y = pair.limit_y * 65536.0f - 0.5f;
  for (int part = 0; part < 2; part++) {
    for (int64_t first = 0; first < sizes[part]; first += kBlock) {
      const int size = int(smaller(kBlock, sizes[part] - first));
      uint32_t block[kBlock] = {};
      std::memcpy(block, parts[part] + first, sizeof(uint32_t) * size);
      Cells cells, mask_cells;
      float logits[kBlock], truth[kBlock], counted[kBlock];
      locate(block, p.height, p.width, cells);
      interpolate(s.logits, p.width + 2, cells, logits);
      const bool known = again && part == 1;
      if (known) {
        std::memcpy(truth, s.truth + first, sizeof(truth));
      } else {
        locate(block, p.mask_height, p.mask_width, mask_cells);
        interpolate(s.mask, p.mask_width + 2, mask_cells, truth);
        if (part == 1) std::memcpy(s.truth + first, truth, sizeof(truth));
      }
      for (int i = 0; i < kBlock; i++) {
        const bool in = float(int32_t(block[i] & 0xffff)) < limit_x && float(int32_t(block[i] >> 16)) < limit_y;
        counted[i] = in && i < size ? 1.0f : 0.0f;
      }
      work(cells, logits, truth, counted);
    }
  }
}

Scratch scratch_in(const MaskProblem& p, float* memory) {
  const int64_t cells = int64_t(p.height + 2) * (p.width + 2);
  Scratch s;
  s.logits = memory;
  s.grad = s.logits + cells;
  s.points = reinterpret_cast<uint32_t*>(s.grad + cells);
  s.uncertainty = s.points + p.candidates;
  s.within = s.uncertainty + p.candidates + 1;
  s.bins = s.within + p.candidates + 1;
  s.uniform = s.bins + kBins;
  s.truth = reinterpret_cast<float*>(s.uniform + p.uniform);
  s.mask = reinterpret_cast<uint8_t*>(s.truth + p.uniform + kBlock);
  return s;
}

int64_t scratch(const MaskProblem& p) {
  const int64_t cells = int64_t(p.height + 2) * (p.width + 2);
  const int64_t mask_cells = int64_t(p.mask_height + 2) * (p.mask_width + 2);
  return 2 * cells + 3 * (p.candidates + 1) + kBins + 2 * p.uniform + kBlock + mask_cells / 4 + 2;
}

void forward(const MaskProblem& p, MaskPair& pair, float* memory, bool again) {
  const Scratch s = scratch_in(p, memory);
  add_border(pair.logits, p.height, p.width, s.logits);
  if (!again) add_border(pair.mask, p.mask_height, p.mask_width, s.mask);
  if (p.candidates > 0 && p.important > 0) keep_least_certain(p, pair, s);
  float partial[kSums][kPartial] = {};
  for_blocks(p, pair, s, again, [&](const Cells&, const float* logits, const float* truth,
                                    const float* counted) {
    for (int j = 0; j < kBlock; j += kPartial) {
      for (int lane = 0; lane < kPartial; lane++) {
        const int i = j + lane;
        const float x = logits[i], t = truth[i], c = counted[i];
        const float e = exp_of_negative(-__builtin_fabsf(x));
        const float probability = choose(x >= 0, 1.0f, e) / (1.0f + e);
        partial[kCounted][lane] += c;
        partial[kCrossEntropy][lane] += c * (choose(x >= 0, x, 0.0f) + log_of_one_plus(e) - t * x);
        partial[kProbability][lane] += c * probability;
        partial[kTruth][lane] += c * t;
        partial[kOverlap][lane] += c * probability * t;
      }
    }
  });
  for (int k = 0; k < kSums; k++) {
    double total = 0;
    for (int lane = 0; lane < kPartial; lane++) total += partial[k][lane];
    pair.sums[k] = float(total);
  }
}

void backward(const MaskProblem& p, MaskPair& pair, float* memory, bool again) {
  const Scratch s = scratch_in(p, memory);
  const int32_t pitch = p.width + 2;
  add_border(pair.logits, p.height, p.width, s.logits);
  if (!again) add_border(pair.mask, p.mask_height, p.mask_width, s.mask);
  std::memset(s.grad, 0, sizeof(float) * int64_t(p.height + 2) * pitch);
  const float per_point = pair.grad_cross_entropy / larger(pair.sums[kCounted], 1.0f);
  // dice = 1 - numerator / denominator
  const float numerator = 2 * pair.sums[kOverlap] + 1;
  const float denominator = pair.sums[kProbability] + pair.sums[kTruth] + 1;
  const float constant = pair.grad_dice * numerator / (denominator * denominator);
  const float per_truth = -2 * pair.grad_dice / denominator;
  for_blocks(p, pair, s, again, [&](const Cells& cells, const float* logits, const float* truth,
                                    const float* counted) {
    float grads[4][kBlock];
    for (int i = 0; i < kBlock; i++) {
      const float x = logits[i], t = truth[i];
      const float e = exp_of_negative(-__builtin_fabsf(x));
      const float inverse = 1.0f / (1.0f + e), probability = choose(x >= 0, 1.0f, e) * inverse;
      const float slope = e * inverse * inverse;  // of the probability
      const float grad =
          counted[i] * (per_point * (probability - t) + slope * (constant + per_truth * t));
      const float lower = grad * cells.y[i], upper = grad - lower;
      grads[1][i] = upper * cells.x[i];
      grads[0][i] = upper - grads[1][i];
      grads[3][i] = lower * cells.x[i];
      grads[2][i] = lower - grads[3][i];
    }
    for (int i = 0; i < kBlock; i++) {
      float* to = s.grad + cells.upper_left[i];
      to[0] += grads[0][i];
      to[1] += grads[1][i];
      to[pitch] += grads[2][i];
      to[pitch + 1] += grads[3][i];
    }
  });
  for (int row = 0; row < p.height; row++)
    std::memcpy(pair.grad + int64_t(row) * p.width, s.grad + (row + 1) * pitch + 1, sizeof(float) * p.width);
}

}  // namespace

extern const MaskKernel MPFORMER_KERNEL;
const MaskKernel MPFORMER_KERNEL = {scratch, forward, backward};

}  // namespace mpformer
