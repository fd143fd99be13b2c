// Mask losses on sampled points on the CPU: choice of the kernel, memory and threads. Threads draw the next run of
// pairs that have their true mask and stream in common, until none is left. A pair's results do not depend on those
// of others, so the bits do not depend on the threads.
#include "mask_points.h"

#include <atomic>
#include <cstring>

#include "threads.h"

extern "C" int mpformer_deform_attn_runs_here(int kernel);

namespace mpformer {
namespace {

const MaskKernel* const kernels[] = {
    &mask_kernel_plain,
#if defined(__x86_64__)
    &mask_kernel_avx2,
    &mask_kernel_avx512,
#endif
};
constexpr int kKernels = sizeof(kernels) / sizeof(kernels[0]);

struct Work {
  const MaskProblem* problem;
  const MaskKernel* kernel;
  float* memory;
  int64_t per_thread;
  bool is_backward;
  std::atomic<int64_t> next_pair;  // the next to be looked at: its run is done by who draws its first pair
  std::atomic<int32_t> next_thread;
};

bool continues_run(const MaskProblem& p, int64_t i) {
  if (i == 0 || i >= p.count || p.pairs[i].mask != p.pairs[i - 1].mask) return false;
  return std::memcmp(&p.pairs[i].stream, &p.pairs[i - 1].stream, sizeof(Stream)) == 0;
}

void thread(void* argument) {
  Work& w = *static_cast<Work*>(argument);
  const MaskProblem& p = *w.problem;
  const auto work = w.is_backward ? w.kernel->backward : w.kernel->forward;
  float* scratch = w.memory + w.next_thread.fetch_add(1) * w.per_thread;
  for (int64_t i; (i = w.next_pair.fetch_add(1)) < p.count;) {
    if (continues_run(p, i)) continue;
    work(p, p.pairs[i], scratch, false);
    while (continues_run(p, ++i)) work(p, p.pairs[i], scratch, true);
  }
}

// The kernel that was asked for, or the best one if -1; null if this processor cannot run it.
const MaskKernel* kernel_of(int chosen) {
  if (chosen < 0)
    for (chosen = kKernels - 1; !mpformer_deform_attn_runs_here(chosen);) chosen--;
  return chosen < kKernels && mpformer_deform_attn_runs_here(chosen) ? kernels[chosen] : nullptr;
}

int call(const MaskProblem& p, bool is_backward) {
  Work w;
  w.problem = &p;
  w.kernel = kernel_of(p.instruction_set);
  if (!w.kernel) return 2;
  w.is_backward = is_backward;
  w.next_pair = 0;
  w.next_thread = 0;
  w.per_thread = (w.kernel->scratch(p) + 15) / 16 * 16;
  const int threads = p.count < p.threads ? int(p.count) : p.threads;
  w.memory = static_cast<float*>(std::malloc(sizeof(float) * w.per_thread * threads));
  if (!w.memory) return 1;
  run_on_threads(thread, &w, threads, p.launcher);
  std::free(w.memory);
  return 0;
}

}  // namespace

// Here and not in the kernels: GCC's code for AVX2 takes twice the time of that for any x86-64. So many counters
// together that loops over them become vectors.
void random_bits(const Stream& stream, Word call, int64_t count, uint32_t* to) {
  constexpr int kFours = 64;
  for (int64_t first = 0; first < count; first += 4 * kFours) {
    Word a[kFours], b[kFours], c[kFours], d[kFours];
    for (int i = 0; i < kFours; i++) {
      a[i] = Word(first / 4 + i);
      b[i] = call;
      c[i] = stream.row;
      d[i] = stream.place;
    }
    for (Word round = 0; round < kPhiloxRounds; round++) {
      const Word key0 = stream.key0 + round * kPhiloxStep0, key1 = stream.key1 + round * kPhiloxStep1;
      for (int i = 0; i < kFours; i++) philox_round(a[i], b[i], c[i], d[i], key0, key1);
    }
    Word block[4 * kFours];
    for (int i = 0; i < kFours; i++) {
      block[4 * i] = a[i];
      block[4 * i + 1] = b[i];
      block[4 * i + 2] = c[i];
      block[4 * i + 3] = d[i];
    }
    const int64_t left = count - first;
    std::memcpy(to + first, block, sizeof(Word) * (left < 4 * kFours ? left : 4 * kFours));
  }
}

}  // namespace mpformer

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0: done; 1: no memory; 2: this processor lacks the instruction set that was asked for.
EXPORT int mpformer_mask_points_forward(const mpformer::MaskProblem* p) { return mpformer::call(*p, false); }
EXPORT int mpformer_mask_points_backward(const mpformer::MaskProblem* p) { return mpformer::call(*p, true); }
// [streams, count]
EXPORT void mpformer_random_bits(const mpformer::Stream* streams, int64_t count_streams, uint32_t call, int64_t count,
                                 uint32_t* to) {
  for (int64_t i = 0; i < count_streams; i++) mpformer::random_bits(streams[i], call, count, to + i * count);
}
