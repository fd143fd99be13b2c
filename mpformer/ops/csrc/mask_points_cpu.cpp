// Mask losses on sampled points on the CPU: choice of the kernel, memory and threads. Threads draw the next run of
// pairs that have their true mask and uniform points in common, until none is left. A pair's results do not depend
// on those of others, so the bits do not depend on the threads.
#include "mask_points.h"

#include <atomic>

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
  return i > 0 && i < p.count && p.pairs[i].mask == p.pairs[i - 1].mask &&
         p.pairs[i].uniform == p.pairs[i - 1].uniform;
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

int call(const MaskProblem& p, bool is_backward) {
  int chosen = p.instruction_set;
  if (chosen < 0)
    for (chosen = kKernels - 1; !mpformer_deform_attn_runs_here(chosen);) chosen--;
  if (chosen >= kKernels || !mpformer_deform_attn_runs_here(chosen)) return 2;
  Work w;
  w.problem = &p;
  w.kernel = kernels[chosen];
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
}  // namespace mpformer

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0: done; 1: no memory; 2: this processor lacks the instruction set that was asked for.
EXPORT int mpformer_mask_points_forward(const mpformer::MaskProblem* p) { return mpformer::call(*p, false); }
EXPORT int mpformer_mask_points_backward(const mpformer::MaskProblem* p) { return mpformer::call(*p, true); }
