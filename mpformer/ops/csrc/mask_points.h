// Mask losses on sampled points: the data that the entry points and the kernels share.
#pragma once
#include <cstdint>

#include "philox.h"

namespace mpformer {

// A predicted mask and the true one, for one thread at a time.
struct MaskPair {
  const float* logits;         // [height, width]
  const uint8_t* mask;         // [mask_height, mask_width], 0 or 1
  uint32_t* kept;              // [important], packed points: written by forward if there are candidates, else read
  float* sums;                 // [kSums]: written by forward, read by backward
  float* grad;                 // [height, width]: written by backward
  float grad_cross_entropy, grad_dice;
  float limit_x, limit_y;  // points at or beyond these do not count
  Stream stream;           // its call 0 gives the candidates, call 1 the uniform points
};

// counted points; sums over them of the cross-entropy, the probability, the truth, and their product
enum Sum { kCounted, kCrossEntropy, kProbability, kTruth, kOverlap, kSums };

// A call. Filled in by mpformer/ops/mask_points_cpu.py, which mirrors this layout with ctypes.
struct MaskProblem {
  MaskPair* pairs;
  void* launcher;  // GOMP_parallel of the OpenMP that torch runs on, or null: threads of our own
  int64_t count;   // of pairs
  int64_t candidates;  // 0: the kept points are given
  int64_t uniform, important;
  int32_t height, width, mask_height, mask_width;
  int32_t threads;
  int32_t instruction_set;  // index into the kernels of this build, -1: the best that this processor has
};

struct MaskKernel {
  // floats of scratch memory that a thread needs
  int64_t (*scratch)(const MaskProblem&);
  // `again`: the pair before, in the same scratch memory, had the same true mask and stream
  void (*forward)(const MaskProblem&, MaskPair&, float* scratch, bool again);
  void (*backward)(const MaskProblem&, MaskPair&, float* scratch, bool again);
};

// The first `count` numbers of a call of a stream.
void random_bits(const Stream& stream, Word call, int64_t count, uint32_t* to);

extern const MaskKernel mask_kernel_plain;
#if defined(__x86_64__)
extern const MaskKernel mask_kernel_avx2, mask_kernel_avx512;
#endif

}  // namespace mpformer
